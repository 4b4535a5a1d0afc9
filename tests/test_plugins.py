"""Parts of other packages: found by name, named when they fail, part of fingerprints, and at work in a comparison."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pharmacist_ray.cli import app as cli
from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.curation.scorers import SCORERS, Scorer
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.data.schema import Row
from pharmacist_ray.doctor.plugins import show_plugins
from pharmacist_ray.errors import ConfigError, DataError, PluginError
from pharmacist_ray.evaluation.judges import JUDGES, JudgeConfig, JudgeSettings, build_judge
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.plugins import Plugin, Table, blaming
from pharmacist_ray.runtime.actors import on_actors
from pharmacist_ray.training.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3}


@dataclass(frozen=True)
class Line:
    run: Callable[[int], int]


def table(**own: Line) -> Table[Line]:
    return Table("scorer", Line, own, watched=lambda line, plugin: line, also=("random",))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on the path of imports; modules and packages of the test go away with it."""
    before = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for one in (SCORERS, OBJECTIVES, JUDGES):
        monkeypatch.setattr(one, "_found", {})
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def install(folder: Path, package: str, version: str, **groups: dict[str, str]) -> None:
    """Write what tells Python of an installed package with entry points."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [
        f"[pharmacist_ray.{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def test_a_name_is_the_packages_own_then_an_entry_point_then_a_place(here):
    (here / "first_mod.py").write_text("def entry(x): return x + 1\nclass Inner:\n    place = staticmethod(lambda x: x + 2)\n")
    install(here, "first-pkg", "1.2", scorers={"own": "first_mod:entry", "entry": "first_mod:entry"})
    own = Line(lambda x: x)
    found = table(own=own)
    assert found["own"] is own
    assert found["entry"].run(1) == 2
    assert found["first_mod:Inner.place"].run(1) == 3
    assert list(found) == ["own"]
    assert found.plugin("own") is None
    assert found.plugin("random") is None
    assert str(found.plugin("entry")) == "scorer 'entry' of first-pkg 1.2 (first_mod:entry)"
    assert str(found.plugin("first_mod:Inner.place")) == "scorer 'first_mod:Inner.place'"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "owm", ConfigError,
            "unknown scorer 'owm' (did you mean 'own'?); known: broken, number, own, random, twice, twice, worse; one of another "
            "package is known once that is installed here and on every node (`pharmacist plugins` lists all); name one of your own "
            "as module:attribute",
        ),
        ("a b:c", ConfigError, "unknown scorer 'a b:c'"),
        (
            "nowhere_mod.inner:novelty", ConfigError,
            "scorer 'nowhere_mod.inner:novelty': there is no module 'nowhere_mod'; install its package here and on every node, or put "
            "the folder that has it on PYTHONPATH",
        ),
        ("second_mod:novelty", ConfigError, "scorer 'second_mod:novelty': module 'second_mod' has no 'novelty'; it has number, fine"),
        ("number", ConfigError, "scorer 'number' of second-pkg 3 (second_mod:number) is of type int; it has to be a Line or a function"),
        (
            "twice", ConfigError,
            "scorer 'twice' is given by second-pkg 3 (second_mod:fine) and third-pkg 4 (second_mod:fine); name the place that is meant "
            "instead",
        ),
        (
            "broken", PluginError,
            "scorer 'broken' of second-pkg 3 (broken_mod:x) cannot be imported: ZeroDivisionError: division by zero; the bug is the "
            "plug-in's",
        ),
        (
            "worse", PluginError,
            "scorer 'worse' of second-pkg 3 (worse_mod:x) cannot be imported: ModuleNotFoundError: No module named 'never_installed'; "
            "the bug is the plug-in's",
        ),
    ],
)  # fmt: skip
def test_a_plugin_that_is_not_there_or_not_sound_is_told_in_one_line(here, name, error, message):
    (here / "second_mod.py").write_text("number = 3\ndef fine(x): return x\n")
    (here / "broken_mod.py").write_text("1 / 0\n")
    (here / "worse_mod.py").write_text("import never_installed\n")
    points = {"number": "second_mod:number", "twice": "second_mod:fine", "broken": "broken_mod:x", "worse": "worse_mod:x"}
    install(here, "second-pkg", "3", scorers=points)
    install(here, "third-pkg", "4", scorers={"twice": "second_mod:fine"})
    with pytest.raises(error) as raised:
        table(own=Line(lambda x: x))[name]
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    notes = "".join(getattr(raised.value, "__notes__", ()))
    assert ("Traceback" in notes and f"{name}_mod.py" in notes) is (error is PluginError)


SIGNALS = Signals([Row("1", "p", "a b c"), Row("2", "p", "a")])


def test_a_plugins_failure_names_it_keeps_its_traceback_and_survives_the_way_between_processes(here):
    (here / "fails_mod.py").write_text("def broken(signals):\n    return [len(row.no_such_field) for row in signals.rows]\n")
    install(here, "fails-pkg", "0.3", scorers={"broken": "fails_mod:broken"})
    with pytest.raises(PluginError) as raised:
        SCORERS["broken"].score(SIGNALS)
    line = (
        "scorer 'broken' of fails-pkg 0.3 (fails_mod:broken) failed: AttributeError: 'Row' object has no attribute 'no_such_field'; "
        "the bug is the plug-in's"
    )
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert str(error) == line
        assert "return [len(row.no_such_field) for row in signals.rows]" in error.__notes__[0]


def test_what_a_plugin_raises_on_purpose_and_what_ours_raises_below_it_passes_as_it_is(here):
    (here / "calls_mod.py").write_text(
        "from pharmacist_ray.errors import DataError\n"
        "def purpose(signals):\n    raise DataError('row 1 has no colour; give it one')\n"
        "def below(signals):\n    return signals.base_loss\n"
    )
    with pytest.raises(DataError, match="row 1 has no colour"):
        SCORERS["calls_mod:purpose"].score(SIGNALS)
    with pytest.raises(Exception) as raised:  # whatever our own code raises where no model is loaded
        SCORERS["calls_mod:below"].score(SIGNALS)
    assert not isinstance(raised.value, PluginError)
    assert raised.value.__notes__ == ["while scorer 'calls_mod:below' ran"]
    with pytest.raises(ZeroDivisionError), blaming(None):
        raise ZeroDivisionError


def judge_settings(kind: str) -> JudgeSettings:
    return JudgeSettings(JudgeConfig(kind=kind))


def test_what_a_plugin_returns_is_checked(here):
    (here / "odd_mod.py").write_text(
        "def one(signals): return [1.0]\n"
        "def kinds(settings): return lambda kind, prompts, answers: ['harmfull'] * len(answers)\n"
        "def few(settings): return lambda kind, prompts, answers: []\n"
        "def none(step): return iter(())\n"
    )
    with pytest.raises(
        PluginError, match=r"scorer 'odd_mod:one' returned values of shape \(1,\) for 2 rows; the bug is the plug-in's"
    ):
        SCORERS["odd_mod:one"].score(SIGNALS)
    with pytest.raises(
        PluginError, match="judge 'odd_mod:kinds' returned the verdict 'harmfull'; there are harmful, refusal, helpful"
    ):
        build_judge(judge_settings("odd_mod:kinds"))("harmful", ["p"], ["a"])
    with pytest.raises(PluginError, match="judge 'odd_mod:few' returned 0 verdicts for 1 answers"):
        build_judge(judge_settings("odd_mod:few"))("harmful", ["p"], ["a"])
    step: Any = type("Step", (), {"batches": [1, 2]})
    with pytest.raises(PluginError, match="objective 'odd_mod:none' yielded 0 losses for 2 micro-batches"):
        list(OBJECTIVES["odd_mod:none"].run(step))


def config(tmp_path: Path, **changed: Any) -> Any:
    names = ("alignment", "validation", "harmful", "benign", "task")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(name)
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    path = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in names}
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"candidates": path["alignment"], **{name: path[name] for name in ("validation", "harmful", "benign")}},
        "evaluation": {"harmful_prompts": path["harmful"], "benign_prompts": path["benign"], "task": {"source": path["task"]}},
    }
    return parse_config(values | {k: values.get(k, {}) | v for k, v in changed.items()}, where="test")


def prints(run: Run) -> dict[str, str]:
    return {
        "fit": run.fitted.fingerprint,
        "score": run.scored.fingerprint,
        "align": run.trained(run.variants[0]).fingerprint,
        "answers": run.answers(run.variants[0]).name.rpartition("-")[2],
        "evaluate": run.evaluated.fingerprint,
    }


def test_a_plugins_version_or_its_files_content_is_part_of_what_it_made(here, tmp_path, monkeypatch):
    def made(version: str, text: str, **changed: Any) -> dict[str, str]:
        for one in (SCORERS, OBJECTIVES, JUDGES):
            monkeypatch.setattr(one, "_found", {})
        sys.modules.pop("made_mod", None)
        shutil.rmtree(next(here.glob("made_pkg-*"), here / "none"), ignore_errors=True)
        (here / "made_mod.py").write_text(text)
        points = {"scorers": {"made": "made_mod:f"}, "objectives": {"made": "made_mod:f"}, "judges": {"made": "made_mod:f"}}
        install(here, "made-pkg", version, **points)
        return prints(Run(config(tmp_path, **changed)))

    def differ(one: dict[str, str], other: dict[str, str]) -> set[str]:
        return {name for name in one if one[name] != other[name]}

    text, other = "def f(x): return x\n", "def f(x): return 2 * x\n"
    for name, versions, texts in (("made", ("1", "2"), (text, text)), ("made_mod:f", ("1", "1"), (text, other))):
        for changed, stages in (
            ({"scoring": {"scorers": ["pharmacist", name]}}, {"score", "align", "evaluate"}),
            ({"alignment": {"objective": name}}, {"align", "evaluate"}),
            ({"evaluation": {"judge": name}}, {"answers", "evaluate"}),
            ({}, set()),
        ):
            first = made(versions[0], texts[0], **changed)
            assert made(versions[0], texts[0], **changed) == first
            assert differ(first, made(versions[1], texts[1], **changed)) == stages
    entry = made("1", text, scoring={"scorers": ["pharmacist", "made"]})
    assert made("1", other, scoring={"scorers": ["pharmacist", "made"]}) == entry  # an installed package answers by its version
    run = Run(
        config(
            tmp_path,
            scoring={"scorers": ["made_mod:f"]},
            selection={"scorer": "made_mod:f"},
            comparison={"selections": ["made_mod:f"]},
        )
    )
    assert run.main_selection.folder.name == "made_mod-f"
    assert run.variants[0].name == "made_mod-f.sft.s0"


def test_the_list_of_plugins_has_kind_name_place_and_version_and_says_what_cannot_be_loaded(here, capsys, monkeypatch):
    (here / "list_mod.py").write_text("def f(x): return x\nnumber = 3\n")
    install(
        here, "list-pkg", "7.1", scorers={"listed": "list_mod:f", "number": "list_mod:number"}, judges={"phrases": "list_mod:f"}
    )
    monkeypatch.setattr(sys, "argv", ["pharmacist", "plugins"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["kind", "name", "from", "package"] in lines
    assert ["scorer", "listed", "list_mod:f", "list-pkg", "7.1"] in lines
    for kind, names in (("scorer", [*SCORERS, "random"]), ("objective", OBJECTIVES), ("judge", JUDGES)):
        for name in names:
            assert any(line[:4] == [kind, name, "built", "in"] for line in lines)
    assert (
        "not usable  scorer 'number' of list-pkg 7.1 (list_mod:number) is of type int; it has to be a Scorer or a function" in out
    )
    assert "not usable  judge 'phrases' of another package: the name is taken by a built-in" in out


class Failing:
    """An actor in which a plug-in fails."""

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        with blaming(Plugin("judge", "mine", "my_mod:mine", "my-pkg", "2.0")):
            raise KeyError(unit["number"])


def test_a_failure_in_an_actor_of_ray_arrives_as_it_was(ray_local):
    with pytest.raises(PluginError) as raised:
        list(on_actors(Failing, {}, [{"number": 7}], attempts=1, resources=ResourcesConfig(actors=1), what="test"))
    assert str(raised.value) == "judge 'mine' of my-pkg 2.0 (my_mod:mine) failed: KeyError: 7; the bug is the plug-in's"
    assert 'raise KeyError(unit["number"])' in raised.value.__notes__[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example plug-in, as it lies in the repository, into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "plugin", folder / "source")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    done = subprocess.run([sys.executable, *command, folder / "site", folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_example_plugin_runs_in_a_comparison(workers, installed, model_folder, rows_of, tmp_path):
    counts = {"alignment": 12, "trusted": 4, "harmful": 4, "ask_bad": 3, "ask_good": 3, "test": 3}
    for seed, (name, count) in enumerate(counts.items()):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{row.raw}\n" for row in rows_of(count, seed=seed)))
    path = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in counts}
    (tmp_path / "my_module.py").write_text(
        "def first_letter(signals):\n    return [float(ord(row.response[1])) for row in signals.rows]\n"
    )
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32, "lora": {"r": 2}},
        "data": {"candidates": path["alignment"], "validation": path["trusted"], "harmful": path["harmful"], "shards": 2},
        "resources": {"workers": workers, "actors": workers, "parallel_runs": 1 + workers, "cpus_per_worker": 0.5},
        "scoring": {"scorers": ["long_answer", "my_module:first_letter"]},
        "selection": {"ratio": 0.5, "scorer": ["long_answer", "my_module:first_letter"]},
        "alignment": {"objective": "scaled", "parameters": {"scaled": {"scale": 0.5}}, "train": TRAIN},
        "evaluation": {
            "harmful_prompts": path["ask_bad"], "benign_prompts": path["ask_good"], "task": {"source": path["test"]},
            "max_new_tokens": 4, "bootstrap_draws": 50, "judge": "short",
        },
        "comparison": {"selections": ["long_answer", "my_module:first_letter"], "seeds": [3]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", "from pharmacist_ray.cli.app import main; main()"]

    def pharmacist(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=tmp_path)

    done = pharmacist("run", "--config", "run.yaml")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "run" / "evaluation" / "table.json").read_text())
    assert {(row["selection"], row["defence"], row["score"]) for row in table} == {
        ("long_answer", "scaled", "long answers"),
        ("my_module:first_letter", "scaled", "long answers"),
    }
    made = json.loads((tmp_path / "run" / "scores" / "manifest.json").read_text())
    assert made["config"]["plugins"]["long_answer"] == {"package": "my-plugin", "version": "0.1.0"}

    (tmp_path / "my_module.py").write_text("def first_letter(signals):\n    return [row.no_such_field for row in signals.rows]\n")
    failed = pharmacist("score", "--config", "run.yaml", "resources.actors=0")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == (
        "pharmacist: scorer 'my_module:first_letter' failed: AttributeError: 'Row' object has no attribute 'no_such_field'; the bug is "
        "the plug-in's"
    )
    assert "return [row.no_such_field for row in signals.rows]" in failed.stderr


def test_the_example_is_listed_and_computes_what_it_says(installed, monkeypatch, capsys):
    monkeypatch.syspath_prepend(installed)
    for one in (SCORERS, OBJECTIVES, JUDGES):
        monkeypatch.setattr(one, "_found", {})
    show_plugins()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for kind, name in (("scorer", "long_answer"), ("objective", "scaled"), ("judge", "short")):
        assert [kind, name, f"my_plugin.{kind}s:{name}", "my-plugin", "0.1.0"] in lines
    assert SCORERS["long_answer"].score(SIGNALS).tolist() == [3.0, 1.0]
    assert isinstance(SCORERS["long_answer"], Scorer)
    assert np.isfinite(SCORERS["long_answer"].score(SIGNALS)).all()
    answers = ["no", "first take the part, then the other"]
    assert build_judge(judge_settings("short"))("harmful", ["how", "how"], answers) == ["refusal", "harmful"]
