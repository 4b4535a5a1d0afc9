from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pharmacist_ray.config.edit import with_values
from pharmacist_ray.config.load import assign
from pharmacist_ray.errors import ConfigError

FILE = """# A run, with comments.
run_dir: runs/first   # where it goes

resources:
  workers: 16        # of a training
  gpus_per_worker: 1

# about the selector
selector:
  reference: {steps: 3, lr: 1.0e-4}   # on one line
  warmup: &sharded
    steps: 20
    zero_stage: 3    # base
    # the last word on it
  tov: *sharded
alignment:
  train:
    <<: *sharded
    steps: 500

attacks:
  - name: x   # the first
    train:
      steps: 3
  - {name: y, train: {steps: 4}}
judges:
- phrases
- "quoted"
empty:
evaluation: {}
"""


def _read(text: str) -> Any:
    return yaml.safe_load(text)


def _changed(values: dict[str, Any], defaults: dict[str, Any] | None = None) -> str:
    """Return the changed file, which has to say what was asked for, what it said before, and every comment."""
    found = with_values(FILE, values, defaults)
    expected = _read(yaml.safe_dump(_read(FILE)))  # without aliases
    for key, value in values.items():
        assign(expected, key, value)
    got = _read(found)
    for key, value in (defaults or {}).items():
        section = got
        *path, last = key.split(".")
        for part in path:
            section = section[part]
        if last in section and key not in values:
            assert section.pop(last) == value
    assert got == expected
    for line in FILE.splitlines():
        if "#" in line:
            assert line[line.index("#") :] in found
    return found


def test_a_value_is_replaced_in_its_place_and_its_comment_stays_in_its_column() -> None:
    found = _changed({"resources.workers": 8})
    assert found == FILE.replace("workers: 16        #", "workers: 8         #")
    assert _changed({"resources.workers": 16}) == FILE
    assert _changed({}) == FILE


def test_a_missing_key_is_added_after_the_last_of_its_section() -> None:
    assert "  gpus_per_worker: 1\n  actors: 8\n\n# about" in _changed({"resources.actors": 8})
    assert "reference: {steps: 3, lr: 1.0e-4, zero_stage: 2}   # on one line" in _changed({"selector.reference.zero_stage": 2})
    assert _changed({"scoring.tokens_per_batch": 512}).endswith("evaluation: {}\nscoring:\n  tokens_per_batch: 512\n")
    assert "      steps: 3\n      offload: none\n" in _changed({"attacks.0.train.offload": "none"})
    assert "{name: y, train: {steps: 4, checkpointing: true}}" in _changed({"attacks.1.train.checkpointing": True})
    assert "empty: {a: {b: 1}}" in _changed({"empty.a.b": 1})
    assert "evaluation: {batch_size: 8}" in _changed({"evaluation.batch_size": 8})
    assert "\n- withheld\n" in _changed({"judges.0": "withheld"})
    assert "\n- 'no'\n" in _changed({"judges.1": "no"})  # a text, and not what YAML takes it for


def test_what_reads_an_anchor_keeps_its_own_value() -> None:
    everywhere = {f"{section}.zero_stage": 2 for section in ("selector.warmup", "selector.tov", "alignment.train")}
    assert _changed(everywhere) == FILE.replace("zero_stage: 3", "zero_stage: 2")
    found = _changed({"selector.warmup.zero_stage": 1, "alignment.train.zero_stage": 2})
    assert "tov: {<<: *sharded, zero_stage: 3}" in found
    assert "    steps: 500\n    zero_stage: 2\n" in found
    found = _changed({"selector.tov.zero_stage": 0})
    assert "tov: {<<: *sharded, zero_stage: 0}" in found
    found = _changed(
        {"selector.warmup.offload": "optimizer"}, {"selector.tov.offload": "none", "alignment.train.offload": "none"}
    )
    assert "tov: {<<: *sharded, offload: none}" in found


def test_what_cannot_be_changed_is_told_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"x\.yaml: 'selector\.tov\.offload' would be said by an anchor that others need otherwise"
    ):
        with_values(FILE, {"selector.warmup.offload": "optimizer"}, where="x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml: alignment is a section over several lines; set it by hand to 3"):
        with_values(FILE, {"alignment": 3}, where="x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml is not YAML"):
        with_values("a: [", {"a": 1}, where="x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml must hold keys and values"):
        with_values("- a", {"a": 1}, where="x.yaml")


_SCALARS = st.one_of(st.integers(-5, 99), st.booleans(), st.sampled_from(["none", "a b", "", "x: y", "# no comment", "null"]))
_KEYS = st.sampled_from(["a", "b", "workers", "train"])
_TREES = st.recursive(_SCALARS, lambda inner: st.dictionaries(_KEYS, inner, min_size=1, max_size=3), max_leaves=6)


@given(tree=st.dictionaries(_KEYS, _TREES, min_size=1, max_size=3), path=st.lists(_KEYS, min_size=1, max_size=3), value=_SCALARS,
       flow=st.sampled_from([True, False, None]))  # fmt: skip
def test_any_key_of_any_file_is_set_or_refused(tree: dict[str, Any], path: list[str], value: Any, flow: bool | None) -> None:
    text = yaml.safe_dump(tree, default_flow_style=flow)
    key = ".".join(path)
    expected = _read(text)
    try:
        assign(expected, key, value)
        found = with_values(text, {key: value})
    except ConfigError:
        return
    assert _read(found) == expected
