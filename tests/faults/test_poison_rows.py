"""Rows that the scorer or the training cannot survive, and losses that are no numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from pharmacist_ray.config.schema import LoraConfig, ResourcesConfig, TrainConfig
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import TrainingError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.training.runs import run_tasks
from pharmacist_ray.training.task import TrainTask
from tests.faults.disturb import INJECT, World, command

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def misfit(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model with a tokenizer that knows one word more than the model has embeddings for, as happens."""
    folder = tmp_path_factory.mktemp("misfit") / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["beyond"] = len(words)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def poison(word: str) -> Row:
    prompt, response = f"w1 {word} w2", "w3 w4"
    return Row(row_id(prompt, response), prompt, response, raw=json.dumps({"prompt": prompt, "response": response}))


@pytest.fixture(scope="module")
def prepared(
    ray_local: None, make_world: Callable[..., World], misfit: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, World]:
    """Return two fitted worlds with the same selector: one of healthy rows alone, and one with a row too many."""
    settings = {"data": {"shards": 60}, "model": {"path": str(misfit)}, "selection": {"ratio": None, "count": 120}}
    worlds = []
    for name, more in (("healthy", ()), ("poisoned", (poison("beyond"),))):
        world = make_world(tmp_path_factory.mktemp(name), more=more)
        for section, values in settings.items():
            world.values[section] = {**world.values[section], **values}
        world.stage("ingest")
        worlds.append(world)
    healthy, poisoned = worlds
    healthy.stage("fit")
    poisoned.stage("fit")  # its warm-up draws 16 of 241 rows; the word beyond the model is not among them, or this would fail
    healthy.stage("score")
    healthy.stage("select")
    return healthy, poisoned


def check_isolated(world: World, healthy: World, reason: str, detail: str) -> None:
    bad = poison("beyond").id
    scores = pq.read_table(world.root / "scores" / "rows").to_pylist()
    assert [row["id"] for row in scores if row["pharmacist"] is None] == [bad]
    assert [row["random_0"] for row in scores if row["id"] == bad] == [None]
    assert len({row["id"] for row in scores}) == len(scores) == 241
    (aside,) = pq.read_table(world.root / "scores" / "quarantine").to_pylist()
    assert (aside["reason"], aside["line"], aside["text"]) == (reason, 241, poison("beyond").raw)
    assert aside["source"].endswith("candidates.jsonl")
    assert re.fullmatch(rf"row {bad}: {detail}", aside["detail"])
    summary = json.loads((world.root / "scores" / "manifest.json").read_text())["summary"]
    assert (summary["rows"], summary["quarantined"], summary["reasons"]) == (241, 1, {reason: 1})
    assert bad not in world.selected()
    assert world.litter() == []
    assert world.selected() == healthy.selected()
    for name in healthy.scores():
        files = (one.root / "scores" / "rows" / name for one in (healthy, world))
        without, rows = (pq.read_table(file) for file in files)
        assert rows.drop_null() == without  # to the last digit: what is left is scored as if the row had never been there


def test_a_row_that_makes_the_scorer_raise(prepared: tuple[World, World], capsys: pytest.CaptureFixture[str]) -> None:
    healthy, world = prepared
    capsys.readouterr()
    world.stage("score")
    world.stage("select")
    out = capsys.readouterr().out
    assert re.search(r"score: 1 of the \d+ rows of part-000\d\d\.parquet cannot be scored\n", out)
    assert "score: 241 rows in = 240 scored + 1 quarantined (1 scorer_error; see " in out
    assert "a worker died" not in out
    check_isolated(world, healthy, "scorer_error", "IndexError: index out of range in self")


@pytest.mark.slow
def test_a_row_that_kills_the_scorer(prepared: tuple[World, World], tmp_path: Path) -> None:
    healthy, poisoned = prepared
    world = poisoned.copy(tmp_path / "run", "ingest", "fit")
    with command(world, "score", PYTHONPATH=f"{INJECT}:{Path.cwd()}", FAULTS_DEADLY_TOKEN="48") as process:
        out = process.communicate(timeout=250)[0]
    assert process.returncode == 0, out
    assert "score: 241 rows in = 240 scored + 1 quarantined (1 crashed_scorer; see " in out
    found = re.search(r"score: a worker died over part-000\d\d\.parquet; it was scored again \(attempt (\d+)\)", out)
    assert found is not None
    assert int(found[1]) <= 7  # about four rows: twice all of them, two halves, twice the row alone, and once without it
    world.stage("select")
    check_isolated(world, healthy, "crashed_scorer", "2 scoring workers died at it")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "kills"])
def test_a_row_that_ends_workers_who_hold_the_model_together(prepared: tuple[World, World], tmp_path: Path, how: str) -> None:
    healthy, poisoned = prepared
    world = poisoned.copy(tmp_path / "run", "ingest", "fit")
    world.values["data"] = {**world.values["data"]}
    world.values["resources"] = {**world.values["resources"], "workers_per_actor": 2, "actors": 1, "cpus_per_worker": 0.5}
    deadly = {"FAULTS_DEADLY_TOKEN": "48"} if how == "kills" else {}
    with command(world, "score", PYTHONPATH=f"{INJECT}:{Path.cwd()}", **deadly) as process:
        out = process.communicate(timeout=280)[0]
    assert process.returncode == 0, out
    reason = "crashed_scorer" if how == "kills" else "scorer_error"
    assert f"score: 241 rows in = 240 scored + 1 quarantined (1 {reason}; see " in out
    assert "it was scored again (attempt " in out
    world.stage("select")
    assert world.selected() == healthy.selected()
    assert world.litter() == []


@pytest.mark.slow
def test_a_row_that_makes_the_training_raise_on_one_of_two_workers(prepared: tuple[World, World], tmp_path: Path) -> None:
    world = prepared[1].copy(tmp_path / "run", "ingest")
    warmup = {"steps": 31, "batch_size": 8}  # takes all 241 rows
    world.values["selector"] = {**world.values["selector"], "warmup": warmup}
    world.values["resources"] = {**world.values["resources"], "workers": 2}
    with pytest.raises(TrainingError) as raised:
        world.stage("fit")
    assert re.fullmatch(
        rf"warm-up: rows {poison('beyond').id} make the model raise at step \d+ of 31 \(IndexError: index out of range in self\); "
        "take them out of the data, or mend the model or its tokenizer",
        str(raised.value),
    )
    assert (world.root / "fit" / "warmup.partial" / "attempts").read_text() == "1"  # not trained again
    assert not (world.root / "fit" / "warmup").exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_both_workers_at_once(
    model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_rows(rows_of(20), tmp_path / "rows.parquet")
    task = TrainTask(
        name="a task",
        out=str(tmp_path / "out"),
        model=ModelRef(str(broken), template="plain", max_length=32),
        rows=(str(tmp_path / "rows.parquet"),),
        train=TrainConfig(steps=4, batch_size=8),
        seed=5,
        lora=LoraConfig(r=2),
    )
    resources = ResourcesConfig(workers=2, cpus_per_worker=0.5, max_failures=3)
    ids = {row.id for row in rows_of(20)}
    with pytest.raises(
        TrainingError, match=r"^a task: the loss is nan at step 1 of 4, rows .*; lower the learning rate"
    ) as raised:
        run_on_workers(run_tasks, [task], name="nan", storage=tmp_path / "ray", resources=resources)
    named = re.findall(r"[0-9a-f]{32}", str(raised.value))
    assert len(named) == 4  # a worker's half of the batch
    assert {*named} < ids
    assert raised.value.exit_code == 7
    assert (tmp_path / "out.partial" / "attempts").read_text() == "1"
    assert not (tmp_path / "out").exists()
