"""What a step minimises. One file each, and one line here.

An objective is a generator over one optimiser step: it yields one scalar loss per micro-batch, and the loop back-propagates each
before it asks for the next. The loop owns everything else: accumulation, clipping, schedule, checkpoints, metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError

from pharmacist_ray.config.section import Section
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.plugins import Plugin, Table, blaming, misfit
from pharmacist_ray.training.objectives.booster import BoosterSettings, booster, booster_vaccine
from pharmacist_ray.training.objectives.repnoise import RepNoiseSettings, repnoise, repnoise_fits
from pharmacist_ray.training.objectives.sft import sft
from pharmacist_ray.training.objectives.step import Objective, Step
from pharmacist_ray.training.objectives.t_vaccine import TVaccineSettings, group_of, t_vaccine, t_vaccine_fits
from pharmacist_ray.training.objectives.vaccine import VaccineSettings, vaccine, vaccine_fits


def _watched(objective: Objective, plugin: Plugin) -> Objective:
    def run(step: Step) -> Iterator[torch.Tensor]:
        losses = 0
        with blaming(plugin):
            for loss in objective.run(step):
                losses += 1
                yield loss
        if losses != len(step.batches):
            raise misfit(plugin, f"yielded {losses} losses for {len(step.batches)} micro-batches")

    return replace(objective, run=run)


_OWN = {
    "sft": Objective(sft),
    "vaccine": Objective(vaccine, {"vaccine": VaccineSettings}, fits=vaccine_fits),
    "t_vaccine": Objective(t_vaccine, {"t_vaccine": TVaccineSettings}, "rows", fits=t_vaccine_fits, group=group_of),
    "repnoise": Objective(repnoise, {"repnoise": RepNoiseSettings}, "pairs", fits=repnoise_fits, least_batch=2),
    "booster": Objective(booster, {"booster": BoosterSettings}, "rows", moves_weights=True),
    "booster+vaccine": Objective(
        booster_vaccine,
        {"booster": BoosterSettings, "vaccine": VaccineSettings},
        "rows",
        fits=vaccine_fits,
        moves_weights=True,
    ),
}

OBJECTIVES = Table("objective", Objective, _OWN, watched=_watched)
"""By name."""


def sections_of(objectives: Iterable[str]) -> dict[str, list[str]]:
    """Return the sections that ``alignment.parameters`` may have: section → the objectives it is for.

    Args:
        objectives: Those that the run has, for the plug-ins among them; the package's own count anyhow.
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*OBJECTIVES, *objectives]):
        for section in OBJECTIVES[name].settings:
            found.setdefault(section, []).append(name)
    return found


def settings_of(objective: str, parameters: Mapping[str, Mapping[str, Any]]) -> dict[type[Section], Section]:
    """Return an objective's settings, with defaults for what is not given.

    Args:
        objective: A key of `OBJECTIVES`, or a plug-in's name.
        parameters: Section → key → value, as in ``alignment.parameters``; sections of other objectives are ignored.

    Raises:
        ConfigError: The objective is unknown, or one of its settings is unknown or out of range.
    """
    found: dict[type[Section], Section] = {}
    for name, kind in OBJECTIVES[objective].settings.items():
        try:
            found[kind] = kind.model_validate(dict(parameters.get(name, {})))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = ", ".join(field.alias or key for key, field in kind.model_fields.items())
            raise ConfigError(f"alignment.parameters.{name}.{key}: {first['msg']}; {name} has {known}") from error
    return found


__all__ = ["OBJECTIVES", "Objective", "Step", "sections_of", "settings_of"]
