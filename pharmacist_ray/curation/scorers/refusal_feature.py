"""How harmful a prompt looks to the model, before any answer: its state at the prompt's last token (refusal feature, arXiv 2506.07356)."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.representation import Likeness, likeness_of, unit
from pharmacist_ray.curation.scorers.signals import Signals


def refusal_feature(signals: Signals) -> np.ndarray:
    """Return the mean cosine of h_i to the benign rows less that to the harmful rows, h being the state at a prompt's last token.

    It reads prompts alone, so a harmful answer to an ordinary prompt looks ordinary to it. The paper trains a teacher first, and updates
    the feature meanwhile. Here the states are those of ``scoring.refusal_teacher``, or of the base as it is, at the layer that tells either
    half of the sets best by the other half (ours). It costs a forward a row without the output head, and once for each actor one for every
    trusted row; a teacher is held beside the base.

    Args:
        signals: The shard's signals.
    """
    signals = signals.by_teacher()
    likeness = signals.of_trusted(choose_layer, ("benign", "harmful"))
    return np.asarray(unit(signals.prompt_states(likeness.layer)) @ likeness.direction, dtype=np.float64)


def choose_layer(benign: Signals, harmful: Signals) -> Likeness:
    """Return the layer that tells prompts of the two sets best, and the direction there.

    Args:
        benign: The ordinary rows.
        harmful: The harmful rows.

    Raises:
        ConfigError: A set has a single row, so that there are no halves.
    """
    return likeness_of(benign.prompt_states(), harmful.prompt_states(), "refusal_feature")
