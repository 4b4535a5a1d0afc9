"""Likeness to trusted rows in the base's hidden states, at the layer that tells them best from harmful ones (LARF, arXiv 2507.18631)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from pharmacist_ray.curation.grades import auroc
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.curation.selector import TINY
from pharmacist_ray.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Likeness:
    """Where to look, and in which direction."""

    layer: int
    direction: np.ndarray
    """Mean of the validation rows' unit vectors minus that of the harmful rows', (D,)."""
    curve: np.ndarray
    """The held-out AUC by layer, (L + 1,)."""


def representation(signals: Signals) -> np.ndarray:
    """Return the mean cosine of h_i to the validation rows less that to the harmful rows, h being hidden states averaged over an answer.

    The states are the base's own, without any adapter. The layer is the one at which either half of the trusted sets tells the rows
    of the other half apart best (AUC). The paper finds it by generation, and takes the last token's state; both are ours. It costs a
    forward a row without the output head, and once for each actor one for every trusted row.

    Args:
        signals: The shard's signals.
    """
    likeness = signals.of_trusted(choose_layer)
    return np.asarray(unit(signals.states(likeness.layer)) @ likeness.direction, dtype=np.float64)


def choose_layer(validation: Signals, harmful: Signals) -> Likeness:
    """Return the layer with the best held-out AUC, between equal ones that with the widest gap, and the direction there.

    Args:
        validation: The trusted validation rows.
        harmful: The harmful rows.
    """
    return likeness_of(validation.states(), harmful.states(), "representation")


def likeness_of(good: np.ndarray, bad: np.ndarray, scorer: str) -> Likeness:
    """Return where and along what the states of two sets are told apart best.

    Args:
        good: States of the one set at all layers, (N, L + 1, D).
        bad: States of the other, (M, L + 1, D).
        scorer: Whose, for the log and for the error.

    Raises:
        ConfigError: A set has a single row, so that there are no halves.
    """
    if min(len(good), len(bad)) < 2:
        raise ConfigError(f"the {scorer} scorer chooses its layer by halves of its two trusted sets: give two rows each")
    curve = layer_curve(good, bad)
    layer = max(range(len(curve)), key=lambda layer: (curve[layer][0], curve[layer][1]))
    written = ", ".join(f"{area:.3f}" for area, _ in curve)
    _log.info("%s: layer %d of %d; held-out AUC by layer: %s", scorer, layer, len(curve) - 1, written)
    return Likeness(layer, direction(good[:, layer], bad[:, layer]), curve[:, 0])


def layer_curve(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Return for each layer the AUC of good rows against bad ones, and the gap between their means in standard deviations, (L + 1, 2).

    Both are means over two halves, each scored by the direction that the other half gives. Rows come in an order that has nothing
    to do with what they say, so every other one is a half.

    Args:
        good: States of the one set, (N, L + 1, D).
        bad: States of the other, (M, L + 1, D).
    """
    curve = np.zeros((good.shape[1], 2))
    for layer in range(len(curve)):
        for fitted, held in ((0, 1), (1, 0)):
            toward = direction(good[fitted::2, layer], bad[fitted::2, layer])
            ours, others = (unit(states[held::2, layer]) @ toward for states in (good, bad))
            scores, ours_first = np.concatenate([ours, others]), np.arange(len(ours) + len(others)) < len(ours)
            spread = max(TINY, float(np.sqrt((ours.var() + others.var()) / 2)))
            curve[layer] += (auroc(scores, ours_first) / 2, float(ours.mean() - others.mean()) / spread / 2)
    return curve


def direction(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Return the vector whose product with a unit vector is its mean cosine to the one set less that to the other, (D,)."""
    return np.asarray(unit(good).mean(axis=0) - unit(bad).mean(axis=0))


def unit(states: np.ndarray) -> np.ndarray:
    """Return states at length 1."""
    return np.asarray(states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), TINY))
