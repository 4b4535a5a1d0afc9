"""The Python interface: each function does what the command of its name does, on the same artifacts, and goes on where it was.

    from pharmacist_ray import curate

    curated = curate("pairs.jsonl", model="my/model", trusted="trusted.jsonl", harmful="harmful.jsonl", ratio=0.4)
    curated.rows                                    # a datasets.Dataset: your columns, pharmacist_id and pharmacist_score

Mistakes raise `PharmacistError` with the line that the command prints. Ray is the one that is connected, else the one that
``RAY_ADDRESS`` names, else a private one for the length of the call.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from pharmacist_ray.cli.process import private_ray
from pharmacist_ray.config.load import assign, dump_config, load_config, parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.config.scoring import CALIBRATED
from pharmacist_ray.errors import DataError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import StoragePath, json_of, move_tree, remove_tree, storage_path, working_folder

if "ray" not in sys.modules:  # Ray reads the token when it is imported
    private_ray()

if TYPE_CHECKING:
    import datasets
    import ray.data

    from pharmacist_ray.pipeline.run import Run

Rows: TypeAlias = "str | os.PathLike[str] | Sequence[str] | Iterable[Mapping[str, Any]] | datasets.Dataset | ray.data.Dataset"
"""Rows of a set: a path, a URI or a hub id, or several of them; or the rows themselves, as dictionaries or a data set."""
Settings: TypeAlias = Mapping[str, Any]
"""Settings by dotted key, for example ``{"selection.ratio": 0.3, "resources.workers": 0}``."""
Configured: TypeAlias = "Config | Mapping[str, Any] | str | os.PathLike[str]"
"""A configuration: checked, as nested values, or the YAML file with it."""


@dataclass(frozen=True)
class Curated:
    """A curated subset, and how it came about."""

    config: Config
    """What was run; `align`, `attack` and `evaluate` take it to go on."""
    folder: StoragePath
    """Of the selection; what `datasets.load_dataset` reads."""
    scores_folder: StoragePath
    """Of the scores of all candidates."""

    @property
    def rows(self) -> datasets.Dataset:
        """The kept rows: your columns, ``pharmacist_id`` and ``pharmacist_score``."""
        return _parquet(self.folder / "data")

    @property
    def scores(self) -> datasets.Dataset:
        """Every candidate that could be scored: ``id``, and a column a score."""
        return _parquet(self.scores_folder / "rows")

    @property
    def manifest(self) -> dict[str, Any]:
        """Rule, counts, versions and provenance of the selection."""
        return dict(json_of(self.folder / "manifest.json"))

    def ray_dataset(self) -> ray.data.Dataset:
        """Return the kept rows as a Ray data set; nothing is read yet."""
        import ray.data

        from pharmacist_ray.runtime.workers import storage_of

        place = storage_of(self.folder / "data")
        return ray.data.read_parquet(place["storage_path"], filesystem=place.get("storage_filesystem"))


def configure(config: Configured, settings: Settings | None = None) -> Config:
    """Return a checked configuration.

    Args:
        config: A configuration.
        settings: What is to be otherwise.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or a value is wrong; every problem is named.
    """
    if isinstance(config, str | os.PathLike):
        config = load_config(Path(config))
    values = yaml.safe_load(dump_config(config)) if isinstance(config, Config) else copy.deepcopy(dict(config))
    for key, value in (settings or {}).items():
        assign(values, key, str(value) if isinstance(value, os.PathLike) else value)
    return parse_config(values, where="the configuration")


def curate(
    data: Rows,
    *,
    model: str | os.PathLike[str],
    trusted: Rows,
    harmful: Rows,
    benign: Rows | None = None,
    ratio: float = 0.4,
    scorer: str | Sequence[str] = "pharmacist",
    run_dir: str | os.PathLike[str] = "runs/python",
    settings: Settings | None = None,
) -> Curated:
    """Rank alignment rows and keep the best: ingest, fit, score and select.

    The same call finds what is there: rows that are given as such are written below ``run_dir`` under a name made of their content.

    Args:
        data: The candidates, of mixed quality: prompt → safe answer.
        model: Folder, hub id or URI of the model that is to be aligned.
        trusted: Trusted safety rows, disjoint from the candidates (paper: 200).
        harmful: Harmful prompt → harmful answer, for the simulated attack (paper: 200).
        benign: Trusted ordinary rows, for the loss gap's reference.
        ratio: Share of the candidates to keep.
        scorer: What to rank by; of several the sum of their ranks. ``calibrated`` weighs all scores by held-out trusted rows.
        run_dir: Where every artifact goes.
        settings: Anything else, by dotted key.

    Raises:
        PharmacistError: What the stages raise.
    """
    root = storage_path(run_dir).resolve()  # Ray's workers may stand elsewhere
    given = {"candidates": data, "validation": trusted, "harmful": harmful} | ({} if benign is None else {"benign": benign})
    names = [scorer] if isinstance(scorer, str) else list(scorer)
    values = {
        "run_dir": str(run_dir),
        "model": {"path": str(model)},
        "data": {name: {"path": _places(rows, name, root)} for name, rows in given.items()},
        "selection": {"ratio": ratio, "scorer": scorer if isinstance(scorer, str) else names},
        "comparison": {"selections": ["random", *names]},
    }
    if scorer != CALIBRATED:
        values["scoring"] = {"scorers": list(dict.fromkeys([*names, "random"]))}
    config = configure(values, settings)
    run = _run(("ingest", "fit", "score", "select"), config)
    return Curated(config, run.main_selection.folder, run.scored.folder)


def score(config: Configured, settings: Settings | None = None) -> datasets.Dataset:
    """Score every candidate and return the scores: ``id``, and a column a score; see `configure` for the arguments.

    Raises:
        PharmacistError: What the stages raise.
    """
    run = _run(("ingest", "fit", "score"), configure(config, settings))
    return _parquet(run.scored.folder / "rows")


def align(config: Configured, settings: Settings | None = None) -> dict[str, ModelRef]:
    """Align the model on every selection that is compared, and return the models by name; see `configure` for the arguments.

    Raises:
        PharmacistError: What the stages raise.
    """
    run = _run(("ingest", "fit", "score", "select", "align"), configure(config, settings))
    return {variant.name: run.model_of(variant) for variant in run.variants}


def attack(config: Configured, settings: Settings | None = None) -> dict[str, ModelRef]:
    """Put every aligned model through every harmful fine-tune, and return what comes of it; see `configure` for the arguments.

    Raises:
        PharmacistError: What the stages raise.
    """
    run = _run(("ingest", "fit", "score", "select", "align", "attack"), configure(config, settings))
    return {attacked.name: run.model_of(attacked) for variant in run.variants for attacked in run.attacks_on(variant)}


def evaluate(config: Configured, settings: Settings | None = None) -> list[dict[str, Any]]:
    """Run everything and return the table of the comparison, a row for each arm and attack; see `configure` for the arguments.

    Raises:
        PharmacistError: What the stages raise.
    """
    run = _run(("run",), configure(config, settings))
    run.config.require_evaluation()
    return list(json_of(run.evaluated.require() / "table.json"))


def search_settings(config: Configured, settings: Settings | None = None, *, resume: bool = False) -> dict[str, Any]:
    """Search the settings that ``search.space`` names, and return the recommendation; see `configure` for the arguments.

    Args:
        config: A configuration with a ``search`` section.
        settings: What is to be otherwise.
        resume: Go on in a folder that holds the trials of another ``search`` section.

    Raises:
        PharmacistError: What `pharmacist search` raises.
    """
    from pharmacist_ray.search.search import run_search

    return dict(json_of(run_search(configure(config, settings), resume=resume) / "recommendation.json"))


def _run(stages: tuple[str, ...], config: Config) -> Run:
    from pharmacist_ray.pipeline.session import run_stages

    return run_stages(stages, config)


def _parquet(folder: StoragePath) -> datasets.Dataset:
    from datasets import Dataset

    files = sorted(str(file) for file in folder.glob("*.parquet"))
    found = Dataset.from_parquet(files)
    assert isinstance(found, Dataset)
    return found


def _places(rows: Rows, name: str, root: StoragePath) -> list[str]:
    """Return where rows lie; those that are given as such are written below the run directory first."""
    if isinstance(rows, str | os.PathLike):
        return [str(rows)]
    if isinstance(rows, Sequence) and rows and all(isinstance(one, str | os.PathLike) for one in rows):
        return [str(one) for one in rows]
    fresh = working_folder(root / "given" / f"{name}.{uuid.uuid4().hex[:8]}.partial")
    fresh.mkdir(parents=True)
    try:
        _write(rows, name, fresh)
        digest = hashlib.blake2b(digest_size=8)
        for content in sorted(map(_digest, fresh.iterdir())):
            digest.update(content)  # the same blocks, whatever their files are called
        place = root / "given" / f"{name}-{digest.hexdigest()}"
        if not place.exists():
            move_tree(fresh, place)
    finally:
        remove_tree(fresh)
    return [str(place)]


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def _write(rows: Any, name: str, folder: Path) -> None:
    import ray.data
    from datasets import Dataset

    if isinstance(rows, ray.data.Dataset):
        rows.write_parquet(str(folder))
    elif isinstance(rows, Dataset):
        rows.to_parquet(str(folder / "rows.parquet"))
    else:
        found = list(rows) if isinstance(rows, Iterable) else []
        if not found or not all(isinstance(row, Mapping) for row in found):
            raise DataError(
                f"{name}: expected a path, dictionaries with prompt and response, or a data set, got {type(rows).__name__}"
            )
        Dataset.from_list(list(map(dict, found))).to_parquet(str(folder / "rows.parquet"))
