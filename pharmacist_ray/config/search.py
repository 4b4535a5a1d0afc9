"""Which settings are tried against each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.section import Count, Section, Share


class RangeConfig(Section):
    """Numbers between two ends, both included; whole numbers if the ends are."""

    low: int | float
    """The lowest number."""
    high: int | float
    """The highest number."""
    log: bool = False
    """Draw evenly on the logarithmic scale."""
    step: int | float | None = None
    """Draw multiples of this only."""

    @model_validator(mode="after")
    def _can_be_drawn_from(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"a range needs low < high, got {self.low} and {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a range with log=true needs low above 0 and no step")
        if self.step is not None and (self.step <= 0 or any(abs(x / self.step - round(x / self.step)) > 1e-9 for x in self.ends)):
            raise ValueError(f"the ends of a range must be multiples of its step, got {self.low}, {self.high} and {self.step}")
        return self

    @property
    def ends(self) -> tuple[int | float, int | float]:
        """Low and high."""
        return self.low, self.high

    @property
    def whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return all(isinstance(one, int) for one in (*self.ends, 0 if self.step is None else self.step))


class EarlyConfig(Section):
    """The early look at a trial: the harmful score after one attack of the suite, on a part of the harmful prompts."""

    attack: str | None = None
    """Name of the attack; default: the first of `attacks`. It should tell settings apart: after a weak one all score alike."""
    prompts: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Share of the harmful prompts that are asked, the same ones in every trial (ours)."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """ASHA keeps a trial that is among the best 1/reduction_factor of those looked at before it (Ray Tune: 4; ours keeps half)."""


class SearchConfig(Section):
    """Which settings `pharmacist search` tries. A trial is a selection, aligned, attacked by every attack, and evaluated."""

    space: Annotated[dict[str, list[Any] | RangeConfig], Field(min_length=1)]
    """Dotted key of this file → the values to try, or `{low: 0.1, high: 1.0, log: true}` to draw from (not for grid)."""
    algorithm: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    """`grid` tries every combination, `random` draws; `tpe` and `nsga2` are Optuna's, with four objectives: worst harmful score,
    task accuracy, over-refusal and seconds of alignment."""
    trials: Count | None = None
    """How many settings are tried; grid tries all."""
    concurrent: Count = 1
    """Trials at the same time; each needs the workers and actors of `resources`."""
    seed: int = 0
    """Seed of the draws."""
    selection: str | None = None
    """What trials align on: `all`, or the name of a scorer; default: selection.scorer."""
    tolerance: Share = 0.05
    """A recommended setting loses at most this much task accuracy to the most accurate trial, and refuses at most this share more
    of the ordinary prompts than the trial that refuses the fewest (ours)."""
    time_tolerance: Annotated[float, Field(ge=0.0)] = 0.5
    """Alignment times that differ by at most this share count as equal on the Pareto front (ours: on a shared machine the same number
    of steps took up to 1.35 times as long). On machines of your own, 0.1 may do; 0 compares seconds as they are."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops trials whose early look is bad, by Ray Tune's asynchronous successive halving; grid and random only. Look at
    `pharmacist search --agreement` first: it says whether the early look ranks trials as their final score does."""
    early: EarlyConfig = EarlyConfig()

    @model_validator(mode="after")
    def _space_fits_the_algorithm(self) -> SearchConfig:
        ranges = [key for key, choice in self.space.items() if isinstance(choice, RangeConfig)]
        if self.algorithm == "grid" and ranges:
            raise ValueError(f"search.algorithm=grid needs lists of values, but search.space.{ranges[0]} is a range")
        if (self.algorithm == "grid") != (self.trials is None):
            what = "search.trials must be null: a grid tries every combination" if self.trials else "search.trials must be set"
            raise ValueError(f"with search.algorithm={self.algorithm}, {what}")
        if self.scheduler == "asha" and self.algorithm in ("tpe", "nsga2"):
            raise ValueError(
                f"search.scheduler=asha stops trials by one number, but search.algorithm={self.algorithm} weighs four against each "
                "other; set search.scheduler=none, or algorithm=grid or random"
            )
        check_choices(self.space, "search.space")
        return self


def check_choices(space: dict[str, list[Any] | RangeConfig], where: str) -> None:
    """Refuse a list without values, or with one twice.

    Raises:
        ValueError: Names the key.
    """
    for key, choice in space.items():
        if isinstance(choice, list) and (not choice or any(one in choice[:place] for place, one in enumerate(choice))):
            raise ValueError(f"{where}.{key} must be a list of at least one value, all different, got {choice}")
