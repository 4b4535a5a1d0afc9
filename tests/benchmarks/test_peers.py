"""Our scoring beside other systems' methods, small: what every method gives is right, whatever it costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.benchmark import main
from pharmacist_ray.benchmarks.peer_methods import BLOCK, METHODS, PROJECTED, Load, _projected, make
from pharmacist_ray.benchmarks.peers import EXACT, _check, measure
from pharmacist_ray.errors import ArtifactError, ConfigError
from pharmacist_ray.models.influence import loop_influence

LOAD = Load(shape="tiny", rows=12, length=16, tokens_per_batch=64, rounds=1, rank=2)


def test_it_measures_small_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shapes", "tiny", "--lengths", "16", "--rows", "6", "--rounds", "1", "--methods", "hooks", "LESS"]
    main(["peers", *small, "--out", str(tmp_path)])
    found = {one["method"]: one for one in json.loads((tmp_path / "peers.json").read_text())["peers"]}
    assert list(found) == ["forward", "loop", "hooks", "LESS"]
    assert found["forward"]["ratio"] == 1.0
    assert found["forward"]["agreement"] is None
    assert found["hooks"]["agreement"] == pytest.approx(1.0, abs=1e-4)
    assert (found["hooks"]["bytes_per_row"], found["LESS"]["bytes_per_row"]) == (8, 2 * PROJECTED)
    assert all(one["peak_mib"] > 10 and one["samples_per_s"] == pytest.approx(6 / one["seconds"]) for one in found.values())
    out = capsys.readouterr().out
    assert "tiny, lora, 6 rows of up to 16 tokens, 1 rounds on cpu" in out
    assert f"written to {tmp_path / 'peers.json'}" in out.replace("\n", "")


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_each_method_gives_a_score_a_row_of_the_same_direction(tmp_path: Path, weights: str) -> None:
    bench = make(Load(**{**vars(LOAD), "weights": weights}), tmp_path)
    everything = loop_influence(bench.model, bench.batch(range(12)), bench.direction)
    before = {name: one.clone() for name, one in bench.model.named_parameters()}
    scores = {name: one.run(bench) for name, one in METHODS.items()}
    np.testing.assert_allclose(scores["forward"], everything.losses, rtol=1e-4)
    for name in EXACT:
        np.testing.assert_allclose(scores[name], everything.dots[:, 0], rtol=1e-3, atol=1e-4)
    agreement = {name: np.corrcoef(one, scores["loop"])[0, 1] for name, one in scores.items()}
    assert min(agreement[name] for name in ("LESS", "LESS, sketched", "DataFlex")) > 0.9
    sketched = scores["DataFlex"]
    np.testing.assert_allclose(scores["LESS, sketched"], sketched, rtol=0.02, atol=0.02 * np.abs(sketched).max())
    assert agreement["bergson"] > (0.4 if weights == "lora" else 0.1)  # of sides of 32 and 64 it keeps 16
    assert agreement["last layers"] > 0.2
    assert np.ptp(scores["SEAL"]) > 0
    written = {"LESS": tmp_path / "less.bin", "LESS, sketched": tmp_path / "sketched.bin", "bergson": tmp_path / "collected.bin"}
    assert {name: METHODS[name].bytes_per_row(bench) * 12 for name in written} == {
        n: f.stat().st_size for n, f in written.items()
    }
    assert all(torch.equal(one, before[name]) for name, one in bench.model.named_parameters())
    assert all(one.requires_grad for name, one in bench.model.named_parameters() if name in bench.direction)


def test_a_projection_by_random_signs_keeps_lengths_and_angles() -> None:
    vectors = torch.randn(3, 2 * BLOCK + 100, generator=torch.Generator().manual_seed(0))
    found = _projected(vectors)
    assert found.shape == (3, PROJECTED)
    assert torch.equal(found, _projected(vectors))
    torch.testing.assert_close(_projected(vectors[:1] + vectors[1:2]), found[:1] + found[1:2], rtol=1e-3, atol=1e-3)
    products = vectors @ vectors.T
    torch.testing.assert_close(found @ found.T, products, rtol=0, atol=4 * float(products.max()) / PROJECTED**0.5)
    column = _projected(torch.eye(BLOCK + 1)[[0, BLOCK]]) * PROJECTED**0.5  # the signs themselves: of two blocks
    torch.testing.assert_close(column.abs(), torch.ones_like(column))
    assert abs(float(column[0].mean())) < 4 / PROJECTED**0.5
    assert abs(float(column[0] @ column[1])) < 4 * PROJECTED**0.5


def test_rows_are_as_long_as_texts_are_and_half_answer(tmp_path: Path) -> None:
    bench = make(Load(shape="tiny", rows=400, length=64), tmp_path)
    lengths = np.array([len(ids) for ids, _ in bench.rows])
    assert lengths.min() >= 8
    assert lengths.max() == 64
    assert 25 < np.median(lengths) < 40
    assert all(start == len(ids) // 2 for ids, start in bench.rows)
    places = [place for batch, _ in bench.batches() for place in batch]
    assert sorted(places) == list(range(400))
    assert max(batch.input_ids.numel() for _, batch in bench.batches()) <= 2048


@pytest.mark.parametrize(
    ("scores", "bytes_per_row", "message"),
    [
        ({"hooks": np.arange(11.0)}, 8, r"hooks gave \(11,\) scores, some of them no numbers, for 12 rows"),
        ({"LESS": np.full(12, np.nan)}, 8, r"LESS gave \(12,\) scores"),
        ({"hooks": np.arange(12.0)[::-1]}, 8, r"hooks agrees with a backward pass a row to -1.0000 only, less than 0.999"),
        ({"LESS": np.arange(12.0)[::-1]}, 0, "LESS says that it writes 0 bytes a row"),
    ],
)
def test_what_is_not_right_ends_it(scores: dict[str, np.ndarray], bytes_per_row: int, message: str) -> None:
    exact = {"loop": np.arange(12.0)}
    with pytest.raises(ArtifactError, match=message):
        _check(LOAD, exact | scores, dict.fromkeys(["loop", *scores], bytes_per_row) | {"loop": 8})
    _check(LOAD, exact | {"LESS": np.arange(12.0)[::-1]}, {"loop": 8, "LESS": 16})


def test_names_that_are_none_are_said() -> None:
    with pytest.raises(ConfigError, match=r"^unknown method 'lesss'; known: DataFlex, LESS"):
        measure([LOAD], ["lesss"])
    with pytest.raises(ConfigError, match=r"^unknown shape '7B'"):
        measure([Load(shape="7B")])
