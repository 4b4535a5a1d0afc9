"""Answers by an endpoint: a real HTTP server that runs a tiny model and takes adapters by request, as vLLM does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pharmacist_ray.config.evaluation import EngineConfig
from pharmacist_ray.config.load import load_config
from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.evaluation.engine import EndpointEngine
from pharmacist_ray.models.adapters import factors_of, stacked
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.load import add_lora, load_adapter, load_model, save_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check
from tests.endpoint_server import Server

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12]]


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters on the tiny model, of different ranks and modules."""
    out = []
    for number, settings in enumerate((LoraConfig(r=2), LoraConfig(r=3, alpha=5, targets=["q_proj", "up_proj"]))):
        model = add_lora(load_model(model_folder), settings, seed=number)
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        out.append(str(tmp_path_factory.mktemp("adapter")))
        save_adapter(model, out[-1])
    return out


def test_several_adapters_as_one_are_what_they_are_merged_one_after_the_other(
    model_folder: Path, adapters: list[str], batch_of: Any, tmp_path: Path
) -> None:
    assert stacked(adapters, "base", tmp_path / "one") == 5
    batch = batch_of(3)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    want = logits(ModelRef(str(model_folder), tuple(adapters)).load())
    torch.testing.assert_close(logits(load_adapter(load_model(model_folder), tmp_path / "one")), want, rtol=1e-4, atol=1e-4)
    assert (logits(load_model(model_folder)) - want).abs().max() > 0.1
    assert {b.shape[1] for b, _ in factors_of(str(tmp_path / "one")).values()} == {5}
    assert stacked(adapters[:1], "base", tmp_path / "alone") == 2
    torch.testing.assert_close(
        logits(load_adapter(load_model(model_folder), tmp_path / "alone")),
        logits(ModelRef(str(model_folder), (adapters[0],)).load()),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.fixture
def serving(server: Server, model_folder: Path, tokenizer: Any) -> Server:
    """The server, running the tiny model: completions of token ids, greedily, by whatever adapter was loaded under a name."""
    models: dict[str, Any] = {"base": load_model(model_folder)}

    def reply(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        path = server.headers[number]["path"]
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in models:
                return 400, {}, f"The lora adapter {body['lora_name']} has already been loaded.".encode()
            models[body["lora_name"]] = PeftModel.from_pretrained(load_model(model_folder), body["lora_path"])
            return 200, {}, b"Success: LoRA adapter added successfully."
        if path == "/v1/unload_lora_adapter":
            if models.pop(body["lora_name"], None) is None:
                return 404, {}, b"The lora adapter cannot be found."
            return 200, {}, b"Success: LoRA adapter removed successfully."
        if body["model"] not in models:
            return 404, {}, f"The model {body['model']} does not exist.".encode()
        [text] = generate(
            models[body["model"]], tokenizer, [body["prompt"]], max_new_tokens=body["max_tokens"], batch_size=1,
            end_id=body["stop_token_ids"][0],
        )  # fmt: skip
        return 200, {}, json.dumps({"choices": [{"text": text, "finish_reason": "stop"}]}).encode()

    server.answers = reply
    return server


def test_it_answers_as_transformers_does_and_loads_each_model_once(
    serving: Server, model_folder: Path, adapters: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    engine = EndpointEngine(EngineConfig(url=serving.url, model="base"))
    refs = [ModelRef(str(model_folder), tuple(adapters[:count])) for count in (0, 1, 2)]
    found = []
    for ref in refs:
        want = generate(ref.load(), tokenizer, PROMPTS, max_new_tokens=6, batch_size=3, end_id=2)
        for _ in range(2):
            answers = engine.answers(ref, PROMPTS, max_new_tokens=6, end_id=2, files=tmp_path)
            assert answers == want
        found.append(want)
    assert len({tuple(one) for one in found}) == 3
    told = [one["path"] for one in serving.headers]
    assert told.count("/v1/load_lora_adapter") == 2
    assert told.count("/v1/unload_lora_adapter") == 1  # of the first before the second
    assert told.count("/v1/completions") == 3 * 2 * 3
    assert {(one["temperature"], tuple(one["stop_token_ids"])) for one in serving.asked if "prompt" in one} == {(0, (2,))}
    again = EndpointEngine(
        EngineConfig(url=serving.url, model="base")
    )  # another actor's, to which the endpoint says that it is there
    assert again.answers(refs[2], PROMPTS, max_new_tokens=6, end_id=2, files=tmp_path) == found[2]


def test_an_endpoint_that_takes_no_adapters_says_how_it_would(
    server: Server, model_folder: Path, adapters: list[str], tmp_path: Path
) -> None:
    server.answers = lambda number, body: (404, {}, b'{"detail":"Not Found"}')
    engine = EndpointEngine(EngineConfig(url=server.url, model="base", patience_s=2.0))
    message = (
        r"^evaluation.engine at http://127\S+ refuses .*Not Found.*; it has to take adapters by request of rank 2: vllm serve"
    )
    with pytest.raises(ConfigError, match=message):
        engine.answers(ModelRef(str(model_folder), (adapters[0],)), PROMPTS, max_new_tokens=2, end_id=2, files=tmp_path)


def test_what_it_cannot_serve_is_told_before_work_and_it_changes_no_fingerprint(
    placed_example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    (tmp_path / "config.yaml").write_text(json.dumps(placed_example))

    def run(*overrides: str) -> Run:
        return Run(load_config(tmp_path / "config.yaml", list(overrides)))

    engine = "evaluation.engine={url: 'http://127.0.0.1:1/v1', model: base, key_variable: ENGINE_KEY}"
    check(run(engine))  # the key is needed when it is asked
    assert run(engine).evaluated.fingerprint == run().evaluated.fingerprint
    with pytest.raises(
        ConfigError, match=r"^evaluation.engine serves one base with adapters, and alignment has all its weights trained"
    ):
        check(run(engine, "alignment.train.weights=full"))
    with pytest.raises(ConfigError, match=r"^evaluation.engine needs url \(up to and with /v1\) and model"):
        check(run("evaluation.engine={url: 'http://127.0.0.1:1/v1'}"))


@pytest.mark.usefixtures("ray_local")
def test_a_run_asks_it_and_gets_the_table_that_transformers_gives(
    serving: Server, model_folder: Path, rows_of: Callable[..., Any], tmp_path: Path
) -> None:
    from pharmacist_ray.pipeline.session import run_stages
    from pharmacist_ray.storage import json_of
    from tests.search.test_search import write_config

    file = write_config(tmp_path, model_folder, rows_of)
    small = [
        "comparison.seeds=[0]",
        "comparison.selections=[random]",
        "scoring.scorers=[random]",
        "scoring.random_draws=1",
        "selection.scorer=random",
    ]
    stages = ("ingest", "score", "select", "align", "attack", "evaluate")
    tables = []
    for engine in ([], [f"evaluation.engine={{url: '{serving.url}', model: base}}"]):
        folder = tmp_path / ("served" if engine else "here")
        run = run_stages(stages, load_config(file, [*small, *engine, f"run_dir={folder}"]))
        tables.append(json_of(run.evaluated.require() / "table.json"))
    here, there = tables
    assert [row["metrics"] for row in there] == [row["metrics"] for row in here]
    assert sum("prompt" in one for one in serving.asked) > 20
    assert list((tmp_path / "served" / "served").iterdir())
