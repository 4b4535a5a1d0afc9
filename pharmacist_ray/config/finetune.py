"""What a service does while a model is fine-tuned on a user's rows, and afterwards; and how a whole defence is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from pharmacist_ray.config.data import SourceConfig
from pharmacist_ray.config.section import Section
from pharmacist_ray.config.training import TrainConfig

PLAIN, UNREPAIRED = "sft", "none"
"""The fine-tune that nothing defends, and the model after it as it is."""
NEED_ALIGNED = ("safe_lora", "nlsr")
"""Repairs that read the alignment's adapter; what is not aligned has none."""


class FinetuneConfig(Section):
    """What the service does while a model is fine-tuned on a user's rows, an attacker's among them, and afterwards."""

    objective: str = PLAIN
    """What a step of the fine-tune minimises: sft, mix, mimic, lookahead, backdoor, lisa, safegrad, star_dss, refusal_teacher, ema,
    bds, panacea, or an objective of alignment; `pharmacist plugins` lists all."""
    repair: str = UNREPAIRED
    """What is done to the model afterwards: none, few_shot, unlearn, safe_lora, nlsr, antidote or dro."""
    parameters: dict[str, dict[str, Any]] = {}
    """Settings of these by name, for example `{lisa: {rho: 1.0}, mix: {share: 0.1}}`; the defaults are the papers' where they give any."""
    data: SourceConfig | None = None
    """The user's rows that `pharmacist finetune` trains on; a path on the command line goes before it. Audit them first."""
    train: TrainConfig = TrainConfig(epochs=3, batch_size=16, lr=1e-4)
    """How `pharmacist finetune` trains (ours: little drift needs a low rate, few passes and no small batch, arXiv 2508.12531)."""
    adapter: Literal["fresh", "same"] = "fresh"
    """A fresh adapter on the aligned model, or training of the alignment's own goes on."""
    harmful: SourceConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Harmful rows for what looks at such in the fine-tune and after it, for example those that an audit left out (`flags/as_read`);
    default: those of alignment."""
    safe: SourceConfig | None = None
    """Harmful prompt → refusal, for what trains on such rows again; default: the rows that the model was aligned on, of one that was not
    aligned data.validation."""


@dataclass(frozen=True)
class Defence:
    """A defence of up to three stages, by the names of its objectives; written ``booster``, ``sft/lisa`` or ``sft/sft/few_shot``."""

    alignment: str
    """Before the fine-tune."""
    finetune: str = PLAIN
    """While it runs."""
    repair: str = UNREPAIRED
    """After it."""

    @classmethod
    def of(cls, name: str) -> Defence:
        """Return what a name stands for.

        Raises:
            ValueError: It has an empty part, or more than three.
        """
        parts = name.split("/")
        if len(parts) > 3 or not all(parts):
            raise ValueError(
                f"defence '{name}' must be ALIGNMENT, ALIGNMENT/FINETUNE or ALIGNMENT/FINETUNE/REPAIR, for example sft/lisa"
            )
        return cls(*parts)

    @property
    def name(self) -> str:
        """The shortest name."""
        parts = [self.alignment, self.finetune, self.repair]
        if self.repair == UNREPAIRED:
            parts.pop()
            if self.finetune == PLAIN:
                parts.pop()
        return "/".join(parts)
