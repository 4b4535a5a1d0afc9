"""What a cascade will spare, reckoned before it runs: arithmetic a row, and how many rows the model has to see in any case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pharmacist_ray.config.schema import Config
from pharmacist_ray.curation.cascade import MEMBERS
from pharmacist_ray.curation.missed import fewest_members
from pharmacist_ray.doctor.estimate import Item, total
from pharmacist_ray.doctor.passes import fit_memory, score_memory
from pharmacist_ray.doctor.shape import Shape


@dataclass(frozen=True)
class Spared:
    """What a cascade costs, as shares of scoring every row by the model."""

    proxy: float
    """The proxy's pass over all rows: its weights over the model's, for arithmetic a token is two or four operations a weight."""
    least: float
    """Rows that the model sees in any case: as many as are kept, and the sample's others."""

    def cost(self, seen: float) -> float:
        """Return the cost where the model sees a share of the rows."""
        return self.proxy + seen

    @property
    def pays_below(self) -> float:
        """Share of the rows below which a cascade costs less than none; 0 where it never does."""
        return max(0.0, 1 - self.proxy)


def spared(model: Shape, proxy: Shape, kept: float, sampled: float) -> Spared:
    """Return what a cascade costs.

    Args:
        model: The model to harden.
        proxy: The proxy.
        kept: Share of the rows that is kept.
        sampled: Share of the rows that is drawn at random.
    """
    weights = [shape.parameters - shape.embedding + shape.adapter for shape in (proxy, model)]
    return Spared(weights[0] / weights[1], kept + sampled * (1 - kept))


def cascade_lines(config: Config, of_proxy: Config, model: Shape, proxy: Shape, rows: int, made: dict[str, Any]) -> Iterator[str]:
    """Yield what the doctor says of a cascade, line by line.

    Args:
        config: The run's configuration, its precision resolved.
        of_proxy: That of its proxy.
        model: The model to harden.
        proxy: The proxy.
        rows: Candidates; 0 where nobody has counted them yet.
        made: What a finished cascade found; empty where there is none.
    """
    settings, selection = config.scoring.proxy, config.selection
    assert settings is not None
    few = of_proxy.model.quantization
    bits = f" in {few.removesuffix('bit')} bits, which spare memory and no arithmetic" if few else ""
    held = f"{_gib(score_memory(proxy, of_proxy))} per actor, {_gib(fit_memory(proxy, of_proxy))} per worker in fit's directions"
    yield f"the proxy has {proxy.parameters:,} parameters in {proxy.layers} layer{'s' * (proxy.layers != 1)}{bits}: {held}"
    kept = selection.ratio if selection.ratio is not None else (min(1.0, (selection.count or 1) / rows) if rows else 0.0)
    sample = settings.sample or (MEMBERS / kept if kept else 0.0)
    one = spared(model, proxy, kept, min(1.0, sample / rows) if rows else 0.0)
    if kept:
        also = ", and the sample" if rows else ""
        yield (
            f"its pass costs {one.proxy:.0%} of the model's, which sees at least {one.least:.0%} of the rows (what is kept{also}): at best "
            f"scoring costs {one.cost(one.least):.0%} of what it does without a proxy, and it pays as long as the model sees fewer than "
            f"{one.pays_below:.0%}"
        )
    if made:
        seen = made["seen"] / max(1, made["candidates"])
        yield f"in the scores that are there it saw {seen:.0%}, which costs {one.cost(seen):.0%}"
    if kept and one.cost(one.least) >= 1:
        yield "warning: this proxy spares nothing: keep fewer rows, take a smaller proxy, or leave scoring.proxy out"
    members, fewest = sample * kept, fewest_members(settings.miss)
    if kept and members < fewest:
        yield (
            f"warning: a sample of {sample:,.0f} rows has about {members:,.0f} of the model's top rows, and it takes {fewest} to leave any "
            f"row out at scoring.proxy.miss={settings.miss:g}: raise scoring.proxy.sample"
        )


def _gib(items: list[Item]) -> str:
    return f"{total(items) / 2**30:.1f} GiB"
