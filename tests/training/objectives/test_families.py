"""Every objective on every family of models: what does not fit is said before, and what does is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pharmacist_ray.config.schema import LoraConfig, TrainConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import PharmacistError
from pharmacist_ray.models.load import add_lora, empty_model, load_model
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import current_ranks
from pharmacist_ray.training.engine import build_engine
from pharmacist_ray.training.objectives import OBJECTIVES, settings_of
from tests import families
from tests.families import FAMILIES
from tests.training.objectives.conftest import Bench

SHORT = "Qwen3-MoE"
"""The family that the short suite has."""
PARAMETERS = {"t_vaccine": {"layers": 1, "probe_rows": 2}}


@pytest.fixture
def bench_of(family_folder: Callable[[str], Path]) -> Iterator[Callable[[str, str], Bench]]:
    """Return a maker of benches: bench_of('Qwen3', 'booster')."""
    engines: list[Any] = []

    def make(family: str, objective: str) -> Bench:
        train = TrainConfig(batch_size=4, lr=1e-2, clip=0.0)
        model = add_lora(load_model(family_folder(family)), LoraConfig(r=2), seed=0)
        engines.append(build_engine(model, train, current_ranks(), group=OBJECTIVES[objective].group))
        engines[-1].train()
        return Bench(engines[-1], train, objective)

    yield make
    for engine in engines:
        engine.destroy()


@pytest.mark.parametrize("objective", families.OBJECTIVES)
@pytest.mark.parametrize("family", [name if name == SHORT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_an_objective_trains_a_family_or_says_before_that_it_cannot(
    family: str,
    objective: str,
    family_folder: Callable[[str], Path],
    bench_of: Callable[[str, str], Bench],
    batch_of: Callable[..., Batch],
) -> None:
    settings = settings_of(objective, PARAMETERS)
    fits = OBJECTIVES[objective].fits
    if message := FAMILIES[family].cannot.get(objective):
        assert fits is not None
        with pytest.raises(PharmacistError) as caught:
            fits(empty_model(family_folder(family)), settings)
        assert str(caught.value) == message
        return
    if fits is not None:
        fits(empty_model(family_folder(family)), settings)
    bench = bench_of(family, objective)
    before, batch, harmful = bench.weights(), batch_of(4, seed=1), batch_of(4, seed=2)
    for number in range(2):
        taken = bench.take(batch, harmful, *settings.values(), number=number)
        assert all(map(math.isfinite, [*taken.losses, *taken.step.measured.values()]))
    moved = {name for name, weight in bench.weights().items() if not torch.equal(weight, before[name])}
    assert all(torch.isfinite(weight).all() for weight in bench.weights().values())
    adapter = {name for name in before if "lora_" in name}
    if objective == "t_vaccine":  # one layer of the two at a time
        assert moved
        assert moved < adapter
    else:
        assert moved == adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_loss_is_that_of_a_plain_loop(
    family: str, bench_of: Callable[[str, str], Bench], batch_of: Callable[..., Batch]
) -> None:
    bench, batch = bench_of(family, "sft"), batch_of(4)
    model, loss = bench.engine.module, 0.0
    for row in range(len(batch)):
        length = int(batch.attention_mask[row].sum())
        ids, labels = batch.input_ids[row, :length], batch.labels[row, :length]
        logits = model(input_ids=ids[None]).logits[0].float().detach()
        scored = [int(place) for place in range(1, length) if labels[place] != -100]
        nll = [float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, ids[place]]) for place in scored]
        loss += sum(nll) / len(nll) / len(batch)
    taken = bench.take(batch)
    assert taken.losses == pytest.approx([loss], rel=1e-4)
    assert all(gradient.abs().max() > 0 for name, gradient in taken.gradients.items() if "lora_B" in name)
    assert float(per_sample_nll(bench.engine, batch).mean().detach()) < loss  # one step down
