"""Make the example: the model, its data sets, a configuration, and an estimate of how long the run will take here."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from pharmacist_ray.config.load import assign, parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.errors import ConfigError, unknown_name
from pharmacist_ray.example.model import QUESTION, ask, obtain
from pharmacist_ray.example.reckon import lengths_of, pace_of, reckon
from pharmacist_ray.example.sets import SIZES, Sample, own_sets, pair_sets
from pharmacist_ray.models.load import load_tokenizer
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.storage import write_text
from pharmacist_ray.testbed.plant import read_pairs, write_jsonl

CORES = 8
"""The most cores that one process takes: more gain little with so small a model (ours)."""


def make_example(
    folder: Path,
    *,
    size: str = "small",
    seed: int = 0,
    safety: Path | None = None,
    benign: Path | None = None,
    model: Path | None = None,
) -> None:
    """Write data sets and a configuration to run, and get the model for it.

    Args:
        folder: Gets ``base/`` (the model, kept if it is there), ``data/`` and ``config.yaml``.
        size: A key of `SIZES`.
        seed: Draws the data.
        safety: JSONL of the reader's own pairs with a safe answer, in the place of the example's requests.
        benign: JSONL of the reader's own ordinary pairs; with ``safety``.
        model: A model folder of the reader's, in the place of SmolLM2-135M-Instruct.

    Raises:
        ConfigError: Unknown size, or one of two files.
        DataError: A file cannot be read, or has too few pairs.
        ModelError: The model can be had from nowhere, or cannot be read.
    """
    if size not in SIZES:
        raise unknown_name("size", size, list(SIZES))
    if (safety is None) != (benign is None):
        raise ConfigError("--safety and --benign go together: give both, or neither for the example's own requests")
    if safety is not None and benign is not None:
        sets = pair_sets(read_pairs(safety), read_pairs(benign), SIZES[size], seed)
    else:
        sets = own_sets(SIZES[size], seed)
    settings = settings_of(folder, size, model, own=safety is None)
    config = parse_config(settings, where=f"{size}.yaml")
    path = Path(config.model.path)
    if model is None:
        obtain(path)
    else:
        load_tokenizer(path)
        said = ask(ModelRef(str(path)), QUESTION)[:80]
        say(f"  the model in {escaped(path)}; asked '{QUESTION}', it says '{escaped(said)}'")
    write_jsonl(sets, folder / "data")
    head = "# Written by `pharmacist example`; change it and run again: only what depends on the change is made anew.\n"
    write_text(head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), folder / "config.yaml")
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in sets.items())
    say(f"  {sizes} in {escaped(folder / 'data')} (seed {seed})")
    _say_time(config, sets)
    say(f"  next: pharmacist run --config {escaped(folder / 'config.yaml')}")


def settings_of(folder: Path, size: str, model: Path | None = None, *, own: bool = True) -> dict[str, Any]:
    """Return the configuration as plain values.

    Args:
        folder: Where model and data are.
        size: A key of `SIZES`.
        model: Another model's folder.
        own: Whether the requests are the example's own, and so have an ``exposure`` and an ``act``.
    """
    places = {"{folder}": str(folder), "{model}": str(model or folder / "base")}
    settings: dict[str, Any] = _filled(_read("small"), places)
    for key, value in ({} if size == "small" else _filled(_read(size), places)).items():
        assign(settings, key, value)
    gpus = min(1, torch.cuda.device_count())
    settings["resources"] = {
        "workers": 1,
        "actors": 1,
        "cpus_per_worker": min(CORES, os.cpu_count() or 1),
        "gpus_per_worker": gpus,
    }
    if not own:
        settings["scoring"]["planted"]["good"].remove("rare")
        for column in ("group_column", "cluster_column"):
            del settings["evaluation"][column]
    return settings


def _read(size: str) -> Any:
    return yaml.safe_load(files("pharmacist_ray.example").joinpath(f"{size}.yaml").read_text(encoding="utf-8"))


def _filled(value: Any, places: dict[str, str]) -> Any:
    """Return values with the places in the texts filled in; YAML's aliases become values of their own."""
    if isinstance(value, dict):
        return {key: _filled(one, places) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, places) for one in value]
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], value)
    return value


def _say_time(config: Config, sets: dict[str, list[Sample]]) -> None:
    device = "cuda" if config.resources.gpus_per_worker else "cpu"
    ref = ModelRef(config.model.path, max_length=config.model.max_length)
    if device == "cpu":
        use_cores(int(config.resources.cpus_per_worker))
    pace, variants = pace_of(ref, config, device), len(Run(config).variants)
    counts = {name: len(rows) for name, rows in sets.items()}
    stages = reckon(config, counts, lengths_of(ref, sets), variants, pace)
    where = "this GPU" if device == "cuda" else f"{config.resources.cpus_per_worker:g} cores"
    say(
        f"  the run will take about {in_words(sum(stages.values()))} on {where}: "
        + ", ".join(f"{name} {in_words(seconds)}" for name, seconds in stages.items())
        + f" ({pace.forward:.0f} tokens/s forward, {pace.trained:.0f} trained, measured just now)"
    )


def in_words(seconds: float) -> str:
    """Return a duration, roughly."""
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
