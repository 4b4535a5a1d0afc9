"""The models of a comparison by what is done to them, and what of their settings goes into their fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pharmacist_ray.config.alignment import AlignmentConfig, AttackConfig
from pharmacist_ray.config.endpoint import HOW
from pharmacist_ray.config.evaluation import HOW as HOW_ASKED
from pharmacist_ray.config.evaluation import UNASKED
from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.schema import Config, Section
from pharmacist_ray.config.scoring import folder_of, tells_rows_apart
from pharmacist_ray.evaluation.judges import JUDGES
from pharmacist_ray.pipeline.artifacts import without
from pharmacist_ray.training.objectives import OBJECTIVES, settings_of

COLUMNS = ("group_column", "cluster_column")
"""Keys of the evaluation that say how answers are put together."""


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


def asked_of(
    config: Config, prompts: Mapping[str, str], settings: Callable[[Section], dict[str, Any]], file: Callable[[str], Any]
) -> list[Any]:
    """Return what is asked in an evaluation and how it is judged, as JSON-able values.

    Args:
        config: The configuration; with an evaluation.
        prompts: Fingerprints of the sets of prompts.
        settings: Returns a section as what is made from it depends on it.
        file: Returns what identifies a file.
    """
    assert config.evaluation is not None
    judge, model = config.evaluation.judge_path, config.model
    asked = settings(config.evaluation)
    for name in (*UNASKED, *COLUMNS):
        asked.pop(name, None)
    asked["judge"] = without(asked["judge"], HOW_ASKED)
    chat = [model.system, model.template_arguments] if model.system or model.template_arguments else []
    files = map(file, config.evaluation.judge_places)
    plugged = JUDGES.plugged([judge.kind for judge in config.evaluation.judges])
    return [prompts, asked, model.template, file(judge) if judge else None, *chat, *files, *plugged.values()]


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
