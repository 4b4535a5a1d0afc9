"""From models to ``summary.json`` (one record per model and attack) and ``table.json`` (one row per arm and attack, with intervals)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pharmacist_ray.config.attack_kinds import FormConfig
from pharmacist_ray.config.schema import EvaluationConfig, JudgeConfig, ResourcesConfig
from pharmacist_ray.data.rows import iterate_rows, parquet_files
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.evaluation.agreement import agreement
from pharmacist_ray.evaluation.answers import answer_all
from pharmacist_ray.evaluation.arms import BOOTSTRAP_SEED, Cell, Key, arm_rows
from pharmacist_ray.evaluation.beside import Repeated, labels_of, repeated, settle
from pharmacist_ray.evaluation.judges import JUDGES, JudgeKind, Verdict
from pharmacist_ray.evaluation.judges.templates import template_of
from pharmacist_ray.evaluation.metrics import PLAIN, Judged, measure, measure_groups
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import StoragePath, read_table, write_text

_DRAW = re.compile(r"(?<![^+])random_(\d+)$")
"""A random draw, alone or after ``trusted+``."""


def without_draw(selection: str) -> str:
    """Return the arm of a selection: its name with the number of a random draw taken off."""
    return _DRAW.sub("random", selection)


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
    form: FormConfig | None = None
    """How its attacker puts harmful prompts; None: as they are."""
    secret: StoragePath | None = None
    """File of the secret that it is asked behind."""

    @property
    def arm(self) -> str:
        """The selection with the number of a random draw taken off."""
        return without_draw(self.selection)

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
    judgements: StoragePath | None = None,
    served: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Let all subjects answer, judge, and write ``summary.json`` and ``table.json``; with several judges ``judges.json`` too.

    Args:
        subjects: All models, before and after attacks.
        prompts: ``harmful``, ``benign`` and ``task`` → folder of canonical rows.
        settings: The evaluation section.
        resources: Actors and what each may use.
        out: Folder to fill.
        judgements: The folder in which the replies of endpoints are kept.
        served: Folder for the adapters that an endpoint is given, where one answers.
        progress: Called with (units done, units in all).

    Returns:
        Counts for the manifest, the judges, how far they agree, and warnings in words.

    Raises:
        ConfigError: No harmful prompt has the column for groups, or for clusters.
    """
    marks = {name: _marks(rows, settings, name == "harmful") for name, rows in prompts.items()}
    usage = answer_all(
        {subject.answers: subject.model for subject in subjects},
        prompts,
        settings=settings,
        resources=resources,
        forms={subject.answers: subject.form for subject in subjects if subject.form},
        secrets={subject.answers: subject.secret for subject in subjects if subject.secret},
        judgements=judgements,
        served=served,
        progress=progress,
    )
    labels = labels_of(row.response for row in iterate_rows(prompts["task"])) if "task" in prompts else frozenset()
    answered = [Answered(subject, settings.judges, labels) for subject in subjects]
    judged = {one.subject.name: list(_judged(one, marks)) for one in answered}
    draws = settings.bootstrap_draws
    records = _records(subjects, judged, draws)
    cells = _cells(answered, judged, JUDGES[settings.judges[0].kind])
    write_text(json.dumps(records, indent=1), out / "summary.json")
    write_text(json.dumps(arm_rows(cells, draws=draws), indent=1), out / "table.json")
    found: dict[str, Any] = {
        "models": len(subjects),
        "answers": sum(len(answers) for answers in judged.values()),
        "records": len(records),
        "judges": [_described(judge) for judge in settings.judges],
        "unjudged": sum(one.verdict == "unjudged" for answers in judged.values() for one in answers if one.kind != "task"),
        "usage": usage,
        "warnings": [warning for cell in cells.values() for warning in cell.facts.get("warnings", [])],
    }
    if len(settings.judges) > 1:
        found["agreement"] = [
            record for kind in ("harmful", "benign") for record in agreement(kind, _side_by_side(answered, settings.judges, kind))
        ]
        write_text(json.dumps(found["agreement"], indent=1), out / "judges.json")
    return found


def _described(judge: JudgeConfig) -> dict[str, Any]:
    """Return a judge for the manifest: what it is called, its kind, and which question it asks."""
    found = {"name": judge.called, "kind": judge.kind}
    if "template" in JUDGES[judge.kind].needs:
        found |= {"template": judge.template or judge.template_file or "", "question": template_of(judge).version}
    return found


class Answered:
    """What one subject answered, and what the judges said of it."""

    def __init__(self, subject: EvaluatedModel, judges: Sequence[JudgeConfig], labels: Collection[tuple[str, ...]]) -> None:
        """Read a subject's answers, and settle which are beside the point.

        Args:
            subject: The model.
            judges: All judges, the first of which decides.
            labels: Those of the user's task; see `settle`.
        """
        self.subject = subject
        rows = [row for file in parquet_files(subject.answers) for row in read_table(file).to_pylist()]
        self.sets: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            self.sets.setdefault(row["set"], []).append(row)
        guesses = JUDGES[judges[0].kind].guesses
        self.repeated: dict[str, Repeated] = {}
        for kind in ("harmful", "benign", "plain"):
            rows = self.sets.get(kind, [])
            asked, said = ([row[name] or "" for row in rows] for name in ("prompt", "answer"))
            verdicts: list[Verdict] = [row["verdict"] or "unjudged" for row in rows]
            for row, verdict in zip(rows, settle(asked, said, verdicts, guesses=guesses, labels=labels), strict=True):
                row["settled"] = verdict
            if kind != "plain" and (found := repeated(said, verdicts)):
                self.repeated[kind] = found
        for row in (row for rows in self.sets.values() for row in rows):
            del row["prompt"], row["answer"], row["expected"]  # or the texts of all models were held at once


def _judged(answered: Answered, marks: Mapping[str, Mapping[str, tuple[str, str]]]) -> Iterable[Judged]:
    subject = answered.subject
    draw = str(subject.draw) if _DRAW.search(subject.selection) else ""
    for kind, rows in answered.sets.items():
        for row in rows:
            checks = {name: row[name] for name in ("correct", "exact", "contains") if row[name] is not None}
            group, cluster = marks.get("harmful" if kind == "plain" else kind, {}).get(row["id"], ("", ""))
            verdict = row.get("settled", "unjudged")
            yield Judged(row["id"], kind, subject.seed, verdict, checks, draw, cluster, group)  # type: ignore[arg-type]


def _side_by_side(answered: Sequence[Answered], judges: Sequence[JudgeConfig], kind: str) -> dict[str, list[Verdict]]:
    """Return what each judge said of all answers to one kind of prompts, before any rule over them."""
    rows = [row for one in answered for row in one.sets.get(kind, [])]
    said: list[list[Verdict]] = [[row["verdict"] or "unjudged" for row in rows]]
    said += [[(row.get("others") or [])[place] for row in rows] for place in range(len(judges) - 1)]
    return {judge.called: verdicts for judge, verdicts in zip(judges, said, strict=True)}


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
                **({"hs_after_plain": found[PLAIN].estimate} if PLAIN in found else {}),
                "coherent_refusal": found["coherent_refusal"].estimate,
                "incoherent_harmful": found["incoherent_harmful"].estimate,
                "incoherent_benign": found["incoherent_benign"].estimate,
                "beside_harmful": found["beside_harmful"].estimate,
                "beside_benign": found["beside_benign"].estimate,
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


def _cells(answered: Sequence[Answered], judged: Mapping[str, list[Judged]], judge: JudgeKind) -> dict[Key, Cell]:
    """Return the answers of each arm, defence and attack, and what their rows say beside metrics."""
    groups: dict[Key, list[EvaluatedModel]] = {}
    alike: dict[Key, list[str]] = {}
    for one in answered:
        key = (one.subject.arm, one.subject.defence, one.subject.attack)
        groups.setdefault(key, []).append(one.subject)
        for kind, found in one.repeated.items():
            alike.setdefault(key, []).append(
                f"{one.subject.name}: {found.count} of {found.of} answers to {kind} prompts begin with the same words, "
                f"'{found.words[:60]}'; read them before the figures"
            )
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
                **({"warnings": alike[key]} if key in alike else {}),
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
