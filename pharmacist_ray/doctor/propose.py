"""A configuration filled in after a look at a data set and a model: what `pharmacist init --from` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import torch

from pharmacist_ray.config.data import ROW_KINDS
from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.model import ModelConfig
from pharmacist_ray.config.public_sets import ROW_SETS
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.data.layouts import LAYOUTS, BadRow, to_row
from pharmacist_ray.data.readers import load_huggingface, plan, read_chunk, record_of
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError, ModelError
from pharmacist_ray.models.load import empty_model
from pharmacist_ray.models.ref import ModelRef

READ = 2000
"""Rows that are looked at, from the beginning (ours)."""

PROMPTS = ("question", "query", "instruction", "input", "request", "goal", "user", "text")
ANSWERS = ("answer", "output", "completion", "reply", "safe_response", "refusal", "target", "assistant")
CATEGORIES = ("harm_category", "hazard", "topic", "type", "label", "subject", "source")
"""Columns that are tried, in this order, where no layout fits or there is no ``category`` (ours)."""

FITS = 0.99
"""Share of the rows that shall fit uncut (ours)."""

LONGEST = 1 << 20


@dataclass(frozen=True)
class Look:
    """What the first rows of a data set are like."""

    read: int
    rows: list[Row]
    """Those that are usable."""
    broken: Counter[str]
    """Reason → how many are not."""
    how: dict[str, Any] = field(default_factory=dict)
    """Keys of the source that are not as they would be by default."""
    layout: str = ""
    """The layout that fits, or the columns, in words."""


def propose(
    data: str | None = None, model: str | None = None, split: str = "train", **trusted: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Return values of a configuration, and what was seen in lines of words.

    Args:
        data: The candidates, as ``data.candidates.path`` takes them.
        model: As ``model.path`` takes it.
        split: Of a Hugging Face data set.
        trusted: ``validation``, ``harmful`` and ``benign``: a path, or the name of a public set; a set that is not given is the first
            public one of its kind.

    Raises:
        DataError: The data cannot be read, or its columns mean nothing known.
        ConfigError: A public set is not of the kind that it is to be.
        ModelError: The model has no usable tokenizer or configuration.
    """
    values: dict[str, Any] = {name: EXAMPLE[name] for name in ("run_dir", "model", "selection", "comparison")}
    values["data"] = {"candidates": dict(EXAMPLE["data"]["candidates"])}
    lines = []
    if model is not None:
        values["model"] = {"path": model}
    if data is not None:
        seen = look(data, split)
        values["data"]["candidates"] = {"path": data, **seen.how}
        lines += list(_said(seen))
        if model is not None:
            values["model"]["max_length"], said = _longest(seen.rows, model)
            lines += said
    for name, kind in ROW_KINDS.items():
        given = trusted.get(name) or next(public for public, one in ROW_SETS.items() if one.kind == kind)
        values["data"][name] = {"name": given} if given in ROW_SETS else {"path": given}
        if given in ROW_SETS:
            one = ROW_SETS[given]
            lines.append(f"data.{name}: {given}, which is {one.hub} on the hub; its licence is {one.licence}, and yours to check")
    if gpus := torch.cuda.device_count():
        values["resources"] = {"workers": 1, "actors": gpus, "gpus_per_worker": 1}
        lines.append(
            f"resources: {gpus} actors that score, each with a GPU, and 1 training worker; batch sizes are multiples of workers"
        )
    parse_config(values, where="what was seen")
    return values, lines


def look(path: str, split: str = "train") -> Look:
    """Return what the first `READ` rows of a data set are like, read in the layout, or by the columns, that suits most of them.

    Raises:
        DataError: It cannot be read or has no rows, or no known layout or columns suit.
    """
    records, broken = [], Counter[str]()
    for item in _records(path, split):
        if isinstance(item, BadRow):
            broken[item.reason] += 1
        else:
            records.append(item)
        if len(records) + sum(broken.values()) >= READ:
            break
    if not records:
        raise DataError(f"{path} has no rows that can be read" + (f" ({_counted(broken)})" if broken else ""))
    rows, reasons, how = list[Row](), Counter[str](), dict[str, Any]()
    for way in _ways(records):
        found, refused = _read_as(records, way)
        if len(found) > len(rows) or not reasons:  # of equals the first
            rows, reasons, how = found, refused, way
        if not refused:
            break
    if not rows:
        raise DataError(
            f"{path}: no row is usable ({_counted(reasons)}); its columns are {', '.join(map(str, records[0]))[:200]}; write a file "
            "by `pharmacist init` and name the columns in data.candidates.columns"
        )
    columns = how.get("columns")
    layout = (
        f"columns {', '.join(f'{ours}={theirs}' for ours, theirs in columns.items())}"
        if columns
        else f"layout {how['layout']}"
        if how
        else ""
    )
    if category := _category(records):
        how = {**how, "category_column": category}
        rows = _read_as(records, how)[0]
    if split != "train":
        how = {**how, "split": split}
    return Look(len(records) + sum(broken.values()), rows, broken + reasons, how, layout or f"layout {_fitting(rows[0])}")


def _records(path: str, split: str) -> Iterator[dict[str, Any] | BadRow]:
    found = load_huggingface(path, split)
    if found is not None:
        yield from found
        return
    for chunk in plan([path]):
        for _, item in read_chunk(chunk):
            try:
                yield record_of(item) if isinstance(item, bytes) else item
            except BadRow as bad:
                yield bad


def _ways(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield ways to read the records, the best first: by their columns, by a layout, by columns of likely names."""
    yield {}
    yield from ({"layout": name} for name in LAYOUTS)
    there = set(records[0])
    prompts = [name for name in ("prompt", *PROMPTS) if name in there]
    answers = [name for name in ("response", *ANSWERS) if name in there]
    yield from ({"columns": {"prompt": p, "response": a}} for p in prompts for a in answers if p != a)


def _read_as(records: Sequence[Mapping[str, Any]], how: dict[str, Any]) -> tuple[list[Row], Counter[str]]:
    rows, reasons = [], Counter[str]()
    for record in records:
        try:
            rows.append(to_row(record, **how))
        except BadRow as bad:
            reasons[bad.reason] += 1
    return rows, reasons


def _fitting(row: Row) -> str:
    record = orjson.loads(row.raw)
    return next(name for name, layout in LAYOUTS.items() if all(record.get(column) is not None for column in layout.required))


def _category(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a column that tells rows apart by kind: of a likely name, with a few values that are text."""
    if "category" in records[0]:
        return None
    for name in CATEGORIES:
        values = [record.get(name) for record in records]
        different = {value for value in values if isinstance(value, str)}
        if all(value is None or isinstance(value, str) for value in values) and 2 <= len(different) <= min(50, len(records) // 2):
            return name
    return None


def _said(seen: Look) -> Iterator[str]:
    first = f"the first {seen.read:,} rows" if seen.read >= READ else f"its {seen.read:,} rows"
    broken = f"; not: {_counted(seen.broken)}" if seen.broken else ""
    yield f"data.candidates: {len(seen.rows):,} of {first} are usable ({seen.layout}){broken}"
    if kinds := {row.category for row in seen.rows if row.category}:
        yield f"data.candidates: {len(kinds)} categories in {seen.how.get('category_column', 'category')}"


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def _longest(rows: Sequence[Row], model: str) -> tuple[int, list[str]]:
    """Return the power of two of tokens in which `FITS` of the rows fit uncut, as far as the model goes, and why."""
    renderer = ModelRef(model, max_length=LONGEST).renderer()
    lengths = []
    for row in rows:
        try:
            lengths.append(len(renderer.render(row).ids))
        except DataError:  # ingestion says which, and why
            continue
    if not lengths:
        raise ModelError(f"{model}: its template and tokenizer refuse every row that was looked at; `pharmacist doctor` says why")
    half, most = (int(np.quantile(lengths, share, method="higher")) for share in (0.5, FITS))
    limit = getattr(empty_model(model).config.get_text_config(), "max_position_embeddings", None) or LONGEST
    smallest = ModelConfig.model_fields["max_length"].default // 4
    chosen = min(max(smallest, 1 << (most - 1).bit_length()), limit)
    cut = sum(length > chosen for length in lengths)
    template = {"chat": "the model's chat template", "alpaca": "Alpaca's frame, for the tokenizer has no chat template"}
    return chosen, [
        f"model.template: {template[renderer.template]}",
        f"model.max_length: {chosen}; half of the rows have up to {half} tokens, 99 % up to {most}, {cut:,} of {len(lengths):,} are cut",
    ]
