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
from pharmacist_ray.training.objectives.antibody import AntibodySettings, antibody
from pharmacist_ray.training.objectives.antidote import AntidoteSettings, antidote
from pharmacist_ray.training.objectives.backdoor import BackdoorSettings, backdoor
from pharmacist_ray.training.objectives.bds import BdsSettings, bds
from pharmacist_ray.training.objectives.booster import BoosterSettings, booster, booster_vaccine
from pharmacist_ray.training.objectives.dro import DroSettings, dro
from pharmacist_ray.training.objectives.ema import EmaSettings, ema, take_mean
from pharmacist_ray.training.objectives.few_shot import FewShotSettings, few_shot
from pharmacist_ray.training.objectives.lisa import LisaSettings, lisa
from pharmacist_ray.training.objectives.lookahead import LookaheadSettings, lookahead
from pharmacist_ray.training.objectives.mix import MixSettings, mimic, mix, with_ordinary
from pharmacist_ray.training.objectives.nlsr import NlsrSettings, nlsr
from pharmacist_ray.training.objectives.panacea import PanaceaSettings, panacea, step_away
from pharmacist_ray.training.objectives.refusal_teacher import RefusalTeacherSettings, refusal_teacher
from pharmacist_ray.training.objectives.repnoise import RepNoiseSettings, repnoise, repnoise_fits
from pharmacist_ray.training.objectives.safe_lora import SafeLoraSettings, safe_lora
from pharmacist_ray.training.objectives.safegrad import SafeGradSettings, safegrad
from pharmacist_ray.training.objectives.sft import sft
from pharmacist_ray.training.objectives.star_dss import StarDssSettings, prefix_words, star_dss
from pharmacist_ray.training.objectives.step import FINISH, Objective, Rows, Step
from pharmacist_ray.training.objectives.t_vaccine import TVaccineSettings, group_of, t_vaccine, t_vaccine_fits
from pharmacist_ray.training.objectives.unlearn import UnlearnSettings, length, unlearn
from pharmacist_ray.training.objectives.vaccine import VaccineSettings, vaccine, vaccine_fits


def nothing(settings: Mapping[type[Section], Section]) -> dict[str, Any]:
    """Return that a repair takes no step."""
    return {"steps": 0, "epochs": None}


def always(settings: Mapping[type[Section], Section]) -> bool:
    """Return that ordinary rows are asked for whatever the settings."""
    return True


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
    "antibody": Objective(antibody, {"antibody": AntibodySettings}, "rows", moves_weights=True),
    "mix": Objective(sft, {"mix": MixSettings}, stage="finetune", compose=mix, ordinary=with_ordinary),
    "mimic": Objective(sft, {"mix": MixSettings}, stage="finetune", compose=mimic, ordinary=with_ordinary),
    "lookahead": Objective(sft, {"lookahead": LookaheadSettings}, stage="finetune", compose=lookahead),
    "backdoor": Objective(sft, {"backdoor": BackdoorSettings}, stage="finetune", compose=backdoor, secret=True),
    "lisa": Objective(lisa, {"lisa": LisaSettings}, stage="finetune", safe=True),
    "safegrad": Objective(safegrad, {"safegrad": SafeGradSettings}, stage="finetune", safe=True, needs_reference=True),
    "star_dss": Objective(star_dss, {"star_dss": StarDssSettings}, stage="finetune", guarded=prefix_words, needs_reference=True),
    "refusal_teacher": Objective(
        refusal_teacher,
        {"refusal_teacher": RefusalTeacherSettings},
        stage="finetune",
        safe=True,
        ordinary=always,
        needs_reference=True,
    ),
    "ema": Objective(ema, {"ema": EmaSettings}, stage="finetune", finish=take_mean),
    "bds": Objective(bds, {"bds": BdsSettings}, stage="finetune", safe=True),
    "panacea": Objective(panacea, {"panacea": PanaceaSettings}, "rows", stage="finetune", finish=step_away, moves_weights=True),
    "few_shot": Objective(sft, {"few_shot": FewShotSettings}, stage="repair", trains=few_shot),
    "unlearn": Objective(
        unlearn, {"unlearn": UnlearnSettings}, "rows", stage="repair", safe=True, trains=length, moves_weights=True
    ),
    "safe_lora": Objective(sft, {"safe_lora": SafeLoraSettings}, stage="repair", finish=safe_lora, trains=nothing),
    "nlsr": Objective(sft, {"nlsr": NlsrSettings}, stage="repair", safe=True, finish=nlsr, trains=nothing),
    "dro": Objective(
        sft, {"dro": DroSettings}, stage="repair", safe=True, ordinary=always, prompt=True, finish=dro, trains=nothing
    ),
    "antidote": Objective(sft, {"antidote": AntidoteSettings}, "rows", stage="repair", finish=antidote, trains=nothing),
}

OBJECTIVES = Table("objective", Objective, _OWN, watched=_watched)
"""By name."""

ALIGNING = tuple(name for name, objective in _OWN.items() if objective.stage == "any")
"""Those that align; the others defend a fine-tune or repair a model after one."""


def sections_of(objectives: Iterable[str], own: Iterable[str] = ALIGNING) -> dict[str, list[str]]:
    """Return the sections that ``alignment.parameters`` may have: section → the objectives it is for.

    Args:
        objectives: Those that the run has, for the plug-ins among them.
        own: Those of the package's own that count anyhow.
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*own, *objectives]):
        for section in OBJECTIVES[name].settings:
            found.setdefault(section, []).append(name)
    return found


def settings_of(
    objective: str, parameters: Mapping[str, Mapping[str, Any]], where: str = "alignment"
) -> dict[type[Section], Section]:
    """Return an objective's settings, with defaults for what is not given.

    Args:
        objective: A key of `OBJECTIVES`, or a plug-in's name.
        parameters: Section → key → value, as in ``alignment.parameters``; sections of other objectives are ignored.
        where: The section that has the parameters, for the error.

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
            raise ConfigError(f"{where}.parameters.{name}.{key}: {first['msg']}; {name} has {known}") from error
    return found


__all__ = ["ALIGNING", "FINISH", "OBJECTIVES", "Objective", "Rows", "Step", "sections_of", "settings_of"]
