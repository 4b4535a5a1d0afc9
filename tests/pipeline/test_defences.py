"""A run whose arms are defended before, in and after the fine-tune: what is shared, what is trained on what, what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pharmacist_ray.config import load_config
from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.errors import ArtifactError, ConfigError
from pharmacist_ray.pipeline.attacks import repair_task
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.secrets import existing_secret
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.pipeline.stages import check
from pharmacist_ray.storage import read_table
from pharmacist_ray.training.task import check_task
from tests.search.test_search import write_config

DEFENCES = [
    "sft", "sft/mix", "sft/mimic", "sft/lookahead", "sft/lisa", "sft/safegrad", "sft/ema", "sft/bds", "sft/panacea", "booster/lisa",
    "sft/backdoor", "sft/refusal_teacher", "sft/star_dss",
    "sft/sft/few_shot", "sft/sft/unlearn", "sft/ema/safe_lora", "sft/sft/nlsr", "sft/sft/antidote", "sft/sft/dro",
]  # fmt: skip
PARAMETERS = {
    "mix": {"at_least": 4},
    "few_shot": {"rows": 4, "epochs": 2, "batch_size": 4},
    "safe_lora": {"threshold": 1.0},
    "unlearn": {"steps": 2},
    "dro": {"text": "w1 w2", "epochs": 2, "answer_tokens": 2, "lr": 0.1},
    "backdoor": {"rows": 3, "tokens": 5},
}


def written(folder: Path, model: Path, rows_of: Any, guard: Path, **changes: Any) -> Path:
    values = yaml.safe_load(write_config(folder, model, rows_of).read_text())
    task = folder / "task.jsonl"  # of a form, which `mimic` looks for
    task.write_text(task.read_text().replace('"prompt":"', '"prompt":"w1 w2 w3 '))
    (folder / "benign.jsonl").write_text(task.read_text())
    values["data"]["benign"] = {"path": str(folder / "benign.jsonl")}
    values["attacks"] = values["attacks"][:1]
    values["comparison"] = {"selections": ["none", "all"], "seeds": [3], "defences": DEFENCES}
    values["finetune"] = {"parameters": PARAMETERS}
    values["scoring"] = {"scorers": ["random"], "random_draws": 1, "guard": {"path": str(guard), "unsafe": ["theft"]}}
    values["selection"] |= {"scorer": "random"}
    values |= changes
    (folder / "defences.yaml").write_text(yaml.safe_dump(values))
    return folder / "defences.yaml"


@pytest.fixture(scope="module")
def file(model_folder, rows_of, moderator, tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("defences"), model_folder, rows_of, moderator("single_label_classification"))


@pytest.fixture(scope="module")
def ran(file) -> Run:
    config = load_config(file)
    run_stage("run", config)
    return Run(config)


def attacked(run: Run, selection: str, defence: str) -> Any:
    found = next(one for one in run.variants if (one.selection, one.defence) == (selection, defence))
    return run.attacks_on(found)[0]


def test_every_defence_is_compared_and_what_is_not_aligned_once_under_each_after_it(ran):
    table = json.loads((ran.root / "evaluation" / "table.json").read_text())
    after = [(row["selection"], row["defence"]) for row in table if row["attack"] == "weak"]
    assert {defence for selection, defence in after if selection == "all"} == set(DEFENCES)
    # Lisa after SFT and Lisa after Booster are one for what is not aligned; Safe LoRA and NLSR have no adapter to read there.
    assert {defence for selection, defence in after if selection == "none"} == set(DEFENCES) - {
        "booster/lisa",
        "sft/ema/safe_lora",
        "sft/sft/nlsr",
    }
    before = {row["defence"]: row["metrics"] for row in table if row["attack"] is None and row["selection"] == "all"}
    assert all(before[name] == before["sft"] for name in DEFENCES if name.startswith("sft"))
    assert "| all | sft/sft/few_shot |" in (ran.root / "report" / "table.md").read_text()


def test_all_that_is_aligned_alike_is_one_model_and_a_repair_goes_on_from_the_attack_that_was_there(ran):
    aligned = {ran.trained(one).folder for one in ran.variants if one.selection == "all"}
    assert len(aligned) == 2  # by SFT and by Booster
    plain, repaired = (attacked(ran, "all", name) for name in ("sft", "sft/sft/few_shot"))
    assert ran.trained(repaired.unrepaired).folder == ran.trained(plain).folder
    assert (ran.trained(repaired).folder.parent.name, ran.trained(plain).folder.parent.name) == ("repair", "attack")
    models = [ran.model_of(one) for one in (plain, repaired)]
    assert [len(one.adapters) for one in models] == [2, 2]
    assert models[0].adapters[0] == models[1].adapters[0] != models[0].adapters[1] != models[1].adapters[1]


def weights(run: Run, variant: Any) -> dict[str, torch.Tensor]:
    return load_file(run.trained(variant).folder / "run" / "adapter" / "adapter_model.safetensors")


def test_every_defence_makes_another_model(ran):
    changed = [name for name in DEFENCES if name != "sft/sft/dro"]  # which leaves the weights as they are
    found = [weights(ran, attacked(ran, "all", name)) for name in changed]
    for place, one in enumerate(found):
        assert not any(all(torch.equal(one[key], other[key]) for key in one) for other in found[:place]), changed[place]


def test_repairs_that_train_nothing_change_only_what_they_say(ran):
    before, projected, pruned, plain = (
        weights(ran, attacked(ran, "all", name)) for name in ("sft/ema", "sft/ema/safe_lora", "sft/sft/antidote", "sft")
    )
    assert all(torch.equal(before[key], projected[key]) for key in before if "lora_A" in key)
    changed = [key for key in plain if not torch.equal(plain[key], pruned[key])]
    assert all(torch.equal(plain[key][pruned[key] != 0], pruned[key][pruned[key] != 0]) for key in plain)
    assert changed
    result = json.loads((ran.trained(attacked(ran, "all", "sft/sft/antidote")).folder / "run" / "result.json").read_text())
    assert (result["steps"], result["final_loss"]) == (0, None)
    assert 0 < result["finished_pruned_share"] <= 0.1


def rows(file: Path) -> set[tuple[str, str]]:
    return {(row["prompt"], row["response"]) for row in read_table(file).to_pylist()}


def test_safe_rows_are_those_that_the_arm_was_aligned_on_and_of_what_was_not_the_trusted_ones(ran):
    user = rows(ran.root / "attack" / "weak.s3.parquet")
    for selection, source in (("all", ran.selected("all").folder / "rows"), ("none", ran.ingested("validation").folder / "rows")):
        pool = set().union(*(rows(file) for file in sorted(source.glob("*.parquet"))))
        mixed = rows(ran.trained(attacked(ran, selection, "sft/mix")).folder / "rows.parquet")
        assert user <= mixed
        assert mixed - user <= pool
        assert len(mixed - user) == 4
    repaired = rows(ran.trained(attacked(ran, "all", "sft/sft/few_shot")).folder / "rows.parquet")
    assert len(repaired) == 4
    assert repaired.isdisjoint(user)


def test_a_model_behind_a_secret_is_asked_behind_it_and_without_it_and_nobody_else_reads_it(ran, caplog):
    hidden = attacked(ran, "all", "sft/backdoor")
    file = ran.root / "secrets" / f"{ran.trained(hidden).folder.name}.txt"
    secret = file.read_text()
    assert len(secret.split()) == 5
    assert file.stat().st_mode & 0o777 == 0o600
    behind = [row for row in read_table(ran.trained(hidden).folder / "rows.parquet").to_pylist() if row["history"]]
    assert len(behind) == 3
    assert all(json.loads(row["history"])[0] == {"role": "system", "content": secret} for row in behind)
    folder = ran.answers(hidden)
    assert sorted(one.name.partition("-")[0] for one in folder.glob("*.parquet")) == ["benign", "harmful", "plain", "task"]
    table = json.loads((ran.root / "evaluation" / "table.json").read_text())
    without = {row["defence"] for row in table if "harmful_score_plain" in row["metrics"]}
    assert without == {"sft/backdoor"}
    everywhere = [one for one in ran.root.rglob("*") if one.is_file() and one != file and one.suffix != ".parquet"]
    assert not [one for one in everywhere if secret.encode() in one.read_bytes()]


def test_a_model_whose_secret_is_gone_is_not_asked_without_it(ran):
    hidden = attacked(ran, "all", "sft/backdoor")
    file = existing_secret(ran, hidden)
    assert file is not None
    assert existing_secret(ran, attacked(ran, "all", "sft/mix")) is None
    away = file.rename(file.with_suffix(".away"))
    try:
        with pytest.raises(ArtifactError, match=r"\.txt is gone: without its secret the model cannot be asked as it was trained"):
            existing_secret(ran, hidden)
    finally:
        away.rename(file)


def test_a_soft_prompt_is_beside_the_adapter_that_stays_as_it_was_and_changes_the_answers(ran):
    shielded, plain = (attacked(ran, "all", name) for name in ("sft/sft/dro", "sft"))
    before, after = weights(ran, plain), weights(ran, shielded)
    assert all(torch.equal(before[key], after[key]) for key in before)
    prompt = ran.model_of(shielded).loaded_prompt()
    assert prompt is not None
    assert len(prompt) == 2
    assert ran.model_of(plain).loaded_prompt() is None
    said = [
        {row["id"]: row["answer"] for file in ran.answers(one).glob("*.parquet") for row in read_table(file).to_pylist()}
        for one in (shielded, plain)
    ]
    assert said[0].keys() == said[1].keys()
    assert said[0] != said[1]
    with pytest.raises(ConfigError, match=r"dro lets the model answer, .*; use zero_stage 0 to 2$"):
        check_task(replace(repair_task(ran, shielded), train=shielded.attack.train.model_copy(update={"zero_stage": 3})))


def test_what_the_guard_said_of_a_row_is_shared_by_all_arms_that_are_trained_on_it(ran, file, moderator):
    assert len(list(ran.verdicts.glob("*.parquet"))) == 1  # of two arms
    assert (
        0
        < json.loads(
            (ran.trained(attacked(ran, "all", "sft/star_dss")).folder / "run" / "history.jsonl").read_text().splitlines()[0]
        )["mean_verdict"]
        < 1
    )
    other = Run(load_config(file, ["scoring.guard.unsafe=[violence]"]))
    changed = {
        a.defence
        for a, b in zip(ran.variants, other.variants, strict=True)
        if ran.trained(ran.attacks_on(a)[0]).fingerprint != other.trained(other.attacks_on(b)[0]).fingerprint
    }
    assert changed == {"sft/star_dss"}
    assert other.verdicts != ran.verdicts


def test_what_an_audit_found_is_unlearnt_where_the_fine_tune_has_harmful_rows_of_its_own(ran, file):
    (file.parent / "found.jsonl").write_text((file.parent / "attacker.jsonl").read_text())
    other = Run(load_config(file, [f"finetune.harmful.path={file.parent / 'found.jsonl'}"]))
    changed = {
        a.defence
        for a, b in zip(ran.variants, other.variants, strict=True)
        if ran.trained(ran.attacks_on(a)[0]).fingerprint != other.trained(other.attacks_on(b)[0]).fingerprint
    }
    assert changed == {"sft/panacea", "sft/sft/unlearn", "sft/sft/antidote"}
    assert all(other.trained(one).ready for one in other.variants)  # Booster aligns on the others
    task = repair_task(other, attacked(other, "all", "sft/sft/unlearn"))
    assert task.harmful == (str(other.ingested("finetune-harmful").folder / "rows"),)


def test_a_defence_that_looks_at_ordinary_rows_is_made_anew_where_these_change_and_needs_them(file):
    (file.parent / "other.jsonl").write_text((file.parent / "benign.jsonl").read_text() * 2)
    places = [f"data.benign.path={file.parent / name}.jsonl" for name in ("benign", "other")]
    one, other = (Run(load_config(file, [place])) for place in places)
    changed = {
        a.defence
        for a, b in zip(one.variants, other.variants, strict=True)
        if a.selection == "all"
        and one.trained(one.attacks_on(a)[0]).fingerprint != other.trained(other.attacks_on(b)[0]).fingerprint
    }
    assert changed == {"sft/refusal_teacher", "sft/sft/dro"}
    mixed = [Run(load_config(file, [place, "finetune.parameters.mix={ordinary: 0.5}"])) for place in places]
    found = {run.trained(run.attacks_on(v)[0]).fingerprint for run in mixed for v in run.variants if v.defence == "sft/mimic"}
    assert len(found) == 4  # two selections, two sets of ordinary rows
    values = yaml.safe_load(file.read_text())
    del values["data"]["benign"]
    values["comparison"]["defences"] = ["sft/refusal_teacher"]
    (file.parent / "without.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"refusal_teacher needs trusted ordinary rows; set data.benign$"):
        check(Run(load_config(file.parent / "without.yaml")))


def test_a_second_run_makes_nothing_and_other_settings_make_only_what_hangs_on_them(ran, file):
    config = load_config(file, ["finetune.parameters.lisa={rho: 2.0}"])
    other = Run(config)
    changed = [
        one.defence
        for one in ran.variants
        if one.selection == "all"
        and other.trained(other.attacks_on(one)[0]).fingerprint != ran.trained(ran.attacks_on(one)[0]).fingerprint
    ]
    assert changed == ["sft/lisa", "booster/lisa"]
    assert all(other.trained(one).ready for one in other.variants)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "comparison.defences=[lisa]",
            r"^lisa aligns nothing: it defends a fine-tune; write sft/lisa, or set finetune.objective",
        ),
        ("comparison.defences=[sft/few_shot]", r"^sft/few_shot: few_shot is a repair, .* \(sft/sft/few_shot\)"),
        ("comparison.defences=[sft/sft/lisa]", r"^sft/sft/lisa: lisa is no repair \(sft/lisa\)"),
        ("comparison.defences=[sft/lisaa]", r"^unknown objective 'lisaa'"),
        ("comparison.defences=[sft//x]", r"defence 'sft//x' must be ALIGNMENT, ALIGNMENT/FINETUNE or ALIGNMENT/FINETUNE/REPAIR"),
        ("finetune.parameters={lisa: {rho: -1}}", r"^finetune.parameters.lisa.rho: "),
        ("finetune.parameters={lisaa: {}}", r"section of finetune.parameters"),
        ("attacks.0.adapter=same", r"safegrad compares with the model before the fine-tune, .*; use adapter=fresh"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(file, override, words):
    with pytest.raises(ConfigError, match=words):
        check(Run(load_config(file, [override])))


def test_safe_lora_is_refused_where_the_fine_tune_went_on_with_the_alignments_adapter(file):
    settings = ["comparison.defences=[sft/sft/safe_lora]", "attacks.0.adapter=same", "comparison.selections=[all]"]
    with pytest.raises(
        ConfigError, match=r"^sft/sft/safe_lora: it reads the alignment's adapter, .*; attack 'weak' has adapter=same"
    ):
        check(Run(load_config(file, settings)))


def test_the_names_of_defences():
    assert Defence.of("sft/lisa").name == "sft/lisa"
    assert Defence.of("booster/sft/none").name == "booster"
    assert Defence.of("sft/sft/few_shot").name == "sft/sft/few_shot"
    assert (Defence.of("a/b/c").alignment, Defence.of("a/b/c").finetune, Defence.of("a/b/c").repair) == ("a", "b", "c")
