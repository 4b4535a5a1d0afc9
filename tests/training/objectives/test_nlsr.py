from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.adapters import factors_of
from pharmacist_ray.models.load import save_adapter
from pharmacist_ray.training.objectives.nlsr import Layer, NlsrSettings, critical_neurons, nlsr, repaired, similarity
from pharmacist_ray.training.weights import set_weights, whole_weights

OUT, INSIDE, TOKENS = 20, 10, 30


def _layer(seed: int = 0, *, beta: float = 0.9, aligned: int = 5, rank: int = 4) -> tuple[Layer, dict[str, torch.Tensor]]:
    """A layer, and the matrices that it stands for."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    b, a, user, x = drawn(OUT, aligned), drawn(aligned, INSIDE), (drawn(OUT, rank), drawn(rank, INSIDE)), drawn(INSIDE, TOKENS)
    layer = Layer((b, a), user, 2.0, (a @ x) @ (a @ x).T)
    whole = {"aligned": b @ a, "reference": (1 + beta) * b @ a, "user": 2.0 * user[0] @ user[1], "x": x}
    return layer, {name: one.double() for name, one in whole.items()}


def _critical(whole: dict[str, torch.Tensor], rank: int, sparsity: float) -> torch.Tensor:
    u = torch.linalg.svd(whole["reference"] @ whole["x"])[0][:, : max(1, round(rank * (1 - sparsity)))]
    lengths = (u @ u.T @ whole["reference"]).norm(dim=1)
    count = max(1, round(OUT * (1 - sparsity)))
    return torch.zeros(OUT, dtype=torch.bool).index_fill_(0, lengths.argsort(descending=True)[:count], True)


@pytest.mark.parametrize("sparsity", [0.8, 0.4, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_neurons_likeness_and_repair_are_those_of_whole_matrices(seed: int, sparsity: float):
    layer, whole = _layer(seed)
    mask = critical_neurons(layer, NlsrSettings(sparsity=sparsity))
    assert torch.equal(mask, _critical(whole, 5, sparsity))
    after = whole["aligned"] + whole["user"]
    a, b = whole["reference"][mask].flatten(), after[mask].flatten()
    assert similarity(layer, mask) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
    new_b, new_a, lost = repaired(layer, mask, 0.9)
    expected = torch.where(mask[:, None], whole["reference"], after) - whole["aligned"]  # of the fine-tune's adapter
    u, values, v = torch.linalg.svd(expected)
    nearest = (u[:, :4] * values[:4]) @ v[:4]
    assert torch.allclose(2.0 * (new_b @ new_a).double(), nearest, atol=1e-4)
    assert lost == pytest.approx(float(values[4:].square().sum() / values.square().sum()), abs=1e-6)
    assert (new_b.shape, new_a.shape) == (layer.user[0].shape, layer.user[1].shape)


def test_without_extrapolation_and_without_a_difference_nothing_changes():
    layer, _ = _layer(beta=0.0)
    layer = replace(layer, user=(torch.zeros_like(layer.user[0]), layer.user[1]))
    mask = critical_neurons(layer, NlsrSettings(beta=0.0))
    assert similarity(layer, mask) == pytest.approx(1.0)
    b, a, lost = repaired(layer, mask, 0.0)
    assert float((b @ a).abs().max()) < 1e-6
    assert lost == 0.0


def test_where_every_neuron_is_critical_the_aligned_model_comes_back():
    layer, _ = _layer(beta=0.0)
    b, a, _ = repaired(layer, torch.ones(OUT, dtype=torch.bool), 0.0)
    assert float((b @ a).abs().max()) < 1e-6


def test_a_rank_that_holds_it_all_loses_nothing_and_one_below_the_matrix_is_filled_with_zeros():
    layer, whole = _layer(rank=9)
    mask = critical_neurons(layer, NlsrSettings())
    b, a, lost = repaired(layer, mask, 0.9)
    assert lost < 0.05
    layer, whole = _layer(rank=12)  # more than the matrix has
    b, a, lost = repaired(layer, mask, 0.9)
    assert (b.shape, a.shape, lost) == ((OUT, 12), (12, INSIDE), 0.0)
    expected = torch.where(mask[:, None], whole["reference"], whole["aligned"] + whole["user"]) - whole["aligned"]
    assert torch.allclose(2.0 * (b @ a).double(), expected, atol=1e-4)


@pytest.fixture
def aligned(adapted: Callable[..., Any], tmp_path: Path) -> str:
    model = adapted()
    save_adapter(model, tmp_path / "aligned")
    return str(tmp_path / "aligned")


def _turned(running: Any, factor: float) -> None:
    """Let the fine-tune's adapter point against the alignment in one layer, and along it everywhere else."""
    weights = {name: weight.clone() for name, weight in whole_weights(running.engine)}
    for name in (name for name in weights if "lora_B" in name):
        weights[name] *= factor if "layers.1" in name else 0.01
    set_weights(running.engine, weights)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_the_layers_that_were_turned_most_are_repaired_and_no_others(
    zero_stage: int, bench: Callable[..., Any], pair: tuple[Batch, Batch], aligned: str
):
    running = bench("nlsr", zero_stage=zero_stage)
    _turned(running, -1.2)
    before = running.weights()
    step = running.step(pair[0], None, NlsrSettings(layers=0.5, beta=0.5), safe=pair[1], merged=[aligned])
    nlsr(step)
    after = running.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.1" in name and ".lora_" in name}
    count = sum(".lora_B." in name for name in before)
    assert step.measured["repaired_layers"] == count / 2
    known = factors_of(aligned)
    cosines = []
    for name, module in running.engine.module.named_modules():
        if "layers.1" not in name or not hasattr(module, "get_delta_weight"):
            continue
        b, a = known[name.removeprefix("base_model.model.")]
        alike = torch.nn.functional.cosine_similarity(
            (module.get_delta_weight("default") + b @ a).flatten(), (b @ a).flatten(), 0
        )
        cosines.append(float(alike.detach()))
    assert all(cosine > 0 for cosine in cosines)  # −0.2 of the alignment was left: now the critical rows are the reference's


def test_inputs_are_those_of_safe_rows_without_padding(bench: Callable[..., Any], pair: tuple[Batch, Batch], aligned: str):
    """The same rows with more padding are repaired alike, and other rows are not."""
    found = []
    for batch in (pair[1], pair[0]):
        for width in (0, 7):
            running = bench("nlsr")
            _turned(running, -1.2)
            wider = Batch(
                *(
                    torch.nn.functional.pad(one, (0, width), value=value)
                    for one, value in ((batch.input_ids, 0), (batch.attention_mask, 0), (batch.labels, -100))
                )
            )
            nlsr(running.step(pair[0], None, NlsrSettings(sparsity=0.7), safe=wider, merged=[aligned]))
            found.append(torch.cat([one.flatten() for name, one in running.weights().items() if "lora_" in name]))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_what_was_not_aligned_with_an_adapter_is_refused(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    with pytest.raises(ConfigError, match=r"^nlsr needs a model that was aligned with an adapter"):
        nlsr(bench("nlsr").step(pair[0], safe=pair[1]))
