from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from pharmacist_ray.config import Config, load_config
from pharmacist_ray.config.load import apply_override, dump_config, parse_config
from pharmacist_ray.config.schema import SourceConfig
from pharmacist_ray.config.template import EXAMPLE, USUAL, schema, template
from pharmacist_ray.errors import ConfigError


def _fields(section: BaseModel, values: Any, where: str = "") -> list[tuple[str, bool, str | None]]:
    """Return (dotted name, whether it is among the values, description) of every field below a section."""
    found = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        found.append((f"{where}{name}", name in values, field.description))
        if isinstance(value, BaseModel) and name in values:
            found += _fields(value, values[name], f"{where}{name}.")
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            found += _fields(value[0], values[name][0], f"{where}{name}.0.")
    return found


@pytest.mark.parametrize("every", [False, True])
def test_the_template_loads_and_is_the_defaults(every: bool, tmp_path: Path):
    (tmp_path / "pharmacist.yaml").write_text(template(every=every), encoding="utf-8")
    assert load_config(tmp_path / "pharmacist.yaml") == Config.model_validate(EXAMPLE)


def test_the_short_template_is_a_part_of_the_long_one_and_fits_on_a_screen_or_two():
    text = template()
    assert 30 <= len(text.splitlines()) <= 84
    assert "pharmacist init --all" in text.splitlines()[0]

    def missing(short: Any, long: Any, where: str = "") -> list[str]:
        """Return where the short one has what the long one has not, or has otherwise; one path stands for a list of one."""
        if isinstance(short, dict):
            return [lost for key in short for lost in missing(short[key], long.get(key), f"{where}.{key}")]
        if isinstance(short, list) and short and isinstance(short[0], dict):
            return [lost for one, other in zip(short, long, strict=True) for lost in missing(one, other, f"{where}.0")]
        return [] if short == long or [short] == long else [where]

    short = yaml.safe_load(text)
    assert missing(short, yaml.safe_load(template(every=True))) == []
    for usual in USUAL:
        value = short
        for key in usual.split("."):
            value = value[0][key] if isinstance(value, list) else value[key]


def test_every_field_of_every_section_is_there_but_a_sources_defaults_only_once():
    fields = _fields(Config.model_validate(EXAMPLE), yaml.safe_load(template(every=True)))
    left_out = {name for name, shown, _ in fields if not shown}
    assert all(name.rpartition(".")[2] in SourceConfig.model_fields for name in left_out)
    assert not any(name.startswith("data.candidates") for name in left_out)
    shown = {name for name, there, _ in fields if there}
    assert {"model.max_length", "model.lora.r", "attacks.0.train.lr", "evaluation.judge", "selector.reference.steps"} <= shown


def test_every_key_is_explained_above_it():
    lines = template(every=True).splitlines()
    for number, line in enumerate(lines):
        if re.match(r" *(- )?\w+:", line):
            assert lines[number - 1].lstrip().startswith("# "), line
    text = " ".join(line.lstrip("# ") for line in lines)
    config = Config.model_validate(EXAMPLE)
    for name, _, description in _fields(config, EXAMPLE):
        assert description is None or " ".join(description.split()) in text, name
    assert max(map(len, lines)) <= 120
    assert textwrap.dedent(config.selector.__doc__ or "") in text


def test_the_schema_takes_what_init_writes_and_what_a_run_keeps():
    Draft202012Validator.check_schema(schema())
    known = Draft202012Validator(schema())
    full = dump_config(Config.model_validate(EXAMPLE))
    for text in (template(), template(every=True), full):
        assert list(known.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "selection.ratoi=1", "selection.ratio=2", "selection.ratio=[0.1]", "model.dtype=float33", "attacks.0.rows=0",
        "data.candidates.path={}", "scoring.scorers=[]", "evaluation.task.checker=near", "seed=one", "model=null",
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_package_refuses_and_at_the_same_place(wrong: str):
    values = yaml.safe_load(template(every=True))
    apply_override(values, wrong)
    with pytest.raises(ConfigError) as raised:
        parse_config(values, where="test")
    errors = list(Draft202012Validator(schema()).iter_errors(values))
    inner = [*errors, *(one for error in errors for one in error.context)]  # in a section that may be null
    places = {".".join(map(str, error.absolute_path)) for error in inner}
    key = wrong.partition("=")[0]
    assert places & {key, key.rpartition(".")[0]}
    assert key in str(raised.value)
