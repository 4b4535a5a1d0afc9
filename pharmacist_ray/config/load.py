"""Read a configuration: safe YAML, dotted overrides, and every problem reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pharmacist_ray.config.schema import Config, Section
from pharmacist_ray.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file with overrides applied.

    Relative paths in the file mean what they would mean in a shell: they are relative to the working directory.

    Args:
        path: A YAML file.
        overrides: ``dotted.key=value`` pairs; the value is YAML, list items are addressed by number (``attacks.0.rows=50``).

    Raises:
        ConfigError: The file is missing or is not YAML, an override is malformed, a key is unknown, or a value is wrong; the
            message lists every problem with its dotted name.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}; `pharmacist init` writes one") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {file} is not UTF-8 text") from error
    values = _yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold keys and values, not {type(values).__name__}; `pharmacist init` writes an example")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, where=str(file))


def parse_config(values: dict[str, Any], *, where: str) -> Config:
    """Return plain values as a checked configuration.

    Args:
        values: What YAML or JSON gave.
        where: The file named in errors.

    Raises:
        ConfigError: See `load_config`.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(_describe(dict(problem), values) for problem in error.errors())
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def located(config: Config) -> Config:
    """Return the configuration with local paths that workers open made absolute: they do not share this process's folder.

    Hub ids and URIs stay as they are.
    """
    model, evaluation = config.model, config.evaluation
    if _here(model.path):
        model = model.model_copy(update={"path": str(Path(model.path).resolve())})
    if evaluation is not None:
        evaluation = _absolute(evaluation, "judge_path").with_judges(lambda one: _absolute(one, "path", "template_file"))
        evaluation = evaluation.model_copy(update={"lm_eval": _absolute(evaluation.lm_eval, "include")})
    scoring, guard = _absolute(config.scoring, "refusal_teacher"), config.scoring.guard
    if guard is not None and _here(guard.path):
        scoring = scoring.model_copy(update={"guard": guard.model_copy(update={"path": str(Path(guard.path).resolve())})})
    if scoring.proxy is not None:
        scoring = scoring.model_copy(update={"proxy": _absolute(scoring.proxy, "path")})
    changed = {"run_dir": config.run_dir.resolve(), "model": model, "scoring": scoring, "evaluation": evaluation}
    return config.model_copy(update=changed)


def _absolute(section: S, *keys: str) -> S:
    """Return a section with those of its paths made absolute that are there."""
    found = {key: str(Path(path).resolve()) for key in keys if _here(path := getattr(section, key))}
    return section.model_copy(update=found)


def _here(path: str | None) -> bool:
    return path is not None and "://" not in path and Path(path).exists()


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key of plain values, in place.

    Args:
        values: What YAML gave.
        override: ``dotted.key=value``; the value is YAML.

    Raises:
        ConfigError: The override is malformed or steps into something that has no keys.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override '{override}' is not of the form dotted.key=value")
    assign(values, key, _yaml(text, f"override '{override}': the value"))


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key of plain values, in place; list items are addressed by number.

    Raises:
        ConfigError: The key steps into something that has no keys.
    """
    *parents, last = key.split(".")
    node: Any = values
    for done, part in enumerate(parents):
        node = _step(node, part, key, ".".join(parents[:done]), create=True)
    if isinstance(node, list):
        _step(node, last, key, ".".join(parents))
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override '{key}': '{'.'.join(parents)}' is a plain value and has no keys")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date like 2020-13-45 is a plain ValueError
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _step(node: Any, part: str, key: str, where: str, create: bool = False) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise ConfigError(f"override '{key}': '{where}' is a list of {len(node)}; use a number below that, not '{part}'")
        place: Any = int(part)
    elif isinstance(node, dict):
        place = part
        if create and node.get(part) is None:
            node[part] = {}
    else:
        raise ConfigError(f"override '{key}': '{where}' is a plain value and has no keys")
    node[place] = copy(node[place])  # YAML's aliases make one object of several sections, and only this one is meant
    return node[place]


def _describe(problem: dict[str, Any], values: Any) -> str:
    location = _location(problem, values)
    where = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1], problem["loc"])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"unknown key '{where}'" + (f" (did you mean '{near[0]}'?)" if near else f"; known here: {', '.join(known)}")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {message}, got {problem['input']!r:.80}" if problem["type"] != "value_error" else message


def _location(problem: dict[str, Any], values: Any) -> list[Any]:
    """Return the keys that lead to a problem: pydantic's location without the names of the types that a union may have."""
    found = []
    *path, last = problem["loc"] or (None,)
    for part in (*path, last):
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values))
        if inside:
            values = values[part]
        if inside or (part is last and problem["type"] == "missing"):
            found.append(part)
    return found


def _fields_at(location: list[Any], tags: tuple[Any, ...]) -> list[str]:
    """Return the keys of the section at a place; of several that may stand there, of the kind that is among pydantic's tags."""
    model: Any = Config
    for part in location:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        several = _models_in(field.annotation)
        model = next((one for one in several if {*_kinds_of(one)} & {*tags}), next(iter(several), None))
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]
