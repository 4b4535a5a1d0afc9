"""Weights of the last layers' terms: against a regression written out, refitted without each row, and against real gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.curation.last_layers import RIDGE, agreements, find_weights, in_words, weigh, weighed
from pharmacist_ray.curation.selector import Point
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.models.sample_grads import last_layers
from pharmacist_ray.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def drawn(
    checkpoints: int = 2, rows: int = 30, directions: int = 3, parameters: int = 8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Terms of which some hang together, as layers' do."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(checkpoints, rows, directions, 2))
    dots = common @ generator.normal(size=(2, parameters)) + generator.normal(size=(checkpoints, rows, directions, parameters))
    return dots, generator.uniform(0.1, 2.0, size=(checkpoints, rows, parameters))


def scores(dots: np.ndarray, squares: np.ndarray, cosine: bool) -> np.ndarray:
    """(N, K), with loops."""
    found = np.zeros(dots.shape[1:3])
    for at, norms in zip(dots, squares, strict=True):
        for row in range(len(at)):
            found[row] += at[row].sum(axis=-1) / (np.sqrt(norms[row].sum()) if cosine else 1.0)
    return found


@pytest.mark.parametrize("cosine", [False, True])
def test_weights_are_a_ridge_regressions_and_the_agreement_that_of_rows_it_never_saw(cosine: bool) -> None:
    dots, squares = drawn()
    kept = np.array([False, False, True, False, True, True, True, True])
    weights, agreement = weigh(dots, squares, kept, cosine)
    assert not weights[..., ~kept].any()
    want = scores(dots, squares, cosine)
    for k in range(3):
        norms = np.sqrt(squares[..., kept].sum(-1)) if cosine else np.ones(squares.shape[:2])
        terms = np.concatenate(list(dots[:, :, k][..., kept] / norms[..., None]), axis=1)
        # min |y − Tw|² + Σ_p (λ' r_p² w_p²), as least squares with rows appended
        size = np.sqrt((terms**2).mean(0))
        penalty = RIDGE * ((terms / size) ** 2).sum() / len(terms)

        def fit(rows: np.ndarray, k: int = k, terms: Any = terms, size: Any = size, penalty: float = penalty) -> np.ndarray:
            stacked = np.concatenate([terms[rows], np.sqrt(penalty) * np.diag(size)])
            return np.asarray(np.linalg.lstsq(stacked, np.concatenate([want[rows, k], np.zeros(len(size))]), rcond=None)[0])

        every = np.arange(len(terms))
        np.testing.assert_allclose(weights[:, k, kept].ravel(), fit(every), rtol=1e-8)
        without = [terms[row] @ fit(every[every != row]) for row in every]
        assert agreement[k] == pytest.approx(np.corrcoef(without, want[:, k])[0, 1], abs=1e-9)


def test_what_all_layers_tell_is_left_as_it_is_and_what_tells_nothing_is_zero() -> None:
    dots, squares = drawn()
    weights, agreement = weigh(dots, squares, np.ones(8, dtype=bool), True)
    assert (weights == 1).all()
    assert agreement.tolist() == [1, 1, 1]
    kept = np.array([True] * 3 + [False] * 5)
    dots[..., 0, kept] = 0  # along the first direction these parameters say nothing
    weights, agreement = weigh(dots, squares, kept, True)
    assert np.isfinite(weights).all()
    assert agreement[0] == 0
    assert (agreement[1:] > 0).all()


def test_terms_that_others_follow_are_weighed_so_that_nothing_is_missed() -> None:
    dots, squares = drawn(checkpoints=1, rows=200, parameters=6)
    kept = np.array([False, False, False, True, True, True])
    dots[..., 0] = 2.5 * dots[..., 3]
    dots[..., 1] = -4 * dots[..., 4]
    dots[..., 2] = 0
    weights, agreement = weigh(dots, squares, kept, False)
    plain = [np.corrcoef(dots[0, :, k][:, kept].sum(-1), dots[0, :, k].sum(-1))[0, 1] for k in range(3)]
    assert (agreement > 0.999).all()
    assert max(plain) < 0.9
    np.testing.assert_allclose(weights[0, :, kept].T, [[3.5, -3.0, 1.0]] * 3, atol=0.05)


@pytest.fixture
def point(tiny: Callable[..., Any], tokenizer: Any) -> Point:
    model = add_lora(tiny(num_hidden_layers=3), LoraConfig(r=4), seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return Point.at(model, Renderer(tokenizer, "plain").collate, 64, ALONE)


def made(count: int, seed: int) -> list[Rendered]:
    draw = np.random.default_rng(seed)
    return [Rendered([*draw.integers(3, 48, 8).tolist(), 2], 4) for _ in range(count)]


def directions_at(point: Point, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, *p.shape, generator=generator) for name, p in point.parameters.items()}


def test_terms_add_up_to_influences_and_squared_norms(point: Point) -> None:
    samples, directions = made(7, 0), directions_at(point)
    dots, squares = point.terms(samples, directions)
    assert (dots.shape, squares.shape) == ((7, 2, len(directions)), (7, len(directions)))
    found = influence(point.model, point.collate(samples), directions, norms=True)
    assert found.grad_norms is not None
    torch.testing.assert_close(dots.sum(-1), found.dots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(squares.sum(-1).sqrt(), found.grad_norms, rtol=1e-4, atol=1e-5)
    name = sorted(directions)[5]
    (only,) = point.along(samples, {name: directions[name]}).T[:1]
    place = list(directions).index(name)
    torch.testing.assert_close(dots[:, 0, place], only, rtol=1e-4, atol=1e-5)


def test_scores_by_the_file_are_those_of_the_regression(point: Point, tmp_path: Path) -> None:
    samples, directions = made(40, 0), directions_at(point)
    found = find_weights([(point, directions)], samples, cosine=True)
    save_file(found, tmp_path / "directions.safetensors")
    assert found["weights"].shape == (3, 1, 2, len(directions))
    assert found["agreement"][2].tolist() == [1, 1]
    dots, squares = (
        one.double().numpy() for one in point.terms(samples, {name: directions[name] for name in sorted(directions)})
    )
    for count in (1, 2, 3, 9):
        over = weighed(tmp_path / "directions.safetensors", 0, count, directions)
        assert {*over} == last_layers(point.model, count, directions)
        scored = influence(point.model, point.collate(samples), over, norms=False).dots.double().numpy()
        kept = np.array([name in over for name in sorted(directions)])
        weights, _ = weigh(dots[None], squares[None], kept, True)
        np.testing.assert_allclose(scored, np.einsum("nkp,kp->nk", dots, weights[0]), rtol=1e-3, atol=1e-4)
        if count >= 3:
            assert all(torch.equal(over[name], directions[name]) for name in directions)


def test_of_the_first_of_the_layers_only_what_follows_its_attention_counts(point: Point) -> None:
    names = [*point.parameters]
    assert last_layers(point.model, 3, names) == {*names}
    for count in (1, 2):
        found, lowest = last_layers(point.model, count, names), f"layers.{3 - count}."
        kinds = {re.sub(r".*layers\.\d+\.\w+\.(\w+)\..*", r"\1", name) for name in found if lowest in name}
        assert kinds == {"o_proj", "gate_proj", "up_proj", "down_proj"}
        assert {name for name in names if any(f"layers.{number}." in name for number in range(4 - count, 3))} <= found
        assert not any(f"layers.{number}." in name for name in found for number in range(3 - count))
    queries = [name for name in names if "q_proj" in name]  # an adapter on those alone: then they are what there is
    assert last_layers(point.model, 1, queries) == {name for name in queries if "layers.2." in name}


def test_a_line_says_how_far_they_agree_and_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert agreements(tmp_path) == {}
    (tmp_path / "last_layers").mkdir()
    for kind, values in {"directions": [[0.91234, 0.8], [1, 1]], "groups": [[0.9, 0.7, 0.8], [1, 1, 1]]}.items():
        save_file({"agreement": torch.tensor(values, dtype=torch.float64)}, tmp_path / "last_layers" / f"{kind}.safetensors")
    found = agreements(tmp_path)
    assert found["directions"] == [[0.9123, 0.8], [1, 1]]
    assert in_words(1, found) == (
        "influences over the last 1 of 2 layers: correlation with all layers 0.912 for pharmacist, 0.800 for no_attack, "
        "0.700 or more for each group"
    )
    assert "last 2 of 2" in in_words(7, found)
    with pytest.raises(
        ArtifactError, match=r"^the selector is incomplete: .*none\.safetensors is missing; run `pharmacist fit` again$"
    ):
        weighed(tmp_path / "none.safetensors", 0, 1, {})
