"""Train-on-Validation (arXiv 2510.00386): how much better a model tuned on the trusted validation rows alone explains a row."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals


def tov(signals: Signals) -> np.ndarray:
    """Return ℓ_i(θ₀) − ℓ_i(θ_V), θ_V being the base θ₀ after a few steps on validation rows: signed, not its size.

    To first order it is what a step on the row would do to the validation loss, so it is `less` at the base. The paper draws a part
    of what it keeps at random, which is for a selection to do, and repeats the tuning in cycles, which is left out. It costs two
    forwards and no backward a row, the first shared with `loss_gap`, and one short training.

    Args:
        signals: The shard's signals.
    """
    return np.asarray(signals.base_loss - signals.reference_loss("tov"))
