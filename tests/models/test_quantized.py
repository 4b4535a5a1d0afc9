"""A frozen base in few bits, by bitsandbytes on a CPU: adapters over it are what they are over the base as it was loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pharmacist_ray.config.load import load_config
from pharmacist_ray.config.schema import LoraConfig, ModelConfig, TrainConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.doctor.estimate import Setup
from pharmacist_ray.doctor.passes import base_memory
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.influence import influence, loop_influence
from pharmacist_ray.models.load import add_lora, load_adapter, load_model, save_adapter
from pharmacist_ray.models.quantized import check_quantization, is_quantized
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.task import TrainTask

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

BITS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, wide enough for blocks of 64 weights."""
    out = tmp_path_factory.mktemp("wide")
    tiny(hidden_size=64, intermediate_size=128).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the model, of different ranks."""
    out = []
    for number, rank in enumerate((2, 4)):
        model = add_lora(load_model(folder), LoraConfig(r=rank), seed=number)
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        out.append(tmp_path_factory.mktemp("adapter"))
        save_adapter(model, out[-1])
    return out


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("bits", BITS)
def test_layers_are_in_few_bits_and_the_rest_is_not(folder: Path, batch_of: Any, bits: str) -> None:
    whole, few = load_model(folder), load_model(folder, quantization=bits)
    assert is_quantized(few)
    assert is_quantized(add_lora(load_model(folder, quantization=bits), LoraConfig(r=2), seed=0))
    assert not is_quantized(whole)
    kinds = {name: parameter.dtype for name, parameter in few.named_parameters()}
    assert {kind for name, kind in kinds.items() if "proj" in name} == {torch.int8 if bits == "8bit" else torch.uint8}
    assert {kind for name, kind in kinds.items() if "proj" not in name} == {torch.float32}
    batch = batch_of(3)
    far = (logits(few, batch) - logits(whole, batch)).norm() / logits(whole, batch).norm()
    assert 1e-4 < far < (0.05 if bits == "8bit" else 0.4)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_merged_elsewhere_is_added_to_what_layers_put_out(
    folder: Path, adapters: list[Path], batch_of: Any, bits: str
) -> None:
    batch = batch_of(3)
    on_top = PeftModel.from_pretrained(load_model(folder, quantization=bits), adapters[0], adapter_name="first")
    on_top.load_adapter(adapters[1], adapter_name="second")
    on_top.base_model.set_adapter(["first", "second"])
    want = logits(on_top, batch)
    model = ModelRef(str(folder), tuple(map(str, adapters)), quantization=bits).load()
    assert not isinstance(model, PeftModel)
    torch.testing.assert_close(logits(model, batch), want, rtol=1e-4, atol=1e-4)
    third = ModelRef(str(folder), tuple(map(str, adapters)), quantization=bits).load(adapter=adapters[0])
    assert (logits(third, batch) - want).norm() / want.norm() > 0.01
    with third.disable_adapter():  # what is merged is the base
        torch.testing.assert_close(logits(third, batch), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_influence_over_it_is_that_of_a_backward_pass_a_row(folder: Path, adapters: list[Path], batch_of: Any, bits: str) -> None:
    model, batch = (
        ModelRef(str(folder), (str(adapters[0]),), quantization=bits).load(adapter=adapters[1]),
        batch_of(4, padded=False),
    )
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(1, *parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert all("lora_" in name for name in directions)
    logits(model, batch)  # a pass without gradients must not change those after it
    found, want = influence(model, batch, directions), loop_influence(model, batch, directions)
    torch.testing.assert_close(
        found.dots, want.dots, rtol=0.05 if bits == "8bit" else 1e-3, atol=0.02 * float(want.dots.abs().max())
    )


@pytest.mark.parametrize("bits", BITS)
def test_a_training_over_it_leaves_an_adapter_that_every_stage_reads(
    folder: Path, adapters: list[Path], rows_of: Callable[..., list[Row]], tmp_path: Path, bits: str
) -> None:
    write_rows(rows_of(16, seed=0), tmp_path / "rows.parquet")
    model = ModelRef(str(folder), (str(adapters[0]),), quantization=bits, template="plain", max_length=32)
    train = TrainConfig(steps=12, batch_size=8, lr=1e-2)
    task = TrainTask(
        name="few bits", out=str(tmp_path / "out"), model=model, rows=(str(tmp_path / "rows.parquet"),), train=train, seed=0
    )
    result = run_task(task)
    history = [json.loads(line)["loss"] for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert history[-1] < 0.8 * history[0]
    assert result["parameters"] > 0
    trained = model.plus(str(tmp_path / "out" / "adapter"))
    renderer = trained.renderer()
    answers = generate(trained.load(), renderer.tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=4, batch_size=2)
    assert len(answers) == 2


@pytest.mark.parametrize("bits", BITS)
def test_the_doctor_counts_what_it_takes(folder: Path, bits: str) -> None:
    model = load_model(folder, quantization=bits)
    taken = 0.0
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                taken += parameter.numel() * parameter.element_size()
                state = getattr(parameter, "quant_state", None)
                taken += state.absmax.numel() * state.absmax.element_size() if state is not None else 0
    shape = shape_of(ModelConfig(path=str(folder)))
    reckoned = sum(item.amount for item in base_memory(shape, Setup(quantization=bits)))
    assert reckoned == pytest.approx(taken, rel=0.02)
    whole = sum(item.amount for item in base_memory(shape, Setup()))
    assert whole == sum(parameter.numel() * 4 for parameter in load_model(folder).parameters())


def test_what_cannot_be_done_over_it_is_told_before_work(
    placed_example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(placed_example))

    def check(*overrides: str) -> None:
        check_quantization(load_config(tmp_path / "config.yaml", ["model.quantization=4bit", *overrides]))

    check()
    with pytest.raises(ConfigError, match=r"^alignment.train trains all weights, and those of model.quantization are frozen"):
        check("alignment.train.weights=full")
    with pytest.raises(
        ConfigError, match=r"^selector.warmup has zero_stage=3, which cannot shard the weights of model.quantization"
    ):
        check("selector.warmup.zero_stage=3")
    with pytest.raises(ConfigError, match=r"^model.quantization cannot be had with a model of its own code"):
        check("model.trust_remote_code=true")
    monkeypatch.setattr("pharmacist_ray.models.quantized.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^model.quantization needs bitsandbytes: `pip install 'pharmacist-ray\[quantization\]'`"
    ):
        check()
    check_quantization(load_config(tmp_path / "config.yaml", []))


def test_a_wrong_adapter_is_still_one_line(folder: Path, model_folder: Path, tmp_path: Path) -> None:
    save_adapter(add_lora(load_model(model_folder), LoraConfig(r=2), seed=0), tmp_path / "other")
    with pytest.raises(Exception, match=r"cannot load|does not fit this model"):
        load_adapter(load_model(folder, quantization="4bit"), tmp_path / "other", merge=True)
