"""SEAL: the logits of a bilevel selection (arXiv 2410.07471)."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals


def seal(signals: Signals) -> np.ndarray:
    """Return the logit ω_i that `curation.seal` has learnt.

    The fit takes two forward-backward passes over a candidate each time a batch has it, and one over a trusted row beside it; scoring
    only looks the logits up.

    Args:
        signals: The shard's signals.
    """
    return signals.learnt("seal")
