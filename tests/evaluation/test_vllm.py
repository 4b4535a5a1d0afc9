"""vLLM by Ray Data's own processor, with a stand-in for the engine alone: no vLLM runs here, and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pharmacist_ray.config.evaluation import EngineConfig, VllmConfig
from pharmacist_ray.config.schema import EvaluationConfig, LoraConfig, ResourcesConfig
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.evaluation import vllm
from pharmacist_ray.evaluation.answers import answer_all
from pharmacist_ray.evaluation.engine import check_engine
from pharmacist_ray.models.load import add_lora, load_model, save_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import read_table

SOURCE = {"path": "x"}
REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).parent / "stand_in"


def settings(**more: Any) -> EvaluationConfig:
    return EvaluationConfig(  # type: ignore[arg-type]
        harmful_prompts=SOURCE, benign_prompts=SOURCE, task={"source": SOURCE}, max_new_tokens=5, **more
    )


@pytest.mark.usefixtures("ray_local")
def test_it_answers_as_transformers_does_for_the_base_and_for_adapters_on_it(
    tmp_path: Path, model_folder: Path, rows_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = []
    for number in range(2):
        model = add_lora(load_model(model_folder), LoraConfig(r=6), seed=number)
        generator = torch.Generator().manual_seed(number)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        adapters.append(str(tmp_path / f"adapter-{number}"))
        save_adapter(model, adapters[-1])
    base = ModelRef(str(model_folder), template="plain")
    models = {"base": base, "aligned": base.plus(adapters[0]), "attacked": base.plus(adapters[0]).plus(adapters[1])}
    for seed, name in enumerate(("harmful", "benign")):
        write_rows(rows_of(5 + seed, seed=seed), tmp_path / name / "part-00000.parquet")
    sets = {name: tmp_path / name for name in ("harmful", "benign")}
    ask = vllm.ask
    environment = {"env_vars": {"PYTHONPATH": f"{STAND_IN}:{REPOSITORY}"}}
    monkeypatch.setattr(vllm, "ask", lambda *given, **more: ask(*given, **more, runtime_env=environment))

    def answered(folder: str, engine: Any, resources: ResourcesConfig) -> dict[str, Any]:
        where = {tmp_path / folder / name: model for name, model in models.items()}
        answer_all(where, sets, settings=settings(engine=engine), resources=resources, served=tmp_path / "served")
        files = sorted((tmp_path / folder).rglob("*.*"))
        assert {file.suffix for file in files} == {".parquet"}  # no texts are left that were judged
        return {str(file.relative_to(tmp_path / folder)): read_table(file) for file in files}

    want = answered("transformers", None, ResourcesConfig(actors=0))
    got = answered("vllm", {"kind": "vllm"}, ResourcesConfig(actors=1, cpus_per_worker=0.5))
    assert got.keys() == want.keys()
    assert len(want) == 6
    for name, table in want.items():
        assert got[name].equals(table), name
    assert len({tuple(want[f"{name}/harmful-000000.parquet"]["answer"].to_pylist()) for name in models}) == 3

    monkeypatch.setattr(vllm, "_given", lambda *_: pytest.fail("what has been asked is not asked again"))
    vllm.write_text('["said before"]', vllm.texts_file(str(tmp_path / "there")))
    question = (str(tmp_path / "there"), base, lambda renderer: [[1]])
    vllm.ask([question], engine=VllmConfig(kind="vllm"), max_new_tokens=2, resources=ResourcesConfig(), adapters=tmp_path)


def test_texts_lie_beside_their_answers_in_a_bucket_too() -> None:
    uri = "s3://bucket/answers/base/harmful-000000.parquet?region=us-east-1&scheme=http"
    assert str(vllm.texts_file(uri)) == uri.replace(".parquet?", ".parquet.texts.json?")


def test_which_engine_is_meant_is_told_by_its_kind() -> None:
    assert settings(engine={"kind": "vllm", "tensor_parallel": 4}).engine == VllmConfig(kind="vllm", tensor_parallel=4)
    endpoint = settings(engine={"url": "http://127.0.0.1:8000/v1", "model": "base"}).engine
    assert isinstance(endpoint, EngineConfig)
    with pytest.raises(ValidationError, match="tensor_paralel"):
        settings(engine={"kind": "vllm", "tensor_paralel": 4})
    with pytest.raises(ValidationError, match="'endpoint', 'vllm'"):
        settings(engine={"kind": "sglang"})


def test_where_it_is_not_installed_it_is_said_before_it_is_asked(tmp_path: Path) -> None:
    config = VllmConfig(kind="vllm")
    check_engine(config, [("alignment", "")], tmp_path, ready=False)
    with pytest.raises(
        ConfigError, match=r"^evaluation.engine: vLLM is not installed; pip install 'pharmacist-ray\[vllm\]' on every node"
    ):
        check_engine(config, [("alignment", "")], tmp_path, ready=True)
    with pytest.raises(ConfigError, match="has all its weights trained; leave the engine out"):
        check_engine(config, [("alignment", "has all its weights trained")], tmp_path, ready=False)
