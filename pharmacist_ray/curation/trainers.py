"""A curated set as trainers want it: one layout each, and one line here.

Whatever the layout, the loss is meant for the last answer alone, as in every training here; what stands beside a data file says so in
the trainer's own words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import yaml

from pharmacist_ray.data.schema import Row
from pharmacist_ray.plugins import Plugin, Table, blaming, misfit

FILE = "train.parquet"
"""The data file of every export: of one type throughout, however the first rows look, and read by all these trainers."""


@dataclass(frozen=True)
class Sample:
    """One row, ready to be written out."""

    row: Row
    turns: Sequence[Mapping[str, str]]
    """The turns up to the answer as ``{"role", "content"}``: perhaps a system prompt, earlier turns, and the user's last."""
    text: str
    """The same for a model without a chat template, as ``model.template`` frames it."""


@dataclass(frozen=True)
class Export:
    """A trainer's layout."""

    record: Callable[[Sample], dict[str, Any] | None]
    """Returns a row's columns; None where the layout has no place for it."""
    schema: pa.Schema | None = None
    """The columns; they need not be named where all are text."""
    beside: Callable[[str], Mapping[str, str]] = lambda folder: {}
    """What else lies in the export's folder, by name: small text files."""


_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _answered(sample: Sample) -> list[dict[str, str]]:
    return [*map(dict, sample.turns), {"role": "assistant", "content": sample.row.response}]


def _trl(sample: Sample) -> dict[str, Any]:
    *prompt, answer = _answered(sample)
    return {"prompt": prompt, "completion": [answer]}


def _trl_text(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.text, "completion": sample.row.response}


def _messages(sample: Sample) -> dict[str, Any]:
    return {"messages": _answered(sample)}


_SHAREGPT = {
    "system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation",
}  # fmt: skip
"""Role → what ShareGPT's layout calls it, with LLaMA-Factory's name for what a tool returned."""


def _sharegpt(sample: Sample) -> dict[str, Any]:
    return {"conversations": [{"from": _SHAREGPT[turn["role"]], "value": turn["content"]} for turn in _answered(sample)]}


def _apart(sample: Sample) -> tuple[str, list[Mapping[str, str]]]:
    """Return the system prompt, and the turns after it."""
    first, *rest = sample.turns
    return (first["content"], rest) if first["role"] in ("system", "developer") else ("", [first, *rest])


def _alpaca(sample: Sample) -> dict[str, Any] | None:
    system, turns = _apart(sample)
    earlier = turns[:-1]
    if [turn["role"] for turn in earlier] != ["user", "assistant"] * (len(earlier) // 2):
        return None
    asked, answered = earlier[::2], earlier[1::2]
    return {
        "instruction": sample.row.prompt,
        "input": sample.row.input,
        "output": sample.row.response,
        "system": system,
        "history": [[one["content"], other["content"]] for one, other in zip(asked, answered, strict=True)],
    }


def _llamafactory(sample: Sample) -> dict[str, Any] | None:
    """Return the messages, for LLaMA-Factory skips a row whose turns do not take turns."""
    system, turns = _apart(sample)
    asks = [turn["role"] in ("user", "tool") for turn in turns]
    if asks != [place % 2 == 0 for place in range(len(turns))] or any(turn["role"] in ("system", "developer") for turn in turns):
        return None
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, *map(dict, turns), {"role": "assistant", "content": sample.row.response}]}


def _dataset_info(folder: str) -> dict[str, str]:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags |= {"observation_tag": "tool", "function_tag": "function", "system_tag": "system"}
    known = {"file_name": FILE, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    return {"dataset_info.json": json.dumps({"curated": known}, indent=1) + "\n"}


def _axolotl(folder: str) -> dict[str, str]:
    source = {
        "path": f"{folder}/{FILE}",
        "ds_type": "parquet",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": None,
        "train_on_eos": None,
    }
    head = "# For a configuration of axolotl. Without roles_to_train and train_on_eos the loss is on the last answer alone.\n"
    return {"axolotl.yaml": head + yaml.safe_dump({"datasets": [source]}, sort_keys=False, allow_unicode=True, width=10**6)}


def _watched(export: Export, plugin: Plugin) -> Export:
    columns = set(export.schema.names) if export.schema else None

    def record(sample: Sample) -> dict[str, Any] | None:
        with blaming(plugin):
            found = export.record(sample)
        if found is not None and (not isinstance(found, Mapping) or (columns is not None and set(found) != columns)):
            raise misfit(plugin, f"returned {found!r:.60} for a row; its columns are {', '.join(sorted(columns or {'any'}))}")
        return found

    def beside(folder: str) -> Mapping[str, str]:
        with blaming(plugin):
            return export.beside(folder)

    return replace(export, record=record, beside=beside)


_TALK = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
_PAIRS = pa.list_(pa.list_(pa.string()))
_MESSAGES = pa.schema([("messages", _TURNS)])
_ALPACA = pa.schema([*((name, pa.string()) for name in ("instruction", "input", "output", "system")), ("history", _PAIRS)])

_OWN = {
    "trl": Export(_trl, pa.schema([("prompt", _TURNS), ("completion", _TURNS)])),
    "trl_text": Export(_trl_text, pa.schema([("prompt", pa.string()), ("completion", pa.string())])),
    "messages": Export(_messages, _MESSAGES),
    "alpaca": Export(_alpaca, _ALPACA),
    "sharegpt": Export(_sharegpt, pa.schema([("conversations", _TALK)])),
    "llamafactory": Export(_llamafactory, _MESSAGES, _dataset_info),
    "axolotl": Export(_messages, _MESSAGES, _axolotl),
}

EXPORTS = Table("export", Export, _OWN, watched=_watched)
"""By name."""
