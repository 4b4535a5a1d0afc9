"""A cascade's proxy as a run: what is made anew by what, and what cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config import Config
from pharmacist_ray.config.load import apply_override, parse_config
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.pipeline.proxied import check_proxy, passing_arms, proxy_config
from pharmacist_ray.pipeline.run import Run

LAYER = "scoring.proxy.layers=1"


@pytest.fixture
def values(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    path = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("candidates", "validation", "harmful", "benign")}
    for name, one in path.items():
        Path(one["path"]).write_text(name)
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder), "template": "plain"},
        "data": path,
        "scoring": {"scorers": ["pharmacist", "loss_gap", "keyword", "random"], "proxy": {"layers": 1}},
        "comparison": {"selections": ["all", "random", "pharmacist", "keyword"]},
    }


def config_of(values: dict[str, Any], *overrides: str) -> Config:
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, where="test")


def made(config: Config) -> dict[str, str]:
    """Name → fingerprint of what is fitted and scored."""
    run = Run(config)
    found = {"ingest": run.ingested("candidates").fingerprint, "fit": run.fitted.fingerprint, "score": run.scored.fingerprint}
    if run.proxied:
        found |= {"proxy fit": run.proxied.fitted.fingerprint, "proxy score": run.proxied.scored.fingerprint}
    return found


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("scoring.proxy.miss=0.1", {"score"}),
        ("scoring.proxy.sample=7", {"score"}),
        ("scoring.proxy.seed=1", {"score"}),
        ("selection.ratio=0.3", {"score"}),
        ("comparison.selections=[all,pharmacist,loss_gap]", {"proxy score", "score"}),
        ("comparison.selections=[pharmacist]", set()),
        ("scoring.proxy.layers=2", {"proxy fit", "proxy score", "score"}),
        ("scoring.proxy.quantization=4bit", {"proxy fit", "proxy score", "score"}),
        ("selector.intensity=0.2", {"fit", "proxy fit", "proxy score", "score"}),
        ("scoring.proxy=null", {"score"}),
    ],
)
def test_a_setting_makes_anew_what_depends_on_it(values: dict[str, Any], override: str, changed: set[str]) -> None:
    before, after = made(config_of(values)), made(config_of(values, override))
    assert {name for name in after if before[name] != after[name]} == changed


def test_the_proxy_is_the_same_run_of_the_same_rows_by_another_model_in_folders_of_its_own(values: dict[str, Any]) -> None:
    run = Run(config_of(values))
    assert run.proxied is not None
    assert run.proxied.model.layers == 1
    assert run.model.layers is None
    assert run.proxied.model.path == run.model.path
    assert run.proxied.ingested("candidates").folder == run.ingested("candidates").folder
    assert run.proxied.fitted.folder == run.root / "proxy" / "fit"
    assert run.proxied.scored.folder == run.root / "proxy" / "scores"
    assert run.proxied.proxied is None
    # Only what arms select by: the loss gap's reference is fitted for the model alone.
    assert run.proxied.config.scoring.scorers == ["pharmacist"]
    assert (run.parts, run.proxied.parts) == (["directions", "reference"], ["directions"])


def test_a_model_that_takes_the_proxys_place_is_known_by_its_content(values: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    found = [made(config_of(values, f"scoring.proxy={{path: {tmp_path / name}}}")) for name in "abc"]
    assert found[0] == found[1]
    assert {name for name in found[0] if found[0][name] != found[2][name]} == {"proxy fit", "proxy score", "score"}


def test_trials_of_a_search_share_the_proxy_that_they_do_not_vary(values: dict[str, Any]) -> None:
    base = Run(config_of(values))
    assert base.proxied is not None
    other = Run(config_of(values, "scoring.proxy.miss=0.1"), base=base).proxied
    assert other is not None
    assert (other.fitted.folder, other.scored.folder) == (base.proxied.fitted.folder, base.proxied.scored.folder)
    deeper = Run(config_of(values, "scoring.proxy.layers=2"), base=base).proxied
    assert deeper is not None
    assert deeper.fitted.folder == base.root / "proxy" / "search" / "fit" / deeper.fitted.fingerprint[:8]
    plain = Run(config_of(values, "scoring.proxy=null"))
    anew = Run(config_of(values, "scoring.proxy={layers: 2}"), base=plain).proxied  # a base without a cascade
    assert anew is not None
    assert anew.fitted.folder == deeper.fitted.folder


def test_the_arms_that_pass_rows_on_are_those_that_the_model_has_a_part_in(values: dict[str, Any]) -> None:
    config = config_of(
        values,
        "selection.combinations={text: {keyword: 1}, both: {loss_gap: 1, keyword: 2}}",
        "comparison.selections=[text, both, all]",
    )
    arms = Run(config).selections
    assert arms == ["pharmacist", "text", "both", "all"]
    assert passing_arms(config, arms) == ["pharmacist", "both"]
    assert proxy_config(config, arms).scoring.scorers == ["pharmacist", "loss_gap", "keyword"]
    calibrated = config_of(values, "selection.scorer=calibrated")
    assert passing_arms(calibrated, ["calibrated", "random_0"]) == ["calibrated"]


def test_where_the_model_takes_a_group_of_workers_each_of_them_is_an_actor_of_the_proxy(values: dict[str, Any]) -> None:
    config = config_of(values, "resources.actors=3", "resources.workers_per_actor=4")
    found = proxy_config(config, ["pharmacist"]).resources
    assert (found.actors, found.workers_per_actor) == (12, 1)


def test_a_proxy_in_few_bits_is_not_sharded(values: dict[str, Any]) -> None:
    config = config_of(
        values, "scoring.proxy={quantization: 4bit}", "selector.warmup.zero_stage=3", "selector.warmup.offload=parameters",
        "selector.reference.zero_stage=2",
    )  # fmt: skip
    found = proxy_config(config, ["pharmacist"])
    assert (found.model.quantization, found.selector.warmup.zero_stage, found.selector.warmup.offload) == ("4bit", 2, "none")
    assert found.selector.reference == config.selector.reference
    small = config_of(values, "model.quantization=8bit", "scoring.proxy={path: elsewhere}")
    assert proxy_config(small, ["pharmacist"]).model.quantization is None  # of the large model alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["selection.ratio=null", "selection.threshold=0.5"],
            "scoring.proxy bounds what is lost of the model's top rows and cannot heed selection.threshold: use selection.ratio or count "
            "alone, or leave scoring.proxy out",
        ),
        (
            ["selection.quotas=proportional", "selection.near_duplicates=2"],
            "scoring.proxy bounds what is lost of the model's top rows and cannot heed selection.quotas, selection.near_duplicates: use "
            "selection.ratio or count alone, or leave scoring.proxy out",
        ),
        (
            ["selection.scorer=keyword", "comparison.selections=[all]"],
            "scoring.proxy spares the model rows, and no arm (keyword, all) selects by a score that needs the model: leave it out",
        ),
        (
            ["scoring.scorers=[pharmacist,seal,random]", "comparison.selections=[pharmacist]"],
            "scoring.proxy has nothing to spare where the model learns a logit for each candidate (seal): take the scores that do out of "
            "scoring.scorers (now pharmacist, seal, random), or leave scoring.proxy out",
        ),
        (
            ["scoring.scorers=[pharmacist]", "comparison.selections=[all]"],
            "the arm all needs a score that every row has, which scoring.proxy leaves to text: add random to scoring.scorers",
        ),
    ],
)
def test_what_a_cascade_cannot_do_is_refused(values: dict[str, Any], overrides: list[str], message: str) -> None:
    config = config_of(values, *overrides)
    with pytest.raises(ConfigError) as raised:
        check_proxy(config, Run(config).selections)
    assert str(raised.value) == message


def test_a_proxy_that_is_not_there_or_not_cheaper_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    for override, message in (
        (
            f"scoring.proxy={{path: {tmp_path}/none}}",
            f"'{tmp_path}/none' is not a folder, and a hub id has the form 'owner/name'; check",
        ),
        ("scoring.proxy={layers: 3}", "the model has 2 layers, and its first 3 are asked for; lower scoring.proxy.layers"),
    ):
        config = config_of(values, override)
        with pytest.raises(ModelError) as raised:
            check_proxy(config, Run(config).selections)
        assert str(raised.value).startswith(message)
    with pytest.raises(
        ConfigError, match=r"scoring\.proxy needs a path, layers or quantization: by what is it cheaper than the model\?"
    ):
        config_of(values, "scoring.proxy={miss: 0.1}")
