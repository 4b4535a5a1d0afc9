from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import Config, LoraConfig, ModelConfig
from pharmacist_ray.data.schema import Row
from pharmacist_ray.doctor.cascade import cascade_lines, spared
from pharmacist_ray.doctor.examine import examine
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.load import add_lora, load_model
from pharmacist_ray.pipeline.proxied import proxy_config


def config_of(model: Path, **sections: Any) -> Config:
    data = {name: {"path": "x.jsonl"} for name in ("candidates", "validation", "harmful")}
    scoring = {"scorers": ["pharmacist", "random"], "proxy": {"layers": 1, **sections.pop("proxy", {})}}
    values = {"run_dir": "run", "model": {"path": str(model), "dtype": "float32"}, "data": data, "scoring": scoring, **sections}
    return parse_config(values, where="test")


def lines_of(config: Config, rows: int = 0, made: dict[str, Any] | None = None) -> list[str]:
    shapes = (shape_of(config.model), shape_of(config.model, 1))
    return list(cascade_lines(config, proxy_config(config, ["pharmacist"]), *shapes, rows, made or {}))


def test_the_proxys_share_is_that_of_the_weights_that_multiply(model_folder: Path) -> None:
    """Held against modules that were really loaded: an embedding table is looked up, and multiplies nothing."""
    sizes = []
    for layers in (1, None):
        model = add_lora(load_model(model_folder, layers=layers), LoraConfig(), seed=0)
        all_of_it = sum(parameter.numel() for parameter in model.parameters())
        sizes.append(all_of_it - model.get_input_embeddings().weight.numel())
    model = ModelConfig(path=str(model_folder))
    found = spared(shape_of(model), shape_of(model, 1), kept=0.4, sampled=0.1)
    assert found.proxy == pytest.approx(sizes[0] / sizes[1])
    assert found.least == pytest.approx(1 - 0.6 * 0.9)  # who is neither kept nor drawn
    assert found.cost(0.5) == pytest.approx(sizes[0] / sizes[1] + 0.5)
    assert found.pays_below == pytest.approx(1 - sizes[0] / sizes[1])


def test_it_says_what_is_spared_at_best_and_what_was(model_folder: Path) -> None:
    config = config_of(model_folder, selection={"ratio": 0.1}, proxy={"sample": 1000})
    share = spared(shape_of(config.model), shape_of(config.model, 1), 0.1, 0.1).proxy
    first, second, third = lines_of(config, 10_000, {"seen": 2500, "candidates": 10_000})
    count = sum(parameter.numel() for parameter in load_model(model_folder, layers=1).parameters())
    assert first.startswith(f"the proxy has {count:,} parameters in 1 layer: ")
    assert second == (
        f"its pass costs {share:.0%} of the model's, which sees at least 19% of the rows (what is kept, and the sample): at best scoring "
        f"costs {share + 0.19:.0%} of what it does without a proxy, and it pays as long as the model sees fewer than {1 - share:.0%}"
    )
    assert third == f"in the scores that are there it saw 25%, which costs {share + 0.25:.0%}"


def test_it_warns_of_a_cascade_that_spares_nothing_and_of_a_sample_that_is_too_small(model_folder: Path) -> None:
    assert lines_of(config_of(model_folder, selection={"ratio": 0.9}))[-1] == (
        "warning: this proxy spares nothing: keep fewer rows, take a smaller proxy, or leave scoring.proxy out"
    )
    small = config_of(model_folder, selection={"ratio": 0.1}, proxy={"sample": 300})
    assert lines_of(small)[-1] == (
        "warning: a sample of 300 rows has about 30 of the model's top rows, and it takes 49 to leave any row out at "
        "scoring.proxy.miss=0.02: raise scoring.proxy.sample"
    )
    counted = config_of(model_folder, selection={"ratio": None, "count": 50}, proxy={"sample": 211})
    assert len(lines_of(counted)) == 1  # of how many, nobody knows yet
    assert "sees at least 25% of the rows" in lines_of(counted, 1000)[1]


def test_a_model_has_no_more_layers_than_it_has(model_folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^the model has 2 layers, and its first 3 are asked for; lower scoring\.proxy\.layers$"
    ):
        shape_of(ModelConfig(path=str(model_folder)), 3)


def test_the_doctor_says_it_with_the_rest(
    model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(row.raw + "\n" for row in rows_of(3)))
    config = config_of(model_folder, selection={"ratio": 0.1})
    values = config.model_dump(mode="json") | {"run_dir": str(tmp_path / "run")}
    values["data"] = {name: {"path": str(data)} for name in ("candidates", "validation", "harmful")}
    values["alignment"]["replay"] = 0
    values["model"]["template"] = "plain"
    values["comparison"] = {"selections": ["all", "pharmacist"], "seeds": [0]}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    examine(tmp_path / "run.yaml")
    said = " ".join(capsys.readouterr().out.split())
    share = spared(shape_of(config.model), shape_of(config.model, 1), 0.1, 0).proxy
    assert (
        f"cascade the proxy has {sum(p.numel() for p in load_model(model_folder, layers=1).parameters()):,} parameters in 1 layer"
        in said
    )
    assert f"its pass costs {share:.0%} of the model's, which sees at least 10% of the rows (what is kept): at best" in said
    for folder in ("fit", "proxy/fit", "proxy/scores", "scores"):
        assert f"to be made ({tmp_path}/run/{folder})" in said
