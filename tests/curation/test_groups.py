"""Groups of trusted rows: by category, and by the angles between their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.curation.groups import by_angle, by_category, sketches
from pharmacist_ray.curation.selector import Point
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.errors import DataError
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_categories_go_to_the_smallest_group_the_largest_first():
    categories = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 3
    found = by_category(categories, 2)
    assert {name: found[categories.index(name)] for name in "abcd"} == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert by_category(categories[::-1], 2) == found[::-1]


def test_rows_that_point_the_same_way_are_a_group_whatever_their_length():
    generator = np.random.default_rng(0)
    ways = np.linalg.qr(generator.normal(size=(16, 3)))[0].T
    truth = generator.integers(0, 3, 60)
    vectors = ways[truth] * generator.uniform(0.1, 10, (60, 1)) + generator.normal(scale=0.01, size=(60, 16))
    for seed in range(3):
        found = by_angle(vectors, 3, seed)
        assert len({(int(a), b) for a, b in zip(truth, found, strict=True)}) == 3
        assert list(dict.fromkeys(found)) == [0, 1, 2]
        assert found == by_angle(vectors, 3, seed)


def test_more_groups_than_there_are_is_one_line():
    vectors = np.repeat(np.eye(2), 5, axis=0)
    assert by_angle(vectors, 2, 0) == [0] * 5 + [1] * 5
    with pytest.raises(
        DataError, match=r"^selector\.coverage\.groups=3, but the 10 validation rows do not fall into so many; lower it$"
    ):
        by_angle(vectors, 3, 0)


def test_sketches_keep_the_angles_between_gradients(tiny: Callable[..., Any], tokenizer: Any):
    model = add_lora(tiny(), LoraConfig(r=4), seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    point = Point.at(model, Renderer(tokenizer, "plain").collate, 64, ALONE)
    draw = np.random.default_rng(0)
    samples = [Rendered([*draw.integers(3, 48, 8).tolist(), 2], 4) for _ in range(12)]
    gradients = np.stack([torch.cat([g.flatten() for g in point.gradient([sample])]).numpy() for sample in samples])
    found = sketches(point, samples, seed=3)
    assert found.shape == (12, 64)

    def cosines(vectors: np.ndarray) -> np.ndarray:
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return (units @ units.T)[np.triu_indices(len(units), 1)]

    generator = torch.Generator().manual_seed(3)
    drawn = [
        torch.cat([torch.randn(8, *p.shape, generator=generator).flatten(1) for p in point.parameters.values()], dim=1)
        for _ in range(8)
    ]
    np.testing.assert_allclose(found, gradients @ torch.cat(drawn).numpy().T, rtol=1e-3, atol=1e-4)
    assert np.abs(cosines(found) - cosines(gradients)).max() < 0.5
    np.testing.assert_allclose(sketches(point, samples[:5], seed=3), found[:5], rtol=1e-3, atol=1e-5)
