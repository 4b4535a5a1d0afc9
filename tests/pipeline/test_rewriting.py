"""Safe rows rewritten by a model behind a real HTTP server, on their way into a fine-tune."""

from __future__ import annotations

import json
import re

import pytest

from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.config.load import load_config
from pharmacist_ray.data.rewriting import taken
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.rewriting import rewrite
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check
from tests.endpoint_server import completion

ASKED = [
    ("how is a lantern broken", ["sort this : the ferry", "sort this : the post"]),
    ("where does the key lie", ["sort this : bread"]),
]


def rewritten(number, body):
    question = body["messages"][1]["content"].splitlines()[-1]
    if "key" in question:
        return completion("I cannot write that.")
    return completion(f"<think>easy</think><question>sort this : {question}</question>")


def test_questions_are_asked_once_and_what_is_no_question_is_left(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REWRITER_KEY", "sk-of-the-test")
    server.answers = rewritten
    endpoint = EndpointConfig(url=server.url, model="writer", key_variable="REWRITER_KEY", parameters={"seed": 3})
    for _ in range(2):
        assert rewrite(endpoint, ASKED, tmp_path / "rewrites") == ["sort this : how is a lantern broken", None]
    assert len(server.asked) == 2
    assert {(one["model"], one["temperature"], one["seed"]) for one in server.asked} == {("writer", 0, 3)}
    assert {one["auth"] for one in server.headers} == {"Bearer sk-of-the-test"}
    assert capsys.readouterr().out.split("\n")[0] == "  1 of 2 questions rewritten by writer"
    kept = "".join(file.read_text() for file in (tmp_path / "rewrites").iterdir())
    assert "sk-of-the-test" not in kept
    assert taken(re.sub("<think>.*</think>", "", next(iter(json.loads(kept).values()))), *ASKED[0]) or "cannot" in kept


def test_where_it_is_and_how_it_is_asked_make_no_other_fine_tune_and_what_is_missing_is_told_before_work(
    placed_example, tmp_path, monkeypatch
):
    monkeypatch.delenv("REWRITER_KEY", raising=False)
    placed_example |= {"comparison": {**placed_example["comparison"], "defences": ["sft/mimic"], "seeds": [0]}}
    (tmp_path / "config.yaml").write_text(json.dumps(placed_example))

    def run(**rewriter):
        return Run(load_config(tmp_path / "config.yaml", [f"finetune.parameters.mix={json.dumps({'rewriter': rewriter})}"]))

    def made(run):
        return run.trained(run.attacks_on(run.variants[0])[0]).fingerprint

    found = [
        made(run(url="http://127.0.0.1:1/v1", model="m", key_variable="REWRITER_KEY")),
        made(run(url="http://10.0.0.1/v1", model="m", concurrency=2, patience_s=1.0)),
        made(run(url="http://127.0.0.1:1/v1", model="n")),
        made(run(url="http://127.0.0.1:1/v1", model="m", parameters={"seed": 3})),
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    with pytest.raises(ConfigError, match=r"^finetune.parameters.mix.rewriter needs url \(up to and with /v1\) and model"):
        check(run(url="http://127.0.0.1:1/v1"))
    with pytest.raises(ConfigError, match=r"^finetune.parameters.mix.rewriter: its key_variable REWRITER_KEY is not set"):
        rewrite(EndpointConfig(url="http://127.0.0.1:1/v1", model="m", key_variable="REWRITER_KEY"), ASKED, tmp_path)
