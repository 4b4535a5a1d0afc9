"""The models of a comparison by what is done to them, and what of their settings goes into their fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pharmacist_ray.config.alignment import AlignmentConfig, AttackConfig
from pharmacist_ray.config.endpoint import HOW
from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.scoring import folder_of, tells_rows_apart
from pharmacist_ray.pipeline.artifacts import without
from pharmacist_ray.training.objectives import OBJECTIVES, settings_of


@dataclass(frozen=True)
class Variant:
    """One model of the comparison: a selection aligned with a seed, and perhaps attacked, under a defence of up to three stages."""

    selection: str
    defence: str
    seed: int
    attack: AttackConfig | None = None

    @property
    def stages(self) -> Defence:
        """The defence by its stages."""
        return Defence.of(self.defence)

    @property
    def name(self) -> str:
        """For people and folders, for example ``pharmacist.sft.s0.weak``; before an attack only the alignment counts."""
        defence = self.defence if self.attack else self.stages.alignment
        aligned = folder_of(f"{self.selection}.{defence}.s{self.seed}")
        return aligned + (f".{self.attack.name}" if self.attack else "")

    @property
    def cell(self) -> str:
        """Its name in the comparison, where variants of one aligned model are several."""
        return folder_of(f"{self.selection}.{self.defence}.s{self.seed}")

    @property
    def aligned(self) -> Variant:
        """The same variant before any attack."""
        return Variant(self.selection, self.stages.alignment, self.seed)

    @property
    def unrepaired(self) -> Variant:
        """The same variant just after its attack."""
        return replace(self, defence=Defence(self.stages.alignment, self.stages.finetune).name)


def weighed_in(alignment: AlignmentConfig, arm: str) -> list[str]:
    """Return the selections of an arm whose rows count by their scores when it is aligned."""
    return [part for part in arm.split("+") if tells_rows_apart(part)] if alignment.weighted else []


def asks_ordinary(objective: str, parameters: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether an objective of the fine-tune or of a repair, with these settings, looks at trusted ordinary rows.

    Args:
        objective: Its name.
        parameters: ``finetune.parameters``.

    Raises:
        ConfigError: See `settings_of`.
    """
    return OBJECTIVES[objective].ordinary(settings_of(objective, parameters, "finetune"))


def settled(objective: str, parameters: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Return an objective with its settings, defaults too; those of others change nothing that it makes.

    Args:
        objective: Its name.
        parameters: Of the configuration's section.
        where: The name of that section.

    Raises:
        ConfigError: See `settings_of`.
    """
    found = settings_of(objective, parameters, where)
    mine = {name: found[kind].model_dump(mode="json", by_alias=True) for name, kind in OBJECTIVES[objective].settings.items()}
    mine = without(mine, HOW)
    return {"objective": objective, "parameters": mine} | OBJECTIVES.plugged([objective])
