"""Shapes of large models, of which there is nothing but a config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from pharmacist_ray.config import load_config
from pharmacist_ray.config.schema import Config

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
        "vocab_size": 128256,
    },
}  # fmt: skip
FOLDER = Path(__file__).parents[2] / "cluster"
ALONE = ("scoring.method=difference", "resources.workers_per_actor=1")
"""Overrides by which no group can score: the method moves whole weights."""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the config.json of Llama 3's shapes."""
    folders = {}
    for name, settings in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        LlamaConfig(**settings, tie_word_embeddings=False, dtype="bfloat16").save_pretrained(folders[name])
    return folders


@pytest.fixture
def llama(shapes: dict[str, Path]) -> Callable[..., Config]:
    """Return a function: size, overrides → the configuration of ``cluster`` for it, on a shape that is there."""

    def of(size: str, *overrides: str) -> Config:
        return load_config(FOLDER / f"llama-3-{size}.yaml", [f"model.path={shapes[size]}", *overrides])

    return of
