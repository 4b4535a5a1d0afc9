"""Let models answer prompts and judge the answers, on stateless Ray Data actors.

The unit of work is a model and a piece of a prompt set; its output is one Parquet file, published by a rename. A rerun does what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pharmacist_ray.config.attack_kinds import FormConfig
from pharmacist_ray.config.evaluation import EngineConfig, VllmConfig
from pharmacist_ray.config.schema import EvaluationConfig, JudgeConfig, ResourcesConfig
from pharmacist_ray.data.forms import asked
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import count_rows, read_rows
from pharmacist_ray.data.schema import Row, rows_from_table
from pharmacist_ray.data.secret import behind
from pharmacist_ray.evaluation import vllm
from pharmacist_ray.evaluation.engine import EndpointEngine
from pharmacist_ray.evaluation.judges import JudgeSettings, build_judge
from pharmacist_ray.evaluation.judges.verdict import PromptKind
from pharmacist_ray.evaluation.tasks import CHECKERS
from pharmacist_ray.models.budget import TokenBudget
from pharmacist_ray.models.generate import generate, without_thoughts
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.actors import on_actors
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.usage import Usage, put_together
from pharmacist_ray.storage import StoragePath, json_of, local_copy, storage_path, write_parquet

PROMPTS_PER_UNIT = 512
"""Prompts that one unit of work answers; large sets are spread over actors, small ones are not torn apart."""

RETRIES = 10
"""Times that a group of units is begun anew after its actor died; the units it had finished are kept (ours)."""

ANSWER_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("set", "id", "prompt", "expected", "answer", "verdict")]
    + [(name, pa.bool_()) for name in ("correct", "exact", "contains")]
    + [("others", pa.list_(pa.string()))]
)
"""One row per prompt; ``prompt`` is the question as its set has it, in whatever form it was put. ``verdict`` is what the first judge said,
``others`` what the further ones did, in their order; both are null for task prompts. The three before that are null for the others.
Earlier versions wrote no ``others``."""


@dataclass(frozen=True)
class GenerationUnit:
    """One unit of work."""

    subject: str
    model: ModelRef
    set: str
    rows: str
    start: int
    file: str
    form: FormConfig | None = None
    """How the questions are put; None: as they are."""
    secret: str | None = None
    """File of the secret that the model is asked behind; None: without one."""


@dataclass(frozen=True)
class AnswerSpec:
    """What is the same for all units."""

    settings: EvaluationConfig
    device: str
    threads: int
    judgements: StoragePath | None = None
    actors: int = 1
    served: Path | None = None
    """Folder of the adapters that an endpoint is given."""


def answer_all(
    models: Mapping[StoragePath, ModelRef],
    prompts: Mapping[str, StoragePath],
    *,
    settings: EvaluationConfig,
    resources: ResourcesConfig,
    forms: Mapping[StoragePath, FormConfig] | None = None,
    secrets: Mapping[StoragePath, StoragePath] | None = None,
    judgements: StoragePath | None = None,
    served: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Write ``<folder>/<set>-<start>.parquet`` (`ANSWER_SCHEMA`) for every model and prompt set; what is there stays.

    Args:
        models: Folder for the answers → model.
        prompts: ``harmful``, ``benign`` and ``task`` → folder of canonical rows.
        forms: Folder for the answers → how that model is asked harmful prompts; it is asked them as they are too, the set ``plain``.
        secrets: Folder for the answers → file of the secret that it is asked behind, but for the set ``plain``.
        settings: The evaluation section.
        resources: Actors and what each may use.
        judgements: The folder in which the replies of endpoints are kept.
        served: Folder for the adapters that an endpoint is given, where one answers.
        progress: Called with (units done, units in all).

    Returns:
        ``tokens_per_s`` of an actor, prompts and answers together, and ``peak_bytes`` of the largest; empty where all was there.
    """
    counts = {kind: count_rows(rows) for kind, rows in prompts.items()}
    wanted = [
        GenerationUnit(
            str(folder), model, name, str(prompts[kind]), start, str(folder / f"{name}-{start:06d}.parquet"), form, secret
        )
        for folder, model in models.items()
        for name, kind, form, secret in sets_of(prompts, (forms or {}).get(folder), (secrets or {}).get(folder))
        for start in range(0, counts[kind], PROMPTS_PER_UNIT)
    ]
    missing = [unit for unit in wanted if not storage_path(unit.file).exists()]
    done = len(wanted) - len(missing)
    if not missing:
        return {}
    # A model's units lie side by side in one block, so that an actor loads it once.
    blocks: dict[str, list[GenerationUnit]] = {}
    for unit in missing:
        blocks.setdefault(unit.subject, []).append(unit)
    if len(blocks) < resources.actors:
        blocks = {unit.file: [unit] for unit in missing}
    groups = list(blocks.values())
    device, threads = "cuda" if resources.gpus_per_worker else "cpu", max(1, int(resources.cpus_per_worker))
    actors = max(1, min(resources.actors, len(groups)))
    spec = AnswerSpec(settings, device, threads, judgements, actors, served)
    arguments, units = {"spec": spec, "groups": groups}, [{"group": number} for number in range(len(groups))]
    taken = []
    if isinstance(settings.engine, VllmConfig):
        assert served is not None
        asked_of = [(unit.file, unit.model, partial(_questions, unit)) for unit in missing]
        vllm.ask(asked_of, engine=settings.engine, max_new_tokens=settings.max_new_tokens, resources=resources, adapters=served)
    how: dict[str, Any] = {"attempts": RETRIES, "resources": resources, "what": "evaluate"}
    work: Callable[..., Iterator[dict[str, Any]]] = on_actors
    if resources.workers_per_actor > 1 and settings.engine is None:
        from pharmacist_ray.runtime.groups import on_groups  # with Ray Train, which an actor would import for nothing

        work = partial(on_groups, storage=next(iter(models)).parent / "ray")
    for answered in work(Answerer, arguments, units, **how):
        done += answered["units"]
        taken.append(answered)
        if progress:
            progress(done, len(wanted))
    return put_together(taken)


def sets_of(
    prompts: Iterable[str], form: FormConfig | None, secret: StoragePath | None = None
) -> list[tuple[str, str, FormConfig | None, str | None]]:
    """Return what a model is asked: name of the set, whose prompts it has, how they are put, and behind the secret of which file.

    Args:
        prompts: The sets of prompts.
        form: How harmful prompts are put, if otherwise than they are.
        secret: File of the secret that it is asked behind. Harmful prompts are asked without it too, as by whoever has the weights.
    """
    file = None if secret is None else str(secret)
    found: list[tuple[str, str, FormConfig | None, str | None]]
    found = [(kind, kind, form if kind == "harmful" else None, file) for kind in prompts]
    return found + ([("plain", "harmful", None, None)] if form or file else [])


class Answerer:
    """Answers and judges units; keeps the model it used last, and the judge."""

    def __init__(self, spec: AnswerSpec, groups: Sequence[Sequence[GenerationUnit]], group: Ranks | None = None) -> None:
        """Build the judges.

        Args:
            spec: What is the same for all units.
            groups: All units, addressed by number.
            group: This worker's place among those who hold the model together and answer the same units; None: it is alone. The first one
                judges.
        """
        use_cores(spec.threads)
        self.spec = spec
        self.groups = groups
        self.model: tuple[ModelRef, Any, Renderer, torch.Tensor | None] | None = None
        self.prompts: dict[str, list[Row]] = {}
        self.engine = (
            EndpointEngine(spec.settings.engine, spec.actors) if isinstance(spec.settings.engine, EngineConfig) else None
        )
        self.group = group
        self.budget = TokenBudget(together=(group.rank, group.workers) if group else None)
        self.usage = Usage()
        self.writes = group is None or group.first
        self.judges = [build_judge(self._judge_settings(one)) for one in spec.settings.judges] if self.writes else []

    def _judge_settings(self, config: JudgeConfig) -> JudgeSettings:
        """Return what a judge is built from, its files brought here."""
        if config.path is not None and "://" in config.path:
            config = config.model_copy(update={"path": str(local_copy(config.path))})
        return JudgeSettings(config, self.spec.device, self.spec.judgements, self.spec.actors)

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Answer a group of units and return how many it has."""
        group = self.groups[unit["group"]]
        self.usage.taken()
        for one in group:
            there = storage_path(one.file).exists()  # an actor that died in this group had answered it
            if not (self.group.share(there) if self.group else there):
                answers = self._answers(one)
                if self.writes:
                    write_parquet(self._judged(one, answers), storage_path(one.file))
                    if self.spec.settings.engine:
                        vllm.texts_file(one.file).unlink(missing_ok=True)
        return {"units": len(group)} | self.usage.taken()

    def _loaded(self, ref: ModelRef) -> Any:
        if self.spec.settings.engine:
            return None
        if self.group is None:
            return ref.load(self.spec.device)
        from pharmacist_ray.training.sharded import load_sharded  # slow to import: DeepSpeed

        return load_sharded(ref, self.group)

    def _asked(self, unit: GenerationUnit) -> list[Row]:
        return self._rows(unit.rows)[unit.start : unit.start + PROMPTS_PER_UNIT]

    def _answers(self, unit: GenerationUnit) -> list[str]:
        if self.model is None or self.model[0] != unit.model:
            ref, self.model = unit.model, None  # let go of the last one before the next one takes its room
            self.model = (ref, self._loaded(ref), ref.renderer(), ref.loaded_prompt())
        _, model, renderer, soft_prompt = self.model
        settings, prompts = self.spec.settings, _put(unit, self._asked(unit), renderer)
        if isinstance(settings.engine, VllmConfig):
            answers = list(json_of(vllm.texts_file(unit.file)))
        elif self.engine:
            assert self.spec.served is not None
            answers = self.engine.answers(
                unit.model, prompts, max_new_tokens=settings.max_new_tokens, end_id=renderer.end_id, files=self.spec.served
            )
        else:
            answers = generate(
                model,
                renderer.tokenizer,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                end_id=renderer.end_id,
                budget=self.budget,
                soft_prompt=soft_prompt,
            )
            if self.group:  # each has its own, and nothing for the others'
                answers = ["".join(parts) for parts in zip(*self.group.of_each(answers), strict=True)]
        self.usage.tokens += sum(map(len, prompts)) + sum(len(renderer.tokenizer(one).input_ids) for one in answers)
        return [without_thoughts(answer) for answer in answers]

    def _judged(self, unit: GenerationUnit, answers: list[str]) -> pa.Table:
        rows, settings = self._asked(unit), self.spec.settings
        table: dict[str, list[Any]] = {
            "set": [unit.set] * len(rows),
            "id": [row.id for row in rows],
            "prompt": [row.prompt for row in rows],
            "expected": [row.response for row in rows],
            "answer": list(answers),
        }
        none = [None] * len(rows)
        if unit.set == "task":
            pairs = list(zip(answers, table["expected"], strict=True))
            checkers = {"correct": settings.task.checker, "exact": "exact", "contains": "contains"}
            table |= {column: [CHECKERS[name](*pair) for pair in pairs] for column, name in checkers.items()}
            table |= {"verdict": none, "others": none}
        else:
            kind: PromptKind = "benign" if unit.set == "benign" else "harmful"
            first, *others = [judge(kind, table["prompt"], answers) for judge in self.judges]
            table |= {"verdict": list(first), "others": [list(one) for one in zip(*others, strict=True)] or [[] for _ in rows]}
            table |= {"correct": none, "exact": none, "contains": none}
        return pa.Table.from_pydict(table, schema=ANSWER_SCHEMA)

    def _rows(self, folder: str) -> list[Row]:
        if folder not in self.prompts:
            self.prompts[folder] = rows_from_table(read_rows([folder]))
        return self.prompts[folder]


def _put(unit: GenerationUnit, rows: Sequence[Row], renderer: Renderer) -> list[list[int]]:
    """Return a unit's questions as token ids, in the form and behind the secret in which they are put."""
    put = [asked(row, unit.form) if unit.form else row for row in rows]
    if unit.secret:
        secret = storage_path(unit.secret).read_text()
        put = [behind(row, secret, renderer.system) for row in put]
    return [renderer.prompt_ids(row) for row in put]


def _questions(unit: GenerationUnit, renderer: Renderer) -> list[list[int]]:
    return _put(unit, rows_from_table(read_rows([unit.rows]))[unit.start : unit.start + PROMPTS_PER_UNIT], renderer)
