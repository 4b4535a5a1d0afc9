from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param

from pharmacist_ray.config.schema import LoraConfig, TrainConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.load import add_lora, load_model
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from pharmacist_ray.training.engine import build_engine, deepspeed_config, sharded_loading
from pharmacist_ray.training.weights import perturbed_weights, step_norm
from tests.two_workers import TwoWorkers


def _model(folder: str, weights: str) -> Any:
    model = load_model(folder)
    if weights == "full":
        return model.requires_grad_(True)
    model = add_lora(model, LoraConfig(r=4), seed=0)
    with torch.no_grad():  # a B of zero would hide what happens to A
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _slice(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows])


def _trained(model: Any) -> list[torch.Tensor]:
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found.append(parameter.detach().clone())
    return found


def _by_torch(folder: str, weights: str, batches: list[Batch], train: TrainConfig, passes: int) -> list[torch.Tensor]:
    """The same steps by PyTorch alone, on the whole batch."""
    model = _model(folder, weights)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    for batch in batches:
        optimizer.zero_grad()
        for number in range(passes):
            (per_sample_nll(model, batch).mean() * (1 + number)).backward()
        if train.clip:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
    return _trained(model)


def _by_engine(
    folder: str, weights: str, batches: list[Batch], train: TrainConfig, ranks: Ranks, passes: int
) -> list[torch.Tensor]:
    with sharded_loading(train, ranks.workers):
        model = _model(folder, weights)
    engine = build_engine(model, train, ranks)
    engine.train()
    size = train.batch_size // (ranks.workers * train.accumulation)
    for batch in batches:
        for first in range(ranks.rank * size, train.batch_size, ranks.workers * size):
            for number in range(passes):
                part = _slice(batch, slice(first, first + size))
                engine.backward(per_sample_nll(engine, part).mean() * (1 + number))
        engine.step()
    result = _trained(engine.module)
    engine.destroy()
    return result


# Backward passes a micro-batch; several before one step are what ZeRO 1 and 2 lose in DeepSpeed's own accumulation.
CASES = [
    (weights, stage, accumulation, clip, passes)
    for weights in ("lora", "full")
    for stage in (0, 1, 2, 3)
    for accumulation, clip, passes in ((1, 0.0, 1), (1, 0.0, 3), (2, 0.0, 1), (2, 0.05, 2))
]


def _compare(payload: tuple[str, list[Batch]], ranks: Ranks) -> list[tuple[Any, float]]:
    folder, batches = payload
    found = []
    for case in CASES if ranks.workers > 1 else CASES[::5]:
        weights, stage, accumulation, clip, passes = case
        train = TrainConfig(
            batch_size=8,
            accumulation=accumulation,
            lr=0.01,
            clip=clip,
            weight_decay=0.1,
            zero_stage=stage,
            weights=weights,
            steps=3,
        )
        start = _trained(_model(folder, weights))
        expected = _by_torch(folder, weights, batches, train, passes)
        ours = _by_engine(folder, weights, batches, train, ranks, passes)
        moved = sum(float((a - b).square().sum()) for a, b in zip(expected, start, strict=True)) ** 0.5
        off = sum(float((a - b).square().sum()) for a, b in zip(expected, ours, strict=True)) ** 0.5
        found.append((case, off / moved))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_the_applied_update_is_that_of_plain_pytorch_on_the_whole_batch(
    workers: int, two_workers: TwoWorkers, model_folder: Path, batch_of: Callable[..., Batch]
) -> None:
    work = (str(model_folder), [batch_of(8, seed=seed) for seed in range(3)])
    found = _compare(work, current_ranks()) if workers == 1 else two_workers(_compare, work)
    assert len(found) == (len(CASES) if workers > 1 else len(CASES[::5]))
    # Adam divides by the root of tiny second moments, so rounding shows more in its step than in a gradient.
    assert {case: error for case, error in found if error > 1e-5} == {}


def test_gradient_clipping_is_always_written_because_the_default_of_deepspeed_is_not_off() -> None:
    assert deepspeed_config(TrainConfig(clip=0.0, zero_stage=1), 1)["gradient_clipping"] == 0.0
    assert deepspeed_config(TrainConfig(clip=0.3, zero_stage=1), 1)["gradient_clipping"] == 0.3
    assert (
        deepspeed_config(TrainConfig(clip=0.3, zero_stage=0), 1)["gradient_clipping"] == 0.0
    )  # build_engine clips, and keeps the norm


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_reported_norm_is_that_of_the_gradient_before_clipping(
    stage: int, model_folder: Path, batch_of: Callable[..., Batch]
) -> None:
    batch, ranks = batch_of(8), current_ranks()
    model = _model(str(model_folder), "lora")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(per_sample_nll(model, batch).mean(), parameters)
    engine = build_engine(model, TrainConfig(batch_size=8, clip=1e-3, zero_stage=stage), ranks)
    engine.backward(per_sample_nll(engine, batch).mean())
    engine.step()
    assert step_norm(engine) == pytest.approx(float(torch.nn.utils.get_total_norm(expected)), rel=1e-4)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_moved_weights_are_seen_inside_and_gone_to_the_bit_afterwards(
    stage: int, weights: str, model_folder: Path, batch_of: Callable[..., Batch]
) -> None:
    batch, ranks = batch_of(8), current_ranks()
    train = TrainConfig(batch_size=8, zero_stage=stage, weights=weights)
    with sharded_loading(train, 1):
        model = _model(str(model_folder), weights)
    engine = build_engine(model, train, ranks)
    before = _trained(engine.module)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(tensor.shape, generator=generator) for tensor in before]
    plain = _model(str(model_folder), weights)
    with torch.no_grad():
        for parameter, step in zip((p for p in plain.parameters() if p.requires_grad), direction, strict=True):
            parameter += 0.1 * step
        expected = per_sample_nll(plain, batch)
        with contextlib.suppress(KeyError), perturbed_weights(engine, direction, 0.1):
            assert torch.allclose(per_sample_nll(engine.module, batch), expected, atol=1e-5)
            raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, _trained(engine.module), strict=True))
    engine.destroy()


def test_zero_3_loads_a_model_that_is_whole_on_no_worker(model_folder: Path) -> None:
    with sharded_loading(TrainConfig(zero_stage=3), 1):
        model = load_model(model_folder)
    assert all(parameter.numel() == 0 and parameter.ds_numel > 0 for parameter in model.parameters())
    assert all(parameter.numel() > 0 for parameter in load_model(model_folder).parameters())  # the setting does not linger


def test_zero_3_loads_a_bfloat16_base_in_bfloat16_and_trains_a_float32_adapter_on_it(
    model_folder: Path, batch_of: Callable[..., Batch]
) -> None:
    train = TrainConfig(batch_size=8, zero_stage=3, lr=1e-2)
    with sharded_loading(train, 1, "bfloat16"):
        model = load_model(model_folder, dtype="bfloat16")
    engine = build_engine(add_lora(model, LoraConfig(r=2), seed=0), train, current_ranks(), dtype="bfloat16")
    engine.train()
    kinds = {(parameter.requires_grad, parameter.ds_tensor.dtype) for parameter in engine.module.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    losses = []
    for _ in range(6):
        loss = per_sample_nll(engine, batch_of(8)).mean()
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    engine.destroy()
    assert losses[-1] < losses[0] - 0.05


def test_the_optimizer_lives_in_cpu_memory_if_asked_to(model_folder: Path, batch_of: Callable[..., Batch]) -> None:
    results = []
    for stage, offload in ((0, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")):
        train = TrainConfig(batch_size=8, zero_stage=stage, offload=offload, lr=0.01, clip=0.1)
        with sharded_loading(train, 1):
            model = _model(str(model_folder), "lora")
        engine = build_engine(model, train, current_ranks())
        for seed in range(2):
            engine.backward(per_sample_nll(engine, batch_of(8, seed=seed)).mean())
            engine.step()
        results.append(_trained(engine.module))
        engine.destroy()
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_bfloat16_weights_have_float32_masters(stage: int, model_folder: Path, batch_of: Callable[..., Batch]) -> None:
    train = TrainConfig(batch_size=8, zero_stage=stage, weights="full", lr=1e-5, clip=1.0)
    with sharded_loading(train, 1, "bfloat16"):
        model = load_model(model_folder, dtype="bfloat16").requires_grad_(True)
    engine = build_engine(model, train, current_ranks(), dtype="bfloat16")
    masters = [safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]
    for seed in range(2):
        engine.backward(per_sample_nll(engine, batch_of(8, seed=seed)).mean())
        engine.step()
    after = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in after} == {torch.float32}
    # A step of 1e-5 is far below bfloat16's resolution, and is not lost.
    assert all(0 < float((a - b).abs().max()) < 1e-4 for a, b in zip(masters, after, strict=True))
    assert step_norm(engine) is not None
    engine.destroy()
