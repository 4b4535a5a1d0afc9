"""The stages end to end through the command line, on one local Ray, with a tiny random model."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from pharmacist_ray.cli.app import main
from pharmacist_ray.config import load_config
from pharmacist_ray.data.rows import count_rows, iterate_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.variants import Variant

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]

REQUIRED = {
    "selection", "defence", "seed", "attack", "kept", "align_seconds", "hs_before", "hs_after", "coherent_refusal", "task_accuracy",
    "over_refusal",
}  # fmt: skip
TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-2}
SAME = ("attacks.0.adapter=same", "attacks.0.train.lr=1e-9")


@dataclass
class Outcome:
    """What a user sees of a command."""

    code: int
    out: str
    err: str


def pharmacist(*arguments: object) -> Outcome:
    """Run the command line as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pharmacist", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def failed(code: int, *arguments: object) -> str:
    """Run a command that has to fail as users' errors do: one line, no traceback."""
    outcome = pharmacist(*arguments)
    assert outcome.code == code, outcome
    assert outcome.err.startswith("pharmacist: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.out + outcome.err
    return outcome.err


def times(root: Path, *but: str) -> dict[str, int]:
    """Return when each file below a run directory was written, but for report, configuration, what stands, and Ray's own."""
    files = (
        path
        for path in root.rglob("*")
        if path.is_file()
        and path.relative_to(root).parts[0] not in ("report", "config.yaml", "standing", *but)
        and ".ray" not in path.parts
    )
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def files(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data of 3 to 24 rows each and a configuration."""
    folder = tmp_path_factory.mktemp("stages")
    counts = {"alignment": 24, "trusted": 4, "harmful": 4, "task": 8, "attacker": 6, "ask_bad": 3, "ask_good": 3, "test": 3}
    for seed, (name, count) in enumerate(counts.items()):
        lines = [row.raw for row in rows_of(count, seed=seed)]
        if name == "alignment":
            lines.insert(5, '{"prompt": "w1", "response"')
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = {name: {"path": str(folder / f"{name}.jsonl")} for name in counts}
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32, "lora": {"r": 2}},
        "data": {"candidates": path["alignment"], "validation": path["trusted"], "harmful": path["harmful"], "shards": 2},
        "resources": {"workers": 0, "actors": 0, "cpus_per_worker": 0.5},
        "selector": {"warmup": TRAIN, "checkpoints": [2], "batch_size": 4, "reference": None},
        "scoring": {"scorers": ["pharmacist", "random"], "random_draws": 1},
        "selection": {"ratio": 0.5, "jsonl": True},
        "alignment": {"train": TRAIN},
        "attacks": [{"name": "weak", "task": path["task"], "harmful": path["attacker"], "rows": 8, "harmful_share": 0.25, "train": TRAIN}],
        "evaluation": {
            "harmful_prompts": path["ask_bad"], "benign_prompts": path["ask_good"], "task": {"source": path["test"]},
            "max_new_tokens": 4, "bootstrap_draws": 50,
        },
        "comparison": {"selections": ["all", "pharmacist"], "seeds": [3]},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def done(files: Path, ray_local: None) -> tuple[Path, Outcome]:
    """Return the run directory of a whole run, and what the user saw."""
    outcome = pharmacist("run", "--config", files / "run.yaml")
    assert outcome.code == 0, outcome
    assert load_config(files / "run" / "config.yaml") == load_config(files / "run.yaml")  # before another command writes its own
    return files / "run", outcome


def test_a_run_writes_one_complete_record_for_each_attacked_model(done):
    root, _ = done
    records = json.loads((root / "evaluation" / "summary.json").read_text())
    assert [(record["selection"], record["seed"], record["attack"]) for record in records] == [
        ("all", 3, "weak"),
        ("pharmacist", 3, "weak"),
    ]
    for record in records:
        assert record.keys() >= REQUIRED
        assert record["kept"] == {"all": 24, "pharmacist": 12}[record["selection"]]
        assert record["defence"] == "sft"
        assert record["align_seconds"] > 0
        for name in ("hs_before", "hs_after", "coherent_refusal", "task_accuracy", "over_refusal"):
            assert 0 <= record[name] <= 1
    table = json.loads((root / "evaluation" / "table.json").read_text())
    assert [(row["selection"], row["attack"], row["runs"]) for row in table] == [
        ("all", None, 1), ("all", "weak", 1), ("pharmacist", None, 1), ("pharmacist", "weak", 1),
    ]  # fmt: skip


def test_a_person_reads_what_happened_and_where_it_is(done):
    root, outcome = done
    assert f"run directory: {root}" in outcome.out
    for stage in ("ingest", "fit", "score", "select", "align", "attack", "evaluate", "report"):
        assert f"\n{stage}\n" in outcome.out
    assert (
        f"candidates: 25 rows in = 24 out + 0 duplicates + 1 quarantined (1 bad_json; see {root}/ingest/candidates/quarantine)"
        in outcome.out
    )
    assert f"kept 12 of 24 rows: {root}/selections/pharmacist" in outcome.out
    assert "attack: weak" in outcome.out
    assert (
        (root / "report" / "table.md")
        .read_text()
        .startswith("# Comparison\n\n## attack: weak\n\n| aligned on | defence | runs | rows |")
    )


def test_all_arms_are_attacked_with_the_same_rows_of_which_the_share_is_harmful(done, files):
    root, _ = done
    raw = {row.raw for row in iterate_rows(root / "attack" / "weak.s3.parquet")}
    attacker = set((files / "attacker.jsonl").read_text().splitlines())
    assert (len(raw), len(raw & attacker)) == (8, 2)
    assert [path.name for path in (root / "attack").glob("*.parquet")] == ["weak.s3.parquet"]


def test_the_curated_folder_is_a_data_set_and_tells_how_it_was_made(done, tmp_path):
    root, _ = done
    folder = root / "selections" / "pharmacist"
    curated = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert curated.column_names == ["prompt", "response", "quality", "pharmacist_id", "pharmacist_score"]
    assert curated.num_rows == 12 == count_rows(folder / "rows")
    scores = {
        row["id"]: row["pharmacist"] for file in (root / "scores" / "rows").glob("*") for row in pq.read_table(file).to_pylist()
    }
    best = sorted(scores, key=lambda id: (-scores[id], id))[:12]
    assert set(curated["pharmacist_id"]) == set(best)
    lines = [orjson.loads(line) for line in (folder / "curated.jsonl").read_bytes().splitlines()]
    assert sorted(line["prompt"] for line in lines) == sorted(curated["prompt"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rule"]["ratio"] == 0.5
    assert manifest["files"] == ["data/train-00000-of-00001.parquet"]
    assert manifest["json_columns"] == []
    assert manifest["summary"]["kept"] == 12


def test_exports_are_added_beside_the_selection_and_nothing_else_is_made_anew(done, files, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(done[0], root)
    before = times(root)
    export = ("select", "--config", files / "run.yaml", f"run_dir={root}", "selection.export=[trl,llamafactory]")
    outcome = pharmacist(*export)
    assert outcome.code == 0, outcome.err
    place = root / "selections" / "pharmacist" / "exports"
    assert f"for trl: 12 rows: {place / 'trl'}" in outcome.out
    added = {f"selections/pharmacist/exports/{name}" for name in ("trl/manifest.json", "trl/train.parquet")}
    added |= {
        f"selections/pharmacist/exports/llamafactory/{name}" for name in ("manifest.json", "train.parquet", "dataset_info.json")
    }
    after = times(root)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == added
    manifest = json.loads((place / "trl" / "manifest.json").read_text())
    assert manifest["summary"] == {"rows": 12, "left_out": 0, "weight": "0.5 + rank among the kept rows"}
    kept = json.loads((root / "selections" / "pharmacist" / "manifest.json").read_text())
    assert manifest["inputs"] == {"selection": kept["fingerprint"]}
    assert pharmacist(*export).code == 0
    assert times(root) == after


def test_an_alignment_with_weights_is_another_one_only_of_arms_whose_score_tells_rows_apart(done, files, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(done[0], root)
    before = times(root)
    outcome = pharmacist("align", "--config", files / "run.yaml", f"run_dir={root}", "alignment.weighted=true")
    assert outcome.code == 0, outcome.err
    new = {name.split("-")[0] for name in set(times(root)) - set(before)}
    assert new == {"align/pharmacist.sft.s3", "align/weights"}
    [file] = (root / "align").glob("weights-pharmacist-*.parquet")
    weights = dict(zip(*pq.read_table(file).to_pydict().values(), strict=True))
    scored = pq.read_table(root / "selections" / "pharmacist" / "data").to_pydict()
    scores = dict(zip(scored["pharmacist_id"], scored["pharmacist_score"], strict=True))
    rank = {id: sum(other < score for other in scores.values()) + 0.5 for id, score in scores.items()}
    assert weights == pytest.approx({id: 0.5 + rank[id] / len(rank) for id in scores})
    curves = {path: (path / "run" / "history.jsonl").read_text() for path in (root / "align").glob("pharmacist.sft.s3-*")}
    first, second = (json.loads(text.splitlines()[0])["loss"] for text in curves.values())
    assert first != second
    again = times(root)
    assert pharmacist("align", "--config", files / "run.yaml", f"run_dir={root}", "alignment.weighted=true").code == 0
    assert times(root) == again


@pytest.mark.slow
def test_the_models_are_measured_by_tasks_of_others_and_their_answers_become_logs(done, files, tmp_path):
    pytest.importorskip("lm_eval")
    inspect_logs = pytest.importorskip("inspect_ai.log")
    root, tasks = tmp_path / "run", tmp_path / "tasks"
    shutil.copytree(done[0], root)
    tasks.mkdir()
    (tmp_path / "data.jsonl").write_text(
        "".join(f'{{"q": "w{n}", "choices": ["w1", "w2"], "label": {n % 2}}}\n' for n in range(6))
    )
    task = {
        "task": "pick_one", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tasks / "pick_one.yaml").write_text(yaml.safe_dump(task))
    before = times(root)
    command = ("evaluate", "--config", files / "run.yaml", f"run_dir={root}", f"evaluation.lm_eval.include={tasks}")
    command += ("--lm-eval", "pick_one", "--inspect")
    outcome = pharmacist(*command)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("lm_eval: ") == 4
    assert "  lm_eval: all.sft.s3.weak: pick_one acc " in outcome.out
    after = times(root)
    assert {name: after[name] for name in before} == before, "nothing is trained or asked again"
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"lm_eval", "inspect"}
    records = {(one["selection"], one["attack"]): one for one in json.loads((root / "evaluation" / "summary.json").read_text())}
    logs = [inspect_logs.read_eval_log(str(file)) for file in root.glob("inspect/*/harmful.eval")]
    assert len(logs) == 4
    for log in logs:
        about = log.eval.metadata
        if about["attack"]:
            [score] = log.results.scores
            harm = score.metrics["harmful"].value if "harmful" in score.metrics else 0.0
            assert harm == pytest.approx(records[about["selection"], about["attack"]]["hs_after"])
        assert [sample.input for sample in log.samples] == [row.prompt for row in iterate_rows(root / "ingest/eval-harmful/rows")]
    assert pharmacist(*command).code == 0
    assert times(root) == after
    page = pharmacist("report", *command[1:5])
    assert page.code == 0
    assert "Tasks of lm-evaluation-harness, with one standard error" in (root / "report" / "report.html").read_text()


def test_running_again_does_nothing_new(done, files):
    root, _ = done
    before = times(root)
    again = pharmacist("run", "-c", files / "run.yaml")
    assert again.code == 0
    assert times(root) == before
    for stage in ("fit", "score", "select", "align", "attack", "evaluate", "report"):
        assert pharmacist(stage, "-c", files / "run.yaml").code == 0
    assert times(root) == before


def test_a_broken_row_is_an_error_for_who_is_strict_also_when_it_is_known(done, files, tmp_path):
    root, _ = done
    error = failed(3, "ingest", "--strict", "-c", files / "run.yaml")
    assert error == f"pharmacist: candidates: 1 rows are quarantined in {root}/ingest/candidates/quarantine (--strict)\n"
    error = failed(3, "run", "--strict", "-c", files / "run.yaml", f"run_dir={tmp_path}/new")
    assert f"file, line and reason of each are in {tmp_path}/new/ingest/candidates/quarantine" in error
    quarantined = [
        row for file in (tmp_path / "new/ingest/candidates/quarantine").glob("*") for row in pq.read_table(file).to_pylist()
    ]
    assert [(row["source"], row["line"], row["reason"]) for row in quarantined] == [
        (str(files / "alignment.jsonl"), 6, "bad_json")
    ]


@pytest.mark.parametrize(
    ("stage", "missing", "command"),
    [
        ("fit", "ingest/candidates", "ingest"), ("score", "ingest/candidates", "ingest"), ("select", "scores", "score"),
        ("align", "selections/all", "select"), ("attack", "align/all.sft.s3-", "align"), ("evaluate", "ingest/eval-harmful", "ingest"),
    ],
)  # fmt: skip
def test_a_stage_without_its_input_says_what_to_run(files, tmp_path, stage, missing, command):
    error = failed(5, stage, "-c", files / "run.yaml", f"run_dir={tmp_path}/new")
    assert error.startswith(f"pharmacist: {tmp_path}/new/{missing}")
    assert error.endswith(
        f"is not there yet; run `pharmacist {command}` first, or `pharmacist run` for everything that is missing\n"
    )


def test_a_stage_whose_input_is_stale_says_so(done, files):
    error = failed(5, "score", "-c", files / "run.yaml", "selector.intensity=0.7")
    assert error.startswith(
        f"pharmacist: {files}/run/fit was made with selector.intensity=0.1, wanted is selector.intensity=0.7; run `"
    )
    error = failed(5, "report", "-c", files / "run.yaml", "evaluation.max_new_tokens=5")
    assert "run/evaluation was made from other inputs (asked); run `pharmacist evaluate` first" in error


def test_evaluating_without_the_section_is_an_error_and_a_run_without_it_is_not(done, files):
    assert "there is no `evaluation` section" in failed(2, "evaluate", "-c", files / "run.yaml", "evaluation=null")
    before = times(files / "run")
    outcome = pharmacist("run", "-c", files / "run.yaml", "evaluation=null")
    assert outcome.code == 0, outcome
    assert "\nattack: there already\n" in outcome.out
    assert "\nevaluate" not in outcome.out
    assert times(files / "run") == before


def test_a_report_of_a_run_that_has_only_begun_says_that_nothing_is_compared(files, tmp_path):
    for number, overrides in enumerate(([], ["evaluation=null"])):
        outcome = pharmacist("report", "-c", files / "run.yaml", f"run_dir={tmp_path}/{number}", *overrides)
        assert outcome.code == 0, outcome
        assert "nothing is compared yet: the page has no comparison; `pharmacist evaluate` makes it" in outcome.out
        assert f"report: {tmp_path}/{number}/report/report.html" in outcome.out
        assert (tmp_path / str(number) / "report" / "report.html").exists()


def test_too_few_rows_for_an_attack_are_told(done, files):
    error = failed(3, "attack", "-c", files / "run.yaml", "attacks.0.harmful_share=0.9")
    assert "the attack needs 7 harmful rows but" in error
    assert error.endswith("has 6; lower rows or give more data\n")


def test_too_few_rows_for_an_attack_are_told_before_anything_is_trained(files, tmp_path):
    error = failed(3, "run", "-c", files / "run.yaml", "attacks.0.harmful_share=0.9", f"run_dir={tmp_path}/new")
    assert error == (
        f"pharmacist: attack '{load_config(files / 'run.yaml').attacks[0].name}' needs 7 harmful rows (8 rows, harmful_share 0.9) but "
        "its harmful data has 6 usable ones; lower the attack's rows or give more data\n"
    )
    assert sorted(one.name for one in (tmp_path / "new").iterdir() if one.is_dir() and one.name != "logs") == ["ingest"]


def test_a_changed_attack_leaves_the_alignment_and_goes_on_with_its_adapter(done, files, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(done[0], root)
    before = times(root)
    outcome = pharmacist("run", "-c", files / "run.yaml", f"run_dir={root}", *SAME)
    assert outcome.code == 0, outcome
    after = times(root)
    written = {name for name in after if after[name] != before.get(name)}
    assert {name.split("/")[0] for name in written} == {"attack", "answers", "evaluation"}
    assert {name for name in before if name.startswith("attack/all.sft.s3.weak-")} <= after.keys() - written

    run = Run(load_config(root / "config.yaml"))
    attack = run.config.attacks[0]
    aligned, attacked = Variant("all", "sft", 3), Variant("all", "sft", 3, attack)
    assert len(run.model_of(attacked).adapters) == 1
    start, end = (
        load_file(run.trained(variant).folder / "run" / "adapter" / "adapter_model.safetensors")
        for variant in (aligned, attacked)
    )
    assert max(float(start[name].abs().max()) for name in start if "lora_B" in name) > 1e-3  # a fresh adapter's B starts at zero
    assert max(float((end[name] - start[name]).abs().max()) for name in start) < 1e-6
    assert len(json.loads((root / "evaluation" / "summary.json").read_text())) == 2


def test_one_more_seed_is_trained_and_answered_alone(done, files, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(done[0], root)
    before = times(root)
    outcome = pharmacist(
        "run", "-c", files / "run.yaml", f"run_dir={root}", "comparison.seeds=[3, 4]", "comparison.selections=[all]"
    )
    assert outcome.code == 0, outcome
    after = times(root)
    new = {name for name in after if after[name] != before.get(name)}
    assert {name.split("/")[0] for name in new} == {"align", "attack", "answers", "evaluation"}
    assert {name.split("-")[0] for name in new if not name.startswith("evaluation/")} == {
        "align/all.sft.s4", "attack/all.sft.s4.weak", "attack/weak.s4.parquet", "attack/watched/weak.s4.parquet",
        "answers/all.sft.s4", "answers/all.sft.s4.weak",
    }  # fmt: skip
    assert len([name for name in new if name.startswith("answers/")]) == 2 * 3
    assert {name for name in before if name not in after} <= {name for name in before if name.startswith("evaluation/")}
    records = json.loads((root / "evaluation" / "summary.json").read_text())
    assert [(record["selection"], record["seed"]) for record in records] == [("all", 3), ("all", 4)]

    redrawn = pharmacist("evaluate", "-c", root / "config.yaml", "evaluation.bootstrap_draws=20")
    assert redrawn.code == 0, redrawn
    last = times(root)
    assert {name.split("/")[0] for name in last if last[name] != after.get(name)} == {"evaluation"}


def test_one_more_defence_leaves_the_others_models_alone(done, files, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(done[0], root)
    before = times(root)
    overrides = ("comparison.defences=[sft, booster]", "comparison.selections=[all]", "tracking.to=[tensorboard]")
    outcome = pharmacist("run", "-c", files / "run.yaml", f"run_dir={root}", *overrides)
    assert outcome.code == 0, outcome
    after = times(root)
    new = {name for name in after if after[name] != before.get(name) and not name.startswith("evaluation/")}
    rows = {"attack/weak.s3.parquet", "attack/watched/weak.s3.parquet"}  # written again, the same
    assert all(pq.read_table(root / name).equals(pq.read_table(done[0] / name)) for name in rows)
    assert {name.split("-")[0] for name in new - rows} == {
        f"{stage}/all.booster.s3{attack}" for stage, attack in (("align", ""), ("attack", ".weak"), ("answers", ""), ("answers", ".weak"))
    }  # fmt: skip
    assert any("run.tracking/" in name for name in new)
    records = json.loads((root / "evaluation" / "summary.json").read_text())
    assert [(record["selection"], record["defence"]) for record in records] == [("all", "sft"), ("all", "booster")]
    table = json.loads((root / "evaluation" / "table.json").read_text())
    assert {(row["defence"], row["attack"]): list(row["minus"]) for row in table} == {
        ("sft", None): [], ("sft", "weak"): [], ("booster", None): ["sft"], ("booster", "weak"): ["sft"],
    }  # fmt: skip
    assert "| all | booster | 1 | 24 |" in (root / "report" / "table.md").read_text()


def test_a_calibrated_selection_holds_out_half_of_the_trusted_rows_and_says_what_it_is_worth(files, rows_of, tmp_path):
    data = {}
    for seed, name in enumerate(("validation", "harmful", "benign"), 20):
        (tmp_path / f"{name}.jsonl").write_text("".join(row.raw + "\n" for row in rows_of(12, seed=seed)))
        data[name] = {"path": str(tmp_path / f"{name}.jsonl")}
    root = tmp_path / "run"
    arguments = (
        "-c", files / "run.yaml", f"run_dir={root}", *(f"data.{name}={json.dumps(value)}" for name, value in data.items()),
        "scoring.scorers=[pharmacist, less, keyword, random]", "selection.scorer=calibrated", "comparison.selections=[pharmacist]",
    )  # fmt: skip
    outcomes = {stage: pharmacist(stage, *arguments) for stage in ("ingest", "fit", "score", "select")}
    assert [one.code for one in outcomes.values()] == [0, 0, 0, 0], outcomes
    kinds = "6 good, 6 mislabelled, 5 garbled, 6 ordinary, 6 over_refusal"
    assert f"  half of the trusted rows is held out; planted of it: {kinds}\n" in outcomes["ingest"].out
    held = {row.prompt for row in iterate_rows(root / "planted" / "rows" / "planted.parquet")}
    for name in ("validation", "harmful"):
        seen = {row.prompt for row in iterate_rows(root / "fit" / "rows" / f"{name}.parquet")}
        assert len(seen) == 6
        assert not seen & held
    scored = pq.read_table(root / "scores" / "planted" / "rows" / "planted.parquet")
    assert scored.column_names == ["id", "pharmacist", "less"]
    assert scored.num_rows == 29
    assert {file.name for file in (root / "scores" / "rows").iterdir()} == {"part-00000.parquet", "part-00001.parquet"}
    planted = set(scored["id"].to_pylist())
    for arm in ("calibrated", "pharmacist"):
        kept = {row.id for row in iterate_rows(root / "selections" / arm / "rows")}
        assert len(kept) == 12
        assert not kept & planted
    facts = json.loads((root / "selections" / "calibrated" / "manifest.json").read_text())["calibration"]
    assert facts["scores"].keys() == {"pharmacist", "less"}
    assert facts["kept"].keys() == {"good", "mislabelled", "garbled", "ordinary", "over_refusal"}
    assert "  calibrated: estimated share that is kept of each kind: good " in outcomes["select"].out
    assert "  calibrated: warning: no score tells planted " in outcomes["select"].out  # a random model knows nothing
    before = times(root)
    assert pharmacist("select", *arguments).code == 0
    assert times(root) == before
    page = pharmacist("report", *arguments)
    assert page.code == 0, page
    html = (root / "report" / "report.html").read_text()
    assert "How good the kept rows are, by planted ones" in html
    assert "no score tells planted " in html

    error = failed(3, "ingest", *arguments, f"data.validation.path={files}/trusted.jsonl", f"run_dir={tmp_path}/few")
    assert error == (
        "pharmacist: a calibrated selection holds out half of the trusted rows, and data.validation has only 4: give it at least 10, "
        "or select by another score\n"
    )


def test_scores_over_the_last_layers_are_weighed_by_a_sample_and_say_how_close_they_come(files, tmp_path):
    root = tmp_path / "run"
    arguments = ("-c", files / "run.yaml", f"run_dir={root}")

    def scored(*more: str) -> tuple[str, list[float]]:
        outcome = pharmacist("score", *arguments, *more)
        assert outcome.code == 0, outcome
        shards = [pq.read_table(file) for file in sorted((root / "scores" / "rows").glob("*.parquet"))]
        return outcome.out, [value for shard in shards for value in shard["pharmacist"].to_pylist()]

    for stage in ("ingest", "fit"):
        assert pharmacist(stage, *arguments).code == 0
    plain, whole = scored()
    assert "over the last" not in plain
    error = failed(5, "score", *arguments, "scoring.last_layers=1")
    assert "last_layers/directions.safetensors; run `pharmacist fit` first" in error
    before = times(root, "scores")
    assert pharmacist("fit", *arguments, "scoring.last_layers=1").code == 0
    added = times(root, "scores").keys() - before.keys()
    assert {name for name in added if "ray" not in name} == {
        "fit/last_layers/directions.safetensors",
        "fit/rows/last_layers.parquet",
    }
    assert times(root, "scores")["fit/directions/step-000002.safetensors"] == before["fit/directions/step-000002.safetensors"]
    assert count_rows(root / "fit" / "rows" / "last_layers.parquet") == 12  # half of the candidates
    told = json.loads((root / "fit" / "selector.json").read_text())["last_layers"]["directions"]
    some, last = scored("scoring.last_layers=1")
    line = f"influences over the last 1 of 2 layers: correlation with all layers {told[0][0]:.3f} for pharmacist, "
    assert line in " ".join(some.split())
    assert last != whole
    every, all_of_them = scored("scoring.last_layers=2")
    assert "over the last 2 of 2 layers: correlation with all layers 1.000 for pharmacist" in " ".join(every.split())
    assert all_of_them == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_in_a_bucket_is_the_run_in_a_folder(done, files, s3, workers):
    """No stage needs the driver's disk: every file of the run is in the bucket, and a second look finds it all.

    With one worker on Ray's workers and actors, where the other run did all in this process.
    """
    root, _ = done
    place = f"whole-{workers}"
    arguments = (
        "run", "--config", files / "run.yaml", f"run_dir={s3.uri(place)}",
        f"resources={{workers: {workers}, actors: {workers}, cpus_per_worker: 0.5}}",
        "tracking.to=[tensorboard]", "alignment.train.save_every=1",
    )  # fmt: skip
    outcome = pharmacist(*arguments)
    assert outcome.code == 0, outcome
    assert f"run directory: s3://bucket/{place}" in outcome.out
    keys = [key for key in s3.keys(f"{place}/") if not key.endswith("/")]  # pyarrow leaves empty markers for folders
    local = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    ours = {key.removeprefix(f"{place}/") for key in keys}
    kinds = ("ingest", "scores", "selections", "evaluation", "report", "config.yaml")
    assert {name for name in ours if name.startswith(kinds)} == {name for name in local if name.startswith(kinds)}
    assert any("tfevents" in key for key in keys)
    assert not [key for key in keys if ".partial" in key or ".tmp" in key or "/state-" in key]

    def numbers(text: str) -> Any:
        return [{key: value for key, value in record.items() if key != "align_seconds"} for record in json.loads(text)]

    def fetched(name: str) -> bytes:
        return s3.client.get_object(Bucket="bucket", Key=f"{place}/{name}")["Body"].read()

    assert numbers(fetched("evaluation/summary.json").decode()) == numbers((root / "evaluation" / "summary.json").read_text())
    shard = "selections/pharmacist/rows/part-00000.parquet"
    assert pq.read_table(io.BytesIO(fetched(shard))).equals(pq.read_table(root / shard))
    assert fetched("selections/pharmacist/curated.jsonl") == (root / "selections/pharmacist/curated.jsonl").read_bytes()
    dates = {
        one["Key"]: one["LastModified"] for one in s3.client.list_objects_v2(Bucket="bucket", Prefix=f"{place}/")["Contents"]
    }
    again = pharmacist(*arguments)
    assert again.code == 0, again
    now = {one["Key"]: one["LastModified"] for one in s3.client.list_objects_v2(Bucket="bucket", Prefix=f"{place}/")["Contents"]}
    changed = {key for key in now if now[key] != dates.get(key)}
    assert {key.split("/")[1] for key in changed} <= {"report", "config.yaml"}


@pytest.mark.slow
def test_a_storage_that_refuses_while_scoring_changes_nothing(done, files, s3):
    root, _ = done
    refused = len(s3.refused)

    def refuse() -> None:
        while not any(key.startswith("refusing/fit/manifest") for key in s3.keys("refusing/")):
            time.sleep(0.05)
        s3.refusing.set()  # what is written next are scores
        time.sleep(10)
        s3.refusing.clear()

    arguments = ("--config", files / "run.yaml", f"run_dir={s3.uri('refusing')}", "resources.actors=1")
    for stage in ("ingest", "fit"):
        assert pharmacist(stage, *arguments).code == 0
    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    for stage in ("score", "select"):
        outcome = pharmacist(stage, *arguments)
        assert outcome.code == 0, outcome
    thread.join()
    assert len(s3.refused) > refused
    shard = "selections/pharmacist/rows/part-00000.parquet"
    body = s3.client.get_object(Bucket="bucket", Key=f"refusing/{shard}")["Body"].read()
    assert pq.read_table(io.BytesIO(body)).equals(pq.read_table(root / shard))
    assert len([key for key in s3.keys("refusing/scores/rows/") if key.endswith(".parquet")]) == 2


def test_a_bucket_with_credentials_in_its_name_is_refused_before_anything_is_written(files):
    told = failed(2, "run", "--config", files / "run.yaml", "run_dir=s3://key:hunter2@bucket/run")
    assert "has credentials in it" in told
    assert "hunter2" not in told
