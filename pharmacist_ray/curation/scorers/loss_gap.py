"""How much better a model that has seen trusted data explains a row than the base does."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals


def loss_gap(signals: Signals) -> np.ndarray:
    """Return ℓ_i(base) − ℓ_i(reference), the reference being the base tuned on trusted safety and benign rows.

    Its relatives are Train-on-Validation (arXiv 2510.00386, here `tov`), which has no benign rows in the reference, RHO-loss
    (arXiv 2206.07137), whose left model moves with the training, and the cross-entropy difference of Moore and Lewis (2010), between
    two models of language. The benign rows in the reference are ours: they tell good refusals from over-refusals. It costs two
    forwards and no backward a row, and one training.

    Args:
        signals: The shard's signals.
    """
    return np.asarray(signals.base_loss - signals.reference_loss("reference"))
