"""From models to ``summary.json`` (one record per model and attack) and ``table.json`` (one row per arm and attack, with intervals)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pharmacist_ray.config.schema import EvaluationConfig, ResourcesConfig
from pharmacist_ray.data.rows import iterate_rows, parquet_files
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.evaluation.answers import answer_all
from pharmacist_ray.evaluation.arms import BOOTSTRAP_SEED, Cell, Key, arm_rows
from pharmacist_ray.evaluation.judges import JUDGES, JudgeKind
from pharmacist_ray.evaluation.metrics import Judged, measure, measure_groups
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import StoragePath, read_table, write_text

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
    attack_loss: tuple[float, float] | None = None
    """Mean loss of the attack's own harmful rows before it and after it, in nats; None where it has none or nobody looked."""

    @property
    def arm(self) -> str:
        """The selection with the number of a random draw taken off."""
        return _DRAW.sub("random", self.selection)

    @property
    def draw(self) -> int:
        """The number of a random draw, else 0."""
        found = _DRAW.search(self.selection)
        return int(found[1]) if found else 0


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

    Raises:
        ConfigError: No harmful prompt has the column for groups, or for clusters.
    """
    marks = {name: _marks(rows, settings, name == "harmful") for name, rows in prompts.items()}
    answer_all(
        {subject.answers: subject.model for subject in subjects},
        prompts,
        settings=settings,
        resources=resources,
        progress=progress,
    )
    judged = {subject.name: list(_judged(subject, marks)) for subject in subjects}
    draws = settings.bootstrap_draws
    records = _records(subjects, judged, draws)
    table = arm_rows(_cells(subjects, judged, JUDGES[settings.judge]), draws=draws)
    write_text(json.dumps(records, indent=1), out / "summary.json")
    write_text(json.dumps(table, indent=1), out / "table.json")
    return {"models": len(subjects), "answers": sum(len(answers) for answers in judged.values()), "records": len(records)}


def _judged(subject: EvaluatedModel, marks: Mapping[str, Mapping[str, tuple[str, str]]]) -> Iterable[Judged]:
    draw = str(subject.draw) if _DRAW.search(subject.selection) else ""
    for file in parquet_files(subject.answers):
        for row in read_table(file).to_pylist():
            checks = {name: row[name] for name in ("correct", "exact", "contains") if row[name] is not None}
            group, cluster = marks.get(row["set"], {}).get(row["id"], ("", ""))
            yield Judged(row["id"], row["set"], subject.seed, row["verdict"] or "unjudged", checks, draw, cluster, group)


def _records(subjects: Sequence[EvaluatedModel], judged: Mapping[str, list[Judged]], draws: int) -> list[dict[str, Any]]:
    """One record per aligned model and attack; ``attack`` is null for a model that was not attacked."""
    metrics = {
        subject.name: {metric.name: metric for metric in measure(judged[subject.name], seed=BOOTSTRAP_SEED, draws=draws)}
        for subject in subjects
    }
    before = {(s.selection, s.defence, s.seed): metrics[s.name] for s in subjects if s.attack is None}
    attacked = [s for s in subjects if s.attack is not None] or list(subjects)
    records = []
    for subject in attacked:
        found, first = metrics[subject.name], before[subject.selection, subject.defence, subject.seed]
        groups = measure_groups([judged[subject.name]], "mean", seed=BOOTSTRAP_SEED, draws=draws)
        records.append(
            {
                "selection": subject.arm,
                "draw": subject.draw,
                "defence": subject.defence,
                "seed": subject.seed,
                "attack": subject.attack,
                "kept": subject.kept,
                "align_seconds": round(subject.align_seconds, 3),
                "hs_before": first["harmful_score"].estimate,
                "hs_after": found["harmful_score"].estimate if subject.attack is not None else None,
                "coherent_refusal": found["coherent_refusal"].estimate,
                "incoherent_harmful": found["incoherent_harmful"].estimate,
                "incoherent_benign": found["incoherent_benign"].estimate,
                "task_accuracy": found["accuracy_correct"].estimate,
                "task_accuracy_before": first["accuracy_correct"].estimate,
                "task_exact": found["accuracy_exact"].estimate,
                "task_contains": found["accuracy_contains"].estimate,
                "over_refusal": found["over_refusal"].estimate,
                "helpfulness": found["helpfulness"].estimate,
                "helpfulness_before": first["helpfulness"].estimate,
                "intervals": {name: [metric.low, metric.high, metric.n, metric.unscored] for name, metric in found.items()},
                **(
                    {"groups": {group: {one.name: one.estimate for one in ones} for group, ones in groups.items()}}
                    if groups
                    else {}
                ),
            }
        )
    return records


def _cells(subjects: Sequence[EvaluatedModel], judged: Mapping[str, list[Judged]], judge: JudgeKind) -> dict[Key, Cell]:
    """Return the answers of each arm, defence and attack, and what their rows say beside metrics."""
    groups: dict[Key, list[EvaluatedModel]] = {}
    for subject in subjects:
        groups.setdefault((subject.arm, subject.defence, subject.attack), []).append(subject)
    return {
        key: Cell(
            [one for subject in group for one in judged[subject.name]],
            {
                "runs": len(group),
                "kept": group[0].kept,
                "align_seconds": float(np.mean([subject.align_seconds for subject in group])),
                "score": judge.score,
                "score_means": judge.means,
                **_attack_loss(group),
            },
        )
        for key, group in groups.items()
    }


def _attack_loss(group: Sequence[EvaluatedModel]) -> dict[str, Any]:
    """Return the mean over runs of what the attack did to the loss of its own harmful rows, if that is known of all of them."""
    losses = [subject.attack_loss for subject in group]
    known = [loss for loss in losses if loss is not None]
    return {"attack_loss": np.mean(known, axis=0).round(4).tolist()} if known and len(known) == len(losses) else {}


def _marks(folder: StoragePath, settings: EvaluationConfig, grouped: bool) -> dict[str, tuple[str, str]]:
    """Return the group and the cluster of each prompt by id; the empty string where it has none.

    Raises:
        ConfigError: No prompt has the column that was asked for.
    """
    group, cluster = settings.group_column if grouped else None, settings.cluster_column
    if group is None and cluster is None:
        return {}
    found = {}
    for row in iterate_rows(folder):
        record = json.loads(row.raw) if row.raw else {}
        values = (record.get(name) if name else None for name in (group, cluster))
        found[row.id] = tuple("" if value is None else str(value) for value in values)
    for place, (key, name) in enumerate((("group_column", group), ("cluster_column", cluster if grouped else None))):
        if name and not any(values[place] for values in found.values()):
            raise ConfigError(f"evaluation.{key}: no prompt of evaluation.harmful_prompts has a column '{name}'")
    return found  # type: ignore[return-value]
