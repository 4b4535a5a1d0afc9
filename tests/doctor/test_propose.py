"""What `pharmacist init --from` sees in data and model, and that what it writes is a configuration that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.template import template
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.doctor import propose as module
from pharmacist_ray.doctor.propose import look, propose
from pharmacist_ray.errors import ConfigError, DataError, ModelError


def written(path: Path, records: list[dict[str, Any]], *more: str) -> str:
    path.write_text("".join(f"{line}\n" for line in (*map(json.dumps, records), *more)))
    return str(path)


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": "so"}]


@pytest.mark.parametrize(
    ("record", "how", "layout"),
    [
        (lambda n: {"prompt": f"ask {n}", "response": "so"}, {}, "layout prompt_response"),
        (lambda n: {"instruction": f"ask {n}", "output": "so"}, {}, "layout instruction"),
        (lambda n: {"messages": turns(n)}, {}, "layout messages"),
        (lambda n: {"conversations": [{"from": "human", "value": f"ask {n}"}, {"from": "gpt", "value": "so"}]}, {}, "layout sharegpt"),
        (lambda n: {"prompt": f"ask {n}", "chosen": "so", "rejected": "no"}, {}, "layout preference"),
        (
            lambda n: {"prompt": f"ask {n}", "response": "so", "messages": turns(n)},
            {"layout": "prompt_response"}, "layout prompt_response",
        ),
        (
            lambda n: {"question": f"ask {n}", "answer": "so", "id": n},
            {"columns": {"prompt": "question", "response": "answer"}}, "columns prompt=question, response=answer",
        ),
        (
            lambda n: {"text": f"ask {n}", "completion": "so", "topic": f"kind {n % 3}"},
            {"columns": {"prompt": "text", "response": "completion"}, "category_column": "topic"},
            "columns prompt=text, response=completion",
        ),
        (lambda n: {"prompt": f"ask {n}", "response": "so", "topic": f"own {n}"}, {}, "layout prompt_response"),
        (lambda n: {"prompt": f"ask {n}", "response": "so", "category": "a", "topic": f"kind {n % 3}"}, {}, "layout prompt_response"),
    ],
)  # fmt: skip
def test_the_layout_the_columns_and_the_category_are_found(record, how, layout, tmp_path):
    seen = look(written(tmp_path / "mine.jsonl", [record(number) for number in range(12)]))
    assert (seen.read, len(seen.rows), seen.how, seen.layout) == (12, 12, how, layout)
    assert seen.rows[3].prompt == "ask 3"


def test_what_is_broken_is_counted_and_the_beginning_alone_is_read(tmp_path, monkeypatch):
    records = [{"prompt": f"ask {number}", "response": "so" if number else ""} for number in range(30)]
    seen = look(written(tmp_path / "mine.jsonl", records, '{"prompt": "half', "[1]"))
    assert (seen.read, len(seen.rows), dict(seen.broken)) == (32, 29, {"empty_field": 1, "bad_json": 2})
    monkeypatch.setattr(module, "READ", 10)
    assert (look(str(tmp_path / "mine.jsonl")).read) == 10


def test_a_folder_of_a_hub_is_read_with_its_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("train", "extra"):
        written(tmp_path / "set" / f"{name}.jsonl", [{"prompt": f"{name} {number}", "response": "so"} for number in range(3)])
    parts = [{"split": name, "path": f"{name}.jsonl"} for name in ("train", "extra")]
    (tmp_path / "set" / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'default', 'data_files': parts}])}\n---\n"
    )
    seen = look(f"hf:{tmp_path / 'set'}", "extra")
    assert [row.prompt for row in seen.rows] == ["extra 0", "extra 1", "extra 2"]
    assert seen.how == {"split": "extra"}


def test_what_nobody_can_read_is_said(tmp_path):
    with pytest.raises(
        DataError, match=r"mine.jsonl: no row is usable \(unknown_layout 3\); its columns are a, b; write a file by "
    ):
        look(written(tmp_path / "mine.jsonl", [{"a": "x", "b": "y"}] * 3))
    with pytest.raises(DataError, match=r"empty.jsonl has no rows that can be read \(bad_json 1\)"):
        look(written(tmp_path / "empty.jsonl", [], "nothing"))
    with pytest.raises(DataError, match="no such file"):
        look(str(tmp_path / "none.jsonl"))


def test_the_length_is_what_the_rows_take_in_the_models_tokens(tmp_path, model_folder, tokenizer, rows_of):
    rows = rows_of(50, seed=1)
    data = written(tmp_path / "mine.jsonl", [json.loads(row.raw) for row in rows])
    values, said = propose(data, str(model_folder))
    renderer = Renderer(tokenizer, max_length=10_000)
    lengths = sorted(len(renderer.render(row).ids) for row in rows)
    chosen = values["model"]["max_length"]
    assert chosen == max(64, next(2**k for k in range(20) if 2**k >= lengths[49]))
    assert f"model.max_length: {chosen}; half of the rows have up to {lengths[25]} tokens" in "\n".join(said)
    assert "model.template: Alpaca's frame" in "\n".join(said)
    long = {"prompt": "w1 " * 900, "response": "w2 w3"}
    values, said = propose(written(tmp_path / "long.jsonl", [long] * 3), str(model_folder))
    limit = json.loads((model_folder / "config.json").read_text())["max_position_embeddings"]
    assert values["model"]["max_length"] == min(limit, 1024)


def test_what_is_written_is_a_configuration_with_what_was_seen(tmp_path, model_folder):
    records = [{"question": f"ask {number}", "answer": "so", "topic": f"kind {number % 3}"} for number in range(12)]
    data = written(tmp_path / "mine.jsonl", records)
    mine = written(tmp_path / "trusted.jsonl", [])
    values, said = propose(data, str(model_folder), validation=mine)
    (tmp_path / "run.yaml").write_text(template(values))
    config = load_config(tmp_path / "run.yaml")
    assert config == parse_config(values, where="test")
    assert config.data.candidates.columns == {"prompt": "question", "response": "answer"}
    assert config.data.candidates.category_column == "topic"
    assert (config.data.validation.path, config.data.harmful.name) == ([mine], "beavertails-unsafe")
    shown = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert shown["data"]["harmful"] == {"name": "beavertails-unsafe"}
    assert shown["data"]["candidates"] == {
        "path": data, "columns": {"prompt": "question", "response": "answer"}, "category_column": "topic"
    }  # fmt: skip
    assert said[:2] == [
        "data.candidates: 12 of its 12 rows are usable (columns prompt=question, response=answer)",
        "data.candidates: 3 categories in topic",
    ]
    assert said[-1] == (
        "data.benign: dolly, which is databricks/databricks-dolly-15k on the hub; its licence is CC-BY-SA-3.0, and yours to check"
    )


def test_every_gpu_scores(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    values, said = propose(written(tmp_path / "mine.jsonl", [{"prompt": "a", "response": "b"}]))
    assert values["resources"] == {"workers": 1, "actors": 4, "gpus_per_worker": 1}
    assert parse_config(values, where="test").resources.gpus_per_worker == 1
    assert said[-1].startswith("resources: 4 actors that score, each with a GPU, and 1 training worker")


def test_a_model_that_is_none_and_a_set_of_another_kind_are_said(tmp_path):
    data = written(tmp_path / "mine.jsonl", [{"prompt": "a", "response": "b"}])
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="model"):
        propose(data, str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="harmful takes harmful rows and 'dolly' has ordinary ones"):
        propose(data, harmful="dolly")
