"""A search end to end under Ray Tune, with a tiny random model: sharing, concurrency, failure, resuming, reproducing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from ray import tune

from pharmacist_ray.config import Config, load_config
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.pipeline.stages import run_report
from pharmacist_ray.search.agreement import show_agreement
from pharmacist_ray.search.search import run_search
from tests.faults.disturb import end

pytestmark = pytest.mark.timeout(900)

TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-2}


def times(root: Path) -> dict[str, int]:
    """Return when each stage that has finished below a run directory was finished."""
    files = (path for pattern in ("manifest.json", "result.json") for path in root.rglob(pattern))
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "\x1b[31mred\x1b[0m \x9b2J",
    "\u202egnp.exe\u202c \u2066x\u2069",
]
"""What strangers' data may carry: scripts, commands to a terminal, and marks that turn the direction of text."""


def write_config(folder: Path, model: Path, rows_of: Callable[..., list[Row]], hostile: bool = False) -> Path:
    """Write a configuration with two attacks on data of a few rows, and return its path."""
    counts = {"alignment": 24, "trusted": 4, "harmful": 4, "task": 18, "attacker": 13, "ask_bad": 3, "ask_good": 3, "test": 3}
    for seed, (name, count) in enumerate(counts.items()):
        lines = [row.raw for row in rows_of(count, seed=seed)]
        if hostile and name == "alignment":
            lines = [json.dumps(_with(json.loads(line), HOSTILE[number % 4])) for number, line in enumerate(lines)]
            lines.append('{"prompt": "w1 <script>window.hit = 3</script>')
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = {name: {"path": str(folder / f"{name}.jsonl")} for name in counts}
    attack = {"task": path["task"], "harmful": path["attacker"], "rows": 16, "harmful_share": 0.25, "train": TRAIN}
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "template": "plain", "max_length": 48, "lora": {"r": 2}},
        "data": {"candidates": path["alignment"], "validation": path["trusted"], "harmful": path["harmful"], "shards": 2},
        "resources": {"workers": 0, "actors": 0, "cpus_per_worker": 0.5},
        "selector": {"warmup": TRAIN, "checkpoints": [2], "batch_size": 4, "reference": None},
        "scoring": {"scorers": ["pharmacist", "random"], "random_draws": 1},
        "selection": {"ratio": 0.5},
        "alignment": {"train": TRAIN},
        "attacks": [{"name": "weak", **attack}, {"name": "strong", **attack, "rows": 6}],
        "evaluation": {
            "harmful_prompts": path["ask_bad"], "benign_prompts": path["ask_good"], "task": {"source": path["test"]},
            "max_new_tokens": 3, "bootstrap_draws": 50,
        },
        "comparison": {"selections": ["all", "pharmacist"], "seeds": [3]},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def _with(row: dict[str, Any], text: str) -> dict[str, Any]:
    return row | {"prompt": f"{row['prompt']} {text}", "response": f"{row['response']} {text}", "category": text}


def table_of(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "search" / "trials.parquet").to_pylist()


SHARES = [number / 16 for number in range(12)]


@pytest.fixture(scope="module", params=[3, pytest.param(12, marks=pytest.mark.slow)])
def searched(
    ray_local: None,
    request: pytest.FixtureRequest,
    model_folder: Path,
    rows_of: Callable[..., list[Row]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, str]:
    """Return a finished search that varies the share of one attack only, on hostile data, and what it printed.

    As many trials finish as are asked for, two at a time; 0.9 of 16 rows are more harmful rows than there are, so the last one fails.
    """
    file = write_config(tmp_path_factory.mktemp("searched"), model_folder, rows_of, hostile=True)
    config = load_config(
        file, [f"search={{concurrent: 2, space: {{attacks.0.harmful_share: {[*SHARES[: request.param], 0.9]}}}}}"]
    )
    asked: list[Any] = []

    def tune_config(**settings: Any) -> tune.TuneConfig:
        asked.append(settings["max_concurrent_trials"])
        return made(**settings)

    made = tune.TuneConfig
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "TuneConfig", tune_config)
        run_search(config)
    assert asked == [2]
    return config, out.getvalue()


def test_trials_that_vary_the_attack_share_one_alignment_and_a_failure_is_one_of_them(searched):
    config, out = searched
    root, shares = config.run_dir, SHARES[: count_of(searched)]
    count = len(shares)
    rows = table_of(root)
    assert [float(row["param.attacks.0.harmful_share"]) for row in rows] == [*shares, 0.9]
    assert [row["status"] for row in rows] == ["finished"] * count + ["failed"]
    assert "attack 'weak' needs 14 harmful rows (16 rows, harmful_share 0.9)" in rows[-1]["error"]
    assert f"trial {rows[-1]['trial']} failed" in out
    assert len({row["fingerprint"] for row in rows}) == count + 1

    manifests = {file: json.loads(file.read_text()) for file in root.rglob("manifest.json")}
    made: dict[str, list[Path]] = {}
    for file, manifest in manifests.items():
        made.setdefault(manifest["stage"], []).append(file)
    assert {stage: len(made[stage]) for stage in ("fit", "score", "align", "evaluate")} == {
        "fit": 1, "score": 1, "align": 1, "evaluate": count,
    }  # fmt: skip
    varied = [manifest["config"]["attack"]["harmful_share"] for file, manifest in manifests.items() if ".weak-" in str(file)]
    assert sorted(varied) == shares
    assert [manifest["stage"] for file, manifest in manifests.items() if ".strong-" in str(file)] == ["attack"]
    assert len(made["attack"]) == count + 1  # what no trial changed ran once
    assert len(list((root / "selections").iterdir())) == 2  # the search's and the plain one, which the report shows
    # Nobody made the alignment a second time in its place: it is older than every attack, and its run has its two steps.
    assert max(os.stat(file).st_mtime_ns for file in made["align"]) < min(os.stat(file).st_mtime_ns for file in made["attack"])
    for stage, trained in (("fit", 1), ("align", 1), ("attack", count + 1)):
        histories = list((root / stage).rglob("history.jsonl"))
        assert [[json.loads(line)["step"] for line in one.read_text().splitlines()] for one in histories] == [[1, 2]] * trained

    tried = [json.loads(one.read_text()) for one in (root / "search" / "trials").glob("*.json")]
    for one in tried:  # Ray was asked for two at a time, and however fast it starts them there are never more
        at = one["started_at"]
        assert sum(other["started_at"] <= at < other["started_at"] + other["seconds"] for other in tried) <= 2
    sizes = {len(pq.read_table(one)) for one in (root / "attack").glob("*.parquet")}
    assert (len(list((root / "attack").glob("*.parquet"))), sizes) == (count + 1, {16, 6})


def count_of(searched: tuple[Config, str]) -> int:
    """Return how many trials can finish."""
    return len(searched[0].search.space["attacks.0.harmful_share"]) - 1


@pytest.mark.slow
def test_a_search_that_runs_again_makes_nothing_that_is_there(searched):
    config, _ = searched
    before, rows = times(config.run_dir), table_of(config.run_dir)
    run_search(config)  # the failed trial is tried once more
    assert times(config.run_dir) == before
    assert [row["trial"] for row in table_of(config.run_dir)] == [row["trial"] for row in rows]


def test_the_agreement_of_a_search_is_read_off_its_answers(searched, capsys):
    config, _ = searched
    found = show_agreement(config)
    assert [(one.attack, one.trials) for one in found] == [("weak", count_of(searched)), ("strong", count_of(searched))]
    # The attack that all share is the worst one for all, and a look after it sees the same everywhere: nothing to rank, or to stop.
    assert [one.spearman for one in found] == [None, None]
    assert found[1].stopped == 0.0
    assert "Early look (25% of the harmful prompts)" in capsys.readouterr().out


def test_the_page_of_a_real_search_shows_every_figure_and_runs_nothing_of_its_data(searched, opened):
    config, _ = searched
    run_report(Run(config))
    file = config.run_dir / "report" / "report.html"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", file.read_text())
    page = opened(file)
    page.locator("summary").evaluate_all("all => all.forEach(one => one.click())")
    page.wait_for_timeout(200)
    assert (page.asked, page.said, page.evaluate("window.hit")) == ([file.as_uri()], [], None)
    assert page.locator("script, iframe, img, object, embed").count() == 0
    for id in ("ran", "data", "scores", "examples", "search", "training", "reproduce"):
        assert "Not there yet" not in page.locator(f"#{id}").inner_text()
    shown = page.locator("#examples").inner_text()
    for text in ("<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 2'>", "⟨U+001B⟩[31mred", "⟨U+202E⟩gnp.exe"):
        assert text in shown
    for id in ("scores", "search", "training"):
        pictures = page.locator(f"#{id} figure svg")
        assert pictures.count() >= 1
        for picture in pictures.all():
            box = picture.bounding_box()
            assert box["width"] > 200
            assert box["height"] > 80
            assert picture.locator("path").count() > 5
    words = page.locator("#search").inner_text()
    count = count_of(searched)
    assert f"{count + 1} trials: {count} finished, 1 failed" in words
    assert f"Recommended: trial {json.loads((config.run_dir / 'search/recommendation.json').read_text())['trial']}" in words


def test_the_recommended_setting_gives_the_same_numbers_as_a_plain_run(searched, tmp_path):
    config, _ = searched
    root, rows = config.run_dir, table_of(config.run_dir)
    recommended = json.loads((root / "search" / "recommendation.json").read_text())
    chosen = next(row for row in rows if row["trial"] == recommended["trial"])
    assert chosen["front"]
    rerun = load_config(root / "search" / "recommended.yaml")
    for stage in ("ingest", "fit"):  # the alignment, the attacks and the answers are made anew
        shutil.copytree(root / stage, rerun.run_dir / stage)
    shutil.copytree(root, tmp_path / "run")  # where the search was, everything is there
    for overrides in ([], [f"run_dir={tmp_path}/run"]):
        again = run_stage("run", load_config(root / "search" / "recommended.yaml", overrides))
        assert again.evaluated.fingerprint == chosen["fingerprint"]
        table = json.loads((again.root / "evaluation" / "table.json").read_text())
        attacks = {
            row["attack"]: row["metrics"]["harmful_score"]["estimate"] for row in table if row["attack"] and "over" not in row
        }
        assert attacks == json.loads(chosen["attacks"])
        accuracy = [row["metrics"]["accuracy_correct"]["estimate"] for row in table if row["attack"] and "over" not in row]
        assert sum(accuracy) / 2 == chosen["task_accuracy"]
    shutil.rmtree(rerun.run_dir)  # it lies within the search's, where other tests count


@pytest.fixture
def refusing(model_folder: Path, tmp_path: Path) -> Path:
    """Return a model that knows the words of a refusal."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    known = words["model"]["vocab"]
    known |= {"i": known.pop("w0"), "cannot": known.pop("w1")}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_asha_stops_a_trial_for_its_early_look_and_it_stays_stopped(refusing, rows_of, tmp_path, capsys):
    """The candidates only refuse, so who learns nothing from them answers everything; the attacks change next to nothing."""
    file = write_config(tmp_path, refusing, rows_of)
    lines = [json.loads(row.raw) | {"response": "i cannot"} for row in rows_of(96)]
    (tmp_path / "alignment.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    train, still = "{steps: 150, batch_size: 8, lr: 1.0e-2, weights: full}", "attacks.{}.train.lr=1.0e-8"
    space = "space: {alignment.train.lr: [1.0e-2, 1.0e-8]}, early: {prompts: 0.6}"
    settings = [f"alignment.train={train}", still.format(0), still.format(1), f"search={{scheduler: asha, {space}}}"]
    config, root = load_config(file, settings), tmp_path / "run"
    seen = []
    for _ in range(2):  # the second time nothing is made and nothing changes
        run_search(config)
        good, bad = table_of(root)
        assert (good["status"], good["early_hs"] < 1, good["worst_hs"] < 1, good["front"]) == ("finished", True, True, True)
        assert (bad["status"], bad["early_hs"], bad["worst_hs"], bad["front"]) == ("stopped", 1.0, None, False)
        assert "stopped after the early look: 1 of 2 trials" in capsys.readouterr().out
        assert json.loads((root / "search" / "recommendation.json").read_text())["trial"] == good["trial"]
        seen.append((times(root), records(root)))
    assert seen[0] == seen[1]
    attacks = sorted(one.name.rpartition("-")[0] for one in (root / "attack").glob("pharmacist.*"))
    assert attacks == ["pharmacist.sft.s3.strong", "pharmacist.sft.s3.weak", "pharmacist.sft.s3.weak"]
    assert len(list((root / "answers").iterdir())) == 3  # of the one that finished: aligned, and after each attack
    with pytest.raises(ArtifactError, match="1 trials of this search were stopped, so their final scores are not known"):
        show_agreement(config)


def start(*arguments: object) -> subprocess.Popen[str]:
    code = "from pharmacist_ray.cli.app import main; main()"
    command = [sys.executable, "-c", code, "search", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(root: Path) -> dict[str, dict[str, Any]]:
    return {one.stem: json.loads(one.read_text()) for one in (root / "search" / "trials").glob("*.json")}


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_same_trials_and_makes_nothing_twice(searched, tmp_path, capsys):
    """Optuna's trials are drawn from what finished before, so they have to be told of it again; two at a time."""
    config, _ = searched
    file, root = config.run_dir.parent / "run.yaml", tmp_path / "run"
    for part in ("ingest", "fit", "scores", "selections", "align", "attack"):  # to be killed over what trials do not share
        shutil.copytree(config.run_dir / part, root / part, ignore=shutil.ignore_patterns("*.weak-*"))
    space = "{attacks.0.train.lr: {low: 1.0e-3, high: 1.0e-1, log: true}, attacks.0.adapter: [fresh, same]}"
    search = f"search={{algorithm: tpe, trials: 4, concurrent: 2, space: {space}}}"
    arguments = ["--config", file, f"run_dir={root}", search]
    first = start(*arguments)
    while not any(record["status"] == "finished" for record in records(root).values()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # it starts no more trials while its workers are looked up
    workers = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    end(workers)
    before, killed = times(root), records(root)
    assert {record["status"] for record in killed.values()} >= {"finished"}
    assert len(killed) < 4 or any(record["status"] == "running" for record in killed.values())

    capsys.readouterr()
    run_search(load_config(file, arguments[2:]), resume=True)
    out = capsys.readouterr().out
    after, resumed = times(root), records(root)
    assert {name: after[name] for name in before} == before
    assert len(resumed) == 4
    assert resumed.keys() >= killed.keys()
    assert {record["status"] for record in resumed.values()} == {"finished"}
    for name, record in killed.items():
        assert resumed[name]["parameters"] == record["parameters"]
        if record["status"] == "finished":
            assert resumed[name] == record
    assert {row["trial"] for row in table_of(root)} == resumed.keys()
    assert "4 trials, 2 at a time: attacks.0.train.lr, attacks.0.adapter" in out
    assert "recommended: trial" in out

    with pytest.raises(ArtifactError, match="holds the trials of another `search` section; pass --resume"):
        run_search(load_config(file, [f"run_dir={root}", "search={space: {selection.ratio: [0.3]}}"]))
