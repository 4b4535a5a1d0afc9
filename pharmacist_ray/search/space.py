"""The space of a search: from dotted keys and their values to the configuration of a trial, all of it checked before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from ray import tune

from pharmacist_ray.config.load import assign, located, parse_config
from pharmacist_ray.config.schema import AttackConfig, Config, EarlyConfig, RangeConfig, SearchConfig
from pharmacist_ray.config.scoring import arm_of
from pharmacist_ray.errors import ConfigError, unknown_name
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check
from pharmacist_ray.training.objectives import sections_of, settings_of

Point = dict[str, Any]
"""Dotted key → value: what a trial has otherwise than the configuration."""


class Space(Protocol):
    """What points are drawn from: the section of a search, or of the red team."""

    @property
    def space(self) -> dict[str, list[Any] | RangeConfig]:
        """Key → the values to try, or a range."""

    @property
    def algorithm(self) -> str:
        """``grid`` takes every combination, ``random`` draws; with any other one the points are not known beforehand."""

    @property
    def trials(self) -> int | None:
        """How many are drawn."""

    @property
    def seed(self) -> int:
        """Of the draws."""


NOT_VARIED = {
    "run_dir": "trials share it",
    "search": "it describes the search",
    "resources": "trials share them",
    "tracking": "it changes no number",
    "comparison.selections": "vary selection.scorer, or set search.selection",
    "comparison.defences": "vary alignment.objective",
}
"""Keys that no trial can have for itself, and why, or what to do."""


def section(config: Config) -> SearchConfig:
    """Return the search section.

    Raises:
        ConfigError: There is none.
    """
    if config.search is None:
        raise ConfigError(
            "there is no `search` section in the configuration; give one, for example search='{space: {selection.ratio: [0.2, 0.4]}}'"
        )
    return config.search


def trial_config(config: Config, point: Mapping[str, Any]) -> Config:
    """Return the configuration of a trial: one selection, one defence, the seeds and attacks of ``config``, and the point's values.

    Args:
        config: The search's configuration.
        point: What the trial has otherwise.

    Raises:
        ConfigError: A key is unknown or a value is wrong.
    """
    search = section(config)
    values = config.model_dump(mode="json", exclude={"search"})
    try:
        for key, value in point.items():
            assign(values, key, value)
        arm = search.selection or arm_of(values["selection"]["scorer"])
        values["comparison"] |= {"selections": [arm], "defences": []}
    except (TypeError, KeyError):
        pass  # a whole section was replaced by something else: validation says what
    except ConfigError as error:
        raise ConfigError(f"search.space: {str(error).removeprefix('override ')}") from None
    return located(parse_config(values, where=f"search.space ({described(point)})" if point else "search"))


def resolved(config: Config, point: Mapping[str, Any]) -> tuple[Point, Config]:
    """Return a point with its values as the configuration holds them (``"1e-4"``, which YAML takes for text, is a number)."""
    point = {
        key: float(v) if isinstance(v, str) and re.fullmatch(r"-?\d+(\.\d*)?[eE]-?\d+", v) else v for key, v in point.items()
    }
    trial = trial_config(config, point)
    values = trial.model_dump(mode="json")
    return {key: _look_up(values, key) for key in point}, trial


def early_attack(early: EarlyConfig, trial: Config) -> AttackConfig:
    """Return the attack after which a trial is looked at early.

    Args:
        early: What is looked at.
        trial: The trial's configuration.

    Raises:
        ConfigError: The trial has no attack of that name.
    """
    names = {attack.name: attack for attack in trial.attacks}
    name = early.attack or next(iter(names))
    if name not in names:
        raise unknown_name("attack of search.early.attack", name, list(names))
    return names[name]


def trial_name(point: Point) -> str:
    """Return eight digits that stand for a settled point, whatever its place in the search."""
    return digest(point)[:8]


def described(point: Mapping[str, Any]) -> str:
    """Return a point in words."""
    return ", ".join(f"{key}={value}" for key, value in point.items())


def listed(search: Space) -> list[Point]:
    """Return the points that are known beforehand: all of a grid, or the draws of a random search, every point once."""
    if search.algorithm == "grid":
        lists = [[(key, value) for value in choice] for key, choice in search.space.items() if isinstance(choice, list)]
        return [dict(pairs) for pairs in itertools.product(*lists)]
    if search.algorithm != "random":
        return []
    draws, found = domains(search), dict[str, Point]()
    generator = np.random.default_rng(search.seed)
    for _ in range(100 * (search.trials or 0)):
        drawn = {key: domain.sample(random_state=generator) for key, domain in draws.items()}
        point = decoded(search, drawn)
        found.setdefault(digest(point), point)
        if len(found) == search.trials:
            break
    return list(found.values())


def domains(search: Space) -> dict[str, Any]:
    """Return what Ray Tune draws from; a list is drawn by place, for Optuna knows only plain values."""
    return {
        key: tune.choice(list(range(len(choice)))) if isinstance(choice, list) else _domain(choice)
        for key, choice in search.space.items()
    }


def decoded(search: Space, drawn: Mapping[str, Any]) -> Point:
    """Return a point from what was drawn for it."""
    point = {}
    for key, choice in search.space.items():
        value = drawn[key]
        if isinstance(choice, list):
            point[key] = choice[int(value)]
        else:
            point[key] = int(value) if choice.whole else float(f"{value:.12g}")
    return point


def drawn_from(search: Space, drawn: Mapping[str, Any]) -> bool:
    """Return whether something was drawn from this space, by `domains`."""
    return drawn.keys() == search.space.keys() and all(
        drawn[key] in range(len(choice)) if isinstance(choice, list) else choice.low <= drawn[key] <= choice.high
        for key, choice in search.space.items()
    )


def check_space(run: Run) -> list[Point]:
    """Find every mistake in the space that can be known before work begins, and return the `listed` points.

    Every listed point is checked; where the points are drawn later on, every value and both ends of every range, one at a time.

    Args:
        run: The search's own run.

    Raises:
        ConfigError: See `trial_config` and `check`; or there is nothing to judge a trial by.
    """
    config, search = run.config, section(run.config)
    if config.evaluation is None or not config.attacks:
        raise ConfigError(
            "a search judges trials by harmful score after attacks: give `evaluation` and at least one of `attacks`"
        )
    for key in search.space:
        for prefix, why in NOT_VARIED.items():
            if key == prefix or key.startswith(f"{prefix}."):
                raise ConfigError(f"search.space: '{key}' cannot be varied: {why}")
    points = listed(search)
    for point in points or probes(search):
        settled_point, trial = resolved(config, point)
        try:
            check(Run(trial, base=run))
            early_attack(search.early, trial)
            sections = sections_of(trial.objectives)
            for name, parameters in trial.alignment.parameters.items():
                for objective in sections[name]:
                    settings_of(objective, {name: parameters})
        except ConfigError as error:
            raise ConfigError(f"search.space ({described(settled_point)}): {error}") from None
    return points


def probes(search: Space) -> Iterator[Point]:
    """Yield the first value of every key, and that with each other value or end, one at a time."""
    values = {key: choice if isinstance(choice, list) else list(choice.ends) for key, choice in search.space.items()}
    first = {key: one[0] for key, one in values.items()}
    yield first
    for key, one in values.items():
        yield from (first | {key: value} for value in one[1:])


def _domain(choice: RangeConfig) -> Any:
    low, high, step = choice.low, choice.high, choice.step
    if choice.whole:  # Ray leaves the upper end out, but not of multiples
        if step is not None:
            return tune.qrandint(low, high, step)
        return (tune.lograndint if choice.log else tune.randint)(low, high + 1)
    if step is not None:
        return tune.quniform(low, high, step)
    return (tune.loguniform if choice.log else tune.uniform)(low, high)


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
