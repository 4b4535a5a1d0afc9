"""Make something to run on: the embedded benchmark, or planted corruption in a data set of the user's, each with a tiny base model.

Nothing comes from a hub. The base is trained from scratch by the same loop as everything else, with all weights and the SFT
objective.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from pharmacist_ray.config.load import apply_override, assign, parse_config
from pharmacist_ray.config.schema import ResourcesConfig, TrainConfig
from pharmacist_ray.data.layouts import to_row
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.console import escaped, say, watch_training
from pharmacist_ray.pipeline.session import connected
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.storage import write_text
from pharmacist_ray.testbed.check import check_base, in_words, require
from pharmacist_ray.testbed.plant import CANDIDATES, TRUSTED, plant, read_pairs, write_jsonl
from pharmacist_ray.testbed.tiny import bpe_tokenizer, tiny_llama, word_tokenizer
from pharmacist_ray.testbed.world import World
from pharmacist_ray.training.runs import run_tasks
from pharmacist_ray.training.task import TrainTask


def make_testbed(folder: Path, world: World, overrides: Sequence[str] = (), base: Path | None = None) -> None:
    """Write a synthetic world's data, its base model, a configuration, and one for a search.

    Args:
        folder: Gets ``data/``, ``base/``, ``config.yaml`` and ``search.yaml``. A base of the same world and settings is kept.
        world: The world and the draw of its data. The base depends on the number of the world alone.
        overrides: Dotted keys of ``demo.yaml``, its ``pretraining`` section included.
        base: The base of another testbed folder, taken instead of training one.

    Raises:
        ModelError: ``base`` is of another world or was made otherwise, or the base does not know enough to stand on.
    """
    started = time.perf_counter()
    settings, pretraining = _settings("demo.yaml", folder, overrides, world=world.world_seed)
    samples = world.pretraining(pretraining.pop("rows"))
    max_length, template = settings["model"]["max_length"], settings["model"]["template"]
    recipe = _recipe(samples, pretraining, max_length, template, world=world.world_seed)
    own = folder / "base"
    if base is not None and base.resolve() != own.resolve():
        _check_origin(base, recipe)
        shutil.copytree(base, own, dirs_exist_ok=True)
    world.write_jsonl(folder / "data")
    _pretrain(own, recipe, samples, word_tokenizer(world.vocabulary()))
    if not (own / "check.json").exists():
        figures = check_base(ModelRef(str(own), template=template, max_length=max_length), world)
        write_text(json.dumps(figures, indent=1), own / "check.json")
    figures = json.loads((own / "check.json").read_text())
    say(f"  base model: {in_words(figures)}")
    require(figures, own, steps=pretraining["train"]["steps"])
    _write_config(folder, settings, "demo.yaml")
    _write_config(folder, _varied(settings, "search.yaml", folder), "search.yaml", "search.yaml")
    seconds = time.perf_counter() - started
    say(f"  testbed ready in {seconds:.0f} s: {escaped(folder)} (world {world.world_seed}, seed {world.seed})")


def make_planted(
    safety: Path,
    benign: Path,
    folder: Path,
    seed: int,
    overrides: Sequence[str] = (),
    *,
    candidates: int = CANDIDATES,
    trusted: int = TRUSTED,
) -> None:
    """Plant corruption of known kind in a data set, train a tiny base model on the ordinary pairs, and write a configuration.

    Args:
        safety: JSONL of trusted safety pairs.
        benign: JSONL of ordinary pairs.
        folder: Gets ``data/``, ``base/`` and ``config.yaml``.
        seed: Draws rows and corruptions.
        overrides: Dotted keys of ``planted.yaml``, its ``pretraining`` section included.
        candidates: How many candidates.
        trusted: The size of each of the three trusted sets.

    Raises:
        DataError: A file cannot be read, or has too few rows.
    """
    started = time.perf_counter()
    safe, ordinary = read_pairs(safety), read_pairs(benign)
    sets = plant(safe, ordinary, seed, candidates=candidates, trusted=trusted)
    write_jsonl(sets, folder / "data")
    settings, pretraining = _settings("planted.yaml", folder, overrides)
    pretraining.pop("rows", None)
    texts = [f"{row['prompt']}\n{row['response']}" for row in [*safe, *ordinary]]
    recipe = _recipe(ordinary, pretraining, settings["model"]["max_length"], settings["model"]["template"])
    _pretrain(folder / "base", recipe, ordinary, bpe_tokenizer(texts))
    _write_config(folder, settings, "planted.yaml")
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in sets.items())
    say(f"  planted in {time.perf_counter() - started:.0f} s: {sizes} in {escaped(folder / 'data')} (seed {seed})")


def _settings(name: str, folder: Path, overrides: Sequence[str], world: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration of a run, which is checked before anything is made, and the pre-training section."""
    values = _read(name, folder, world)
    for override in overrides:
        apply_override(values, override)
    pretraining = values.pop("pretraining")
    parse_config(values, where=name)
    return values, pretraining


def _read(name: str, folder: Path, world: int = 0) -> dict[str, Any]:
    text = files("pharmacist_ray.testbed").joinpath(name).read_text(encoding="utf-8")
    return dict(yaml.safe_load(text.replace("{folder}", str(folder)).replace("{world}", str(world))))


def _varied(settings: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return settings with the dotted keys of another file in their place."""
    varied = dict(settings)
    for key, value in _read(name, folder).items():
        assign(varied, key, value)
    return dict(json.loads(json.dumps(varied)))  # without YAML's aliases


def _write_config(folder: Path, settings: dict[str, Any], name: str, file: str = "config.yaml") -> None:
    parse_config(settings, where=name)
    head = "# Written by `pharmacist`; change it and run again: only what depends on the change is made anew.\n"
    write_text(head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), folder / file)


def _recipe(
    samples: Sequence[dict[str, Any]], pretraining: dict[str, Any], max_length: int, template: str, world: int | None = None
) -> dict[str, Any]:
    """Return what a base is made from, as ``recipe.json`` has it."""
    digest = hashlib.blake2b(json.dumps(samples, sort_keys=True).encode(), digest_size=8).hexdigest()
    return {"world": world, "pretraining": pretraining, "samples": digest, "max_length": max_length, "template": template}


def _check_origin(base: Path, recipe: dict[str, Any]) -> None:
    """Raise a ModelError if a base was not made as the recipe says."""
    made = json.loads((base / "recipe.json").read_text()) if (base / "recipe.json").exists() else None
    world = made.get("world") if isinstance(made, dict) else None
    if world is None:
        raise ModelError(f"{base} is not the base of a testbed; give the base folder of one, or leave --base out")
    if world != recipe["world"]:
        raise ModelError(
            f"{base} is the base of world {world}, not of world {recipe['world']}; give --world {world} or a base of world "
            f"{recipe['world']}, or leave --base out"
        )
    if made != recipe:
        raise ModelError(
            f"{base} is of world {world}, but was not made with these settings of pretraining and model; give the overrides that it "
            "was made with, or leave --base out"
        )


def _pretrain(base: Path, recipe: dict[str, Any], samples: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Train a Llama from scratch into ``base``, unless it is there and was made by the same recipe."""
    base = base.resolve()  # workers do not share this process's folder
    work = base.with_name("pretraining")
    pretraining, max_length, template = recipe["pretraining"], recipe["max_length"], recipe["template"]
    shape, seed = pretraining["model"], pretraining["seed"]
    if (base / "recipe.json").exists() and json.loads((base / "recipe.json").read_text()) == recipe:
        return
    shutil.rmtree(base, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    start = work / "start"
    tiny_llama(tokenizer, **shape, max_length=max_length, seed=seed).save_pretrained(start)
    tokenizer.save_pretrained(start)
    renderer = Renderer(tokenizer, template, max_length)
    rows = [
        row
        for number, sample in enumerate(samples, 1)
        if (row := to_row(sample, layout="prompt_response", source=f"pretraining:{number}"))
        and len(renderer.prompt_ids(row)) < max_length
    ]
    write_rows(rows, work / "rows.parquet")
    train = TrainConfig(**pretraining["train"], weights="full")
    task = TrainTask(
        name="base",
        out=str(work / "run"),
        model=ModelRef(str(start), template=template, max_length=max_length),
        rows=(str(work / "rows.parquet"),),
        train=train,
        seed=seed,
    )
    resources = ResourcesConfig(workers=pretraining["workers"])
    with (
        connected(resources) if resources.workers else nullcontext(),
        watch_training("train the base model (steps)", [work / "run"], [train.steps]),
    ):
        run_on_workers(run_tasks, [task], name="base", storage=work / "ray", resources=resources)
    (work / "run" / "model").rename(base)
    write_text(json.dumps(recipe, sort_keys=True), base / "recipe.json")
    shutil.rmtree(work)
