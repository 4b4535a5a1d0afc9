"""Workers and drivers that are killed, and workers that end by themselves."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from pharmacist_ray.curation import score as score_module
from pharmacist_ray.errors import ResourceError
from tests.faults.disturb import INJECT, World, command, kill_one, meanwhile, wait_for

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.mark.slow
def test_a_scoring_actor_killed(calm: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = calm.copy(tmp_path / "run", "ingest", "fit")
    with meanwhile(kill_one("ShardScorer", lambda: world.scoring(2, 19))):
        world.stage("score")
    assert re.search(
        r"score: a worker died over part-000\d\d\.parquet; it was scored again \(attempt 2\)", capsys.readouterr().out
    )
    assert world.scores() == calm.scores()
    world.stage("select")
    assert world.selected() == calm.selected()
    assert len(world.selected()) == 120
    assert world.litter() == []


@pytest.mark.slow
def test_deaths_beyond_the_bound_end_the_run_in_one_line(calm: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = calm.copy(tmp_path / "run", "ingest", "fit")
    monkeypatch.setattr(score_module, "RETRIES", 0)
    line = (
        r"^scoring: worker processes died again and again \(.*\); look at the machines' memory, then run the same command again: "
    )
    with pytest.raises(ResourceError, match=line), meanwhile(kill_one("ShardScorer", lambda: world.scoring(2, 19))):
        world.stage("score")
    done = world.scores()
    assert 2 <= len(done) < 24
    monkeypatch.undo()
    world.stage("score")
    assert world.scores() == calm.scores()


@pytest.mark.parametrize("undisturbed", ["aligned_alone", pytest.param("aligned", marks=pytest.mark.slow)])
def test_a_training_worker_killed(
    undisturbed: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one worker the result is that of no worker, with two the one of two."""
    aligned: World = request.getfixturevalue(undisturbed)
    world = aligned.copy(tmp_path / "run", "ingest", "fit", "scores", "selections")
    world.values["resources"] = {**world.values["resources"], "workers": 2 if undisturbed == "aligned" else 1}
    capsys.readouterr()
    with meanwhile(kill_one("RayTrainWorker", lambda: 20 <= world.step() < 100)):
        world.stage("align")
    found = re.search(r"was interrupted; it goes on after step (\d+) of 120 \(attempt 2\)", capsys.readouterr().out)
    assert found is not None
    assert int(found[1]) >= 20
    assert int(found[1]) % 10 == 0
    assert world.adapter() == aligned.adapter()
    assert world.history() == aligned.history()
    assert world.litter() == []


@pytest.mark.slow
def test_the_driver_killed_while_scoring(calm: World, tmp_path: Path) -> None:
    world = calm.copy(tmp_path / "run", "ingest", "fit")
    with command(world, "score") as process:
        wait_for(lambda: world.scored() >= 3, process)
    done = {file: file.stat().st_mtime_ns for file in (world.root / "scores" / "rows").glob("part-*.parquet")}
    assert 3 <= len(done) < 24
    assert not (world.root / "scores" / "manifest.json").exists()
    world.stage("score")
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert world.scores() == calm.scores()
    assert world.litter() == []


@pytest.mark.slow
def test_the_driver_interrupted_while_a_group_trains(aligned_alone: World, tmp_path: Path) -> None:
    world = aligned_alone.copy(tmp_path / "run", "ingest", "fit", "scores", "selections")
    world.values["resources"] = {**world.values["resources"], "workers": 1}
    with command(world, "align") as process:
        wait_for(lambda: world.step() >= 20, process)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert out.endswith("\npharmacist: interrupted; the same command goes on\n")
    assert "Traceback" not in out
    assert not (world.aligned / "run").exists()
    world.stage("align")
    assert world.adapter() == aligned_alone.adapter()
    assert world.litter() == []


@pytest.mark.slow
def test_the_driver_killed_while_scoring_and_while_training(aligned: World, tmp_path: Path) -> None:
    world = aligned.copy(tmp_path / "run", "ingest", "fit")
    with command(world, "run") as process:
        wait_for(lambda: world.scored() >= 3, process)
    done = {file: file.stat().st_mtime_ns for file in (world.root / "scores" / "rows").glob("part-*.parquet")}
    assert 3 <= len(done) < 24
    assert not (world.root / "scores" / "manifest.json").exists()
    with command(world, "run") as process:
        wait_for(lambda: world.step() >= 20, process)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert world.scores() == aligned.scores()
    step = world.step()
    assert not (world.aligned / "run").exists()
    before = (world.aligned / "run.partial" / "history.jsonl").read_text().splitlines()[:step]
    world.stage("run")
    assert world.selected() == aligned.selected()
    assert (world.aligned / "run" / "history.jsonl").read_text().splitlines()[:step] == before  # with its times: not made again
    assert world.history() == aligned.history()
    assert world.adapter() == aligned.adapter()
    assert world.litter() == []


@pytest.mark.slow
def test_a_training_worker_that_always_dies_ends_with_the_step_and_its_rows(calm: World, tmp_path: Path) -> None:
    """Token 10 is in nearly every batch: the first step of the warm-up already ends every group."""
    world = calm.copy(tmp_path / "run", "ingest")
    world.values["resources"] = {**world.values["resources"], "workers": 1, "max_failures": 1}
    with command(world, "fit", PYTHONPATH=f"{INJECT}:{Path.cwd()}", FAULTS_DEADLY_TOKEN="10") as process:
        out = process.communicate(timeout=150)[0]
    assert process.returncode == 7, out
    assert re.search(
        r"pharmacist: fit: its workers died 2 times \(resources\.max_failures=1\), the last time at warm-up: step 1 of 2, rows "
        r"[0-9a-f]{32}, .* \(8 in all\); if it is always there, look at these rows",
        out,
    )
    assert "Traceback" not in out
    assert (world.root / "fit" / "warmup.partial" / "attempts").read_text() == "2"
    assert not (world.root / "fit" / "manifest.json").exists()
    assert json.loads((world.root / "fit" / "warmup.progress.json").read_text())["attempt"] == 2
