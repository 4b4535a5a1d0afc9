"""Hours of stages by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import parse_cluster
from pharmacist_ray.doctor.estimate import setup_of, total
from pharmacist_ray.doctor.hours import Pool, batch_seconds, load_seconds, stage_seconds, step_seconds
from pharmacist_ray.doctor.passes import score_memory
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.doctor.workload import Work, work_of
from pharmacist_ray.pipeline.run import Run

N, A = 70_553_706_496, 103_546_880
TABLE = 128256 * 8192


def pool(text: str, network: float | None = None) -> Pool:
    return Pool(parse_cluster(text, network)[0])


@pytest.fixture
def scored() -> Work:
    return Work(
        rows=1e6, row_bytes=1000, tokens=256, trainings=(), checkpoints=1, forwards=2, directions=0, learnt=0, models=0, prompts=0
    )


def test_a_group_gathers_over_nvlink_within_a_node_and_over_the_network_beyond() -> None:
    assert pool("2x8xH100").link(8) == (0.7 * 450e9, "NVLink")
    assert pool("2x8xH100").link(16) == (0.7 * 400e9, "the network")
    assert pool("2x4xA100-40").link(8) == (0.7 * 25e9, "the network")
    assert pool("8xL40S").link(4) == (0.7 * 20e9, "PCIe")
    assert pool("2x8xH100", 8000e9).link(16) == (0.7 * 450e9, "NVLink")
    mixed = pool("8xH100,8xL4")
    assert (mixed.gpus, mixed.per_node, mixed.slowest, mixed.smallest.memory_gib) == (16, 8, "L4", 22.0)


def test_gathers_of_a_group_that_scores_by_hand(llama: Callable[..., Config], scored: Work) -> None:
    config = llama("70b", "scoring.tokens_per_batch=8192", "scoring.checkpointing=true")
    shape = shape_of(config.model)
    found = {item.what: item.amount for item in batch_seconds(shape, config, scored, pool("2x8xH100"), 8)}
    flops = 6 * (N - TABLE + A) + 2 * A + 2 * 2 * (N - TABLE)  # a pass with gradients and recomputation, and two without
    assert found["arithmetic"] == pytest.approx(8192 * flops / 989e12 / 0.3)
    # Forward, again, backward, and twice forward; each GPU has an eighth already.
    assert found["gathering weights"] == pytest.approx(5 * 7 / 8 * 2 * N / (0.7 * 450e9))
    alone = batch_seconds(shape, config, scored, pool("2x8xH100"), 1)
    assert [item.what for item in alone] == ["arithmetic"]
    # A larger batch has as many gathers, so their share falls.
    larger = config.model_copy(update={"scoring": config.scoring.model_copy(update={"tokens_per_batch": 65536})})
    parts = {item.what: item.amount for item in batch_seconds(shape, larger, scored, pool("2x8xH100"), 8)}
    assert parts["gathering weights"] == found["gathering weights"]
    assert parts["arithmetic"] == pytest.approx(8 * found["arithmetic"])


def test_of_the_last_layers_alone_the_backward_pass_is_theirs(llama: Callable[..., Config], scored: Work) -> None:
    config = llama("70b", "scoring.tokens_per_batch=8192", "scoring.checkpointing=true", "scoring.last_layers=20")
    shape = shape_of(config.model)
    found = {item.what: item.amount for item in batch_seconds(shape, config, scored, pool("2x8xH100"), 8)}
    # Forward through all, and through the head and a quarter of the 80 layers again and back; two forward alone.
    flops = 2 * (N - TABLE + A) + 4 * ((N - 2 * TABLE) / 4 + TABLE + A) + 2 * A + 2 * 2 * (N - TABLE)
    assert found["arithmetic"] == pytest.approx(8192 * flops / 989e12 / 0.3)
    assert found["gathering weights"] == pytest.approx(3.5 * 7 / 8 * 2 * N / (0.7 * 450e9))
    memory, whole = (
        {item.what: item.amount for item in score_memory(shape, one, 8)}
        for one in (config, config.model_copy(update={"scoring": config.scoring.model_copy(update={"last_layers": None})}))
    )
    assert memory["inputs of recomputed layers"] == pytest.approx(whole["inputs of recomputed layers"] / 4)
    assert {name for name in whole if memory[name] != whole[name]} <= {"inputs of recomputed layers", "reserve"}


def test_weights_of_a_group_by_hand(llama: Callable[..., Config]) -> None:
    config = llama("70b", "scoring.tokens_per_batch=4096", "scoring.checkpointing=true")
    shape = shape_of(config.model)
    whole = {item.what: item.amount for item in score_memory(shape, config, 1)}
    shared = {item.what: item.amount for item in score_memory(shape, config, 8)}
    assert whole.pop("base weights") == 2 * N
    assert shared.pop("base weights") == 2 * N / 8
    # A layer and the largest tensor: queries and output, keys and values, the MLP, two norms; the table is larger than a layer.
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert shared.pop("gathered weights") == 2 * (layer + TABLE)
    assert shared == whole


def test_hours_of_a_run_by_hand(llama: Callable[..., Config]) -> None:
    config = llama("8b")
    run = Run(config)
    shape, where = shape_of(config.model), pool("2x4xA100-40")
    work = work_of(run, 2e6)
    assert (work.rows, work.tokens, work.checkpoints, work.forwards, work.directions) == (2e6, 256, 1, 2, 600)
    assert [(one.section, one.steps, one.runs, one.stage) for one in work.trainings] == [
        ("selector.warmup", 20, 1, "fit"),
        ("selector.reference", 150, 1, "fit"),
        ("alignment.train", 500, 4, "align"),  # pharmacist and three draws of random
    ]
    found = stage_seconds(shape, config, work, where)
    n, a = shape.parameters - 128256 * 4096, shape.adapter
    load = 60 + 2 * shape.parameters / 1e9
    reached = 312e12 * 0.3
    flops = 4 * (n + a) + 2 * a + 2 * 2 * n
    assert found["score"] == pytest.approx(load + 2e6 * 256 * flops / reached / 8)
    step = total(step_seconds(shape, setup_of(config, config.alignment.train), where))
    assert step == pytest.approx(8 * 512 * (4 * (n + a) + 2 * a) / reached + 2 * 7 / 8 * 4 * a / (0.7 * 25e9))
    assert found["align"] == pytest.approx(4 * (load + 500 * step))
    directions = load + 38 * 2 * 512 * (4 * (n + a) + 2 * a) / reached  # 600 rows over 8 workers, two at a time
    assert found["fit"] == pytest.approx(2 * load + 170 * step + directions)
    assert "ingest" not in found
    known = Pool(tuple(replace(one, cpus=32.0) for one in where.nodes))
    assert stage_seconds(shape, config, work, known)["ingest"] == pytest.approx(2e6 * 2e-4 / 64)
    assert load_seconds(shape, config) == load
    iterative = llama("8b", "scoring.scorers=[pharmacist_iterative,seal]", "selection.scorer=seal", "comparison.selections=[seal]",
                      "selector.inner_lr=1e-3")  # fmt: skip
    assert work_of(Run(iterative), 1e3).learnt == 200 * 3 * 32 + 200 * 4 * 32
