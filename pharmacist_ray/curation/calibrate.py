"""A score made of all others, weighed by what they say about planted rows; and what it is worth, estimated on rows it was not fitted to.

A logistic model takes a row's ranks among the candidates to the chance that it is good, were good and bad rows as many, and each kind
of corruption as frequent as the others. It is fitted on planted rows (`planted`). Estimates are cross-fitted: a row is judged by a
model that has seen no row of its unit, by where its value lies among the candidates' values by that same model.

A score takes part if it sees the model or trusted rows. ``random`` and ``keyword`` see nothing but the row: the planted rows are made
of refusals, so a list of refusal phrases would find them and tell nothing about the candidates. ``oracle`` sees the labels, and
``pharmacist_iterative`` has a logit for each candidate and none for planted rows.

That planted corruption looks like a candidate's own is an assumption. The estimates are as good as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from pharmacist_ray.config.scoring import CALIBRATED
from pharmacist_ray.curation.combine import Ranks, Read, as_it_is, rank_among, sample_scores
from pharmacist_ray.curation.planted import FEWEST, FILE, GOOD, KINDS, unit_of
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.curation.selector import LEARNT
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError
from pharmacist_ray.storage import StoragePath, read_table

PENALTY = 0.01
"""λ of λ/2 · ‖β‖² beside the mean loss; ranks lie in [0, 1] (ours)."""

FOLDS = 5
"""Parts of the units, each judged by a model fitted on the others (ours)."""

LEVEL = 0.95
"""Coverage of the intervals."""

_Z = 1.959963984540054  # the normal quantile of LEVEL, both sides

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PlantedScores:
    """Where the planted rows and their scores lie, and which scores take part."""

    rows: StoragePath
    """Folder of canonical rows."""
    scores: StoragePath
    """Folder of their scores."""
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Calibrated(Ranks):
    """The ranks of several scores, the logistic model of them, and the planted rows that it was fitted on."""

    intercept: float
    slopes: Floats
    """One a score, (scores,)."""
    planted: Floats
    """Ranks of the planted rows by each score, (n, scores)."""
    kinds: NDArray[np.str_]
    """Kind of each planted row, (n,)."""
    units: NDArray[np.int64]
    """Unit of each planted row, (n,)."""
    places: Floats
    """Where each planted row lies among the candidates by the model of the other units: the share of them below it, (n,)."""

    def of(self, table: pa.Table) -> Floats:
        """Return each row's chance to be good, (n,); NaN where a row lacks one of the scores.

        Args:
            table: The score columns.
        """
        return np.asarray(expit(self.intercept + (self.ranks(table) - 0.5) @ self.slopes))

    def facts(self, share: float) -> dict[str, Any]:
        """Return what the model is made of and what it is worth, for a manifest.

        Args:
            share: Share of the scored candidates that is kept.
        """
        bad = [kind for kind in KINDS if kind != GOOD and (self.kinds == kind).any()]
        good = self.kinds == GOOD
        values = {**dict(zip(self.columns, self.planted.T, strict=True)), CALIBRATED: self.places}
        auroc = {
            name: {kind: _interval(*separation(column, good, self.kinds == kind, self.units)) for kind in bad}
            for name, column in values.items()
        }
        kept = {}
        for kind in (GOOD, *bad):
            chosen = self.places[self.kinds == kind] > 1 - share
            kept[kind] = {"planted": len(chosen), "kept": int(chosen.sum())} | _interval(*wilson(int(chosen.sum()), len(chosen)))
        return {
            "scores": dict(zip(self.columns, map(float, self.slopes), strict=True)),
            "intercept": self.intercept,
            "penalty": PENALTY,
            "folds": FOLDS,
            "level": LEVEL,
            "kept": kept,
            "auroc": auroc,
            "warnings": list(_warnings(auroc, bad)),
        }


def calibration_columns(scorers: Sequence[str], where: str = "scoring.scorers") -> tuple[str, ...]:
    """Return which scores take part: those that see the model or trusted rows and no labels, and can score any row.

    Args:
        scorers: Names of scores.
        where: The key that lists them, for the error.

    Raises:
        ConfigError: None does.
    """
    known = {name: SCORERS[name] for name in scorers if name != "random"}
    found = tuple(
        name
        for name, one in known.items()
        if one.sees and "labels" not in one.sees and one.part not in LEARNT and one.columns is None
    )
    if not found:
        raise ConfigError(
            f"only scores that see the model or trusted rows can be held against known ones, and {where} has none: "
            "add pharmacist, for example"
        )
    return found


def calibrate(parts: Sequence[Any], planted: PlantedScores, read: Read = as_it_is) -> Calibrated:
    """Fit the model on the planted rows.

    Args:
        parts: The candidates' scores, shard after shard: the id and the columns that take part; each is read once.
        planted: The planted rows and their scores.
        read: Reads a part.

    Raises:
        ArtifactError: The scores are those of other rows.
        DataError: Too few planted rows have a score.
    """
    sample = sample_scores(parts, planted.columns, read)
    ranks = Ranks({name: np.sort(values) for name, values in sample.items()})
    rows = read_table(planted.rows / FILE, columns=["id", "category", "raw"])
    scores = read_table(planted.scores / FILE, columns=["id", *planted.columns])
    if rows["id"].to_pylist() != scores["id"].to_pylist():
        raise ArtifactError(f"{planted.scores} has the scores of other planted rows; score again")
    placed = ranks.ranks(scores)
    known = ~np.isnan(placed).any(axis=1)
    placed = placed[known]
    kinds = np.array(rows["category"].to_pylist())[known]
    units = np.array([unit_of(raw) for raw in rows["raw"].to_pylist()])[known]
    good = kinds == GOOD
    for what, count in (("good", int(good.sum())), ("bad", int((~good).sum()))):
        if count < FEWEST:
            raise DataError(
                f"only {count} of the {what} planted rows have every score of {', '.join(planted.columns)}, "
                f"and a calibrated selection needs {FEWEST}; give more trusted rows, or select by another score"
            )
    among = ranks.ranks(pa.table(sample))
    places = np.empty(len(placed))
    for fold in range(FOLDS):
        apart = units % FOLDS == fold
        slopes = fit_logistic(placed[~apart] - 0.5, good[~apart], weights_of(kinds[~apart]))[1]
        places[apart] = rank_among(np.sort(among @ slopes), placed[apart] @ slopes)
    intercept, slopes = fit_logistic(placed - 0.5, good, weights_of(kinds))
    return Calibrated(ranks.values, intercept, slopes, placed, kinds, units, places)


def weights_of(kinds: NDArray[np.str_]) -> Floats:
    """Return a weight for each planted row, (n,): good rows weigh ½ together, and each kind of bad ones the same of the rest."""
    bad = sorted(set(kinds.tolist()) - {GOOD})
    weights = np.empty(len(kinds))
    for kind in (GOOD, *bad):
        mine = kinds == kind
        weights[mine] = (0.5 if kind == GOOD else 0.5 / len(bad)) / max(1, mine.sum())
    return weights


def fit_logistic(features: Floats, good: NDArray[np.bool_], weights: Floats, penalty: float = PENALTY) -> tuple[float, Floats]:
    """Return intercept β₀ and slopes β that minimise Σ_i w_i · log(1 + exp(∓(β₀ + ⟨β, x_i⟩))) + λ/2 · ‖β‖², by Newton's method.

    Args:
        features: x, (n, k).
        good: Which rows are good, (n,); some are and some are not.
        weights: w above 0, (n,), with sum 1.
        penalty: λ; the intercept is free.
    """
    x = np.column_stack([np.ones(len(features)), features])
    ridge = np.array([0.0] + [penalty] * features.shape[1])
    sign = np.where(good, 1.0, -1.0)

    def loss(beta: Floats) -> float:
        return float(weights @ np.logaddexp(0, -sign * (x @ beta)) + ridge @ beta**2 / 2)

    beta = np.zeros(x.shape[1])
    for _ in range(100):
        chance = expit(x @ beta)
        gradient = x.T @ (weights * (chance - good)) + ridge * beta
        step = np.linalg.solve((x.T * (weights * chance * (1 - chance))) @ x + np.diag(ridge), gradient)
        while loss(beta - step) > loss(beta) + 1e-15:  # Newton may go too far where rows are nearly separable
            step /= 2
        beta = beta - step
        if np.abs(step).max() < 1e-10:
            break
    return float(beta[0]), beta[1:]


def separation(
    values: Floats, good: NDArray[np.bool_], bad: NDArray[np.bool_], units: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return the chance that a good row lies above a bad one (ties count half), and its interval.

    The variance is DeLong's for clustered rows: those of a unit are not independent. The interval is symmetric in log odds. Where
    the rows are apart altogether there is no variance, and the exact binomial bound of as many rows takes its place.

    Args:
        values: Of all rows, (n,).
        good: Which are good, (n,).
        bad: Which are bad, (n,).
        units: The unit of each, (n,).
    """
    above, below = values[good], values[bad]
    of_good, of_bad = rank_among(np.sort(below), above), 1 - rank_among(np.sort(above), below)
    area = float(of_good.mean())
    which, place = np.unique(np.concatenate([units[good], units[bad]]), return_inverse=True)
    parts = np.concatenate([(of_good - area) / len(above), (of_bad - area) / len(below)])
    variance = float((np.bincount(place, parts) ** 2).sum()) * len(which) / max(1, len(which) - 1)
    fewest = min(len(above), len(below))
    if area in (0.0, 1.0):
        bound = ((1 - LEVEL) / 2) ** (1 / fewest)
        return area, *((bound, 1.0) if area else (0.0, 1 - bound))
    odds, error = math.log(area / (1 - area)), math.sqrt(variance) / (area * (1 - area))
    low, high = expit(np.array([odds - _Z * error, odds + _Z * error])).tolist()
    return area, low, high


def wilson(hits: int, count: int) -> tuple[float, float, float]:
    """Return the share of hits and its Wilson interval."""
    share, slack = hits / count, _Z**2 / count
    middle = (share + slack / 2) / (1 + slack)
    half = _Z / (1 + slack) * math.sqrt(share * (1 - share) / count + slack / (4 * count))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def kept_in_words(facts: Mapping[str, Any]) -> list[str]:
    """Return what a calibration's facts say of the kept rows, and its warnings, a line each."""
    kept = [(kind, facts["kept"][kind]) for kind in (GOOD, *(kind for kind in facts["kept"] if kind != GOOD))]
    shares = ", ".join(f"{kind} {one['estimate']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for kind, one in kept)
    return [f"estimated share that is kept of each kind: {shares}", *(f"warning: {line}" for line in facts["warnings"])]


def _warnings(auroc: dict[str, dict[str, dict[str, float]]], bad: Sequence[str]) -> Iterable[str]:
    for kind in bad:
        if all(found[kind]["low"] <= 0.5 <= found[kind]["high"] for name, found in auroc.items() if name != CALIBRATED):
            yield (
                f"no score tells planted {kind} rows from good ones (every interval of the AUROC holds 0.5): "
                "expect such rows among the kept ones, or add a scorer"
            )
    if missing := [kind for kind in KINDS if kind != GOOD and kind not in bad]:
        yield f"no {' or '.join(missing)} rows were planted, so nothing is known about them; data.benign gives what they are made of"


def _interval(estimate: float, low: float, high: float) -> dict[str, float]:
    return {"estimate": estimate, "low": low, "high": high}
