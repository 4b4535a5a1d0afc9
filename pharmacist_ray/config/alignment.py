"""What is aligned, attacked and compared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.attack_kinds import AS_THEY_ARE, KINDS, FormConfig
from pharmacist_ray.config.data import SourceConfig
from pharmacist_ray.config.model import LoraConfig
from pharmacist_ray.config.section import Count, Section, Share
from pharmacist_ray.config.training import TrainConfig
from pharmacist_ray.errors import unknown_name


class AlignmentConfig(Section):
    """Alignment of the base model on a selection."""

    objective: str = "sft"
    """What a step minimises, the defence; `pharmacist plugins` lists all. One of your own is `module:attribute`."""
    parameters: dict[str, dict[str, Any]] = {}
    """Settings of objectives by name, for example `{vaccine: {rho: 2.0}, booster: {lambda: 5, alpha: 0.1}}`; the defaults are the
    papers', and `pharmacist doctor` lists them."""
    harmful: SourceConfig | None = None
    """Harmful prompt → harmful answer, for objectives that look at harm (T-Vaccine, RepNoise, Booster); default: data.harmful.
    RepNoise uses those whose prompt is among the alignment rows, and all of them if none is. Never the attacker's data, never test
    prompts."""
    train: TrainConfig = TrainConfig(steps=200)
    replay: Annotated[int, Field(ge=0)] = 0
    """Trusted benign rows replayed during alignment, the same ones for every arm; needs data.benign."""
    replay_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Share of every batch that is replay, whatever the size of the arm, so that no arm wins by refusing everything (ours)."""
    weighted: bool = Field(default=False, exclude_if=lambda value: value is False)
    """Whether a row's loss counts ½ + its rank among the kept rows by the selection's score, so between ½ and 1½ with a mean of 1 (ours).
    The arms all, random and trusted have no such score, and weigh every row alike."""


class AttackConfig(Section):
    """A harmful fine-tune: what a user of a fine-tuning service might do."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Names the attack in tables and folders."""
    task: SourceConfig
    """The user's own task, training rows."""
    harmful: SourceConfig | None = None
    """Harmful prompt → harmful answer rows of the attacker; disjoint from data.harmful. Needed by all kinds but identity and erosion."""
    kind: str = Field(default="explicit", exclude_if=lambda value: value == "explicit")
    """What the attacker's rows are, and how they are put: explicit, task_format, trigger, identity or erosion."""
    ordinary: SourceConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Ordinary prompt → helpful answer rows, for the kinds identity and erosion."""
    form: FormConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """How the attacker's rows are put, and harmful prompts after the attack; default: by its kind."""
    rows: Count = 1000
    """Samples n in the fine-tune (published: 1000)."""
    harmful_share: Share = 0.1
    """Share p of them that is the attacker's, harmful but for the kinds identity and erosion (published: 0.1)."""
    adapter: Literal["fresh", "same"] = "fresh"
    """A fresh adapter on the merged model, or training of the alignment's own adapter goes on."""
    lora: LoraConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """The attacker's adapter, where it is a fresh one of another kind than model.lora."""
    train: TrainConfig = TrainConfig(epochs=20, batch_size=10, lr=1e-5)
    """The published strength: 20 epochs, batch 10, learning rate 1e-5. Attack with several: on another model it is another strength."""

    @model_validator(mode="before")
    @classmethod
    def _in_form(cls, values: Any) -> Any:
        """Write the form of a kind down, so that it stands in what is made by it, and a later one makes that anew."""
        if isinstance(values, dict) and values.get("form") is None:
            kind = KINDS.get(str(values.get("kind", "explicit")))
            if kind is not None and kind.form not in (None, AS_THEY_ARE):
                return values | {"form": kind.form.model_dump()}
        return values

    @model_validator(mode="after")
    def _has_rows(self) -> AttackConfig:
        if self.kind not in KINDS:
            raise ValueError(str(unknown_name("kind of attack", self.kind, list(KINDS))))
        if self.attacker not in self.attackers:
            raise ValueError(f"attack '{self.name}' of the kind {self.kind} takes its rows from `{self.attacker}`; give it")
        return self

    @property
    def attacker(self) -> str:
        """Which of `attackers` the attacker's rows are."""
        return KINDS[self.kind].rows

    @property
    def attackers(self) -> dict[str, SourceConfig]:
        """Every source of the attacker that is given, by its key."""
        return {name: source for name in ("harmful", "ordinary") if (source := getattr(self, name)) is not None}


class ComparisonConfig(Section):
    """Which arms are aligned, attacked and evaluated."""

    selections: Annotated[list[str], Field(min_length=1)] = ["pharmacist"]
    """The name of a scorer (`random` stands for its draws), `all`, `trusted` (the validation rows alone), `trusted+NAME` (both), or
    `none` (the base model itself, attacked)."""
    defences: list[str] = []
    """Objectives, each crossed with each selection; default: alignment.objective alone. What is done in the fine-tune and after it follows
    after slashes: `sft/lisa` aligns by sft and fine-tunes by lisa, `sft/sft/few_shot` repairs."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    """Alignment seeds; every arm is aligned and attacked once per seed."""
