"""What a configuration has to do, counted: rows, tokens, passes, models. What nobody can know yet is assumed, and said.

The assumptions about rows and CPUs are those of the paper plan in ``docs/growth.md``, which takes them from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from pharmacist_ray.config.data import NamedConfig, SourceConfig
from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.public_sets import PROMPT_SETS
from pharmacist_ray.config.schema import Config
from pharmacist_ray.curation.fit import trainings_of
from pharmacist_ray.curation.last_layers import SAMPLE
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.curation.selector import OF_LAST_LAYERS
from pharmacist_ray.data.readers import plan
from pharmacist_ray.errors import PharmacistError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.trainings import in_steps

ROWS = 1e6
"""Candidates where nobody can count them (ours)."""
PROMPTS = 500
"""Prompts of a set where nobody can count them (ours)."""
ROW_BYTES = 1000.0
"""Bytes of a row as it is read (ours)."""
TOKENS = 256.0
"""Mean tokens of a row (ours)."""
INGEST_S = 2e-4
"""CPU seconds in which a row is ingested (ours: where every one has to be tokenised, and a fifth of it where none has)."""
SELECT_S = 7e-6
"""CPU seconds a row takes in selection by one score, near-duplicates not counted (ours)."""

LOSSES = {
    "loss_gap": ("base", "reference"),
    "tov": ("base", "tov"),
    "low_loss": ("base",),
    "high_loss": ("base",),
    "ifd": ("base", "alone"),
    "representation": ("states",),
    "refusal_feature": ("prompts",),
    "guard": ("states",),
}
"""Scorer → the forward passes whose results it reads; one that two read is made once. Those that read influences are not here."""


@dataclass(frozen=True)
class Trained:
    """Runs of one training section by one objective."""

    section: str
    objective: str
    steps: int
    runs: int
    stage: str
    """``fit``, ``align`` or ``attack``."""


@dataclass(frozen=True)
class Work:
    """What there is to do."""

    rows: float
    row_bytes: float
    tokens: float
    """Mean tokens of a candidate."""
    trainings: tuple[Trained, ...]
    checkpoints: int
    """Passes forward and backward over a candidate: one a checkpoint whose directions are needed."""
    forwards: int
    """Forward passes over a candidate besides."""
    directions: int
    """Rows whose gradient `fit` takes at a checkpoint, all together."""
    learnt: int
    """Rows whose gradient it takes while it learns a logit for each candidate, in all iterations."""
    models: int
    """That answer."""
    prompts: int
    """That each of them answers."""
    assumed: list[str] = field(default_factory=list)
    """What was assumed about it, in words."""


def work_of(run: Run, rows: float | None = None) -> Work:
    """Return what a run has to do.

    Args:
        run: The run; its files are looked at, and counted only where their metadata tells.
        rows: Candidates, where somebody says how many.
    """
    config, assumed = run.config, list[str]()
    counted, row_bytes = _candidates(run, rows, assumed)
    influences = bool({"directions", "groups"} & {*run.parts})
    selector = config.selector
    passes = {kind for name in config.scoring.scorers for kind in LOSSES.get(name, _unknown(name))}
    trusted = selector.trusted_rows
    asked = 0
    if config.evaluation is not None:
        evaluation = config.evaluation
        sources = (evaluation.harmful_prompts, evaluation.benign_prompts, evaluation.task.source)
        asked = sum(
            _prompts(run, name, one) for name, one in zip(("eval-harmful", "eval-benign", "eval-task"), sources, strict=True)
        )
    return Work(
        rows=counted,
        row_bytes=row_bytes,
        tokens=min(TOKENS, config.model.max_length),
        trainings=tuple(_trainings(run, counted)),
        checkpoints=len(selector.checkpoints) if influences else 0,
        forwards=len(passes),
        # The harmful rows' gradient for the attack, the validation rows' with and without it (see `curation.fit`), and a sample's by which
        # the last layers are weighed.
        directions=(3 * trusted if "directions" in run.parts else 0)
        + (2 * trusted if "groups" in run.parts else 0)
        + sum(min(SAMPLE, math.ceil(counted / 2)) for part in OF_LAST_LAYERS if part in run.parts),
        learnt=_learnt(run),
        models=len(run.variants) * (1 + len(config.attacks)) if config.evaluation else 0,
        prompts=asked,
        assumed=assumed,
    )


def _learnt(run: Run) -> int:
    """Return the rows of all iterations of the parts that learn: candidates, validation and harmful rows; SEAL's, at two adapters."""
    selector = run.config.selector
    logits = 3 * selector.iterations * selector.batch_size if "logits" in run.parts else 0
    return logits + (4 * selector.seal.steps * selector.seal.batch_size if "seal" in run.parts else 0)


def _candidates(run: Run, rows: float | None, assumed: list[str]) -> tuple[float, float]:
    """Return how many candidates there are, and the bytes of each."""
    artifact = run.ingested("candidates")
    with suppress(PharmacistError, OSError):
        if artifact.ready and rows is None:
            return float(artifact.manifest()["summary"]["rows_out"]), ROW_BYTES
    size = 0.0
    if rows is None:
        with suppress(PharmacistError, OSError, ImportError):
            chunks = plan(run.config.data.candidates.path)
            size = float(sum(chunk.size for chunk in chunks))
            known = [chunk.rows for chunk in chunks]
            if size and all(count is not None for count in known):
                return (counted := float(sum(count or 0 for count in known))), size / max(1.0, counted)
    if size:
        assumed.append(
            f"{size / ROW_BYTES:,.0f} candidates, for their files have {size / 1e9:.3g} GB at {ROW_BYTES:g} bytes a row"
        )
        return size / ROW_BYTES, ROW_BYTES
    if rows is None:
        assumed.append(f"{ROWS:,.0f} candidates, for data.candidates cannot be looked at here; --rows says how many there are")
    return rows or ROWS, ROW_BYTES


def _prompts(run: Run, name: str, source: SourceConfig) -> int:
    if isinstance(source, NamedConfig) and source.name in PROMPT_SETS:
        return PROMPT_SETS[source.name].prompts
    with suppress(PharmacistError, OSError):
        if (artifact := run.ingested(name)).ready:
            return int(artifact.manifest()["summary"]["rows_out"])
    return PROMPTS


def _trainings(run: Run, rows: float) -> Iterable[Trained]:
    config = run.config
    for name, (train, _) in trainings_of(config.selector, run.parts).items():
        yield Trained(f"selector.{name}", "sft", train.steps, 1, "fit")
    aligned = {(one.selection, one.stages.alignment, one.seed) for one in run.variants if one.selection != "none"}
    share = config.alignment.replay_share if config.alignment.replay else 0.0
    for objective in config.objectives:
        runs = [selection for selection, by, _ in aligned if by == objective]
        steps = [in_steps(config.alignment.train, _kept(config, selection, rows), share).steps for selection in runs]
        if runs:
            yield Trained("alignment.train", objective, round(sum(steps) / len(runs)), len(runs), "align")
    for index, attack in enumerate(config.attacks):
        steps_ = in_steps(attack.train, attack.rows).steps
        for finetune in dict.fromkeys(Defence.of(name).finetune for name in config.defences):
            runs_ = len(
                {(one.selection, one.seed, one.stages.alignment) for one in run.variants if one.stages.finetune == finetune}
            )
            yield Trained(f"attacks.{index}.train", finetune, steps_, runs_, "attack")


def _kept(config: Config, arm: str, rows: float) -> int:
    """Return about how many rows an arm is aligned on."""
    selection, trusted = config.selection, config.selector.trusted_rows
    if arm == "trusted":
        return trusted
    kept = float(selection.count) if selection.count is not None else rows * (selection.ratio or 0.5)
    return math.ceil((rows if arm.endswith("all") else kept) + trusted * arm.startswith("trusted+"))


def _unknown(name: str) -> tuple[str, ...]:
    """Return the forward pass that a scorer of somebody else's is counted with, if it looks at the model and not at influences."""
    if name == "random":
        return ()
    scorer = SCORERS[name]
    return ("base",) if scorer.needs_model and scorer.part is None else ()
