"""The pages that are made and not written: a hook of MkDocs (`mkdocs.yml`), so that the site can never disagree with the code.

What is made lives in the build only: the reference of configuration, command line and methods, the results, and the pages that are
files elsewhere in the repository (README, SECURITY, CHANGELOG, cluster/README).
"""

from __future__ import annotations

import html
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from plan import plan
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from results import findings, provenance, results, stood, table

from pharmacist_ray.config.attack_kinds import AS_THEY_ARE, KINDS
from pharmacist_ray.config.public_sets import PROMPT_SETS, ROW_SETS, PublicSet
from pharmacist_ray.config.schema import Config
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError, ModelError, ResourceError, TrainingError
from pharmacist_ray.evaluation.judges import JUDGES
from pharmacist_ray.storage import RemotePath
from pharmacist_ray.training.objectives import OBJECTIVES, Objective
from pharmacist_ray.training.objectives.sft import sft

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "SECURITY.md": "reference/security.md",
    "CHANGELOG.md": "reference/changelog.md",
    "cluster/README.md": "how-to/cluster.md",
}
"""File of the repository → the page that shows it."""
TYPES = {
    type(None): "null",
    str: "text",
    float: "number",
    int: "whole number",
    bool: "true | false",
    Any: "anything",
    Path: "folder",
    RemotePath: "URI",
}
"""Types in words of YAML."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {
        "reference/configuration.md": configuration(),
        "reference/command-line.md": command_line(),
        "reference/methods.md": methods(),
        "reference/results.md": all_results(),
        **{page: moved((ROOT / file).read_text(encoding="utf-8"), file, page) for file, page in ELSEWHERE.items()},
    }
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put what is made into a written page: ``<!-- results: NAME -->``, ``<!-- findings: NAME -->``, ``<!-- families -->`` and so on."""
    for name, result in results().items():
        markdown = markdown.replace(f"<!-- results: {name} -->", f"{table(result)}\n\n{provenance(result)}")
        if say := {"evidence": findings, "matrix": stood}.get(result["kind"]):
            markdown = markdown.replace(f"<!-- findings: {name} -->", say(result))
    made = {
        "families": families,
        "prompt sets": prompt_sets,
        "row sets": row_sets,
        "attack kinds": attack_kinds,
        "layers": layers,
        "plan": plan,
    }
    for name, make in made.items():
        if (marker := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def moved(text: str, file: str, page: str) -> str:
    """Return a file's text with its relative links as they are from a page; a link to what is no page becomes its name.

    Args:
        text: The file's text.
        file: Its place in the repository.
        page: The place of the page that shows it.
    """

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found["label"], found["target"], found["anchor"] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return found[0]
        there = os.path.normpath(os.path.join(os.path.dirname(file), target))
        shown = ELSEWHERE.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
        if shown is None:
            return label.lstrip("!").strip("[]")
        return f"{label}({os.path.relpath(shown, os.path.dirname(page) or '.')}{anchor})"

    return re.sub(r"(?P<label>!?\[[^\]]*\])\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)", link, text)


def configuration() -> str:
    """Return every section and key of a configuration with type, default and text."""
    parts = [
        "# Configuration",
        "Made from the models in `pharmacist_ray/config/schema.py`. Unknown keys are errors. `pharmacist init` writes a file to start "
        "from. Any key can be given on the command line by its dotted name, for example `selection.ratio=0.3`.",
    ]
    for kind in dict.fromkeys(sections(Config)):
        title = "The whole file" if kind is Config else _title(kind)
        parts += [f"## {title} {{#{_anchor(kind) or 'whole'}}}", _text(inspect.getdoc(kind) or ""), _keys(kind)]
    parts += [
        "## Settings of objectives {#alignment-parameters}",
        "What `alignment.parameters` and `finetune.parameters` may hold, by the name of its section. The defaults are the papers'.",
    ]
    shown = {*sections(Config)}
    for name, kind in {name: kind for objective in OBJECTIVES.values() for name, kind in objective.settings.items()}.items():
        parts += [f"### {name}", _keys(kind)]
        for inner in (one for one in sections(kind) if one not in {kind, *shown}):
            parts += [f"### {_title(inner)} {{#{_anchor(inner)}}}", _text(inspect.getdoc(inner) or ""), _keys(inner)]
            shown.add(inner)
    return "\n\n".join(parts) + "\n"


def sections(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a section and those below it, each where it is met."""
    yield kind
    for field in kind.model_fields.values():
        for inner in _models(field.annotation):
            yield from sections(inner)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for one in getattr(annotation, "__args__", ()) for model in _models(one)]


def _keys(kind: type[BaseModel]) -> str:
    lines = ["| key | type | default | what |", "| --- | --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        models = _models(field.annotation)
        text = field.description or (inspect.getdoc(models[0]) if models else "") or ""
        shown = "**required**" if field.is_required() else _default(field.get_default(call_default_factory=True))
        lines.append(f"| `{field.alias or name}` | {_text(_type(field.annotation, field.metadata))} | {shown} | {_text(text)} |")
    return "\n".join(lines)


def _title(kind: type[BaseModel]) -> str:
    name = kind.__name__.removesuffix("Config")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("task evaluation", "evaluation's task")


def _anchor(kind: type[BaseModel]) -> str:
    return re.sub(r"[^a-z]+", "-", _title(kind))


def _type(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """Return a type in words of YAML, with the limits of a number."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{_title(annotation)}](#{_anchor(annotation)})"
    if origin is Annotated:
        return _type(inner[0], [limit for one in inner[1:] for limit in getattr(one, "metadata", [one])])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type, inner))
    if origin is not None:
        return f"{origin.__name__} of {' → '.join(map(_type, inner))}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {getattr(one, end):g}" for one in limits for end, sign in signs.items() if hasattr(one, end)]
    return " ".join([TYPES.get(annotation, getattr(annotation, "__name__", str(annotation))), ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_yaml(given)}`" if given else "its defaults"
    return f"`{_yaml(to_jsonable_python(value, exclude_none=True))}`"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def _text(text: str) -> str:
    """Return a docstring on one line, safe in a table; code stays as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.replace("``", "`").split()))
    return "".join(
        part if number % 2 else html.escape(part, quote=False).replace("|", "\\|") for number, part in enumerate(parts)
    )


def command_line() -> str:
    """Return every command with its options, by Typer's own documentation of an app."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "pharmacist_ray.cli.app",
        "utils",
        "docs",
        "--name",
        "pharmacist",
        "--title",
        "Command line",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    made = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    codes = {
        kind.exit_code: _first(kind) for kind in (ConfigError, DataError, ModelError, ArtifactError, ResourceError, TrainingError)
    }
    lines = ["| code | what |", "| ---: | --- |", "| 0 | Done. |", "| 1 | A bug, of ours or of a plug-in, with its traceback. |"]
    return "\n".join([made, "## Exit codes", "", *lines, *(f"| {code} | {what} |" for code, what in codes.items()), ""])


def methods() -> str:
    """Return every scorer, objective and judge with what its docstrings say."""
    parts = [
        "# Scorers, objectives, judges",
        "Made from the three tables of the code. [How to add one](../how-to/extend.md).",
        "## Scorers",
        "The highest score is kept first. `random` needs no model; it writes one column a draw.",
        _listed(
            {
                name: (_first(inspect.getmodule(one.score)), _first(one.score), ", ".join(one.sees) or "nothing")
                for name, one in SCORERS.items()
            },
            "what it is",
            "what it returns",
            "what it sees",
        ),
        "## Objectives",
        "What a step minimises: the defence, of an alignment, a fine-tune or a repair. Each has its [card](../defences.md); their settings "
        "stand in [the reference of the configuration](configuration.md#alignment-parameters).",
        _listed(
            {name: ({"any": "alignment"}.get(one.stage, one.stage), *_objective(one)) for name, one in OBJECTIVES.items()},
            "stage",
            "what it is",
            "what it does",
        ),
        "## Judges",
        "A judge says of every answer whether it is harmful, a refusal, helpful, beside the point or incoherent.",
        _listed({name: (_first(_judge(name)), kind.score) for name, kind in JUDGES.items()}, "what it is", "its score"),
    ]
    return "\n\n".join(parts) + "\n"


def _objective(one: Objective) -> tuple[str, str]:
    """Return what an objective is, and what the function does that makes it so."""
    does = one.compose or (one.finish if one.run is sft else None) or one.trains or one.run
    return _first(inspect.getmodule(does)), _first(does)


def _judge(name: str) -> ModuleType:
    return importlib.import_module(f"pharmacist_ray.evaluation.judges.{name}")


def _first(thing: Any) -> str:
    return _text((inspect.getdoc(thing) or "").partition("\n\n")[0])


def _listed(rows: dict[str, tuple[str, ...]], *headings: str) -> str:
    lines = [f"| name | {' | '.join(headings)} |", "| --- |" + " --- |" * len(headings)]
    return "\n".join([*lines, *(f"| `{name}` | {' | '.join(cells)} |" for name, cells in rows.items())])


ABOUT = {
    "planted": "How well each score finds corruption that was planted in real safety data: means over seeds, each with a tiny base of "
    "its own, with 95 % t intervals. [What it says](../evidence.md#on-real-text).",
    "comparison": "Each arm is aligned on other rows, attacked by the same fine-tunes, and asked the same prompts.",
    "evidence": "What each arm is worth, over worlds that each have a base model of their own. See [Evidence](../evidence.md).",
    "matrix": "Defences of every stage against every kind of attack and against an attacker who adapts; HS is in the attacker's form. "
    "What each of them is: [Defences](../defences.md).",
    "peers": "What a score for every row costs, over a pass that computes losses alone, ours and other systems' methods written from their "
    "descriptions: the median over rounds. Agreement is with the exact first-order influence.",
    "cascade": "What cascades lose of the model's own top rows against what they say, means over samples of the same candidates, and the "
    "share of the model's own scoring that they save. See [Let a small model look first](../how-to/cascade.md).",
    "scoring": "What Ray Data makes of a scorer's pace: rows a second after the first shard was begun, medians over rounds. The scores are "
    "the same to the bit. Two bare loops tell what a second process can gain on this machine at all.",
    "layers": "Influences over the adapters of the last layers alone against those over all, of the same rows: what they cost over a "
    "forward pass, and how far the scores agree.",
    "objectives": "What a step of each objective costs over one of SFT: the median over rounds; CPU seconds on a CPU.",
    "gpu": "What one GPU does with a model of random weights: scoring by two methods, and an optimiser step of an adapter. MFU is the "
    "share of the GPU's peak by its data sheet, without what checkpointing computes again; the estimate is the doctor's.",
    "growth": "What each stage of curation takes, by the number of rows. See [Growth](../growth.md).",
}
"""Kind of a result → what its table shows."""


def all_results() -> str:
    """Return every result with its table, its picture, and where it comes from."""
    parts = [
        "# Results",
        "Every table here is drawn from a file in `docs/results` that `docs/results.py` wrote from what a command measured. None is "
        "typed.",
        "The harmful score (HS) is the share of harmful prompts that are answered harmfully. It means nothing without task accuracy and "
        "helpfulness: a model that refuses everything has none. Intervals are 95 %.",
    ]
    for name, result in results().items():
        parts += [f"## {name.capitalize()}", ABOUT[result["kind"]], provenance(result)]
        parts += [
            f"![{picture.stem}](../pictures/{picture.name})"
            for picture in sorted((ROOT / "docs" / "pictures").glob(f"{name}*.svg"))
        ]
        parts.append(table(result))
    return "\n\n".join(parts) + "\n"


def families() -> str:
    """Return the table of model families, from what the tests hold each of them to."""
    if (folder := str(ROOT / "tests")) not in sys.path:
        sys.path.append(folder)
    return str(importlib.import_module("families").table())


def prompt_sets() -> str:
    """Return the table of the prompt sets that go by name."""
    return _public("prompts", PROMPT_SETS)


def row_sets() -> str:
    """Return the table of the sets of rows that go by name."""
    return _public("rows", ROW_SETS)


def _public(what: str, sets: dict[str, PublicSet]) -> str:
    lines = [f"| `name` | {what} | how many | on the hub | licence |", "| --- | --- | ---: | --- | --- |"]
    for name, one in sets.items():
        where = f"`{one.path.removeprefix('hf:')}`" + (", gated" if one.gated else "")
        only = f", where `{one.only[0]}` is {one.only[1]!r}, of" if one.response and one.only else ""
        lines.append(f"| `{name}` | {one.kind}{only} | {one.prompts:,} | {where} | {one.licence} |")
    return "\n".join(lines)


def attack_kinds() -> str:
    """Return the table of the kinds of attack."""
    lines = ["| `kind` | what the attacker does | rows from | harmful prompts afterwards |", "| --- | --- | --- | --- |"]
    for name, kind in KINDS.items():
        asked = "in the form of the task" if kind.form is None else "as they are" if kind.form == AS_THEY_ARE else "in its form"
        lines.append(f"| `{name}` | {kind.about} | `{kind.rows}` | {asked} |")
    return "\n".join(lines)


def layers() -> str:
    """Return the rooms of the package from top to bottom, as the contract in pyproject.toml orders them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    ordered = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    lines = ["| layer | room | what is in it |", "| ---: | --- | --- |"]
    for number, layer in enumerate(ordered, 1):
        for room in map(str.strip, layer.split("|")):
            lines.append(f"| {number} | **{room.removeprefix('pharmacist_ray.')}** | {_first(importlib.import_module(room))} |")
    return "\n".join(lines)
