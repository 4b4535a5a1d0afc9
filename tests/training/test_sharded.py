"""A frozen model spread over two workers: the same numbers, and nobody holds it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.curation.selector import Point, attacked_direction
from pharmacist_ray.data.render import Rendered
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora, load_model, load_tokenizer, save_adapter
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.sharded import load_sharded
from tests.two_workers import TwoWorkers

Found = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return two adapters, one to merge and one to put on top."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in ("merged", "top"):
        model = add_lora(load_model(model_folder), LoraConfig(r=2), seed=0)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        found.append(str(tmp_path_factory.mktemp("adapters") / name))
        save_adapter(model, found[-1])
    return found[0], found[1]


def rows(count: int) -> list[Rendered]:
    """Return rows of many lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = [4 + (7 * place) % 19 for place in range(count)]
    return [Rendered(torch.randint(4, 40, (length,), generator=generator).tolist(), 2) for length in lengths]


def numbers(payload: tuple[ModelRef, str, bool, bool], ranks: Ranks) -> Found:
    """Everything that curation takes from a model; of one that is spread, also what this worker holds of it between passes."""
    ref, adapter, spread, checkpointing = payload
    renderer = ref.renderer()
    model: Any = load_sharded(ref, ranks, adapter=adapter) if spread else ref.load(adapter=adapter)
    if checkpointing:
        enable_checkpointing(model)
    point = Point.at(model, renderer.collate, 60, ranks)
    samples = rows(9)  # of which two workers have not as many batches each
    generator = torch.Generator().manual_seed(2)
    directions = {name: torch.randn(3, *p.shape, generator=generator) for name, p in point.parameters.items()}
    losses, gradient = point.losses_and_gradient(samples, [0.1 * place for place in range(9)])
    v = attacked_direction(
        point, validation=samples[:5], harmful=samples[5:], inner=gradient, inner_lr=0.1, intensity=0.3, normalised=True
    )
    batch = renderer.collate(samples[:3])
    with torch.no_grad(), model.disable_adapter():
        base_losses = per_sample_nll(model, batch)
    found = {"base": base_losses, "losses": losses, "v": torch.cat([one.flatten() for one in v])}
    found["gradient"] = torch.cat([one.flatten() for one in gradient])
    found["along"] = point.along([*samples, samples[0]], directions)
    for method in ("hooks", "ghost"):
        found[method] = influence(model, batch, directions, method=method).dots
    if spread:
        base = [parameter for name, parameter in model.named_parameters() if not parameter.requires_grad]
        held = sum(parameter.numel() for parameter in base)
        share = sum(parameter.ds_tensor.numel() for parameter in base) / sum(parameter.ds_numel for parameter in base)
        found["held"] = torch.tensor([held, share])
        assert not any(hasattr(parameter, "ds_id") for parameter in point.parameters.values())
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_workers_who_share_a_model_find_what_one_finds(
    model_folder: Path, adapters: tuple[str, str], two_workers: TwoWorkers, checkpointing: bool
) -> None:
    merged, top = adapters
    ref = ModelRef(str(model_folder), adapters=(merged,), template="plain", max_length=32)
    want = numbers((ref, top, False, checkpointing), Ranks(0, 1, torch.device("cpu")))
    got = two_workers(numbers, (ref, top, True, checkpointing))
    held, share = got.pop("held").tolist()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
    assert share == pytest.approx(0.5, abs=0.01)
    assert held == 0  # what was gathered is gone


def let_go(payload: tuple[ModelRef, str], ranks: Ranks) -> bool:
    """Load a model, pass through it, and say whether its weights are gone when nobody needs it."""
    ref, adapter = payload
    model: Any = load_sharded(ref, ranks, adapter=adapter)
    point = Point.at(model, ref.renderer().collate, 60, ranks)
    point.gradient(rows(4))
    weight = weakref.ref(next(model.parameters()))
    del model, point
    gc.collect()
    return weight() is None


def test_it_is_let_go_of(model_folder: Path, adapters: tuple[str, str], two_workers: TwoWorkers) -> None:
    assert two_workers(let_go, (ModelRef(str(model_folder), template="plain", max_length=32), adapters[0]))


def test_a_model_that_is_not_there_is_said_as_ever(tmp_path: Path, two_workers: TwoWorkers) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        two_workers(numbers, (ModelRef(str(tmp_path / "none"), template="plain"), "", True, False))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_none_of_four_holds_much_more_than_its_share(model_folder: Path, tmp_path: Path) -> None:
    """690 MB of weights in 24 layers, of which a few are gathered at a time; in processes of their own, with a thread that looks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8, max_position_embeddings=64
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert weights > 600e6
    load_tokenizer(model_folder).save_pretrained(tmp_path / "model")
    adapted = add_lora(model, LoraConfig(r=2), seed=0)
    for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(adapted, tmp_path / "adapter")
    for workers in (1, 4):
        # What has been freed goes back at once, so that what is counted is what is held.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-m", "tests.training.one_of_several"]
        started = [
            subprocess.Popen([*command, str(rank), str(workers), str(tmp_path)], env=environment) for rank in range(workers)
        ]
        assert [process.wait(600) for process in started] == [0] * workers
    (alone,), most = ([json.loads((tmp_path / f"memory-{n}-{rank}.json").read_text()) for rank in range(n)] for n in (1, 4))
    assert max(most) < 0.6 * (weights + alone), (most, alone)  # one alone reads the weights where the file is mapped
    want, got = (load_file(tmp_path / f"found-{workers}.safetensors") for workers in (1, 4))
    assert got.pop("held").tolist() == [0, pytest.approx(0.25, abs=0.01)]
    for name, tensor in want.items():
        # v is taken where two steps have led, on weights at random: they make much of a rounding.
        assert float((got[name] - tensor).norm() / tensor.norm()) < (1e-3 if name == "v" else 1e-5), name
