from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pharmacist_ray
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.pipeline import revisions
from pharmacist_ray.pipeline.artifacts import Artifact, digest
from pharmacist_ray.pipeline.stages import STAGES


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(tmp_path / "score", "score", {"method": "hooks", "n": 1}, {"fit": "abc"})


def test_a_fingerprint_is_what_it_was_made_from_and_not_where_it_lies(artifact, tmp_path):
    same = replace(artifact, folder=tmp_path / "elsewhere", config={"n": 1, "method": "hooks"})
    assert same.fingerprint == artifact.fingerprint
    assert len(artifact.fingerprint) == 16
    others = [
        replace(artifact, stage="fit"), replace(artifact, config={"method": "hooks", "n": 2}),
        replace(artifact, inputs={"fit": "abd"}), replace(artifact, inputs={"fit": "abc", "more": 1}),
    ]  # fmt: skip
    assert len({artifact.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_it_is_ready_only_once_the_manifest_of_these_inputs_is_there(artifact):
    assert not artifact.ready
    folder = artifact.begin()
    (folder / "data").write_text("x")
    assert not artifact.ready
    artifact.finish({"rows": 7, "where": Path("p")})
    assert artifact.ready
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["summary"] == {"rows": 7, "where": "p"}
    assert (manifest["stage"], manifest["fingerprint"], manifest["inputs"]) == ("score", artifact.fingerprint, {"fit": "abc"})
    assert manifest["config"] == {"method": "hooks", "n": 1}
    assert manifest["versions"]["torch"]
    assert not (folder / "started.json").exists()
    assert not replace(artifact, inputs={"fit": "new"}).ready


def test_a_part_that_was_not_wanted_before_is_added_to_what_is_there(artifact):
    artifact.begin()
    (artifact.folder / "first").write_text("x")
    artifact.finish({})
    more = replace(artifact, parts=("first", "second"))
    assert more.fingerprint == artifact.fingerprint
    assert replace(artifact, parts=("first",)).ready
    assert not more.ready
    assert more.outdated() == ""  # nothing that was made is made anew
    with pytest.raises(ArtifactError, match=r"score was made without second; run `pharmacist score` first"):
        more.require()
    assert (more.begin() / "first").read_text() == "x"
    (more.folder / "second").write_text("y")
    more.finish({})
    assert more.ready
    assert artifact.ready
    assert not list(replace(more, inputs={"fit": "new"}).begin().glob("first"))


def test_finishing_keeps_what_the_stage_itself_wrote_into_the_manifest(artifact):
    artifact.begin()
    (artifact.folder / "manifest.json").write_text(json.dumps({"json_columns": ["extra"], "fingerprint": "other"}))
    artifact.finish({})
    assert artifact.ready
    assert artifact.manifest()["json_columns"] == ["extra"]


@pytest.mark.parametrize("broken", [b"", b"{", b"[1]", b"7", b"\xff\xfe", b"null"])
def test_a_broken_manifest_is_none(artifact, broken):
    artifact.begin()
    (artifact.folder / "manifest.json").write_bytes(broken)
    assert artifact.manifest() == {}
    assert not artifact.ready


def test_an_interrupted_attempt_goes_on_if_its_inputs_are_the_same(artifact):
    (artifact.begin() / "part-1").write_text("half")
    assert (artifact.begin() / "part-1").read_text() == "half"
    changed = replace(artifact, inputs={"fit": "new"})
    assert [path.name for path in changed.begin().iterdir()] == ["started.json"]


def test_what_was_finished_from_other_inputs_is_replaced(artifact):
    (artifact.begin() / "part-1").write_text("done")
    artifact.finish({})
    changed = replace(artifact, config={})
    assert [path.name for path in changed.begin().iterdir()] == ["started.json"]
    assert [path.name for path in artifact.folder.parent.iterdir()] == ["score"]


def test_a_broken_start_mark_is_an_attempt_of_nobody(artifact):
    for broken in ("[]", "{}", "{"):
        (artifact.begin() / "part-1").write_text("half")
        (artifact.folder / "started.json").write_text(broken)
        assert [path.name for path in artifact.begin().iterdir()] == ["started.json"]


def test_a_folder_that_no_stage_made_is_never_removed(artifact):
    artifact.folder.mkdir()
    artifact.begin()  # an empty one is nobody's
    (artifact.folder / "started.json").unlink()
    (artifact.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="was not made by `pharmacist score`; move it or choose another run_dir"):
        artifact.begin()
    assert (artifact.folder / "thesis.tex").read_text() == "years of work"
    taken = replace(artifact, folder=artifact.folder / "thesis.tex")
    with pytest.raises(ArtifactError, match="was not made by"):
        taken.begin()


def test_what_is_missing_and_what_is_stale_say_which_command_makes_it(artifact):
    with pytest.raises(ArtifactError) as caught:
        artifact.require()
    assert str(caught.value) == (
        f"{artifact.folder} is not there yet; run `pharmacist score` first, or `pharmacist run` for everything that is missing"
    )
    artifact.begin()
    artifact.finish({})
    assert artifact.require() == artifact.folder
    with pytest.raises(
        ArtifactError, match=r"score was made with method='hooks', wanted is no method; run `pharmacist score` first"
    ):
        replace(artifact, config={"n": 1}).require()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"method": "ghost", "n": 1}}, "with method='hooks', wanted is method='ghost'"),
        ({"config": {"method": "hooks", "n": 1, "more": {"deep": [1]}}}, "with no more.deep, wanted is more.deep=[1]"),
        ({"inputs": {"fit": "new", "rows": "r"}}, "from other inputs (fit, rows)"),
        ({"inputs": {}}, "from other inputs (fit)"),
    ],
)
def test_what_is_outdated_says_in_words_what_differs(artifact, changes, words):
    assert artifact.outdated() == ""  # nothing is there
    artifact.begin()
    artifact.finish({})
    assert artifact.outdated() == ""
    assert replace(artifact, **changes).outdated() == words


def test_a_manifest_that_tells_nothing_is_of_other_settings_or_inputs(artifact):
    artifact.begin()
    manifest = {"fingerprint": "other", "config": artifact.config, "inputs": artifact.inputs}
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest))
    assert artifact.outdated() == "with other settings or inputs"


def test_a_folder_that_carries_its_fingerprint_is_compared_with_the_latest_of_its_name(artifact):
    def cell(**changes: Any) -> Artifact:
        made = replace(artifact, **changes)
        made.folder = artifact.folder.parent / f"all.sft.s0-{made.fingerprint[:8]}"
        return made

    for n, at in ((2, "2026-01-02"), (3, "2026-01-01")):
        made = cell(config={"n": n})
        made.begin()
        made.finish({})
        (made.folder / "manifest.json").write_text(json.dumps(made.manifest() | {"made_at": at}))
    (artifact.folder.parent / "all.sft.s0-broken00").mkdir()
    assert cell(config={"n": 4}).outdated() == "with n=2, wanted is n=4"
    assert cell(config={"n": 2}).outdated() == ""


def test_a_new_version_of_the_package_finds_what_the_last_one_made(artifact, monkeypatch):
    artifact.begin()
    artifact.finish({})
    monkeypatch.setattr(pharmacist_ray, "__version__", "9.9.9")
    assert artifact.ready
    assert artifact.fingerprint == "d73489453c51d533"  # as version 0.1.0 had it


def test_a_raised_revision_makes_anew_and_says_why(artifact, monkeypatch):
    artifact.begin()
    artifact.finish({})
    assert artifact.manifest()["revision"] == 1
    monkeypatch.setitem(revisions.REASONS, "fit", ["fits better"])
    assert artifact.ready
    monkeypatch.setitem(revisions.REASONS, "score", ["ties are broken by id", "losses are means"])
    assert not artifact.ready
    with pytest.raises(ArtifactError) as caught:
        artifact.require()
    assert "was made by revision 1 of score, this is 3; since then: ties are broken by id; losses are means; run" in str(
        caught.value
    )
    artifact.begin()
    artifact.finish({})
    assert (artifact.ready, artifact.manifest()["revision"]) == (True, 3)
    monkeypatch.setitem(revisions.REASONS, "score", [])
    assert artifact.outdated() == "by revision 3 of score, this is 1; since then: this version of the package is older"


def test_every_stage_that_makes_artifacts_has_a_revision():
    assert list(revisions.REASONS) == [stage for stage in STAGES if stage != "report"]
