"""DeepSpeed, set up explicitly: every default that would change a result silently is written down here."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from transformers import get_scheduler
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.models.quantized import is_quantized
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from pharmacist_ray.training.weights import whole_size

# DeepSpeed's autotuner, which nothing here uses, imports MLflow where that is installed: a third of what a worker's start takes.
_modules: dict[str, Any] = sys.modules
_hidden = "mlflow" not in _modules
if _hidden:
    _modules["mlflow"] = None
try:
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger
finally:
    if _hidden:
        del _modules["mlflow"]

logger.setLevel("WARNING")

BUCKET = 50_000_000
"""Gradients that are reduced together: a buffer of so many numbers on every GPU (DeepSpeed: 5·10⁸, 2 GB, for any adapter)."""

PERSISTENT = 0
"""At ZeRO 3, parameters of at most so many numbers would stay whole on every worker (DeepSpeed: 10⁵, which is a small model whole)."""


def deepspeed_config(train: TrainConfig, workers: int, dtype: str = "float32", trained: int = BUCKET) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    ``gradient_clipping`` is always written, because DeepSpeed's own default is 1.0 and not off; at ZeRO 0 it is off and `build_engine`
    clips, so that the norm can be reported. Gradients are accumulated until `engine.step` is called: in DeepSpeed's
    managed mode ZeRO 1 and 2 silently lose all but the last of several backward passes.

    Args:
        train: The run's settings.
        workers: Number of data-parallel workers.
        dtype: Precision of the base weights.
        trained: Trained weights; a bucket need not be larger.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage, "overlap_comm": False, "reduce_bucket_size": min(BUCKET, max(1, trained))}
    if train.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT, "stage3_gather_16bit_weights_on_model_save": False}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // (workers * train.accumulation),
        "gradient_accumulation_steps": train.accumulation,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if train.zero_stage == 0 else train.clip,
        "zero_optimization": zero,
        # Full weights in bfloat16 have float32 masters; adapters are float32 over a bfloat16 base, which this mode would cast down.
        "bf16": {"enabled": train.weights == "full" and dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own would have to be compiled
        "steps_per_print": 10**9,
    }


def _without_muon() -> None:
    """Spare a process the import of DeepSpeed's Muon, which compiles with TorchInductor and takes seconds of every worker's start.

    DeepSpeed asks of any optimiser whether it is that one; what stands in its place says no.
    """
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    if name not in sys.modules:
        module = ModuleType(name)
        module.MuonWithAuxAdam = type("MuonWithAuxAdam", (torch.optim.Optimizer,), {})  # type: ignore[attr-defined]
        sys.modules[name] = module


def _plain_collectives() -> None:
    """Use plain gloo on CPUs: DeepSpeed's shared-memory collectives would be compiled at first use, which needs a compiler."""
    if not torch.cuda.is_available() or dist.get_backend() == "gloo":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def sharded_loading(train: TrainConfig, workers: int, dtype: str = "float32") -> Iterator[None]:
    """Let models that transformers loads inside the block arrive sharded, if the run uses ZeRO 3: no worker ever holds one whole.

    Args:
        train: The run's settings.
        workers: Number of data-parallel workers.
        dtype: Precision of the base weights.
    """
    if train.zero_stage < 3:
        yield
        return
    current_ranks()  # a group of one, where there is none
    _plain_collectives()
    # DeepSpeed counts the workers while the model loads, long before the engine is built.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    # What is loaded has the base's own precision, whatever is trained on it: where DeepSpeed is told of no bfloat16 it loads float32.
    precision = {"bf16": {"enabled": dtype == "bfloat16"}}
    keep_alive = HfDeepSpeedConfig(deepspeed_config(train, workers, dtype) | precision)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def build_engine(
    model: torch.nn.Module,
    train: TrainConfig,
    ranks: Ranks,
    *,
    dtype: str = "float32",
    group: Callable[[str], str] | None = None,
    done: int = 0,
) -> Any:
    """Return a DeepSpeed engine with AdamW and the learning-rate schedule around a model's trainable parameters.

    Any number of ``engine.backward`` calls may precede an ``engine.step``; each is divided by ``train.accumulation``.

    Args:
        model: The model; parameters with ``requires_grad`` are trained.
        train: The run's settings.
        ranks: This worker.
        dtype: Precision of the base weights.
        group: Parameter name → name of its optimiser group; default: one group.
        done: Steps that the schedule has behind it.
    """
    _plain_collectives()
    _without_muon()
    groups: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group(name) if group else "all"].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "name": name} for name, parameters in groups.items()],
        lr=train.lr,
        weight_decay=train.weight_decay,
    )
    scheduler = get_scheduler(
        {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule),
        optimizer,
        num_warmup_steps=round(train.warmup * train.steps),
        num_training_steps=train.steps,
    )
    engine, *_ = deepspeed.initialize(
        model=model if train.zero_stage == 3 or is_quantized(model) else model.to(ranks.device),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(train, ranks.workers, dtype, sum(whole_size(one) for many in groups.values() for one in many)),
        dist_init_required=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no step of the optimiser came before, which is so on purpose
        for _ in range(done):
            engine.lr_scheduler.step()
    engine.clipped_norm = None
    if train.zero_stage == 0:
        trained = [parameter for parameters in groups.values() for parameter in parameters]

        def clip(*_: Any) -> None:
            engine.clipped_norm = torch.nn.utils.clip_grad_norm_(trained, train.clip or float("inf"))

        optimizer.register_step_pre_hook(clip)
    return engine
