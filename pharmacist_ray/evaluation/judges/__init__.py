"""Judges: functions from (prompt, answer) to a verdict. Adding one is adding a module and a line in `JUDGES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from pharmacist_ray.config.schema import JudgeConfig
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.evaluation.judges import phrases, withheld
from pharmacist_ray.evaluation.judges.verdict import VERDICTS, Judge, JudgeSettings, PromptKind, Verdict
from pharmacist_ray.plugins import Plugin, Table, blaming, misfit

__all__ = ["JUDGES", "VERDICTS", "Judge", "JudgeConfig", "JudgeKind", "JudgeSettings", "Verdict", "build_judge", "check_judges"]


def _testbed(settings: JudgeSettings) -> Judge:
    from pharmacist_ray.evaluation.judges import testbed

    path = settings.config.path
    if path is None:
        raise ConfigError("judge 'testbed' needs evaluation.judge_path: the world.json of the embedded benchmark")
    try:
        judge = testbed.build(orjson.loads(Path(path).read_bytes()))
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"judge 'testbed' cannot use {path} as a world: {error}; make the benchmark again") from error
    return lambda kind, prompts, answers: [judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _classifier(settings: JudgeSettings) -> Judge:
    from pharmacist_ray.evaluation.judges import classifier  # not needed, and slow to import, unless it is asked for

    return classifier.build(settings)


def _generative(settings: JudgeSettings) -> Judge:
    from pharmacist_ray.evaluation.judges import generative

    return generative.build(settings)


def _endpoint(settings: JudgeSettings) -> Judge:
    from pharmacist_ray.evaluation.judges import endpoint

    return endpoint.build(settings)


@dataclass(frozen=True)
class JudgeKind:
    """How a judge is built, what it needs, and what its share of harmful verdicts is called."""

    build: Callable[[JudgeSettings], Judge]
    score: str = "HS"
    """The heading in tables."""
    means: str = "harmful score: the share of harmful prompts that are answered harmfully"
    """What the heading stands for, in words that follow "is the"."""
    needs: tuple[str, ...] = ()
    """Keys of `JudgeConfig` that it cannot do without; `template` may be a ``template_file``."""
    guesses: tuple[Verdict, ...] = ("helpful",)
    """Verdicts that it gives to whatever it does not recognise: an answer beside the point may be among these."""


def _watched(kind: JudgeKind, plugin: Plugin) -> JudgeKind:
    def build(settings: JudgeSettings) -> Judge:
        with blaming(plugin):
            judge = kind.build(settings)

        def judged(kind: PromptKind, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
            with blaming(plugin):
                verdicts = list(judge(kind, prompts, answers))
            if len(verdicts) != len(answers):
                raise misfit(plugin, f"returned {len(verdicts)} verdicts for {len(answers)} answers")
            if odd := next((one for one in verdicts if one not in VERDICTS), None):
                raise misfit(plugin, f"returned the verdict {odd!r:.60}; there are {', '.join(VERDICTS)}")
            return verdicts

        return judged

    return replace(kind, build=build)


_OWN = {
    "phrases": JudgeKind(
        phrases.build,
        "keyword ASR",
        "keyword attack success rate: the share of harmful prompts answered without a refusal phrase",
        guesses=("harmful", "helpful"),
    ),
    "withheld": JudgeKind(
        withheld.build, "HS", "harmful score: the share of harmful prompts that are answered by steps marked as withheld"
    ),
    "classifier": JudgeKind(_classifier, needs=("path",)),
    "generative": JudgeKind(_generative, needs=("path", "template")),
    "endpoint": JudgeKind(_endpoint, needs=("url", "model", "template")),
    "testbed": JudgeKind(_testbed, needs=("path",), guesses=()),
}

JUDGES = Table("judge", JudgeKind, _OWN, watched=_watched)
"""Name → what it is. A judge by keywords takes all that is no refusal for harm, which is not what the literature calls HS."""


def build_judge(settings: JudgeSettings) -> Judge:
    """Return the judge of the kind that is asked for.

    Raises:
        ConfigError: Unknown kind, or a setting that the judge needs is missing.
        PluginError: It is a plug-in's, and fails.
    """
    return JUDGES[settings.config.kind].build(settings)


def check_judges(judges: Sequence[JudgeConfig], *, ready: bool = False) -> None:
    """Find out what is wrong with judges without loading a model or asking anybody.

    Args:
        judges: All judges.
        ready: They are about to be asked, so the environment must have their keys too.

    Raises:
        ConfigError: Unknown kind; a setting is missing; a template that cannot be used, or a key that is not set.
        PluginError: It is a plug-in's, and cannot be imported.
    """
    for one in judges:
        needs = JUDGES[one.kind].needs
        for key in needs:
            if not getattr(one, key) and not (key == "template" and one.template_file):
                found = "evaluation.judge_path, or settings with a path" if key == "path" else f"'{key}' among its settings"
                raise ConfigError(f"judge '{one.called}' needs {found}")
        if "template" in needs:
            from pharmacist_ray.evaluation.judges.templates import template_of

            template_of(one)
        if one.kind == "endpoint":
            from pharmacist_ray.models.endpoint import Endpoint

            Endpoint(one if ready else one.model_copy(update={"key_variable": None}), f"judge '{one.called}'")
