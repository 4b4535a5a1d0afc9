"""What doctor says of the stages that train nothing, against what PyTorch really holds there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import Config, LoraConfig
from pharmacist_ray.curation.selector import Point, attacked_direction
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.doctor.estimate import RESERVE, Item, total
from pharmacist_ray.doctor.passes import answer_memory, fit_memory, pass_memory, score_memory
from pharmacist_ray.doctor.passes import pass_setup as setup_of_pass
from pharmacist_ray.doctor.shape import Shape, shape_of
from pharmacist_ray.models.folded import folded
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.modes import enable_checkpointing, stand_still
from pharmacist_ray.runtime.ranks import Ranks

LENGTH, ROWS = 64, 8
SHAPES = {
    "wide": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 100},
    "grouped": {
        "hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 500,
    },
    "words": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 6000},
}  # fmt: skip


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive and were made inside, and keeps their peak."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.held = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (place := (storage := tensor.untyped_storage())._cdata) not in self.held:
                self.held[place] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, place)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, place: int) -> None:
        self.now -= self.held.pop(place)


def config_of(folder: Path, dtype: str, checkpointing: bool, **more: Any) -> Config:
    source = {"path": "rows.jsonl"}
    sets = ("candidates", "validation", "harmful", "benign")
    values = {
        "run_dir": "run",
        "model": {"path": str(folder), "dtype": dtype, "max_length": LENGTH},
        "data": dict.fromkeys(sets, source),
        "selector": {
            "tokens_per_batch": LENGTH * ROWS,
            "warmup": {"steps": 20, "checkpointing": checkpointing},
            "reference": None,
        },
        "scoring": {"tokens_per_batch": LENGTH * ROWS, "checkpointing": checkpointing, "scorers": ["pharmacist"]},
        **more,
    }
    return parse_config(values, where="test")


@pytest.fixture(params=SHAPES)
def made(request: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Any, Shape, Config, Any]]:
    settings = LlamaConfig(**SHAPES[request.param], tie_word_embeddings=False)
    settings.save_pretrained(tmp_path)

    def make(dtype: str, checkpointing: bool) -> tuple[Any, Shape, Config, Any]:
        model = add_lora(LlamaForCausalLM(settings).to(getattr(torch, dtype)), LoraConfig(), seed=0)
        if checkpointing:
            enable_checkpointing(model)
        stand_still(model)
        config = config_of(tmp_path, dtype, checkpointing)
        samples = [Rendered([5] * (LENGTH - 4 * (row == 0)), 1) for row in range(ROWS)]  # one is padded
        return model, shape_of(config.model), config, (samples, Renderer(tokenizer, "plain").collate)

    return make


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_directions_and_of_scoring_is_what_is_said(dtype: str, checkpointing: bool, made: Any) -> None:
    model, shape, config, (samples, collate) = made(dtype, checkpointing)
    point = Point.at(model, collate, LENGTH * ROWS, Ranks(0, 1, torch.device("cpu")))
    alive = Alive(model)
    with alive:
        plain = attacked_direction(point, validation=samples, harmful=samples, inner=None, inner_lr=0.0, intensity=0.0)
        attacked_direction(point, validation=samples, harmful=samples, inner=None, inner_lr=0.0, intensity=0.1)
    assert total(fit_memory(shape, config)) == pytest.approx(size(model.parameters()) + alive.peak, rel=0.15)

    directions = {name: torch.stack([v, v]) for name, v in zip(point.parameters, plain, strict=True)}
    batch = collate(samples)
    alive = Alive(model)
    with alive, folded(model):
        influence(model, batch, directions)
    held = size(model.parameters()) + size(point.parameters.values()) + size(directions.values())
    assert total(score_memory(shape, config)) == pytest.approx(held + alive.peak, rel=0.15)


@pytest.mark.parametrize("what", ["directions", "scoring"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autograd_keeps_what_is_said(what: str, checkpointing: bool, made: Any) -> None:
    model, shape, config, (samples, collate) = made("bfloat16", checkpointing)
    batch, kept = collate(samples), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    directions = {n: torch.ones(1, *p.shape) for n, p in model.named_parameters() if p.requires_grad}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = per_sample_nll(model, batch) if what == "directions" else influence(model, batch, directions)
    assert loss is not None
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    said = sum(item.amount for item in pass_memory(shape, setup_of_pass(config, LENGTH * ROWS, checkpointing))[:2])
    log_softmax = ROWS * (LENGTH - 1) * shape.vocabulary * 4
    assert said + log_softmax == pytest.approx(measured, rel=0.15)


def by_name(items: list[Item]) -> dict[str, float]:
    return {item.what: item.amount for item in items}


def test_eight_billion_by_hand(tmp_path: Path) -> None:
    """Llama-3-8B in bfloat16 keeps 9.4 MB a token, so that a batch of 4096 without checkpointing takes an 80 GB GPU nearly whole."""
    LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    evaluation = {
        "harmful_prompts": {"path": "rows.jsonl"}, "benign_prompts": {"path": "rows.jsonl"},
        "task": {"source": {"path": "rows.jsonl"}}, "batch_size": 10, "max_new_tokens": 100,
    }  # fmt: skip
    values = {"evaluation": evaluation, "resources": {"gpus_per_worker": 1}}
    config = config_of(tmp_path, "bfloat16", False, scoring={"scorers": ["pharmacist"]}, selector={}, **values)
    shape = shape_of(config.model)
    adapter = 4 * shape.adapter
    score = by_name(score_memory(shape, config))
    assert score["activations"] / 4096 == pytest.approx(9.4e6, rel=0.02)
    assert score["logits"] == 4096 * 128256 * 12
    assert (score["directions"], score["adapters of the selector"], score["adapter"]) == (2 * adapter, adapter, adapter)
    fit = by_name(fit_memory(shape, config))
    assert fit["activations"] == score["activations"]
    assert fit["gradients and back-ups"] == 5 * adapter
    saved = config.model_copy(update={"scoring": config.scoring.model_copy(update={"checkpointing": True})})
    assert by_name(score_memory(shape, saved))["inputs of recomputed layers"] == 32 * 4096 * 4096 * 2
    assert total(score_memory(shape, saved)) < total(score_memory(shape, config)) / 2
    answers = by_name(answer_memory(shape, config))
    assert answers["keys and values"] == 32 * 10 * (LENGTH + 100) * 2 * 8 * 128 * 2
    assert answers["CUDA, NCCL, fragmentation"] == RESERVE


def test_scorers_that_need_no_gradient_hold_no_activations_and_those_without_a_model_nothing(tmp_path: Path) -> None:
    LlamaConfig(**SHAPES["wide"]).save_pretrained(tmp_path)
    shapes = {}
    for scorers in (["high_loss"], ["keyword", "random"]):
        chosen = {"selection": {"scorer": scorers[0]}, "comparison": {"selections": scorers[:1]}}
        config = config_of(tmp_path, "float32", False, scoring={"scorers": scorers}, **chosen)
        shapes[scorers[0]] = by_name(score_memory(shape_of(config.model), config))
    assert {"activations", "directions"}.isdisjoint(shapes["high_loss"])
    assert "base weights" in shapes["high_loss"]
    assert shapes["keyword"] == {}
