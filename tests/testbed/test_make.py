from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.cli.app import app, main
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.testbed import make
from pharmacist_ray.testbed.language import KINDS
from pharmacist_ray.testbed.make import make_testbed
from pharmacist_ray.testbed.world import World

GOOD = {"facts": 1.0, "compliance": dict.fromkeys(KINDS, 1.0), "declining": 1.0}
SMALL = [
    "pretraining.workers=0",
    "pretraining.rows=200",
    "pretraining.train.steps=2",
    "pretraining.model={hidden: 16, layers: 1, heads: 2, intermediate: 16}",
]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Train nothing and find every base good; return the recipes that bases were trained by."""
    recipes: list[dict[str, Any]] = []

    def pretrain(base: Path, recipe: dict[str, Any], samples: Any, tokenizer: Any) -> None:
        if not (base / "recipe.json").exists() or json.loads((base / "recipe.json").read_text()) != recipe:
            recipes.append(recipe)
            base.mkdir(parents=True, exist_ok=True)
            (base / "recipe.json").write_text(json.dumps(recipe))

    monkeypatch.setattr(make, "_pretrain", pretrain)
    monkeypatch.setattr(make, "check_base", lambda model, world: GOOD)
    return recipes


def test_the_base_follows_from_the_world_and_another_initial_seed_sees_the_same_rows(trained, tmp_path):
    make_testbed(tmp_path / "a", World(1, 3))
    make_testbed(tmp_path / "b", World(2, 3, covered=4, noise=0.0))
    make_testbed(tmp_path / "c", World(1, 3), ["pretraining.seed=8"])
    make_testbed(tmp_path / "d", World(1, 4))
    first, second, reseeded, other = trained
    assert first == second
    assert (first["world"], first["pretraining"]["seed"], other["world"], other["pretraining"]["seed"]) == (3, 3, 4, 4)
    assert reseeded["samples"] == first["samples"] != other["samples"]
    assert reseeded["pretraining"] == {**first["pretraining"], "seed": 8}
    assert json.loads((tmp_path / "a/base/check.json").read_text()) == GOOD
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["seed"] == 0


def test_a_base_is_taken_from_its_own_world_only(trained, tmp_path):
    make_testbed(tmp_path / "a", World(1, 3))
    base = tmp_path / "a" / "base"
    make_testbed(tmp_path / "b", World(2, 3), [], base)
    assert len(trained) == 1
    assert (tmp_path / "b" / "base" / "recipe.json").read_text() == (base / "recipe.json").read_text()

    with pytest.raises(
        ModelError, match=r"a/base is the base of world 3, not of world 4; give --world 3 or a base of world 4, or leave"
    ):
        make_testbed(tmp_path / "c", World(1, 4), [], base)
    with pytest.raises(
        ModelError, match=r"of world 3, but was not made with these settings of pretraining and model; give the overr"
    ):
        make_testbed(tmp_path / "c", World(1, 3), ["pretraining.seed=8"], base)
    for recipe in (None, "[1, 2]", '{"world": null}'):  # no base, one of an earlier version, and one of `plant`
        (base / "recipe.json").unlink(missing_ok=True)
        if recipe is not None:
            (base / "recipe.json").write_text(recipe)
        with pytest.raises(
            ModelError, match=r"a/base is not the base of a testbed; give the base folder of one, or leave --base out"
        ):
            make_testbed(tmp_path / "c", World(1, 3), [], base)
    assert not (tmp_path / "c").exists()


def test_a_bad_base_is_an_error_each_time_and_leaves_no_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pharmacist", "testbed", str(tmp_path), *SMALL, "--world", "2"])
    for _ in range(2):  # the second time, the base is there
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == ModelError.exit_code
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"pharmacist: the base model {tmp_path}/base has learnt too little to stand on: it knows 0.")
        assert line.endswith("give it more steps, for example pretraining.train.steps=4")
        assert json.loads((tmp_path / "base/recipe.json").read_text())["world"] == 2
        assert json.loads((tmp_path / "base/check.json").read_text())["facts"] < 0.9
        assert not (tmp_path / "config.yaml").exists()


@pytest.mark.slow
def test_the_base_of_the_demo_is_good(tmp_path):
    make_testbed(tmp_path, World(), ["pretraining.workers=0"])
    figures = json.loads((tmp_path / "base/check.json").read_text())
    assert min(figures["facts"], figures["declining"], *figures["compliance"].values()) >= 0.9
    before = (tmp_path / "base/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "data")
    make_testbed(tmp_path, World(seed=5), ["pretraining.workers=0"])
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == before


def test_the_command_passes_its_options_on_and_its_defaults_are_the_worlds(tmp_path, monkeypatch):
    made: list[tuple[World, Path | None]] = []
    monkeypatch.setattr(make, "make_testbed", lambda folder, world, overrides, base: made.append((world, base)))
    for options in ([], ["--world", "3", "--seed", "4", "--covered", "1", "--noise", "0.3", "--base", "x"]):
        monkeypatch.setattr(sys, "argv", ["pharmacist", "testbed", str(tmp_path), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert made == [(World(), None), (World(4, 3, 1, 0.3), Path("x"))]
    command = next(one.callback for one in app.registered_commands if one.callback and one.callback.__name__ == "testbed")
    assert list(inspect.signature(command).parameters) == ["folder", "overrides", "seed", "world", "covered", "noise", "base"]


def test_a_mistake_in_an_override_is_found_before_anything_is_made(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'selection.ratoi' .did you mean 'ratio'"):
        make_testbed(tmp_path / "a", World(), ["selection.ratoi=1"])
    assert (trained, list(tmp_path.iterdir())) == ([], [])


def test_a_parameter_out_of_range_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pharmacist", "testbed", str(tmp_path), "--covered", "9"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ConfigError.exit_code
    assert capsys.readouterr().err == "pharmacist: the testbed's trusted rows can cover 1 to 6 hazards, not 9; change covered\n"
