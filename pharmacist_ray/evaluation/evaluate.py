"""From models to ``summary.json`` (one record per model and attack) and ``table.json`` (one row per arm and attack, with intervals)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pharmacist_ray.config.schema import EvaluationConfig, ResourcesConfig
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.evaluation.answers import answer_all
from pharmacist_ray.evaluation.metrics import Judged, Metric, compare, measure
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import StoragePath, read_table, write_text

BOOTSTRAP_SEED = 20251010
"""Fixed, so that the same answers give the same intervals."""

COMPARED = ("harmful_score", "coherent_refusal", "accuracy_correct", "helpfulness")
"""Metrics whose difference to each baseline arm is reported."""

_DRAW = re.compile(r"(?<![^+])random_(\d+)$")
"""A random draw, alone or after ``trusted+``."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One model to evaluate, and where it comes from."""

    name: str
    model: ModelRef
    answers: StoragePath
    """Folder of its judged answers."""
    selection: str
    defence: str
    seed: int
    attack: str | None
    """None before any attack."""
    kept: int
    """Alignment rows of the selection."""
    align_seconds: float

    @property
    def arm(self) -> str:
        """The selection with the number of a random draw taken off."""
        return _DRAW.sub("random", self.selection)

    @property
    def draw(self) -> int:
        """The number of a random draw, else 0."""
        found = _DRAW.search(self.selection)
        return int(found[1]) if found else 0

    @property
    def cluster(self) -> int:
        """One number per independent training run within an arm: what the bootstrap draws as a seed."""
        return self.draw * 1_000_000 + self.seed


def evaluate(
    subjects: Sequence[EvaluatedModel],
    prompts: Mapping[str, StoragePath],
    *,
    settings: EvaluationConfig,
    resources: ResourcesConfig,
    out: StoragePath,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Let all subjects answer, judge, and write ``summary.json`` and ``table.json``.

    Args:
        subjects: All models, before and after attacks.
        prompts: ``harmful``, ``benign`` and ``task`` → folder of canonical rows.
        settings: The evaluation section.
        resources: Actors and what each may use.
        out: Folder to fill.
        progress: Called with (units done, units in all).

    Returns:
        Counts for the manifest.
    """
    answer_all(
        {subject.answers: subject.model for subject in subjects},
        prompts,
        settings=settings,
        resources=resources,
        progress=progress,
    )
    judged = {subject.name: list(_judged(subject.answers, subject.cluster)) for subject in subjects}
    draws = settings.bootstrap_draws
    records = _records(subjects, judged, draws)
    table = _table(subjects, judged, draws)
    write_text(json.dumps(records, indent=1), out / "summary.json")
    write_text(json.dumps(table, indent=1), out / "table.json")
    return {"models": len(subjects), "answers": sum(len(answers) for answers in judged.values()), "records": len(records)}


def _judged(folder: StoragePath, cluster: int) -> Iterable[Judged]:
    for file in parquet_files(folder):
        for row in read_table(file).to_pylist():
            checks = {name: row[name] for name in ("correct", "exact", "contains") if row[name] is not None}
            yield Judged(row["id"], row["set"], cluster, row["verdict"] or "unjudged", checks)


def _records(subjects: Sequence[EvaluatedModel], judged: Mapping[str, list[Judged]], draws: int) -> list[dict[str, Any]]:
    """One record per aligned model and attack; ``attack`` is null for a model that was not attacked."""
    metrics = {
        subject.name: {metric.name: metric for metric in measure(judged[subject.name], seed=BOOTSTRAP_SEED, draws=draws)}
        for subject in subjects
    }
    before = {(s.selection, s.defence, s.seed): metrics[s.name]["harmful_score"].estimate for s in subjects if s.attack is None}
    attacked = [s for s in subjects if s.attack is not None] or list(subjects)
    records = []
    for subject in attacked:
        found = metrics[subject.name]
        records.append(
            {
                "selection": subject.arm,
                "draw": subject.draw,
                "defence": subject.defence,
                "seed": subject.seed,
                "attack": subject.attack,
                "kept": subject.kept,
                "align_seconds": round(subject.align_seconds, 3),
                "hs_before": before[subject.selection, subject.defence, subject.seed],
                "hs_after": found["harmful_score"].estimate if subject.attack is not None else None,
                "coherent_refusal": found["coherent_refusal"].estimate,
                "incoherent": found["incoherent"].estimate,
                "task_accuracy": found["accuracy_correct"].estimate,
                "task_exact": found["accuracy_exact"].estimate,
                "task_contains": found["accuracy_contains"].estimate,
                "over_refusal": found["over_refusal"].estimate,
                "helpfulness": found["helpfulness"].estimate,
                "intervals": {name: [metric.low, metric.high, metric.n, metric.unscored] for name, metric in found.items()},
            }
        )
    return records


def _table(subjects: Sequence[EvaluatedModel], judged: Mapping[str, list[Judged]], draws: int) -> list[dict[str, Any]]:
    """One row per arm, defence and attack (null: before), metrics over all its seeds, and the differences to its baselines.

    Baselines are the arms ``all`` and ``random`` under the same defence, and the same arm under ``sft``.
    """
    Key = tuple[str, str, str | None]
    groups: dict[Key, list[EvaluatedModel]] = {}
    for subject in subjects:
        groups.setdefault((subject.arm, subject.defence, subject.attack), []).append(subject)
    answers = {key: [one for subject in group for one in judged[subject.name]] for key, group in groups.items()}
    rows = []
    for key, group in groups.items():
        arm, defence, attack = key
        baselines: dict[str, Key] = {name: (name, defence, attack) for name in ("all", "random")} | {"sft": (arm, "sft", attack)}
        rows.append(
            {
                "selection": arm,
                "defence": defence,
                "attack": attack,
                "runs": len(group),
                "kept": group[0].kept,
                "align_seconds": float(np.mean([subject.align_seconds for subject in group])),
                "metrics": {m.name: _plain(m) for m in measure(answers[key], seed=BOOTSTRAP_SEED, draws=draws)},
                "minus": {
                    name: {
                        metric: _plain(compare(answers[key], answers[other], metric, seed=BOOTSTRAP_SEED, draws=draws))
                        for metric in COMPARED
                    }
                    for name, other in baselines.items()
                    if other != key and other in answers
                },
            }
        )
    return rows


def _plain(metric: Metric) -> dict[str, Any]:
    values = asdict(metric)
    del values["name"]
    return values
