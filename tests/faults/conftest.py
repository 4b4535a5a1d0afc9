"""A small world and its undisturbed run, with which every disturbed one is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.data.schema import Row
from tests.faults.disturb import TRAIN, World


@pytest.fixture(scope="session")
def make_world(model_folder: Path, rows_of: Callable[..., list[Row]]) -> Callable[..., World]:
    """Return a maker of worlds: make_world(folder, more=[rows], data={"shards": 4})."""

    def make(folder: Path, more: tuple[Row, ...] = (), model: Path = model_folder, **sections: dict[str, Any]) -> World:
        folder.mkdir(parents=True, exist_ok=True)
        for seed, (name, count) in enumerate({"candidates": 240, "trusted": 16, "harmful": 16}.items()):
            rows = [*rows_of(count, seed=seed), *(more if name == "candidates" else ())]
            (folder / f"{name}.jsonl").write_text("\n".join(row.raw for row in rows) + "\n")
        path = {name: {"path": str(folder / f"{name}.jsonl")} for name in ("candidates", "trusted", "harmful")}
        values: dict[str, Any] = {
            "run_dir": str(folder / "run"),
            "model": {"path": str(model), "template": "plain", "max_length": 32, "lora": {"r": 2}},
            "data": {"candidates": path["candidates"], "validation": path["trusted"], "harmful": path["harmful"], "shards": 24},
            "resources": {"workers": 0, "cpus_per_worker": 0.5, "actors": 1},
            "selector": {"warmup": {"steps": 2, "batch_size": 8}, "checkpoints": [2], "batch_size": 8, "reference": None},
            "scoring": {"scorers": ["pharmacist", "random"], "random_draws": 1, "tokens_per_batch": 24},
            "selection": {"ratio": 0.5},
            "alignment": {"train": TRAIN},
        }  # fmt: skip
        for name, settings in sections.items():
            values[name] = {**values[name], **settings}
        return World(folder / "run", values)

    return make


@pytest.fixture(scope="session")
def calm(ray_local: None, make_world: Callable[..., World], tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a world in which nothing has gone wrong, up to the selection."""
    world = make_world(tmp_path_factory.mktemp("calm"))
    for stage in ("ingest", "fit", "score", "select"):
        world.stage(stage)
    return world


@pytest.fixture(scope="session")
def aligned_alone(calm: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return the same with a model aligned in this process."""
    world = calm.copy(tmp_path_factory.mktemp("aligned") / "run", "ingest", "fit", "scores", "selections")
    world.stage("align")
    return world


@pytest.fixture(scope="session")
def aligned(calm: World) -> World:
    """Return the same with a model aligned by two workers."""
    world = World(calm.root, {**calm.values, "resources": {**calm.values["resources"], "workers": 2}})
    world.stage("align")
    return world
