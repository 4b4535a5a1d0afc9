from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pharmacist_ray.curation import combine, curated
from pharmacist_ray.curation.export import write_export, write_weights
from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.curation.trainers import EXPORTS
from pharmacist_ray.data.layouts import to_row
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import iterate_rows
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError, PluginError
from tests.curation.test_select import write_inputs

SYSTEM = {"role": "system", "content": "Be careful."}
EARLIER = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "reply"}]
TOOL = [{"role": "user", "content": "look"}, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "found"}]
TWICE = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]


def messages(*before: dict[str, str], asked: str = "how", answer: str = "so") -> dict[str, Any]:
    return {"messages": [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


RECORDS = [
    {"prompt": "plain “quoted”\nlines", "response": "a"},
    {"instruction": "sum up", "input": "a long text", "output": "b"},
    messages(SYSTEM, answer="c"),
    messages(SYSTEM, *EARLIER, answer="d"),
    messages(*TOOL, {"role": "assistant", "content": "it says"}, answer="e"),
    messages(*TWICE, answer="f"),
    messages({"role": "developer", "content": "Be brief."}, answer="g"),
]


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    """Return a selection of all records, in three shards; the last letter's row has the highest score."""
    rows = [to_row(record, source=f"in.jsonl:{number}") for number, record in enumerate(RECORDS)]
    scores = [float(ord(row.response) ** 3) for row in rows]
    candidates, folder = write_inputs(tmp_path, rows, {"s": scores}, 3)
    write_selection(candidates, folder, Rule("s", ratio=1.0), tmp_path / "selected", provenance={})
    return tmp_path / "selected"


def exported(selection: Path, name: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return what ``datasets`` reads of an export, by answer."""
    out = selection / "exports" / name
    write_export(selection, name, out, **settings)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(out / "train.parquet"), split="train", cache_dir=str(selection.parent / "cache")
    )
    answers = {
        "trl": lambda one: one["completion"][0]["content"], "trl_text": lambda one: one["completion"],
        "alpaca": lambda one: one["output"], "sharegpt": lambda one: one["conversations"][-1]["value"],
    }  # fmt: skip
    return {answers.get(name, lambda one: one["messages"][-1]["content"])(one): one for one in loaded}


def whole(record: dict[str, Any]) -> list[dict[str, str]]:
    """The reference: a record's conversation."""
    if "messages" in record:
        return record["messages"]
    prompt = record.get("prompt") or f"{record['instruction']}\n\n{record['input']}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": record.get("response") or record["output"]}]


CONVERSATIONS = {whole(record)[-1]["content"]: whole(record) for record in RECORDS}


@pytest.mark.parametrize("name", ["messages", "axolotl"])
def test_messages_are_the_conversation_with_every_turn(selection, name):
    assert {answer: one["messages"] for answer, one in exported(selection, name).items()} == CONVERSATIONS


def test_trl_gets_the_turns_before_the_answer_and_the_answer(selection):
    found = exported(selection, "trl")
    assert {answer: [*one["prompt"], *one["completion"]] for answer, one in found.items()} == CONVERSATIONS
    assert all(len(one["completion"]) == 1 for one in found.values())
    assert set(next(iter(found.values()))) == {"prompt", "completion", "weight"}


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_text_for_trl_is_what_a_model_without_a_chat_template_is_aligned_on(selection, tokenizer, template):
    renderer = Renderer(tokenizer, template)
    found = exported(selection, "trl_text", plain=template == "plain")
    rows = [to_row(record) for record in RECORDS]
    assert {answer: one["prompt"] for answer, one in found.items()} == {row.response: renderer.prompt_text(row) for row in rows}


def test_alpaca_has_system_and_earlier_turns_in_columns_and_leaves_out_what_is_no_question_and_answer(selection):
    assert write_export(selection, "alpaca", selection / "exports" / "alpaca") == {
        "rows": 5, "left_out": 2, "weight": "0.5 + rank among the kept rows",
    }  # fmt: skip
    found = exported(selection, "alpaca")
    for one in found.values():
        del one["weight"]
    assert found == {
        "a": {"instruction": "plain “quoted”\nlines", "input": "", "output": "a", "system": "", "history": []},
        "b": {"instruction": "sum up", "input": "a long text", "output": "b", "system": "", "history": []},
        "c": {"instruction": "how", "input": "", "output": "c", "system": "Be careful.", "history": []},
        "d": {"instruction": "how", "input": "", "output": "d", "system": "Be careful.", "history": [["first", "reply"]]},
        "g": {"instruction": "how", "input": "", "output": "g", "system": "Be brief.", "history": []},
    }


def test_sharegpt_has_its_own_names_for_roles(selection):
    found = exported(selection, "sharegpt")
    names = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    want = {a: [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns] for a, turns in CONVERSATIONS.items()}
    assert {answer: one["conversations"] for answer, one in found.items()} == want


def read_by_llamafactory(folder: Path, name: str) -> list[list[tuple[str, str]]]:
    """The reference: what LLaMA-Factory's documentation says of a data set in ShareGPT's formatting with tags."""
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    assert info["formatting"] == "sharegpt"
    tags = info["tags"]
    odd, even = {tags["user_tag"], tags["observation_tag"]}, {tags["assistant_tag"], tags["function_tag"]}
    read = []
    for row in pq.read_table(folder / info["file_name"]).to_pylist():
        turns = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in row[info["columns"]["messages"]]]
        asked = turns[1:] if turns[0][0] == tags["system_tag"] else turns
        assert len(asked) % 2 == 0
        assert all(role in (even if place % 2 else odd) for place, (role, _) in enumerate(asked))
        read.append(turns)
    return read


def test_llamafactory_gets_a_data_set_that_it_would_skip_no_row_of(selection):
    out = selection / "exports" / "llamafactory"
    assert write_export(selection, "llamafactory", out)["left_out"] == 1  # two questions in a row
    read = {turns[-1][1]: turns for turns in read_by_llamafactory(out, "curated")}
    assert set(read) == {"a", "b", "c", "d", "e", "g"}
    assert read["g"][0] == ("system", "Be brief.")
    assert read["e"] == [(turn["role"], turn["content"]) for turn in CONVERSATIONS["e"]]


def test_axolotl_gets_what_to_write_into_its_configuration(selection):
    exported(selection, "axolotl")
    out = selection / "exports" / "axolotl"
    (source,) = yaml.safe_load((out / "axolotl.yaml").read_text())["datasets"]
    assert source["type"] == "chat_template"
    assert source["roles_to_train"] is source["train_on_eos"] is None  # the last message alone
    loaded = datasets.load_dataset(
        source["ds_type"], data_files=source["path"], split="train", cache_dir=str(selection / "cache")
    )
    mapped = source["message_property_mappings"]
    turns = loaded[0][source["field_messages"]]
    assert [[turn[mapped["role"]], turn[mapped["content"]]] for turn in turns] == [
        [turn["role"], turn["content"]] for turn in turns
    ]


def test_a_weight_is_half_and_the_share_of_kept_rows_with_a_lower_score(selection):
    found = exported(selection, "messages")
    # Seven different scores, in the order of the answers: row k of 7 has k lower ones and half of itself below.
    assert [found[answer]["weight"] for answer in "abcdefg"] == pytest.approx([0.5 + (k + 0.5) / 7 for k in range(7)])
    assert np.mean([one["weight"] for one in found.values()]) == pytest.approx(1.0)
    assert {one["weight"] for one in exported(selection, "trl", weighed=False).values()} == {1.0}
    write_weights(selection, selection / "weights.parquet")
    written = pq.read_table(selection / "weights.parquet")
    assert dict(zip(*written.to_pydict().values(), strict=True)) == {
        row.id: found[row.response]["weight"] for row in iterate_rows(selection / "rows")
    }


def test_a_system_prompt_of_the_model_comes_before_rows_without_one(selection):
    found = exported(selection, "messages", system="Stand here.")
    assert found["a"]["messages"][0] == {"role": "system", "content": "Stand here."}
    assert found["c"]["messages"] == CONVERSATIONS["c"]
    assert exported(selection, "alpaca", system="Stand here.")["a"]["system"] == "Stand here."


def test_pieces_and_files_change_nothing_and_ranks_of_many_rows_are_taken_among_some(selection, tmp_path, monkeypatch):
    before = exported(selection, "trl")
    monkeypatch.setattr("pharmacist_ray.curation.export._BATCH", 2)
    assert exported(selection, "trl") == before
    rows = [to_row({"prompt": f"p{n}", "response": f"{n}"}) for n in range(300)]
    monkeypatch.setattr(curated, "_FILE_BYTES", 1)
    monkeypatch.setattr(curated, "_BATCH", 7)
    candidates, folder = write_inputs(tmp_path / "many", rows, {"s": [float(n) for n in range(300)]}, 5)
    write_selection(candidates, folder, Rule("s", ratio=1.0), tmp_path / "many" / "selected", provenance={})
    assert len(list((tmp_path / "many" / "selected" / "data").iterdir())) == 5  # one for each shard
    whole = exported(tmp_path / "many" / "selected", "messages")
    assert [whole[f"{n}"]["weight"] for n in range(300)] == pytest.approx([0.5 + (n + 0.5) / 300 for n in range(300)])
    monkeypatch.setattr(combine, "SAMPLE", 100)
    some = exported(tmp_path / "many" / "selected", "messages")
    assert [some[f"{n}"]["weight"] for n in range(300)] == pytest.approx([0.5 + (n + 0.5) / 300 for n in range(300)], abs=0.15)


def test_a_layout_without_a_place_for_any_row_and_files_that_do_not_belong_together_are_told(tmp_path, selection):
    rows = [to_row(messages(*TWICE, answer="f"))]
    candidates, folder = write_inputs(tmp_path / "other", rows, {"s": [1.0]}, 1)
    write_selection(candidates, folder, Rule("s", ratio=1.0), tmp_path / "other" / "selected", provenance={})
    with pytest.raises(DataError, match=r"^selection\.export: 'alpaca' has no place for any of the 1 rows; leave it out$"):
        write_export(tmp_path / "other" / "selected", "alpaca", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    for file in (selection / "data").iterdir():
        file.unlink()
    (tmp_path / "other" / "selected" / "data").rename(selection / "data2")
    (selection / "data").rmdir()
    (selection / "data2").rename(selection / "data")
    with pytest.raises(ArtifactError, match="data/ and rows/ do not have the same rows; remove it and select again"):
        write_export(selection, "trl", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"unknown export 'trk' \(did you mean 'trl'\?\)"):
        write_export(selection, "trk", tmp_path / "out")


def test_an_export_of_somebody_elses(selection, tmp_path, monkeypatch):
    (tmp_path / "export_mod.py").write_text(
        "import pyarrow as pa\n"
        "from pharmacist_ray.curation.trainers import Export\n"
        "def pairs(sample): return {'q': sample.row.prompt, 'a': sample.row.response}\n"
        "numbered = Export(pairs, pa.schema([('q', pa.string()), ('a', pa.string())]), lambda folder: {'note.txt': folder})\n"
        "odd = Export(pairs, pa.schema([('q', pa.string())]))\n"
        "def wrong(sample): return sample.nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(EXPORTS, "_found", {})
    out = tmp_path / "out"
    assert write_export(selection, "export_mod:pairs", out)["rows"] == 7
    assert pq.read_schema(out / "train.parquet").names == ["q", "a", "weight"]
    write_export(selection, "export_mod:numbered", out)
    assert (out / "note.txt").read_text() == str(out)
    with pytest.raises(PluginError, match=r"export 'export_mod:odd' returned .* for a row; its columns are q"):
        write_export(selection, "export_mod:odd", out)
    with pytest.raises(PluginError, match="export 'export_mod:wrong' failed: AttributeError"):
        write_export(selection, "export_mod:wrong", out)
    del sys.modules["export_mod"]


@pytest.mark.parametrize("name", ["trl", "trl_text", "messages"])
def test_trl_trains_on_it(selection, model_folder, tmp_path, name):
    trl = pytest.importorskip("trl", reason="trl is not installed; `pip install trl` beside this package lets this test run")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported(selection, name)
    out = selection / "exports" / name
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    turn, last = "{{ m['role'] }} {{ m['content'] }} <eos> ", "{% if add_generation_prompt %}assistant {% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{last}"
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trained"), max_steps=1, per_device_train_batch_size=4, max_length=64, report_to="none",
        use_cpu=True, bf16=False, dataset_num_proc=None,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder),
        args=settings,
        train_dataset=datasets.load_dataset(
            "parquet", data_files=str(out / "train.parquet"), split="train", cache_dir=str(tmp_path)
        ),
        processing_class=tokenizer,
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    assert any((one != other).any() for one, other in zip(before, trainer.model.parameters(), strict=True))
    if name != "messages":  # the loss is on the answer alone
        batch = next(iter(trainer.get_train_dataloader()))
        assert ((batch["labels"] != -100).sum(1) < batch["attention_mask"].sum(1)).all()
