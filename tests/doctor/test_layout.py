"""The layout that is chosen, against a plain search, and what is said where none fits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import yaml

from pharmacist_ray.config.load import apply_override, parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import Cluster, Nodes, parse_cluster
from pharmacist_ray.doctor.estimate import memory, setup_of, total
from pharmacist_ray.doctor.hours import Pool, training_seconds
from pharmacist_ray.doctor.layout import FILLED, NEARLY, Layout, best_layout, layout_on
from pharmacist_ray.doctor.passes import answer_memory, fit_memory, score_memory
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.doctor.workload import work_of
from pharmacist_ray.pipeline.run import Run
from tests.doctor.conftest import ALONE


def laid_out(config: Config, cluster: str | Cluster, rows: float = 1e6) -> Layout:
    nodes = parse_cluster(cluster)[0] if isinstance(cluster, str) else cluster
    return best_layout(config, shape_of(config.model), work_of(Run(config), rows), nodes)


def loaded(config: Config, layout: Layout) -> Config:
    """Return the configuration with the layout as a file would have it, which is checked."""
    values = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    for key, value in layout.values.items():
        apply_override(values, f"{key}={yaml.safe_dump(value).splitlines()[0]}")
    return parse_config(values, where="the layout")


@pytest.mark.parametrize(
    ("size", "cluster", "overrides"),
    [
        ("8b", "2x4xA100-40", ()),
        ("8b", "8xH100", ()),
        ("8b", "4xA10G", ()),
        ("8b", "1xA100-80", ()),
        ("8b", "4xA100-80", ("alignment.train.weights=full", "alignment.train.zero_stage=2")),
        ("8b", "8xH100", ("alignment.objective=booster+vaccine", "model.max_length=1024", "data.benign={path: /x.jsonl}")),
        ("8b", "4xL40S", ("model.quantization=4bit",)),
    ],
)
def test_what_is_chosen_can_be_loaded_and_fits(
    size: str, cluster: str, overrides: tuple[str, ...], llama: Callable[..., Config]
) -> None:
    config = llama(size, *overrides)
    layout = laid_out(config, cluster)
    assert layout.problems == []
    there = loaded(config, layout)
    assert there == layout.config
    shape, room = shape_of(config.model), FILLED * layout.pool.smallest.memory
    for name, train in there.trainings().items():
        objective = there.alignment.objective if name == "alignment.train" else "sft"
        assert total(memory(shape, setup_of(there, train, objective))) <= room
        for key in ("steps", "batch_size", "lr", "weights"):  # what results hang on
            assert getattr(train, key) == getattr(config.trainings()[name], key)
    assert total(fit_memory(shape, there)) <= room
    assert total(score_memory(shape, there)) <= room
    assert there.resources.workers * there.resources.parallel_runs <= layout.pool.gpus
    assert there.resources.actors <= layout.pool.gpus


def test_no_way_to_train_that_fits_is_much_quicker(llama: Callable[..., Config]) -> None:
    config = llama("8b", "selector.reference=null", "scoring.scorers=[low_loss,random]", "selection.scorer=low_loss",
                   "comparison.selections=[low_loss]")  # fmt: skip
    shape, work, pool = shape_of(config.model), work_of(Run(config), 1e6), Pool(parse_cluster("2x4xA100-40")[0])
    (aligned,) = work.trainings
    quickest = float("inf")
    for workers, zero, offload, again, parts in product(
        (1, 2, 4, 8), range(4), ("none", "optimizer", "parameters"), (False, True), (1, 2, 4, 8, 16, 32, 64)
    ):
        train = {"zero_stage": zero, "offload": offload, "checkpointing": again, "accumulation": parts}
        values = config.model_dump(mode="json")
        values["resources"] |= {"workers": workers, "parallel_runs": 1}
        for section in (values["selector"]["warmup"], values["alignment"]["train"]):
            section |= train
        try:
            tried = parse_config(values, where="x")
        except Exception:  # noqa: BLE001 - offload without shards, batches that do not divide
            continue
        if total(memory(shape, setup_of(tried, tried.alignment.train))) <= FILLED * 39.4 * 2**30:
            quickest = min(quickest, training_seconds(shape, tried, aligned, pool))
    chosen = layout_on(config, shape, work, pool)
    assert training_seconds(shape, chosen.config, aligned, pool) <= NEARLY**2 * quickest  # a section's choice, and the workers'


def test_groups_score_what_no_gpu_holds(llama: Callable[..., Config]) -> None:
    config = llama("70b")
    layout = laid_out(config, "2x8xH100")
    assert layout.problems == []
    assert layout.group in (2, 4, 8, 16)
    shape, room = shape_of(config.model), FILLED * layout.pool.smallest.memory
    assert total(score_memory(shape, layout.config, layout.group)) <= room < total(score_memory(shape, layout.config, 1))
    assert layout.values["resources.actors"] == 16 // layout.group
    assert "model.quantization" not in layout.values
    assert all(train.zero_stage == 3 for train in layout.config.trainings().values())
    # One that fits a GPU is scored on one.
    assert laid_out(llama("8b"), "2x8xH100").group == 1


def test_without_groups_few_bits_are_the_last_resort(llama: Callable[..., Config]) -> None:
    layout = laid_out(llama("70b", *ALONE), "8xA100-80")
    assert layout.problems == []
    assert layout.values["model.quantization"] == "8bit"
    assert all(train.zero_stage < 3 for train in layout.config.trainings().values())  # which cannot shard these
    assert laid_out(llama("70b", *ALONE, "model.max_length=2048"), "8xA100-80").values["model.quantization"] == "4bit"


def test_what_fits_nowhere_is_said(llama: Callable[..., Config]) -> None:
    problems = laid_out(llama("70b", *ALONE), "4xL4").problems
    assert [problem.partition(":")[0] for problem in problems] == ["fit", "score"]
    assert problems[1].startswith("score: no GPU of 1x4xL4 holds what it takes, 136 GiB with a single row; take larger GPUs")
    uneven = llama("70b", "alignment.train.batch_size=10", "resources.workers=2", "selector.warmup.batch_size=16")
    (problem, *_) = laid_out(uneven, (Nodes(2, 8, "A100-40", memory=64e9),)).problems
    assert "with 2 workers, and more cannot share these batches evenly (selector.warmup.batch_size=16, alignment" in problem
    assert problem.endswith("make them multiples of 16")


def test_answers_that_no_gpu_holds_are_a_groups_or_an_endpoints(llama: Callable[..., Config]) -> None:
    source = {"path": "/x.jsonl"}
    values = llama("70b").model_dump(mode="json")
    values["resources"].pop("workers_per_actor", None)  # few bits cannot be spread
    values["evaluation"] = {"harmful_prompts": source, "benign_prompts": source, "task": {"source": source}}
    config = parse_config(values, where="x")
    layout = laid_out(config, "2x8xH100")
    assert layout.problems == []
    shape, room = shape_of(config.model), FILLED * layout.pool.smallest.memory
    assert total(answer_memory(shape, layout.config, layout.group)) <= room < total(answer_memory(shape, layout.config, 1))
    assert layout.values["evaluation.batch_size"] <= 512 // layout.group
    *_, problem = laid_out(
        parse_config(values | {"model": values["model"] | {"quantization": "8bit"}}, where="x"), "2xA100-40"
    ).problems
    assert problem.startswith("evaluate: no GPU of 1x2xA100-40 holds the model that answers; let an endpoint answer")
    assert "--tensor-parallel-size 8" in problem  # 141 GB with room for answers, over 37 GiB each, a power of two
    values["evaluation"]["engine"] = {"url": "http://host:8000/v1", "model": "BASE"}
    assert "evaluation.batch_size" in laid_out(parse_config(values, where="x"), "2x8xH100").values


def test_small_gpus_are_left_out_where_large_ones_alone_are_quicker(llama: Callable[..., Config]) -> None:
    assert laid_out(llama("8b"), "8xH100,2xL4").pool.name == "1x8xH100"
    assert laid_out(llama("8b"), "8xH100,8xH200").pool.name == "1x8xH100,1x8xH200"


def test_cpus_of_a_node_are_left_for_readers(llama: Callable[..., Config]) -> None:
    assert laid_out(llama("8b"), (Nodes(2, 4, "A100-40", cpus=24.0),)).values["resources.cpus_per_worker"] == 5
    assert "resources.cpus_per_worker" not in laid_out(llama("8b"), (Nodes(2, 4, "A100-40", cpus=30.0),)).values


def test_batches_that_do_not_divide_keep_a_training_small_and_others_beside_it(llama: Callable[..., Config]) -> None:
    uneven: list[Any] = ["resources.workers=1", "alignment.train.batch_size=10", "alignment.train.accumulation=1"]
    layout = laid_out(llama("8b", *uneven), "8xH100")
    assert (layout.values["resources.workers"], layout.values["resources.parallel_runs"]) == (2, 4)
