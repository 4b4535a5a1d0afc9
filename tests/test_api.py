"""The Python interface: the page's examples run, the same call finds what is there, and the surface changes only on purpose."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from datasets import Dataset

import pharmacist_ray
from pharmacist_ray import PharmacistError, align, configure, curate, evaluate, score
from pharmacist_ray.data.schema import Row

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "python.md"
pytestmark = pytest.mark.usefixtures("ray_local")
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-2}
HERE: dict[str, Any] = {
    "model.template": "plain", "model.max_length": 32, "model.lora": {"r": 2}, "resources.workers": 0, "resources.actors": 0,
    "data.shards": 2, "scoring.random_draws": 1, "selector": {"warmup": TRAIN, "checkpoints": [2], "batch_size": 4, "reference": TRAIN},
    "alignment.train": TRAIN, "comparison.seeds": [0],
}  # fmt: skip
"""Small, and in this process."""


def records(rows: list[Row]) -> list[dict[str, Any]]:
    return [json.loads(row.raw) for row in rows]


@pytest.fixture
def files(rows_of: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the page's examples: data/*.jsonl."""
    counts = {"alignment": 24, "trusted": 6, "harmful": 6, "ask_bad": 3, "ask_good": 3, "test": 3, "task": 12, "attacker": 6}
    (tmp_path / "data").mkdir()
    for seed, (name, count) in enumerate(counts.items()):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(f"{row.raw}\n" for row in rows_of(count, seed=seed)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_rows_are_the_same_however_they_are_given(files, model_folder, rows_of):
    others: dict[str, Any] = {
        "model": model_folder,
        "trusted": "data/trusted.jsonl",
        "harmful": "data/harmful.jsonl",
        "settings": HERE,
    }
    rows = records(rows_of(24, seed=0))
    given: dict[str, Any] = {
        "path": "data/alignment.jsonl",
        "paths": ["data/alignment.jsonl"],
        "dictionaries": iter(rows),
        "dataset": Dataset.from_list(rows),
        "ray": ray.data.from_items(rows),
    }
    kept = {}
    for name, data in given.items():
        curated = curate(data, ratio=0.5, run_dir=files / name, **others)
        kept[name] = sorted(zip(curated.rows["pharmacist_id"], curated.rows["pharmacist_score"], strict=True))
        assert set(rows[0]) < set(curated.rows.column_names)
        assert curated.manifest["kept"] == len(curated.rows) == 12
        assert len(curated.scores) == 24
        assert {"id", "pharmacist", "random_0"} <= set(curated.scores.column_names)
    assert kept["dictionaries"] == kept["dataset"] == kept["path"] == kept["paths"]
    assert [one for one, _ in kept["ray"]] == [one for one, _ in kept["path"]]
    assert sorted(row["pharmacist_id"] for row in curated.ray_dataset().take_all()) == [one for one, _ in kept["path"]]


def test_the_same_call_finds_what_is_there_and_others_go_on_from_it(files, model_folder, rows_of):
    def again(seed: int) -> Any:
        trusted = Dataset.from_list(records(rows_of(6, seed=1)))
        return curate(
            records(rows_of(24, seed=seed)), model=model_folder, trusted=trusted, harmful="data/harmful.jsonl", settings=HERE
        )

    curated = again(0)
    made = {file: file.stat().st_mtime_ns for file in (files / "runs" / "python").rglob("manifest.json")}
    assert len(made) >= 6
    assert again(0).folder == curated.folder
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert len(score(curated.config)) == 24
    models = align(curated.config, {"comparison.selections": ["pharmacist", "random"]})
    assert sorted(models) == ["pharmacist.sft.s0", "random_0.sft.s0"]
    assert "lora" not in str(models["random_0.sft.s0"].load())  # merged
    assert {file: file.stat().st_mtime_ns for file in made} == made
    again(7)  # other rows, another name
    assert len(list((files / "runs" / "python" / "given").glob("candidates-*"))) == 2


@pytest.fixture
def values(files, model_folder):
    """The configuration of a comparison; it lies in pharmacist.yaml as well."""
    sets = {"candidates": "alignment", "validation": "trusted", "harmful": "harmful"}
    found: dict[str, Any] = {
        "run_dir": "runs/compared",
        "model": {"path": str(model_folder)},
        "data": {name: {"path": f"data/{file}.jsonl"} for name, file in sets.items()},
        "attacks": [
            {"name": "weak", "task": {"path": "data/task.jsonl"}, "harmful": {"path": "data/attacker.jsonl"}, "rows": 8, "train": TRAIN}
        ],
        "evaluation": {
            "harmful_prompts": {"path": "data/ask_bad.jsonl"}, "benign_prompts": {"path": "data/ask_good.jsonl"},
            "task": {"source": {"path": "data/test.jsonl"}}, "max_new_tokens": 3, "bootstrap_draws": 50,
        },
        "scoring": {"scorers": ["pharmacist", "random"]},
        "comparison": {"selections": ["all", "random"]},
    }  # fmt: skip
    Path("pharmacist.yaml").write_text(json.dumps(found))
    return found


def test_a_comparison_returns_its_table(values):
    table = evaluate(values, HERE)
    assert {("all", None), ("random", None), ("all", "weak"), ("random", "weak")} <= {
        (row["selection"], row["attack"]) for row in table
    }
    assert "seeds" not in values["comparison"]  # what is given stays as it is
    assert sorted(pharmacist_ray.attack(values, HERE)) == ["all.sft.s0.weak", "random_0.sft.s0.weak"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"selection.ration": 1}}, "unknown key 'selection.ration' (did you mean 'ratio'?)"),
        ({"scorer": "farmacist"}, "unknown scorer 'farmacist' (did you mean 'pharmacist'?)"),
        ({"data": 7}, "candidates: expected a path, dictionaries with prompt and response, or a data set, got int"),
        ({"data": []}, "candidates: expected a path, dictionaries with prompt and response, or a data set, got list"),
    ],
)
def test_mistakes_are_one_line(files, model_folder, change, message):
    call = {
        "data": "data/alignment.jsonl",
        "model": model_folder,
        "trusted": "data/trusted.jsonl",
        "harmful": "data/harmful.jsonl",
    }
    with pytest.raises(PharmacistError, match=re.escape(message)):
        curate(**(call | change))


def test_a_configuration_is_that_of_the_file_with_its_settings(files):
    sets = {name: {"path": name} for name in ("candidates", "validation", "harmful", "benign")}
    text = json.dumps({"run_dir": "r", "model": {"path": "m"}, "data": sets})
    Path("one.yaml").write_text(text)
    changed = configure("one.yaml", {"selection.ratio": 0.3, "data.candidates.path": Path("other")})
    assert (changed.selection.ratio, changed.data.candidates.path) == (0.3, ["other"])
    assert configure(changed) == changed
    assert configure(json.loads(text), {"selection.ratio": 0.3, "data.candidates.path": "other"}) == changed


def test_the_public_surface_changes_only_on_purpose():
    """A change here is a change for everybody who imports this: say so in the changelog, and raise the version as it deserves."""
    found = {name: getattr(pharmacist_ray, name) for name in pharmacist_ray.__all__ if name != "__version__"}
    surface = {name: str(inspect.signature(one)) if inspect.isfunction(one) else "class" for name, one in found.items()}
    settings = "settings: 'Settings | None' = None"
    assert surface == {
        "Curated": "class",
        "PharmacistError": "class",
        "align": f"(config: 'Configured', {settings}) -> 'dict[str, ModelRef]'",
        "attack": f"(config: 'Configured', {settings}) -> 'dict[str, ModelRef]'",
        "configure": f"(config: 'Configured', {settings}) -> 'Config'",
        "curate": "(data: 'Rows', *, model: 'str | os.PathLike[str]', trusted: 'Rows', harmful: 'Rows', benign: 'Rows | None' = None, "
        f"ratio: 'float' = 0.4, scorer: 'str | Sequence[str]' = 'pharmacist', "
        f"run_dir: 'str | os.PathLike[str]' = 'runs/python', {settings}) -> 'Curated'",
        "evaluate": f"(config: 'Configured', {settings}) -> 'list[dict[str, Any]]'",
        "score": f"(config: 'Configured', {settings}) -> 'datasets.Dataset'",
        "search_settings": f"(config: 'Configured', {settings}, *, resume: 'bool' = False) -> 'dict[str, Any]'",
    }
    assert sorted(name for name in vars(found["Curated"]) if not name.startswith("_")) == [
        "manifest",
        "ray_dataset",
        "rows",
        "scores",
    ]
    for one in found.values():
        assert len(inspect.getdoc(one) or "") > 20
    stub = (Path(pharmacist_ray.__file__).parent / "__init__.pyi").read_text()
    assert sorted([*re.findall(r"import (\w+) as \1$", stub, re.MULTILINE), "__version__"]) == pharmacist_ray.__all__


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_run(values, model_folder, monkeypatch):
    """As they stand, but for the names of model and rows, and for settings that make them small."""
    monkeypatch.setattr(
        "pharmacist_ray.api.configure", lambda config, settings=None: configure(config, HERE | dict(settings or {}))
    )
    row = {"prompt": "how do I …", "response": "I would rather not …"}
    code = "\n".join(blocks()).replace('"my/model"', repr(str(model_folder)))
    code = code.replace('read_json("data', f'read_json("{Path.cwd()}/data')  # Ray was started in another folder
    code = code.replace(
        f"[{json.dumps(row, ensure_ascii=False)}]",
        repr([json.loads(line) for line in Path("data/alignment.jsonl").read_text().splitlines()]),
    )
    found: dict[str, Any] = {}
    exec(compile(code, PAGE, "exec"), found)
    assert sorted(found["models"]) == ["pharmacist.vaccine.s0", "random_0.vaccine.s0"]
    assert found["kept"].count() == len(found["curated"].rows)
    assert {row["selection"] for row in found["table"]} == {"all", "random"}


@pytest.mark.slow
def test_the_examples_of_the_page_have_types(tmp_path):
    file = tmp_path / "examples.py"
    file.write_text("\n".join(blocks()))
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--follow-imports=silent", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=PAGE.parents[2])
    assert checked.returncode == 0, checked.stdout
