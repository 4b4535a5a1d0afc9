"""The commented configuration that `pharmacist init` writes, made from the schema so that it can never disagree with it."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pharmacist_ray.config.data import NamedConfig, SourceConfig
from pharmacist_ray.config.schema import Config

EXAMPLE: dict[str, Any] = {
    "run_dir": "runs/first",
    "model": {"path": "path/to/model"},
    "data": {
        "candidates": {
            "path": "data/alignment.jsonl",
            "layout": "auto",
            "columns": {},
            "category_column": "category",
            "split": "train",
        },
        "validation": {"path": "data/trusted_safety.jsonl"},
        "harmful": {"path": "data/harmful.jsonl"},
        "benign": {"path": "data/trusted_benign.jsonl"},
    },
    "selection": {"scorer": "calibrated"},
    "comparison": {"selections": ["all", "random", "pharmacist", "calibrated"], "seeds": [0, 1, 2]},
    "attacks": [
        {
            "name": "p10",
            "task": {"path": "data/user_task_train.jsonl"},
            "harmful": {"path": "data/attacker.jsonl"},
        }
    ],
    "evaluation": {
        "harmful_prompts": {"path": "data/eval_harmful.jsonl"},
        "benign_prompts": {"path": "data/eval_benign.jsonl"},
        "task": {"source": {"path": "data/user_task_test.jsonl"}},
    },
}
"""What has no default, filled in; one source in full; and the score to begin with, which is not the default, for files that do not name
one keep their meaning."""

_BRIEF = (SourceConfig,)
"""Sections whose defaults are shown once, in `EXAMPLE`, because they occur many times."""


USUAL = (
    "model.dtype",
    "resources.workers",
    "resources.gpus_per_worker",
    "selection.ratio",
    "alignment.objective",
    "attacks.harmful_share",
    "attacks.train.epochs",
    "attacks.train.lr",
    "evaluation.judge",
)
"""What has a default but is changed in most runs, by its dotted name; with `EXAMPLE` the short file."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration, for editors; what hangs on several keys only `load_config` checks."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema(mode="validation")}
    return made | {"title": "A run of pharmacist"}


def template(values: dict[str, Any] | None = None, *, every: bool = False, schema_file: str | None = None) -> str:
    """Return the YAML text: keys with their descriptions above them, defaults included.

    Args:
        values: What has no default, and what is not as by default; else those of `EXAMPLE`.
        every: Write every key there is; else those that have a value and `USUAL`, and of a source what is not as by default.
        schema_file: Where editors find the `schema`, as seen from the file.
    """
    values = EXAMPLE if values is None else values
    config = Config.model_validate(values)
    if every:
        keys = "Every key is explained above it; keys with a default may be left out."
    else:
        keys = "These are the keys that most runs set; `pharmacist init --all` writes every one there is."
    head = f"# A run of pharmacist. {keys}\n# Relative paths are relative to where you run the command.\n"
    if schema_file:
        head = f"# yaml-language-server: $schema={schema_file}\n{head}"
    return head + "\n".join(_section(config, values, 0, "", every)) + "\n"


def _section(section: BaseModel, given: Any, depth: int, where: str, every: bool) -> list[str]:
    lines: list[str] = []
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{where}{name}"
        shown = given.get(name) if isinstance(given, dict) else None
        if shown is None and isinstance(section, _BRIEF) and name in SourceConfig.model_fields and field.default == value:
            continue
        if not every and shown is None and not any(f"{usual}.".startswith(f"{key}.") for usual in USUAL):
            continue
        if not depth:
            lines.append("")
        description = field.description or (type(value).__doc__ if isinstance(value, BaseModel) else None)
        if description and (every or field.description):
            text = " ".join(description.split())
            lines += [f"{pad}# {line}" for line in textwrap.wrap(text, 118 - len(pad))]
        if isinstance(value, _BRIEF) and not every:
            lines.append(f"{pad}{name}: {_flow(_in_short(value))}")
        elif isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_section(value, shown, depth + 1, f"{key}.", every)]
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(f"{pad}{name}:")
            for index, item in enumerate(value):
                first, *rest = _section(item, shown[index] if shown else None, depth + 2, f"{key}.", every)
                body = [first, *rest]
                start = next(i for i, line in enumerate(body) if not line.lstrip().startswith("#"))
                body[start] = f"{pad}  - {body[start].lstrip()}"
                lines += body
        else:
            lines.append(f"{pad}{name}: {_flow(to_jsonable_python(value, exclude_none=True))}")
    return lines


def _in_short(source: SourceConfig) -> dict[str, Any]:
    """Return what of a source is not as by default, or as its name has it."""
    told = source.model_dump(mode="json", exclude_defaults=True)
    if isinstance(source, NamedConfig) and source.name:
        usual = type(source)(name=source.name)
        told = {"name": source.name} | {key: value for key, value in told.items() if value != getattr(usual, key)}
    if len(told.get("path", ())) == 1:
        [told["path"]] = told["path"]
    return told


def _flow(plain: Any) -> str:
    """Return a value as YAML on one line."""
    dumped = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("...\n").strip()
