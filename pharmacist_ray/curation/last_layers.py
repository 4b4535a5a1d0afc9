"""How influences over the last layers alone are weighed, so that they come close to those over all layers (ours).

An influence ⟨∇ℓ_i, v⟩ is a sum of terms, one of each parameter, and `scoring.last_layers` computes those of the last layers only. The
others are not independent of them: a ridge regression on a random sample of the candidates, of which all terms are computed once, tells
how the last layers' terms are best weighed in their place. A weight is a factor of the direction at one parameter, so that scoring costs
nothing more.

    s_i = Σ_p t_ip / n_i,    ŝ_i = Σ_(p kept) w_p t_ip / m_i,    w = argmin Σ_i (s_i − ŝ_i)² + λ Σ_p r_p² w_p²

with n and m the gradient's norm over all parameters and over those that are kept (1 without `selector.cosine`), and r_p the root mean
square of t_ip / m_i. There is no intercept, so that a score's sign still says what it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pharmacist_ray.curation.selector import AT_CHECKPOINTS, DIRECTIONS, OF_LAST_LAYERS, TINY, Point
from pharmacist_ray.data.render import Rendered
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.models.influence import Directions
from pharmacist_ray.models.sample_grads import last_layers
from pharmacist_ray.models.taps import decoder_layers
from pharmacist_ray.storage import StoragePath, local_copy

RIDGE = 0.1
"""λ over the kernel's mean diagonal, ours: of the last 9 of 30 layers, .03 to .3 differ by .002 in correlation."""

SAMPLE = 256
"""Candidates of which all terms are computed, at most half of them (ours)."""


def find_weights(
    points: Iterable[tuple[Point, Directions]], samples: Sequence[Rendered], cosine: bool
) -> dict[str, torch.Tensor]:
    """Return how a kind of directions is weighed over the last 1, 2, … L layers, on the first worker; nothing on others.

    Args:
        points: The model at each of C checkpoints, and the directions there: K over P parameters.
        samples: The random sample of candidates.
        cosine: Whether scores are divided by the gradients' norm.

    Returns:
        ``weights`` (L, C, K, P), the parameters in alphabetical order, 0 where one is not of those layers; ``kept`` (L, P), whether it is;
        ``agreement`` (L, K), the correlation with the score over all layers of rows that the weights were found without.
    """
    count, found, layers = len(samples), [], list[set[str]]()
    names, first = list[str](), False
    for point, directions in points:
        names = sorted(directions)
        filled = [samples[place % count] for place in range(count + -count % point.ranks.workers)]  # as many for every worker
        terms = point.terms(filled, {name: directions[name] for name in names})
        found.append([tensor[:count].double().cpu().numpy() for tensor in terms])
        layers = [last_layers(point.model, number + 1, names) for number in range(len(decoder_layers(point.model)))]
        first = point.ranks.first
    if not first:
        return {}
    kept = np.array([[name in among for name in names] for among in layers])
    dots, squares = (np.stack(arrays) for arrays in zip(*found, strict=True))
    weights, agreement = zip(*(weigh(dots, squares, one, cosine) for one in kept), strict=True)
    arrays = {"weights": np.stack(weights).astype(np.float32), "kept": kept, "agreement": np.stack(agreement)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def weigh(
    dots: NDArray[np.float64], squares: NDArray[np.float64], kept: NDArray[np.bool_], cosine: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights (C, K, P), and for each direction the correlation of ŝ with s (K,) in rows that were left out, one by one.

    With G = (X Xᵀ + λ I)⁻¹ of the scaled terms X and a = G s, the weights are Xᵀ a, and row i would have got s_i − a_i / G_ii without it.

    Args:
        dots: (C, N, K, P) terms of N rows along K directions at C checkpoints.
        squares: (C, N, P) squared norms of the rows' gradients by parameter.
        kept: (P,) which parameters scoring will know.
        cosine: Whether scores are divided by the gradients' norm.
    """
    checkpoints, rows, directions, parameters = dots.shape
    weights = np.zeros((checkpoints, directions, parameters))
    weights[..., kept] = 1.0
    if kept.all():
        return weights, np.ones(directions)
    agreement = np.zeros(directions)

    def norms(parameters: Any) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.sqrt(squares[..., parameters].sum(-1))
        return np.maximum(found, TINY) if cosine else np.ones_like(found)

    of_all, of_kept = norms(slice(None)), norms(kept)
    for k in range(directions):
        wanted = (dots[:, :, k].sum(-1) / of_all).sum(0)
        terms = np.concatenate([*(dots[:, :, k][..., kept] / of_kept[..., None])], axis=1)
        size = np.sqrt(np.square(terms).mean(0))
        scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
        kernel = (terms * scale) @ (terms * scale).T
        if not kernel.any():  # these layers tell nothing of any row
            continue
        inverse = np.linalg.inv(kernel + RIDGE * np.trace(kernel) / rows * np.eye(rows))
        dual = inverse @ wanted
        weights[:, k, kept] = (scale * ((terms * scale).T @ dual)).reshape(checkpoints, -1)
        without = wanted - dual / np.diag(inverse)
        if rows > 1 and without.std() > 0 and wanted.std() > 0:
            agreement[k] = np.corrcoef(without, wanted)[0, 1]
    return weights, agreement


def agreements(fit: StoragePath) -> dict[str, Any]:
    """Return for each kind of directions that is weighed the correlations by number of last layers and direction (L, K).

    Args:
        fit: The selector's folder.
    """
    files = {of: fit / f"{part}.safetensors" for part, of in OF_LAST_LAYERS.items()}
    return {of: _tensor(local_copy(file), "agreement").numpy().round(4).tolist() for of, file in files.items() if file.exists()}


def in_words(count: int, found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Return a line about how far scores over the last layers are those over all.

    Args:
        count: Layers.
        found: `agreements`.
    """
    most = len(next(iter(found.values())))
    at = {kind: rows[min(count, most) - 1] for kind, rows in found.items()}
    named = [f"{value:.3f} for {name}" for name, value in zip(DIRECTIONS, at.get(AT_CHECKPOINTS[0], ()), strict=False)]
    named += [f"{min(at[AT_CHECKPOINTS[1]]):.3f} or more for each group"] if AT_CHECKPOINTS[1] in at else []
    return f"influences over the last {min(count, most)} of {most} layers: correlation with all layers {', '.join(named)}"


def weighed(file: Path, checkpoint: int, count: int, directions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return directions over the last layers' parameters alone, weighed.

    Args:
        file: What `find_weights` returned.
        checkpoint: The place of the checkpoint whose directions they are.
        count: Layers; more than there are are all.
        directions: Name → (K, *shape).

    Raises:
        ArtifactError: There is no such file.
    """
    if not file.exists():
        raise ArtifactError(f"the selector is incomplete: {file} is missing; run `pharmacist fit` again")
    kept, weights = _tensor(file, "kept"), _tensor(file, "weights")
    number = min(count, len(kept)) - 1
    return {
        name: directions[name] * factors.to(directions[name]).view(-1, *[1] * (directions[name].dim() - 1))
        for name, known, factors in zip(sorted(directions), kept[number], weights[number, checkpoint].T, strict=True)
        if known
    }


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor
