"""The paper's own selector: one logit a candidate, learnt over iterations (arXiv 2510.10085 Algorithm 1)."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals


def pharmacist_iterative(signals: Signals) -> np.ndarray:
    """Return the learnt logit w_i, after at least one epoch over the candidates; `curation.selector` has the update.

    The fit takes two forward-backward passes over a candidate each time a batch has it, and one over a validation and a harmful row
    beside it; scoring only looks the logits up.

    Args:
        signals: The shard's signals.
    """
    return signals.learnt("logits")
