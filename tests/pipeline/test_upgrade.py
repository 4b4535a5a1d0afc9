"""Runs that outlive the code that made them, and the place where their data lay."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import pharmacist_ray
from pharmacist_ray.config.load import parse_config
from pharmacist_ray.pipeline import revisions
from pharmacist_ray.pipeline.artifacts import Artifact
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.sharing import lock_missing_artifacts, say_why_anew
from pharmacist_ray.storage import write_text

NAMES = ("alignment", "validation", "harmful", "benign", "task", "attacker", "eval_harmful", "eval_benign", "eval_task")

OLD_INPUTS = {"files": "e9879768b5a46c81", "model": "1d489d8787dbd667"}
"""What version 0.1.0 wrote as the candidates' inputs, for the files of `place` with their times."""
OLD = {
    "ingest candidates": "37375e11e68fd447",
    "ingest validation": "9d33089a6f61f0b2",
    "ingest harmful": "a7dc4bdcc54b3818",
    "ingest benign": "9c4bf2041af4d8db",
    "ingest attack-weak-task": "9a74cbf1f539e7b9",
    "ingest attack-weak-harmful": "833a8591ec1b7ec1",
    "ingest eval-harmful": "1aca6616e96a1dd7",
    "ingest eval-benign": "117008cf80dcac1f",
    "ingest eval-task": "952a192b2bf74edc",
    "fit": "8bc9949a9253e291",
    "score": "d9b1e6a34f2298cb",
    "select": "ea39cb9d577533a6",
    "align": "5d04658eccbd252f",
    "attack": "e87f240b99535c16",
    "answers": "pharmacist.sft.s0.weak-e87f240b-b6008095",
}
"""What version 0.1.0 called the artifacts of `run_of`, but for the evaluation, whose revision was raised since."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with files that have a known time of change."""
    home = tmp_path / "here"
    for name, text in {**{f"data/{name}.jsonl": name for name in NAMES}, "model/config.json": "{}", "world.json": "{}"}.items():
        file = home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, ns=(0, 10**18))
    monkeypatch.chdir(home)
    return home


def run_of(where: str = "", *, base: Run | None = None, intensity: float = 0.1, template: str = "plain") -> Run:
    """Return a run of one cell and one attack on the files in a folder, in the run directory ``run``."""
    path = {name: {"path": f"{where}data/{name}.jsonl"} for name in NAMES}
    values: dict[str, Any] = {
        "run_dir": "run",
        "model": {"path": f"{where}model", "template": template},
        "data": {"candidates": path["alignment"], **{name: path[name] for name in ("validation", "harmful", "benign")}},
        "selector": {"intensity": intensity},
        "attacks": [
            {"name": "weak", "task": path["task"], "harmful": path["attacker"], "rows": 200, "train": {"steps": 100, "lr": 1e-5}}
        ],
        "evaluation": {
            "harmful_prompts": path["eval_harmful"], "benign_prompts": path["eval_benign"], "task": {"source": path["eval_task"]},
            "judge": "testbed", "judge_path": f"{where}world.json",
        },
        "comparison": {"selections": ["pharmacist"], "seeds": [0]},
    }  # fmt: skip
    return Run(parse_config(values, where="test"), base=base)


def artifacts(run: Run) -> dict[str, Artifact]:
    aligned = run.variants[0]
    return {f"ingest {name}": run.ingested(name) for name in run.sources} | {
        "fit": run.fitted,
        "score": run.scored,
        "select": run.main_selection,
        "align": run.trained(aligned),
        "attack": run.trained(run.attacks_on(aligned)[0]),
        "evaluate": run.evaluated,
    }


def prints(run: Run) -> dict[str, str]:
    """Return the fingerprint of every artifact, and the name of the attacked model's answers."""
    answers = run.answers(run.attacks_on(run.variants[0])[0]).name
    return {name: artifact.fingerprint for name, artifact in artifacts(run).items()} | {"answers": answers}


def make(run: Run) -> None:
    for artifact in artifacts(run).values():
        folder = artifact.begin()
        for part in artifact.parts:
            write_text("", folder / part)
        artifact.finish({})


def made_by_the_first_version() -> None:
    """Leave the run directory as version 0.1.0 did, as far as what is read of it goes."""
    manifest: dict[str, Any] = {"stage": "ingest", "inputs": OLD_INPUTS, "fingerprint": OLD["ingest candidates"]}
    source = {"path": ["data/alignment.jsonl"], "layout": "auto", "columns": {}, "category_column": "category", "split": "train"}
    manifest["config"] = {"source": source, "shards": None, "max_length": 256}
    write_text(json.dumps(manifest), Path("run/ingest/candidates/manifest.json"))


def test_another_version_finds_everything(place, monkeypatch):
    make(run_of())
    monkeypatch.setattr(pharmacist_ray, "__version__", "9.9.9")
    assert all(artifact.ready for artifact in artifacts(run_of()).values())


def test_copied_and_touched_inputs_are_the_same_inputs(place):
    make(run_of())
    shutil.copytree(place / "data", place / "moved/data", copy_function=shutil.copyfile)
    shutil.copytree(place / "model", place / "moved/model", copy_function=shutil.copyfile)
    shutil.copyfile("world.json", "moved/world.json")
    for where in ("moved/", f"{place}/moved/", f"{place}/"):
        assert prints(run_of(where)) == prints(run_of())
        assert all(artifact.ready for artifact in artifacts(run_of(where)).values())
    os.utime("data/alignment.jsonl", ns=(1, 1))
    assert all(artifact.ready for artifact in artifacts(run_of()).values())


def test_another_content_of_the_same_size_and_time_is_another_input(place):
    make(run_of())
    Path("data/alignment.jsonl").write_text("ALIGNMENT")
    os.utime("data/alignment.jsonl", ns=(0, 10**18))
    ready = {name for name, artifact in artifacts(run_of()).items() if artifact.ready}
    assert ready == {f"ingest {name}" for name in run_of().sources if name != "candidates"}
    assert run_of().ingested("candidates").outdated() == "from other inputs (files)"
    assert run_of().scored.outdated() == "from other inputs (fit, candidates)"


def test_a_raised_revision_makes_its_stage_and_those_after_it_anew_and_says_why(place, monkeypatch, capsys):
    make(run_of())
    monkeypatch.setitem(revisions.REASONS, "align", ["replay rows are drawn before the selection's"])
    run = run_of()
    missing = {name: artifact for name, artifact in artifacts(run).items() if not artifact.ready}
    assert list(missing) == ["align", "attack", "evaluate"]
    say_why_anew(run, missing.values())
    align, attack, evaluate = capsys.readouterr().out.splitlines()
    assert align.endswith(
        f"{missing['align'].folder.name} made anew: what was there was made by revision 1 of align, this is 2; since then: "
        "replay rows are drawn before the selection's"
    )
    assert attack.endswith("made anew: what was there was made from other inputs (aligned)")
    assert evaluate == "  evaluation made anew: what was there was made from other inputs (models)"


def test_one_line_tells_of_all_that_is_made_anew_for_one_reason_and_trials_tell_nothing(place, capsys):
    make(run_of())
    Path("model/config.json").write_text("{ }")
    run = run_of()
    wanted = [run.ingested(name) for name in ("validation", "harmful", "benign")]
    with lock_missing_artifacts(run, *wanted):
        pass
    assert capsys.readouterr().out == (
        "  ingest/validation and 2 more made anew: what was there was made from other inputs (model)\n"
    )
    say_why_anew(run_of(base=run), wanted)
    assert capsys.readouterr().out == ""


def test_what_the_first_version_made_is_found_by_its_rule(place):
    made_by_the_first_version()
    run = run_of()
    assert {name: print for name, print in prints(run).items() if name != "evaluate"} == OLD
    assert run.ingested("candidates").ready
    trial = run_of(base=run, intensity=0.5)
    assert trial.ingested("candidates").folder == run.ingested("candidates").folder
    assert trial.fitted.fingerprint != run.fitted.fingerprint


def test_by_that_rule_a_changed_setting_is_still_told(place):
    made_by_the_first_version()
    make(run_of())
    assert run_of(intensity=0.5).fitted.outdated() == "with selector.intensity=0.1, wanted is selector.intensity=0.5"


@pytest.mark.parametrize("file", ["data/alignment.jsonl", "model/config.json"])
def test_what_that_rule_cannot_find_is_made_anew_by_the_new_one_and_says_so(place, file):
    made_by_the_first_version()
    os.utime(file, ns=(1, 1))
    run = run_of()
    assert not run.ingested("candidates").ready
    assert run.ingested("candidates").outdated() == (
        "by version 0.1.0, which knew files by path, size and time; the files and the model may be the same, but lie elsewhere or "
        "have another time, and it kept no hash"
    )
    assert not set(prints(run).values()) & set(OLD.values())
    make(run)
    os.utime(file, ns=(2, 2))
    assert prints(run_of()) == prints(run)


def test_under_a_chat_template_ingestion_is_made_anew_for_its_turns_end_otherwise_now(place):
    artifact = run_of(template="auto").ingested("candidates")
    made = {"config": {key: value for key, value in artifact.config.items() if key != "turns"}, "inputs": dict(artifact.inputs)}
    assert artifact.difference(made) == "with no turns, wanted is turns='as the chat template ends them'"
    assert "turns" not in run_of().ingested("candidates").config
