from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.adapters import factors_of
from pharmacist_ray.models.load import save_adapter
from pharmacist_ray.training.objectives.safe_lora import SafeLoraSettings, left_factor, project, safe_lora


def _matrices(seed: int = 0, out: int = 12, inside: int = 10, aligned: int = 3, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"va": (out, aligned), "vb": (aligned, inside), "b": (out, rank), "a": (rank, inside)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _dense(m: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """C = V Vᵀ / ‖V‖_F and V, as whole matrices."""
    v = (m["va"] @ m["vb"]).double()
    return v @ v.T / v.norm(), v


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_rule_is_that_of_whole_matrices(seed: int):
    m = _matrices(seed)
    c, v = _dense(m)
    assert float(c.trace()) == pytest.approx(float(v.norm()))  # it is no projector: its eigenvalues add up to ‖V‖_F
    delta = (m["b"] @ m["a"]).double()
    found, cosine = project(left_factor(m["va"], m["vb"]), m["b"], m["a"], SafeLoraSettings())
    assert torch.allclose((found @ m["a"]).double(), c @ delta, rtol=1e-4, atol=1e-4)
    expected = ((c @ delta) * delta).sum() / ((c @ delta).norm() * delta.norm())
    assert cosine == pytest.approx(float(expected), abs=1e-5)


def test_the_other_modes():
    m = _matrices()
    c, v = _dense(m)
    left = left_factor(m["va"], m["vb"])
    normalised, _ = project(left, m["b"], m["a"], SafeLoraSettings(mode="normalised"))
    assert torch.allclose(normalised.double(), c / torch.linalg.eigvalsh(c)[-1] @ m["b"].double(), atol=1e-4)
    for rank in (1, 2, 3):
        settings = SafeLoraSettings(mode="topk", rank=rank)
        once, _ = project(left, m["b"], m["a"], settings)
        u = torch.linalg.svd(v)[0][:, :rank]
        assert torch.allclose(once.double(), u @ u.T @ m["b"].double(), atol=1e-4)
        assert torch.allclose(project(left, once, m["a"], settings)[0], once, atol=1e-5)  # a projector
    assert not project(left, m["b"], m["a"], SafeLoraSettings(mode="drop"))[0].any()
    untouched, cosine = project(torch.zeros(12, 1), m["b"], m["a"], SafeLoraSettings())
    assert (float(untouched.abs().sum()), cosine) == (0.0, 0.0)


def test_an_update_in_the_directions_of_alignment_is_left_alone_and_any_other_replaced(
    bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch], tmp_path: Path
):
    aligned = adapted()
    save_adapter(aligned, tmp_path / "aligned")
    known = factors_of(str(tmp_path / "aligned"))
    for name, module in aligned.named_modules():
        if hasattr(module, "get_delta_weight"):
            b, a = known[name.removeprefix("base_model.model.")]
            assert torch.allclose(b @ a, module.get_delta_weight("default"), atol=1e-6)
    running = bench("safe_lora")
    with torch.no_grad():
        for name, parameter in running.engine.module.named_parameters():
            if "layers.1" in name and "lora_B" in name:  # one layer goes elsewhere
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.1)
    before = running.weights()
    step = running.step(pair[0], None, SafeLoraSettings(threshold=0.7, mode="drop"), merged=[str(tmp_path / "aligned")])
    safe_lora(step)
    after = running.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.1" in name and "lora_B" in name}
    assert not any(after[name].any() for name in changed)
    assert step.measured["projected_layers"] == len(changed)


def test_what_was_not_aligned_with_an_adapter_is_refused(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    with pytest.raises(ConfigError, match=r"^safe_lora needs a model that was aligned with an adapter"):
        safe_lora(bench("safe_lora").step(pair[0]))
