"""A whole run's configuration, put together from a file a section. Every field has its unit and the source of its default under it.

All models are frozen and refuse unknown keys. What can be checked from the configuration alone is checked here, so that a mistake is
found before Ray starts.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator

from pharmacist_ray.config.alignment import AlignmentConfig, AttackConfig, ComparisonConfig
from pharmacist_ray.config.audit import AuditConfig
from pharmacist_ray.config.data import DataConfig, PromptsConfig, SourceConfig
from pharmacist_ray.config.evaluation import EvaluationConfig, JudgeConfig, TaskEvaluation, VllmConfig
from pharmacist_ray.config.finetune import NEED_ALIGNED, Defence, FinetuneConfig
from pharmacist_ray.config.model import LoraConfig, ModelConfig
from pharmacist_ray.config.redteam import RedteamConfig
from pharmacist_ray.config.resources import ResourcesConfig
from pharmacist_ray.config.scoring import CALIBRATED, COVERAGE, ProxyConfig, ScoringConfig, SelectionConfig, arm_of
from pharmacist_ray.config.search import EarlyConfig, RangeConfig, SearchConfig
from pharmacist_ray.config.section import RunDir, Section
from pharmacist_ray.config.selector import CoverageConfig, SealConfig, SelectorConfig
from pharmacist_ray.config.training import TrackingConfig, TrainConfig
from pharmacist_ray.errors import ConfigError

__all__ = [
    "AlignmentConfig",
    "AttackConfig",
    "ComparisonConfig",
    "Config",
    "CoverageConfig",
    "DataConfig",
    "EarlyConfig",
    "EvaluationConfig",
    "FinetuneConfig",
    "JudgeConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptsConfig",
    "ProxyConfig",
    "RangeConfig",
    "RedteamConfig",
    "ResourcesConfig",
    "ScoringConfig",
    "SealConfig",
    "SearchConfig",
    "Section",
    "SelectionConfig",
    "SelectorConfig",
    "SourceConfig",
    "TaskEvaluation",
    "TrackingConfig",
    "TrainConfig",
]

_AUDIT = AuditConfig()
_REDTEAM = RedteamConfig()
_FINETUNE = FinetuneConfig()

RESERVED = ("all", "trusted", "none", CALIBRATED)
"""Names of arms that are not scores."""


class Config(Section):
    """A whole run."""

    run_dir: RunDir
    """Where every artifact of the run goes: a folder that all nodes reach, or a URI (s3://bucket/folder, gs://, hdfs://)."""
    seed: int = 0
    """Seed of the selector: warm-up order and adapter initialisation."""
    model: ModelConfig
    data: DataConfig
    resources: ResourcesConfig = ResourcesConfig()
    selector: SelectorConfig = SelectorConfig()
    scoring: ScoringConfig = ScoringConfig()
    selection: SelectionConfig = SelectionConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    attacks: list[AttackConfig] = []
    """Harmful fine-tunes that every aligned model goes through; none is allowed."""
    finetune: FinetuneConfig = Field(default=_FINETUNE, exclude_if=lambda value: value == _FINETUNE)
    """What the service does while an attack runs, and afterwards."""
    evaluation: EvaluationConfig | None = None
    comparison: ComparisonConfig = ComparisonConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig | None = None
    """Settings to try against each other, for example `{space: {selection.ratio: [0.2, 0.4], selector.intensity: [0.05, 0.5]}}`."""
    audit: AuditConfig = Field(default=_AUDIT, exclude_if=lambda value: value == _AUDIT)
    """How rows are audited before a model is fine-tuned on them."""
    redteam: RedteamConfig = Field(default=_REDTEAM, exclude_if=lambda value: value == _REDTEAM)
    """How an attacker searches for the worst fine-tune of each arm."""

    @property
    def sources(self) -> dict[str, tuple[SourceConfig, bool]]:
        """Every set of rows by name, and whether its rows must have an answer."""
        found: dict[str, tuple[SourceConfig, bool]] = {
            "candidates": (self.data.candidates, True),
            "validation": (self.data.validation, True),
            "harmful": (self.data.harmful, True),
        }
        if self.data.benign is not None:
            found["benign"] = (self.data.benign, True)
        if self.alignment.harmful is not None:
            found["align-harmful"] = (self.alignment.harmful, True)
        for attack in self.attacks:
            found[f"attack-{attack.name}-task"] = (attack.task, True)
            found |= {f"attack-{attack.name}-{name}": (source, True) for name, source in attack.attackers.items()}
        if self.finetune.harmful is not None:
            found["finetune-harmful"] = (self.finetune.harmful, True)
        if self.finetune.safe is not None:
            found["finetune-safe"] = (self.finetune.safe, True)
        if self.evaluation is not None:
            found["eval-harmful"] = (self.evaluation.harmful_prompts, False)
            found["eval-benign"] = (self.evaluation.benign_prompts, False)
            found["eval-task"] = (self.evaluation.task.source, True)
        return found

    @property
    def defences(self) -> list[str]:
        """The defences that are compared, by name; see `config.finetune.Defence`."""
        own = Defence(self.alignment.objective, self.finetune.objective, self.finetune.repair)
        return list(dict.fromkeys(Defence.of(name).name for name in self.comparison.defences)) or [own.name]

    @property
    def unaligned(self) -> list[str]:
        """Those of the defences that a model which is not aligned is compared under: one of several that differ in alignment alone."""
        first = {(stages.finetune, stages.repair): stages.name for stages in map(Defence.of, reversed(self.defences))}
        return [name for (_, repair), name in first.items() if repair not in NEED_ALIGNED]

    @property
    def objectives(self) -> list[str]:
        """The objectives of alignment that are compared."""
        return list(dict.fromkeys(Defence.of(name).alignment for name in self.defences))

    def require_evaluation(self) -> EvaluationConfig:
        """Return the ``evaluation`` section.

        Raises:
            ConfigError: The configuration has none.
        """
        if self.evaluation is None:
            raise ConfigError("there is no `evaluation` section in the configuration; `pharmacist init` shows one")
        return self.evaluation

    @property
    def calibrated(self) -> bool:
        """Whether a calibrated selection is asked for, and so half of the trusted rows is kept out of the fit."""
        arms = (arm_of(self.selection.scorer), *self.comparison.selections)
        return CALIBRATED in (part for arm in arms for part in arm.split("+"))

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if problems := list(self._disagreements()):
            raise ValueError("; ".join(problems))
        return self

    def _disagreements(self) -> Iterator[str]:
        if "loss_gap" in self.scoring.scorers and (self.data.benign is None or self.selector.reference is None):
            yield "the loss_gap scorer needs data.benign and selector.reference; add them or take loss_gap out of scoring.scorers"
        for what, asked in (
            ("the refusal_feature scorer", "refusal_feature" in self.scoring.scorers),
            ("scoring.safe with benign", "benign" in self.scoring.safe),
        ):
            if asked and self.data.benign is None:
                yield f"{what} needs data.benign; add it"
        if not self.selector.inner_lr:
            for what, asked in (
                ("selector.mode=iterative", self.selector.mode == "iterative"),
                ("the pharmacist_iterative scorer", "pharmacist_iterative" in self.scoring.scorers),
            ):
                if asked:
                    yield f"{what} needs selector.inner_lr above 0: with no inner step no logit ever moves"
        if self.alignment.replay and self.data.benign is None:
            yield "alignment.replay needs data.benign; add it or set alignment.replay=0"
        share, size = self.alignment.replay_share, self.alignment.train.batch_size
        if self.alignment.replay and round(share * size) >= size:
            yield f"alignment.replay_share={share:g} leaves no alignment row in a batch of {size}; lower it"
        for name in self.comparison.defences:
            try:
                Defence.of(name)
            except ValueError as error:
                yield f"comparison.defences: {error}"
        for what, given in (
            ("attack names", [attack.name for attack in self.attacks]),
            ("comparison.seeds", self.comparison.seeds),
        ):
            if len(set(given)) != len(given):
                yield f"{what} must differ, got {given}"
        summable = {*self.scoring.scorers} - {"random", COVERAGE}
        for name, weights in self.selection.combinations.items():
            if name in (*self.scoring.scorers, *RESERVED, arm_of(self.selection.scorer)) or not set(weights) <= summable:
                yield (
                    f"selection.combinations.{name} must have a name of its own, and combine scores among scoring.scorers "
                    f"({', '.join(sorted(summable))}), got {', '.join(weights)}"
                )
        listed = self.selection.scorer if isinstance(self.selection.scorer, list) else []
        for name in listed:
            if name not in summable:
                yield (
                    f"selection.scorer lists '{name}', which has no rank to add up; "
                    f"of scoring.scorers these do: {', '.join(sorted(summable))}"
                )
        known = {*self.scoring.scorers, *self.selection.sums, "all", CALIBRATED}
        arms = [name.removeprefix("trusted+") for name in self.comparison.selections if name not in ("trusted", "none")]
        for name in dict.fromkeys((arm_of(self.selection.scorer), *arms)):
            if name not in known:
                yield f"selection '{name}' is not among scoring.scorers; scored: {', '.join(sorted(known - {'all', CALIBRATED}))}"
        if self.calibrated and self.selector.mode == "iterative" and "pharmacist" in self.scoring.scorers:
            yield (
                "a calibrated selection needs selector.mode=one_shot: the iterative mode has scores for candidates alone, "
                "and none for planted rows"
            )
        for attack in self.attacks:
            if attack.adapter == "same" and "full" in (self.alignment.train.weights, attack.train.weights):
                yield f"attack '{attack.name}' has adapter=same, which needs weights=lora in alignment.train and in its own train"
        if self.evaluation is not None and isinstance(self.evaluation.engine, VllmConfig):
            if not self.resources.actors:
                yield "evaluation.engine vllm needs resources.actors of 1 or more: each is an engine"
            if self.model.quantization:
                yield "evaluation.engine vllm is not told of model.quantization; set its own by options, and leave that out"
        if self.resources.workers_per_actor > 1:
            if self.scoring.method == "difference":
                yield "scoring.method=difference moves whole weights, which resources.workers_per_actor above 1 spreads; use hooks or ghost"
            if self.model.quantization:
                yield "resources.workers_per_actor above 1 spreads weights, and those of model.quantization cannot be; leave one out"
        for where, train in self.trainings().items():
            share = max(1, self.resources.workers) * train.accumulation
            if train.batch_size % share:
                yield f"{where}.batch_size={train.batch_size} must be a multiple of resources.workers × accumulation = {share}"
        yield from self.too_coarse()

    def too_coarse(self) -> Iterator[str]:
        """Yield which trainings the weights' precision is too low for; of ``auto`` nothing is known yet."""
        for where, train in self.trainings().items():
            if train.weights == "full" and self.model.dtype == "bfloat16" and train.zero_stage == 0:
                yield f"{where}: full weights in {self.model.dtype} need zero_stage 1 or higher, which keeps float32 masters"

    def trainings(self) -> dict[str, TrainConfig]:
        """Return every training section by its dotted name."""
        found = {"selector.warmup": self.selector.warmup, "alignment.train": self.alignment.train}
        if self.selector.reference is not None:
            found["selector.reference"] = self.selector.reference
        if "tov" in self.scoring.scorers:
            found["selector.tov"] = self.selector.tov
        for index, attack in enumerate(self.attacks):
            found[f"attacks.{index}.train"] = attack.train
        return found
