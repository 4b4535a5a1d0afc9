"""A small run to measure on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.data.schema import Row


@pytest.fixture
def small_run(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> Callable[..., Path]:
    """Return a function: candidates, sections → the file of a configuration whose data and model are there."""

    def of(candidates: int, **sections: dict[str, Any]) -> Path:
        sets = {"candidates": candidates, "validation": 6, "harmful": 6}
        for seed, (name, count) in enumerate(sets.items()):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(row.raw for row in rows_of(count, seed=seed)) + "\n")
        values: dict[str, Any] = {
            "run_dir": str(tmp_path / "elsewhere"),
            "model": {"path": str(model_folder), "template": "plain", "max_length": 32, "lora": {"r": 2}},
            "data": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in sets} | {"shards": 2},
            "resources": {"workers": 0, "actors": 0},
            "selector": {"warmup": {"steps": 2, "batch_size": 4, "lr": 1e-2}, "checkpoints": [2], "reference": None},
        }
        for name, keys in sections.items():
            values[name] = values.get(name, {}) | keys
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "run.yaml"

    return of
