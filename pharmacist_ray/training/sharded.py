"""A frozen model over several workers (ZeRO 3), its adapter whole on each: none of them ever holds the base.

What is done with such a model – gradients in the adapter's space, influences, losses – is what is done with a whole one, by the same
code: a layer's weights are gathered when the pass comes to it, forward and back, and let go. Only the passes must be taken together:
each worker brings rows of its own to every one of them, see `models.budget`.
"""

from __future__ import annotations

from typing import Any

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.models.load import load_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.models.taps import decoder_layers
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.storage import StoragePath
from pharmacist_ray.training.engine import deepspeed_config, sharded_loading
from pharmacist_ray.training.weights import whole_size


def load_sharded(ref: ModelRef, ranks: Ranks, *, adapter: str | StoragePath | None = None) -> Any:
    """Return a model as `ModelRef.load` does, its frozen base spread over the workers; all of them take part.

    Args:
        ref: The model; its own adapters are merged, matrix by matrix.
        ranks: This worker.
        adapter: One more adapter to put on top, unmerged, trainable, and whole on every worker.

    Raises:
        ModelError: See `load_model` and `load_adapter`.
    """
    import deepspeed  # as `training.engine` has imported it
    from deepspeed.runtime.zero import parameter_offload

    settings = TrainConfig(steps=1, batch_size=ranks.workers, zero_stage=3)
    with sharded_loading(settings, ranks.workers, ref.dtype):
        base = ref.load(str(ranks.device))
    base.requires_grad_(False)
    # Without an optimiser DeepSpeed only gathers and lets go. It has to be asked before the adapter is there, or it would shard that too.
    config = deepspeed_config(settings, ranks.workers, ref.dtype)
    largest = max(sum(map(whole_size, layer.parameters())) for layer in decoder_layers(base))
    config["zero_optimization"] |= {
        # What is gathered is let go at once, where DeepSpeed would keep 10⁹ numbers: more than many a model has.
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": largest,
        "stage3_max_reuse_distance": 0,
    }
    deepspeed.initialize(model=base, config=config, dist_init_required=False)
    parameter_offload.FWD_MODULE_STACK.remove(base)  # which would keep it for ever: it is put there by every pass anyway
    return base if adapter is None else load_adapter(base, adapter).eval()
