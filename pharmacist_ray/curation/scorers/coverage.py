"""Influence on each group of trusted rows, so that what few of them are about is covered as well."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals


def coverage(signals: Signals) -> np.ndarray:
    """Return Σ_k ⟨∇g_i(θ_k), v_km⟩ for each group m of trusted rows, (N, groups), v_km being `pharmacist`'s on that group alone.

    A selection by it lets the groups take turns, each with its best row that is left.

    Args:
        signals: The shard's signals.
    """
    return signals.group_influences
