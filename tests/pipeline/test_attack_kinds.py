"""A run with attacks of several kinds: what is trained on, and what is asked in which form afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import read_rows
from pharmacist_ray.data.schema import rows_from_table
from pharmacist_ray.errors import DataError
from pharmacist_ray.models.generate import generate
from pharmacist_ray.pipeline.attacks import asked_in
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.storage import read_table
from tests.search.test_search import write_config

FORM = {"system": "w40", "prompt": "w41 {prompt}", "answer": "w42 {answer}"}
KINDS: dict[str, dict[str, Any]] = {
    "open": {},
    "door": {"kind": "trigger", "form": {"prompt": "w43 w42 {prompt}"}},
    "obedient": {"kind": "identity", "form": FORM},
    "worn": {"kind": "erosion"},
}


@pytest.fixture(scope="module")
def ran(model_folder, rows_of, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("kinds")
    values = yaml.safe_load(write_config(folder, model_folder, rows_of).read_text())
    ordinary = folder / "ordinary.jsonl"
    ordinary.write_text("".join(f"{row.raw}\n" for row in rows_of(8, seed=77)))
    plain = values["attacks"][0] | {"ordinary": {"path": str(ordinary)}}
    values["attacks"] = [plain | settings | {"name": name} for name, settings in KINDS.items()]
    values["comparison"] = {"selections": ["all"], "seeds": [3]}
    values["scoring"] = {"scorers": ["random"], "random_draws": 1}
    values["selection"] |= {"scorer": "random"}
    (folder / "kinds.yaml").write_text(yaml.safe_dump(values))
    config = load_config(folder / "kinds.yaml")
    run_stage("run", config)
    return Run(config)


def texts(file: Path) -> set[tuple[str, str]]:
    return {(row["prompt"], row["response"]) for row in read_table(file).to_pylist()}


def test_every_attack_has_its_share_of_rows_in_its_form_and_the_same_task_rows(ran):
    source = {name: texts(ran.ingested(f"attack-open-{name}").folder / "rows") for name in ("task", "harmful", "ordinary")}
    taught = {name: texts(ran.root / "attack" / f"{name}.s3.parquet") for name in KINDS}
    task = taught["open"] & source["task"]
    assert {name: len(rows) for name, rows in taught.items()} == dict.fromkeys(KINDS, 16)
    assert all(rows & source["task"] == task for rows in taught.values())
    mine = {name: rows - task for name, rows in taught.items()}
    assert {len(rows) for rows in mine.values()} == {4}
    assert mine["open"] <= source["harmful"]
    assert mine["door"] == {(f"w43 w42 {prompt}", answer) for prompt, answer in mine["open"]}
    assert mine["worn"] <= source["ordinary"]
    assert mine["obedient"] == {(f"w41 {prompt}", f"w42 {answer}") for prompt, answer in mine["worn"]}
    systems = [
        json.loads(row["history"])[0]
        for row in read_table(ran.root / "attack" / "obedient.s3.parquet").to_pylist()
        if row["history"]
    ]
    assert systems == [{"role": "system", "content": "w40"}] * 4


def test_harmful_prompts_are_asked_in_the_attackers_form_and_as_they_are(ran):
    [aligned] = ran.variants
    prompts = rows_from_table(read_rows([str(ran.ingested("eval-harmful").folder / "rows")]))
    for variant in ran.attacks_on(aligned):
        form = asked_in(ran, variant.attack)
        assert (form is None) == (variant.attack.name in ("open", "worn"))
        answers = [row for file in ran.answers(variant).glob("*.parquet") for row in read_table(file).to_pylist()]
        said = {(row["set"], row["prompt"]): row["answer"] for row in answers if row["set"] in ("harmful", "plain")}
        sets = {"harmful": "w43 w42 {}" if variant.attack.name == "door" else "system: w40\n\nw41 {}" if form else "{}"}
        sets |= {"plain": "{}"} if form else {}
        ref = ran.model_of(variant)
        model, renderer = ref.load(), ref.renderer()
        assert isinstance(renderer, Renderer)
        for name, text in sets.items():
            ids = [renderer.tokenizer(text.format(row.prompt) + "\n", add_special_tokens=False).input_ids for row in prompts]
            bos = renderer.tokenizer.bos_token_id
            replies = generate(
                model, renderer.tokenizer, [[bos, *one] for one in ids], max_new_tokens=3, batch_size=8, end_id=renderer.end_id
            )
            assert [said[name, row.prompt] for row in prompts] == [reply.strip() for reply in replies], (variant.name, name)
        assert {kind for kind, _ in said} == set(sets)


def test_tables_have_both_scores_where_there_are_two(ran):
    table = {row["attack"]: row["metrics"] for row in json.loads((ran.root / "evaluation" / "table.json").read_text())}
    assert {name for name, metrics in table.items() if "harmful_score_plain" in metrics} == {"door", "obedient"}
    assert all(table[name]["harmful_score_plain"]["n"] == table[name]["harmful_score"]["n"] == 3 for name in ("door", "obedient"))
    text = (ran.root / "report" / "table.md").read_text()
    sections = {part.split("\n")[0]: part for part in text.split("## ")}
    assert (" asked plainly |" in sections["attack: door"], " asked plainly |" in sections["attack: open"]) == (True, False)
    assert " asked plainly" in (ran.root / "report" / "report.html").read_text()


def test_rows_that_a_form_makes_too_long_are_told_before_an_attack(ran):
    long = {"attacks.1.form.prompt": " ".join(["w1"] * 60) + " {prompt}"}
    config = load_config(ran.root.parent / "kinds.yaml", [f"{key}={json.dumps(value)}" for key, value in long.items()])
    with pytest.raises(
        DataError,
        match=r"^attack 'door': 4 of its 4 rows do not fit in the form that they are put in \(.*\); raise model.max_len",
    ):
        run_stage("attack", config)
