from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from pharmacist_ray.config.schema import CoverageConfig, LoraConfig, ResourcesConfig, ScoringConfig, SelectorConfig, TrainConfig
from pharmacist_ray.curation import fit as fit_module
from pharmacist_ray.curation.fit import check_learnt, fit
from pharmacist_ray.curation.score import ShardScorer
from pharmacist_ray.curation.scorers import columns_of
from pharmacist_ray.curation.scorers.signals import ProbeSpec
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.selector import DIRECTIONS, IterativeSelector, Point, attacked_direction, checkpoint_name
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import count_rows, iterate_rows, sample_rows, write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.models.load import load_tokenizer
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from tests.two_workers import TwoWorkers

ALONE = Ranks(0, 1, torch.device("cpu"))
SELECTOR = SelectorConfig(
    mode="iterative",
    warmup=TrainConfig(steps=4, batch_size=16, lr=5e-3),
    checkpoints=[2, 4],
    inner_lr=1e-2,
    iterations=6,
    batch_size=16,
    intensity=0.1,
    trusted_rows=24,
    reference=TrainConfig(steps=3, batch_size=8, lr=5e-3),
)
LONGER = SELECTOR.model_copy(update={"iterations": 20, "checkpoints": [2]})
PLAIN = ("directions", "last_layers/directions")
ALL = (*PLAIN, "logits", "reference")


def words(generator: torch.Generator, count: int, low: int, high: int) -> list[str]:
    return [f"w{number}" for number in torch.randint(low, high, (count,), generator=generator).tolist()]


def refusals(count: int, clean: float | None, seed: int) -> list[Row]:
    """Rows with an answer of w0 … w3, of which a share (None: rising from 0 to 1 over the rows) is right and the rest noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        share = clean if clean is not None else number / count
        noise = words(generator, 4, 4, 40)
        right = (torch.rand(4, generator=generator) < share).tolist()
        prompt = " ".join(words(generator, 5, 4, 40))
        response = " ".join(f"w{place}" if right[place] else noise[place] for place in range(4))
        rows.append(Row(row_id(prompt, response), prompt, response, source=f"made:{number}"))
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, rows_of: Callable[..., list[Row]]) -> dict[str, Path]:
    """Folders of canonical rows by name; the candidates in two shards."""
    root = tmp_path_factory.mktemp("sets")
    candidates = refusals(96, None, seed=0)
    write_rows(candidates[::2], root / "candidates" / "part-00000.parquet")
    write_rows(candidates[1::2], root / "candidates" / "part-00001.parquet")
    write_rows(refusals(24, 1.0, seed=1), root / "validation" / "part-00000.parquet")
    harmful = [Row(row_id(row.prompt, "w40 w41"), row.prompt, "w40 w41") for row in refusals(20, 1.0, seed=2)]
    write_rows(harmful, root / "harmful" / "part-00000.parquet")
    write_rows(rows_of(12, seed=5), root / "benign" / "part-00000.parquet")
    return {name: root / name for name in ("candidates", "validation", "harmful", "benign")}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what a group of one worker would do."""
    monkeypatch.setattr(fit_module, "run_on_workers", lambda work, payload, **_: work(payload, current_ranks()))


@pytest.fixture(scope="module")
def run_fit(model_folder: Path, folders: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    def run(
        out: Path, selector: SelectorConfig = SELECTOR, workers: int = 1, parts: Sequence[str] = ALL, **sets: Path | None
    ) -> dict[str, Any]:
        return fit(
            **{
                "model": ModelRef(str(model_folder), template="plain", max_length=32), "lora": LoraConfig(r=4),
                "selector": selector, "resources": ResourcesConfig(workers=workers, cpus_per_worker=0.25, max_failures=0),
                "seed": 3, "out": out, "parts": parts,
                "sets": {name: path for name, path in (folders | sets).items() if path is not None},
            }
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def pair(two_workers: TwoWorkers, run_fit: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of it, fitted once by two workers."""
    out = tmp_path_factory.mktemp("pair") / "fit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "run_on_workers", lambda work, payload, **_: two_workers(work, payload))
        run_fit(out, workers=2)
    return out


@pytest.mark.parametrize("iterative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_who_hold_the_model_together_find_what_two_who_hold_it_each_do(
    pair: Path, two_workers: TwoWorkers, run_fit: Callable[..., dict[str, Any]], tmp_path: Path, iterative: bool
) -> None:
    """From the same warm-up: what it leaves is tested with the training."""
    out = tmp_path / "fit"
    for name in ("warmup", "rows", "reference"):
        shutil.copytree(pair / name, out / name)
    spread = SELECTOR.model_copy(update={"warmup": SELECTOR.warmup.model_copy(update={"zero_stage": 3})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "run_on_workers", lambda work, payload, **_: two_workers(work, payload))
        run_fit(out, spread, workers=2, parts=(*PLAIN, *(("logits",) if iterative else ()), "reference"))
    want, got = (load_file(folder / "last_layers" / "directions.safetensors") for folder in (pair, out))
    for tensor in want:
        torch.testing.assert_close(got[tensor].float(), want[tensor].float(), rtol=1e-2, atol=1e-3)
    for step in (2, 4):
        name = f"directions/{checkpoint_name(step)}.safetensors"
        want, got = load_file(pair / name), load_file(out / name)
        assert got.keys() == want.keys()
        for parameter in want:
            torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-4, atol=1e-6)
    if iterative:
        want, got = logits_of(pair), logits_of(out)
        assert [got[id] for id in want] == pytest.approx(list(want.values()), rel=1e-2, abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_four_workers_who_never_hold_the_model_fit_what_two_who_hold_it_do(
    pair: Path, run_fit: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """From the first step of the warm-up on: each training, and what comes after, by workers of its own."""
    spread = SELECTOR.model_copy(
        update={name: getattr(SELECTOR, name).model_copy(update={"zero_stage": 3}) for name in ("warmup", "reference")}
    )
    summary = run_fit(tmp_path / "fit", spread, workers=4, parts=("directions", "reference"))
    assert summary["parts"] == ["directions", "reference"]
    for step in (2, 4):
        name = f"directions/{checkpoint_name(step)}.safetensors"
        want, got = load_file(pair / name), load_file(tmp_path / "fit" / name)
        assert got.keys() == want.keys()
        for parameter in want:
            torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-3, atol=1e-5)


def stamps(out: Path) -> dict[str, int]:
    """When each file with a result was last written."""
    names = ("warmup", "reference", "directions", "logits.parquet", "logits.safetensors")
    found = [file for name in names for file in (out / name, *(out / name).rglob("*")) if file.is_file()]
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in found}


def logits_of(out: Path) -> dict[str, float]:
    table = pq.read_table(out / "logits.parquet")
    return dict(zip(table.column("id").to_pylist(), table.column("logit").to_pylist(), strict=True))


def one_shot_scores(out: Path, spec_model: ModelRef, selector: SelectorConfig, candidates: Path, to: Path) -> dict[str, float]:
    spec = ProbeSpec(
        spec_model, str(out), tuple(checkpoint_name(step) for step in selector.checkpoints), DIRECTIONS, "hooks",
        2048, selector.cosine,
    )  # fmt: skip
    scoring = ScoringConfig(scorers=["pharmacist"])
    scorer = ShardScorer(spec, scoring, SelectorConfig(), out=str(to), threads=1, trusted=TrustedSets({}, 200, 0))
    for file in sorted(candidates.glob("*.parquet")):
        scorer({"shard": str(file)})
    assert columns_of(scoring, selector) == ["pharmacist"]
    table = pq.read_table(to)
    return dict(zip(table.column("id").to_pylist(), table.column("pharmacist").to_pylist(), strict=True))


def test_two_workers_leave_every_file_and_a_logit_for_each_candidate(
    pair: Path, folders: dict[str, Path], model_folder: Path
) -> None:
    for step in (2, 4):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), pair / "warmup" / checkpoint_name(step))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), pair / "reference" / "adapter")
    summary = json.loads((pair / "selector.json").read_text())
    assert summary.pop("usage")["peak_bytes"] > 50e6  # Python and PyTorch
    assert np.shape(summary.pop("last_layers")["directions"]) == (2, 2)
    assert summary == {
        "mode": "iterative",
        "checkpoints": [2, 4],
        "directions": ["pharmacist", "no_attack"],
        "intensity": 0.1,
        "warmup_rows": 64,
        "parts": ["directions", "last_layers/directions", "logits", "reference"],
    }
    logits = logits_of(pair)
    assert sorted(logits) == sorted(row.id for row in iterate_rows(folders["candidates"]))
    assert len(set(logits.values())) == 96  # six batches of sixteen: every row was met once, none stayed where it was
    assert not list(pair.glob("*.partial")) + list(pair.glob("*.progress.json")) + list(pair.glob("directions/*.partial"))


def test_one_worker_finds_what_two_found(pair: Path, run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path) -> None:
    run_fit(tmp_path / "fit")
    for step in (2, 4):
        name = f"directions/{checkpoint_name(step)}.safetensors"
        one, two = load_file(tmp_path / "fit" / name), load_file(pair / name)
        assert one.keys() == two.keys()
        for parameter in one:
            torch.testing.assert_close(two[parameter], one[parameter], rtol=1e-3, atol=1e-5)
    one, two = logits_of(tmp_path / "fit"), logits_of(pair)
    assert [two[id] for id in one] == pytest.approx(list(one.values()), rel=1e-2, abs=1e-5)


def test_directions_are_the_attacked_gradient_and_the_plain_one_at_each_checkpoint(
    pair: Path, folders: dict[str, Path], model_folder: Path
) -> None:
    renderer = Renderer(load_tokenizer(model_folder), "plain", 32)
    sets = {
        name: [renderer.render(row) for row in iterate_rows(pair / "rows" / f"{name}.parquet")]
        for name in ("validation", "harmful")
    }
    assert {name: len(rows) for name, rows in sets.items()} == {"validation": 24, "harmful": 20}
    # At most `trusted_rows` of the warm-up's rows, all weighted alike, stand for the candidates in the inner step.
    assert count_rows(pair / "rows" / "warmup.parquet") == 64
    warmup = [renderer.render(row) for row in sample_rows(pair / "rows" / "warmup.parquet", 24, 3)]
    for step in (2, 4):
        saved = load_file(pair / "directions" / f"{checkpoint_name(step)}.safetensors")
        adapter = load_file(pair / "warmup" / checkpoint_name(step) / "adapter_model.safetensors")
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        model = PeftModel.from_pretrained(base, pair / "warmup" / checkpoint_name(step), is_trainable=True)
        point = Point.at(model, renderer.collate, 64, ALONE)
        assert list(saved) == sorted(point.parameters)
        assert sum(tensor[0].numel() for tensor in saved.values()) == sum(tensor.numel() for tensor in adapter.values())
        for row, intensity in enumerate((0.1, 0.0)):
            want = attacked_direction(point, **sets, inner=point.gradient(warmup), inner_lr=1e-2, intensity=intensity)
            for name, tensor in zip(point.parameters, want, strict=True):
                torch.testing.assert_close(saved[name][row], tensor, rtol=1e-4, atol=1e-5)
        both = torch.cat([tensor.flatten(1) for tensor in saved.values()], dim=1)
        assert float((both[0] - both[1]).norm() / both[1].norm()) > 1e-3


def test_the_directions_of_groups_add_up_to_that_of_all_and_two_workers_find_the_same(
    run_fit: Callable[..., dict[str, Any]], here: None, two_workers: TwoWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = SELECTOR.model_copy(update={"coverage": CoverageConfig(groups=3)})
    weighed = ["last_layers/directions", "last_layers/groups"]
    summary = run_fit(tmp_path / "one", selector, parts=["directions", "groups", *weighed], benign=None)
    assert summary["parts"] == ["directions", "groups", *weighed]
    assert {kind: np.shape(rows) for kind, rows in summary["last_layers"].items()} == {"directions": (2, 2), "groups": (2, 3)}
    groups = json.loads((tmp_path / "one" / "groups.json").read_text())
    assert len(groups) == 3
    assert sorted(id for group in groups for id in group) == sorted(
        row.id for row in iterate_rows(tmp_path / "one" / "rows" / "validation.parquet")
    )
    sizes = torch.tensor([len(group) for group in groups])
    assert int(sizes.sum()) == 24
    assert int(sizes.min()) > 0
    for step in (2, 4):
        whole, apart = (
            load_file(tmp_path / "one" / part / f"{checkpoint_name(step)}.safetensors") for part in ("directions", "groups")
        )
        for name in whole:  # a mean over all rows is the groups' means weighed by their sizes
            mean = torch.einsum("g,g...->...", sizes / 24, apart[name])
            torch.testing.assert_close(mean, whole[name][0], rtol=1e-4, atol=1e-6)
            assert not torch.allclose(apart[name][0], apart[name][1])
    monkeypatch.setattr(fit_module, "run_on_workers", lambda work, payload, **_: two_workers(work, payload))
    run_fit(tmp_path / "two", selector, workers=2, parts=["groups", "last_layers/groups"], benign=None)
    assert json.loads((tmp_path / "two" / "groups.json").read_text()) == groups
    assert not (tmp_path / "two" / "directions").exists()
    one, two = (load_file(tmp_path / folder / "groups" / "step-000004.safetensors") for folder in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
    one, two = (load_file(tmp_path / folder / "last_layers" / "groups.safetensors") for folder in ("one", "two"))
    assert one["weights"].shape == (2, 2, 3, 28)
    for name in one:
        torch.testing.assert_close(two[name].float(), one[name].float(), rtol=1e-2, atol=1e-3)


def test_groups_by_category_are_the_categories_and_too_few_are_one_line(
    run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path
) -> None:
    rows = [replace(row, category=f"c{number % 3}") for number, row in enumerate(refusals(24, 1.0, seed=1))]
    write_rows(rows, tmp_path / "validation.parquet")
    selector = SELECTOR.model_copy(update={"checkpoints": [2], "coverage": CoverageConfig(groups=3, by="category")})
    run_fit(tmp_path / "fit", selector, parts=["groups"], validation=tmp_path / "validation.parquet", benign=None)
    category = {row.id: row.category for row in rows}
    groups = json.loads((tmp_path / "fit" / "groups.json").read_text())
    assert [{category[id] for id in group} for group in groups] == [{"c0"}, {"c1"}, {"c2"}]
    selector = selector.model_copy(update={"coverage": CoverageConfig(groups=4, by="category")})
    with pytest.raises(
        DataError,
        match=r"^selector\.coverage\.groups=4, but the validation rows have 3 categories \('c0', 'c1', 'c2'\); lower it",
    ):
        run_fit(tmp_path / "many", selector, parts=["groups"], validation=tmp_path / "validation.parquet", benign=None)


def test_a_rerun_computes_nothing_again_and_a_lost_file_alone_is_made_anew(
    pair: Path, run_fit: Callable[..., dict[str, Any]], here: None
) -> None:
    before = stamps(pair)
    content = {name: (pair / name).read_bytes() for name in before}
    assert {"logits.parquet", "warmup/result.json", "reference/result.json", "directions/step-000004.safetensors"} <= set(before)
    summary = run_fit(pair)
    assert summary == json.loads((pair / "selector.json").read_text())
    assert stamps(pair) == before
    lost = "directions/step-000002.safetensors"
    (pair / lost).unlink()
    run_fit(pair)
    after = stamps(pair)
    assert {name for name in before if after[name] != before[name]} == {lost}
    (pair / lost).write_bytes(content[lost])


def test_a_restarted_iterative_fit_goes_on_from_its_last_saved_state(
    run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = SELECTOR.model_copy(update={"checkpoints": [2]})
    run_fit(tmp_path / "whole", selector, parts=["logits"])
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 2)
    iterate, done = IterativeSelector.iterate, []

    def dies_in_the_sixth(self: IterativeSelector, *arguments: Any) -> dict[str, float]:
        done.append(self.iteration)
        if len(done) == 6:
            raise MemoryError
        return iterate(self, *arguments)

    monkeypatch.setattr(IterativeSelector, "iterate", dies_in_the_sixth)
    with pytest.raises(MemoryError):
        run_fit(tmp_path / "broken", selector, parts=["logits"])
    assert not (tmp_path / "broken" / "logits.parquet").exists()
    assert not (tmp_path / "broken" / "selector.json").exists()
    told = json.loads((tmp_path / "broken" / "logits.progress.json").read_text())
    assert (told["step"], told["total"]) == (4, 6)
    run_fit(tmp_path / "broken", selector, parts=["logits"])
    assert done == [0, 1, 2, 3, 4, 5, 4, 5]
    assert logits_of(tmp_path / "broken") == logits_of(tmp_path / "whole")


def test_both_modes_rank_alike_and_find_the_clean_rows(
    run_fit: Callable[..., dict[str, Any]], folders: dict[str, Path], model_folder: Path, here: None, tmp_path: Path
) -> None:
    run_fit(tmp_path / "fit", LONGER, parts=["directions", "logits"])
    learnt = logits_of(tmp_path / "fit")
    scored = one_shot_scores(
        tmp_path / "fit",
        ModelRef(str(model_folder), template="plain", max_length=32),
        LONGER,
        folders["candidates"],
        tmp_path / "scores",
    )
    ids = sorted(learnt)
    assert spearmanr([learnt[id] for id in ids], [scored[id] for id in ids]).statistic > 0.9
    clean = {row.id: sum(word in ("w0", "w1", "w2", "w3") for word in row.response.split()) for row in refusals(96, None, seed=0)}
    for found in (learnt, scored):
        assert spearmanr([found[id] for id in ids], [clean[id] for id in ids]).statistic > 0.5


def test_only_the_parts_that_are_asked_for_are_made_and_others_can_be_added(
    run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path
) -> None:
    out, selector = tmp_path / "fit", SELECTOR.model_copy(update={"inner_lr": 0.0, "trusted_rows": 16, "checkpoints": [1]})
    assert run_fit(out, selector, parts=["tov"], harmful=None, benign=None)["parts"] == ["tov"]
    assert {file.name for file in out.iterdir()} == {"rows", "selector.json", "tov", "tov.tracking"}
    assert [file.name for file in (out / "rows").iterdir()] == ["validation.parquet"]
    assert count_rows(out / "rows" / "validation.parquet") == 16
    adapter = out / "tov" / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert run_fit(out, selector, parts=["directions", "tov"], benign=None)["parts"] == ["directions", "tov"]
    assert adapter.stat().st_mtime_ns == before
    assert not (out / "reference").exists()
    assert not (out / "logits.parquet").exists()


def test_the_reference_of_train_on_validation_sees_nothing_but_validation_rows(
    run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path, rows_of: Callable[..., list[Row]]
) -> None:
    write_rows(rows_of(12, seed=9), tmp_path / "other.parquet")
    folders = []
    for number, change in enumerate(
        [{}, {"candidates": tmp_path / "other.parquet", "benign": None}, {"validation": tmp_path / "other.parquet"}]
    ):
        folders.append(tmp_path / str(number))
        selector = SELECTOR.model_copy(update={"tov": TrainConfig(steps=2, batch_size=8, lr=5e-3)})
        run_fit(folders[-1], selector, parts=["tov"], **change)
    first, same, other = (load_file(folder / "tov/adapter/adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["validation", "harmful", "benign"])
def test_an_empty_trusted_set_is_an_error_of_one_line(
    run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path, name: str
) -> None:
    write_rows([], tmp_path / "none.parquet")
    with pytest.raises(DataError, match=rf"^data\.{name} has no rows left after ingestion; the selector cannot do without$"):
        run_fit(tmp_path / "fit", **{name: tmp_path / "none.parquet"})


def test_too_few_candidates_for_the_warmup_say_so(run_fit: Callable[..., dict[str, Any]], here: None, tmp_path: Path) -> None:
    for count in (0, 5):
        write_rows(refusals(count, 1.0, seed=9), tmp_path / "few.parquet")
        with pytest.raises(
            DataError, match=rf"^warm-up: {count} training rows are fewer than batch_size=16; give more or lower it$"
        ):
            run_fit(tmp_path / f"fit{count}", candidates=tmp_path / "few.parquet")


def test_what_the_iterative_mode_cannot_do_is_refused_before_anything_runs(
    run_fit: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^the iterative selector needs selector\.inner_lr above 0: "):
        run_fit(tmp_path / "fit", SELECTOR.model_copy(update={"inner_lr": 0.0}))
    with pytest.raises(
        ConfigError,
        match=r"^selector\.iterations=5 with 16 rows each meet 80 of the 96 candidates, .*; one epoch takes selector\.iterations=6$",
    ):
        run_fit(tmp_path / "fit", SELECTOR.model_copy(update={"iterations": 5}))
    # Three workers share fifteen of the sixteen rows, so that an epoch takes one more.
    check_learnt(["logits"], SELECTOR.model_copy(update={"iterations": 7}), lambda: 96, 3)
    with pytest.raises(ConfigError, match=r"with 15 rows each meet 90 of the 96 .* one epoch takes selector\.iterations=7$"):
        check_learnt(["logits"], SELECTOR, lambda: 96, 3)
    monkeypatch.setattr(fit_module, "MAX_LEARNT", 95)
    with pytest.raises(ConfigError, match=r"^the iterative selector holds one .* limited to 95 rows; use the one-shot score$"):
        run_fit(tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
