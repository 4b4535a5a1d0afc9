"""Public sets as files of ours: the set of a name, from the hub or from a folder that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pharmacist_ray.config.public_sets import PUBLIC_SETS, PublicSet
from pharmacist_ray.data.readers import load_huggingface
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import StoragePath, write_parquet

if TYPE_CHECKING:
    import datasets

_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def stage_public_set(name: str, path: str, split: str, target: StoragePath) -> StoragePath:
    """Write a public set as a Parquet file with ``prompt``, ``response`` if it has answers, and ``category``; return the file.

    Args:
        name: A key of `PUBLIC_SETS`.
        path: ``hf:ID`` of the hub, a copy of the hub's folder, a folder made by ``save_to_disk``, or the authors' own file.
        split: Which split; a folder or a file that has one alone gives that.
        target: The file to write.

    Raises:
        DataError: The set cannot be had from there, or what is there is not laid out as it.
    """
    chosen = PUBLIC_SETS[name]
    called = f"{'set of rows' if chosen.response else 'prompt set'} '{name}'"
    try:
        found = load_huggingface(path, split)
        if found is None:
            found = _local(Path(path).expanduser(), chosen, split)
    except DataError as error:
        gate = f"; {chosen.hub} lets in only whom its authors allow" if chosen.gated else ""
        raise DataError(
            f"{called}: {error}{gate}; where the hub is out of reach, name a folder that has the set with path"
        ) from error
    wanted = {"prompt": chosen.prompt, "response": chosen.response, "category": chosen.category}
    columns = {ours: _column(found, known, called, path) for ours, known in wanted.items() if known}
    if chosen.only:
        column = _column(found, chosen.only[:1], called, path)
        kept = [place for place, value in enumerate(found[column]) if value == chosen.only[1]]
        if not kept:
            raise DataError(f"{called}: no row in {path} has {column}={chosen.only[1]}")
        found = found.select(kept)
    table = {ours: [_first(value) for value in found[theirs]] for ours, theirs in columns.items()}
    if "category" in table:
        table["category"] = [str(value) for value in table["category"]]
    write_parquet(pa.table(table, schema=pa.schema([(ours, pa.string()) for ours in table])), target)
    return target


def _local(path: Path, chosen: PublicSet, split: str) -> datasets.Dataset:
    """Return what a folder or a file holds."""
    import datasets  # slow to import, and most runs read plain files

    if not path.exists():
        raise DataError(f"no such folder: {path}")
    if path.is_file() and path.suffix not in _FILES:
        raise DataError(f"{path} is of a type that is not known here; known: {', '.join(_FILES)}")
    try:
        if path.is_file():
            parts = datasets.load_dataset(_FILES[path.suffix], data_files=str(path))
        else:
            known = datasets.get_dataset_config_names(str(path))
            parts = datasets.load_dataset(str(path), chosen.configuration if chosen.configuration in known else None)
    except Exception as error:  # the library raises what its readers raise
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    if split not in parts and len(parts) > 1:
        raise DataError(f"{path} has no split '{split}'; it has {', '.join(parts)}")
    return parts[split if split in parts else next(iter(parts))]


def _column(found: Any, known: tuple[str, ...], called: str, path: str) -> str:
    column = next((one for one in known if one in found.column_names), None)
    if column is None:
        wanted, there = " or ".join(known), ", ".join(found.column_names)
        raise DataError(f"{called}: {path} has no column {wanted}; it has {there}")
    return column


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value
