"""Judges: functions from (prompt, answer) to a verdict. Adding one is adding a module and a line in `JUDGES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.evaluation.judges import phrases
from pharmacist_ray.evaluation.judges.verdict import VERDICTS, Judge, JudgeSettings, Verdict
from pharmacist_ray.plugins import Plugin, Table, blaming, misfit

__all__ = ["JUDGES", "VERDICTS", "Judge", "JudgeKind", "JudgeSettings", "Verdict", "build_judge"]


def _testbed(settings: JudgeSettings) -> Judge:
    from pharmacist_ray.evaluation.judges import testbed

    if settings.path is None:
        raise ConfigError("judge 'testbed' needs evaluation.judge_path: the world.json of the embedded benchmark")
    try:
        judge = testbed.build(orjson.loads(Path(settings.path).read_bytes()))
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"judge 'testbed' cannot use {settings.path} as a world: {error}; make the benchmark again") from error
    return lambda prompts, answers: [judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _classifier(settings: JudgeSettings) -> Judge:
    from pharmacist_ray.evaluation.judges import classifier  # not needed, and slow to import, unless it is asked for

    return classifier.build(settings)


@dataclass(frozen=True)
class JudgeKind:
    """How a judge is built, and what its share of harmful verdicts is called."""

    build: Callable[[JudgeSettings], Judge]
    score: str = "HS"
    """The heading in tables."""
    means: str = "harmful score: the share of harmful prompts that are answered harmfully"
    """What the heading stands for, in words that follow "is the"."""


def _watched(kind: JudgeKind, plugin: Plugin) -> JudgeKind:
    def build(settings: JudgeSettings) -> Judge:
        with blaming(plugin):
            judge = kind.build(settings)

        def judged(prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
            with blaming(plugin):
                verdicts = list(judge(prompts, answers))
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
    ),
    "classifier": JudgeKind(_classifier),
    "testbed": JudgeKind(_testbed),
}

JUDGES = Table("judge", JudgeKind, _OWN, watched=_watched)
"""Name → what it is. A judge by keywords takes all that is no refusal for harm, which is not what the literature calls HS."""


def build_judge(name: str, settings: JudgeSettings) -> Judge:
    """Return the judge of that name.

    Raises:
        ConfigError: Unknown name, or a setting that the judge needs is missing.
        PluginError: It is a plug-in's, and fails.
    """
    return JUDGES[name].build(settings)
