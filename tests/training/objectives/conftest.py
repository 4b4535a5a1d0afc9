"""One optimiser step of an objective around a real DeepSpeed engine of one process, as the loop takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pharmacist_ray.config.schema import LoraConfig, Section, TrainConfig
from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.runtime.ranks import current_ranks
from pharmacist_ray.training.engine import build_engine
from pharmacist_ray.training.objectives import OBJECTIVES, Step

Tensors = dict[str, torch.Tensor]


@dataclass
class Taken:
    """What a step did."""

    step: Step
    losses: list[float]
    gradients: Tensors
    """Accumulated over the micro-batches, before clipping; empty where ZeRO has taken them away."""


@dataclass
class Bench:
    """A model under an objective."""

    engine: Any
    train: TrainConfig
    objective: str
    seed: int = 3
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def step(
        self,
        batch: Batch,
        harmful: Batch | None = None,
        *settings: Section,
        number: int = 0,
        safe: Batch | None = None,
        ordinary: Batch | None = None,
        rows: Sequence[int] = (),
        **more: Any,
    ) -> Step:
        """Return a step on whole batches, cut into ``train.accumulation`` micro-batches; ``rows`` are their numbers in the set."""
        count = self.train.accumulation
        size = len(batch) // count
        return Step(
            number=number,
            engine=self.engine,
            ranks=current_ranks(),
            batches=cut(batch, count),
            positions=[list(range(index * size, (index + 1) * size)) for index in range(count)],
            seed=self.seed,
            settings={type(one): one for one in settings},
            harmful=cut(harmful, count) if harmful else (),
            state=self.state,
            safe=cut(safe, count) if safe else (),
            ordinary=cut(ordinary, count) if ordinary else (),
            rows=[list(rows[index * size : (index + 1) * size]) for index in range(count)],
            **more,
        )

    def take(
        self, batch: Batch, harmful: Batch | None = None, *settings: Section, number: int = 0, apply: bool = True, **more: Any
    ) -> Taken:
        """Take one step; see `step`."""
        step = self.step(batch, harmful, *settings, number=number, **more)
        losses = []
        for loss in OBJECTIVES[self.objective].run(step):
            losses.append(float(loss.detach()))
            self.engine.backward(loss)
        found = {name: p.grad.clone() for name, p in step.trained.items() if p.grad is not None}
        if apply:
            for group in self.engine.optimizer.param_groups:
                if group["name"] in step.frozen:
                    group["lr"] = 0.0
            self.engine.step()
        return Taken(step, losses, found)

    def weights(self) -> Tensors:
        """Return copies of all weights."""
        return {name: p.detach().clone() for name, p in self.engine.module.named_parameters()}


def cut(batch: Batch, count: int) -> list[Batch]:
    """Return micro-batches, each as wide as its longest row, as they come from a renderer."""
    if count == 1:
        return [batch]
    size, found = len(batch) // count, []
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        width = int(batch.attention_mask[rows].sum(1).max())
        found.append(Batch(batch.input_ids[rows, :width], batch.attention_mask[rows, :width], batch.labels[rows, :width]))
    return found


@pytest.fixture
def adapted(tiny: Callable[..., LlamaForCausalLM]) -> Callable[..., Any]:
    """Return a maker of tiny models with an adapter whose B is not zero: adapted(layers=3, dropout=0.2, weights='full')."""

    def make(*, layers: int = 2, dropout: float = 0.0, weights: str = "lora", checkpointing: bool = False) -> Any:
        model: Any = tiny(num_hidden_layers=layers)
        if weights == "full":
            model.requires_grad_(True)
        else:
            model = add_lora(model, LoraConfig(r=4, dropout=dropout), seed=0)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    return make


@pytest.fixture
def bench(adapted: Callable[..., Any]) -> Iterator[Callable[..., Bench]]:
    """Return a maker of benches: bench('booster', accumulation=4, dropout=0.2, lr=0.0); the model is that of `adapted`."""
    engines = []

    def make(
        objective: str, *, accumulation: int = 1, zero_stage: int = 0, lr: float = 1e-2, weight_decay: float = 0.1, **model: Any
    ) -> Bench:
        train = TrainConfig(
            batch_size=8,
            accumulation=accumulation,
            zero_stage=zero_stage,
            lr=lr or 1.0,
            weight_decay=weight_decay,
            clip=0.0,
            weights=model.get("weights", "lora"),
        )
        engine = build_engine(adapted(**model), train, current_ranks(), group=OBJECTIVES[objective].group)
        engine.train()
        if not lr:  # no setting is 0, so the schedule is told
            engine.lr_scheduler.base_lrs = [0.0] * len(engine.lr_scheduler.base_lrs)
            for group in engine.optimizer.param_groups:
                group["lr"] = 0.0
        engines.append(engine)
        return Bench(engine, train, objective)

    yield make
    for engine in engines:
        engine.destroy()


@pytest.fixture
def pair(batch_of: Callable[..., Batch]) -> tuple[Batch, Batch]:
    """Return 8 alignment rows and 8 harmful rows; in the latter only some answer tokens are supervised, as RepNoise's mask leaves."""
    harmful = batch_of(8, seed=11)
    for row in range(8):
        (places,) = (harmful.labels[row] != IGNORE).nonzero(as_tuple=True)
        if len(places) > 2:
            harmful.labels[row, places[1]] = IGNORE
    return batch_of(8, seed=10), harmful


@pytest.fixture
def apart() -> Callable[[Tensors, Tensors], tuple[float, float]]:
    """Return a comparison of two gradients: 1 − cosine, and the relative difference of their lengths."""

    def compare(ours: Tensors, theirs: Tensors) -> tuple[float, float]:
        assert ours.keys() == theirs.keys()
        a, b = (torch.cat([tensors[name].double().flatten() for name in ours]) for tensors in (ours, theirs))
        return float(1 - a @ b / (a.norm() * b.norm())), float((a.norm() / b.norm() - 1).abs())

    return compare


@pytest.fixture
def by_autograd() -> Callable[..., Tensors]:
    """Return plain PyTorch's gradient of a loss with respect to a model's trained parameters, by name."""

    def differentiate(model: Any, loss: torch.Tensor) -> Tensors:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        found: Sequence[torch.Tensor] = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        return dict(zip(names, found, strict=True))

    return differentiate
