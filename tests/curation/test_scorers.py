from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.curation.poison import RowAtFaultError
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.curation.scorers import signals as signals_module
from pharmacist_ray.curation.scorers.signals import REFERENCES, Probe, ProbeSpec, Signals
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.data import render
from pharmacist_ray.data.batches import length_batches
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.models.influence import loop_influence
from pharmacist_ray.models.load import add_lora, load_model, load_tokenizer, save_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import write_parquet

CHECKPOINTS = ("step-000001", "step-000002")


@pytest.fixture(scope="module")
def fitted(model_folder: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selector's folder as `fit` leaves it, with random adapters and directions."""
    out = tmp_path_factory.mktemp("fit")
    generator = torch.Generator().manual_seed(0)
    for place in (*(f"warmup/{name}" for name in CHECKPOINTS), "reference/adapter"):
        model = add_lora(load_model(model_folder), LoraConfig(r=2), seed=0)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        save_adapter(model, out / place)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (out / "directions").mkdir()
    for checkpoint in CHECKPOINTS:
        directions = {name: torch.randn(2, *p.shape, generator=generator) for name, p in names.items()}
        save_file(directions, out / "directions" / f"{checkpoint}.safetensors")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    save_adapter(model, out / "tov" / "adapter")
    ids = [row.id for row in rows]
    for part, last in (("logits", 1), ("seal", 2)):
        write_parquet(pa.table({"id": ids, "logit": pa.array(np.linspace(-1, last, len(ids)))}), out / f"{part}.parquet")
    return out


@pytest.fixture(scope="module")
def spec(model_folder: Path, fitted: Path) -> ProbeSpec:
    return ProbeSpec(
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        fit=str(fitted),
        checkpoints=CHECKPOINTS,
        directions=("pharmacist", "no_attack"),
        method="hooks",
        tokens_per_batch=40,
        cosine=False,
    )


@pytest.fixture(scope="module")
def rows(rows_of: Callable[..., list[Row]]) -> list[Row]:
    return rows_of(9, seed=4)


@pytest.fixture(scope="module")
def folders(rows_of: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("trusted")
    for seed, name in ((11, "validation"), (12, "harmful"), (13, "benign")):
        write_rows(rows_of(7, seed=seed), out / name / "part-00000.parquet")
    return {name: str(out / name) for name in ("validation", "harmful", "benign")}


@pytest.fixture(scope="module")
def signals_of(spec: ProbeSpec, folders: dict[str, str]) -> Callable[..., Signals]:
    """Return a maker of an actor's signals with everything that scorers see: signals_of(rows, tokens_per_batch=25)."""

    def make(rows: list[Row], **changed: Any) -> Signals:
        return Signals(rows, probe=Probe(replace(spec, **changed)), trusted=TrustedSets(folders, 200, 0))

    return make


@pytest.fixture(scope="module")
def signals(signals_of: Callable[..., Signals], rows: list[Row]) -> Signals:
    return signals_of(rows)


@pytest.mark.parametrize("at_a_time", [1, 2, None])
def test_scores_are_the_same_to_the_bit_however_many_rows_are_tokenised_at_a_time(
    signals: Signals, signals_of: Callable[..., Signals], rows: list[Row], at_a_time: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_a_time is None:  # each by itself, as where a tokenizer is code of the model's own
        monkeypatch.setattr(Renderer, "render_all", lambda self, rows: [self.render(row) for row in rows])
    else:
        monkeypatch.setattr(render, "TEXTS", at_a_time)
    again = signals_of(rows)
    for name in ("pharmacist", "loss_gap", "low_loss", "ifd"):
        assert np.array_equal(SCORERS[name].score(again), SCORERS[name].score(signals))


def plain_losses(model: Any, samples: list[Rendered]) -> list[float]:
    """Mean NLL of the answer, one sample at a time and written out."""
    losses = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        losses.append(float(cross_entropy(logits[sample.answer_start - 1 : -1], ids[0, sample.answer_start :])))
    return losses


def worn(model_folder: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter, is_trainable=True).eval()


@contextmanager
def memory_for(model: Any, tokens: int) -> Iterator[list[int]]:
    """Let a model run out of memory over batches of more padded tokens than that; yields the sizes of those that went through."""
    passed: list[int] = []

    def measure(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        passed.append(given["input_ids"].numel())

    handle = model.register_forward_pre_hook(measure, with_kwargs=True)
    try:
        yield passed
    finally:
        handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_little_memory_every_row_is_scored_alike_and_the_size_is_remembered(
    signals_of: Callable[..., Signals], rows: list[Row], checkpointing: bool
) -> None:
    wanted = signals_of(rows, tokens_per_batch=400)
    given = signals_of(rows, tokens_per_batch=400, checkpointing=checkpointing)
    assert any(getattr(module, "gradient_checkpointing", False) for module in given.probe.model.modules()) == checkpointing
    with memory_for(given.probe.model, 30):
        np.testing.assert_allclose(given.influence("pharmacist"), wanted.influence("pharmacist"), rtol=1e-4)
    assert given.probe.budget.tokens <= 30
    with memory_for(given.probe.model, int(given.probe.budget.tokens)) as passed:
        np.testing.assert_allclose(given.base_loss, wanted.base_loss, rtol=1e-5)
    assert passed


def test_a_row_that_does_not_fit_even_alone_is_named(signals_of: Callable[..., Signals], rows: list[Row]) -> None:
    given = signals_of(rows, tokens_per_batch=400)
    lengths = [len(sample.ids) for sample in given.samples]
    longest = lengths.index(max(lengths))
    with memory_for(given.probe.model, max(lengths) - 1), pytest.raises(RowAtFaultError) as raised:
        _ = given.base_loss
    assert (raised.value.id, raised.value.reason) == (rows[longest].id, "out_of_memory")
    assert raised.value.detail == f"its {max(lengths)} tokens do not fit in memory, even alone"


def test_every_scorer_has_a_name_and_random_needs_no_model() -> None:
    assert SCORERS.also == ("random",)
    assert "random" not in SCORERS


def test_scores_from_signals_by_hand() -> None:
    influences = {"pharmacist": np.array([3.0, -4.0]), "no_attack": np.array([5.0, 6.0])}
    signals = cast(
        Signals,
        SimpleNamespace(
            base_loss=np.array([2.0, 0.5]),
            reference_loss={"reference": np.array([0.5, 0.75]), "tov": np.array([2.5, 0.25])}.__getitem__,
            learnt={"logits": np.array([-1.0, 9.0]), "seal": np.array([2.0, -3.0])}.__getitem__,
            unprompted_loss=np.array([4.0, 0.25]),
            gradient_norm=np.array([7.0, 8.0]),
            influence=influences.__getitem__,
        ),
    )
    wanted = {
        "pharmacist": [3.0, -4.0],
        "less": [5.0, 6.0],
        "pharmacist_iterative": [-1.0, 9.0],
        "loss_gap": [1.5, -0.25],
        "tov": [-0.5, 0.25],
        "seal": [2.0, -3.0],
        "low_loss": [-2.0, -0.5],
        "high_loss": [2.0, 0.5],
        "ifd": [0.5, 2.0],
        "grad_norm": [7.0, 8.0],
    }
    assert {name: SCORERS[name].score(signals).tolist() for name in wanted} == wanted


def test_losses_of_base_and_reference_are_the_models_own_in_whatever_order_they_are_asked_for(
    spec: ProbeSpec, rows: list[Row], model_folder: Path, fitted: Path
) -> None:
    probe = Probe(spec)
    renderer = Renderer(load_tokenizer(model_folder), "plain", 32)
    samples = [renderer.render(row) for row in rows]
    base = plain_losses(AutoModelForCausalLM.from_pretrained(model_folder), samples)
    reference = plain_losses(worn(model_folder, fitted / "reference" / "adapter"), samples)
    assert min(abs(a - b) for a, b in zip(base, reference, strict=True)) > 1e-4
    orders = [("base_loss", "reference"), ("reference", "base_loss"), ("_influences", "reference", "base_loss", "tov")]
    for order in orders:
        signals = Signals(rows, probe=probe)
        found = {name: signals.reference_loss(name) if name in REFERENCES else getattr(signals, name) for name in order}
        assert signals.base_loss.tolist() == pytest.approx(base, rel=1e-5)
        assert found["reference"].tolist() == pytest.approx(reference, rel=1e-5)
        assert SCORERS["loss_gap"].score(signals).tolist() == pytest.approx(np.subtract(base, reference).tolist(), abs=1e-5)
    assert signals.base_loss.dtype == np.float64


def test_ifd_is_the_answers_loss_over_its_loss_without_the_prompt(signals: Signals, rows: list[Row], model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    renderer = Renderer(load_tokenizer(model_folder), "plain", 32)
    samples = [renderer.render(row) for row in rows]
    alone = [Rendered([2, *sample.ids[sample.answer_start :]], 1) for sample in samples]  # 2: <eos>, the only context left
    want = np.divide(plain_losses(model, samples), plain_losses(model, alone))
    assert SCORERS["ifd"].score(signals).tolist() == pytest.approx(want.tolist(), rel=1e-5)


def test_train_on_validation_is_to_first_order_the_influence_of_a_step_on_the_validation_loss(
    spec: ProbeSpec, rows: list[Row], rows_of: Callable[..., list[Row]], model_folder: Path, tmp_path: Path
) -> None:
    renderer = Renderer(load_tokenizer(model_folder), "plain", 32)
    model = add_lora(load_model(model_folder), LoraConfig(r=2), seed=0)  # B = 0: its losses are the base's
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(samples: list[Rendered]) -> torch.Tensor:
        total = torch.zeros(sum(p.numel() for p in parameters))
        for sample in samples:
            ids = torch.tensor([sample.ids])
            logits = model(input_ids=ids).logits[0]
            loss = cross_entropy(logits[sample.answer_start - 1 : -1], ids[0, sample.answer_start :])
            total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) / len(samples)
        return total

    validation, samples = ([renderer.render(row) for row in some] for some in (rows_of(6, seed=8), rows))
    direction, rate = gradient(validation), 1e-3
    influence = [float(gradient([sample]) @ direction) for sample in samples]
    with torch.no_grad():
        for parameter, step in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            parameter -= rate * step.view_as(parameter)
    save_adapter(model, tmp_path / "tov" / "adapter")
    signals = Signals(rows, probe=Probe(replace(spec, fit=str(tmp_path), checkpoints=())))
    scores = SCORERS["tov"].score(signals)
    assert min(influence) < 0 < max(influence)  # the sign counts: a row whose loss rises comes last
    np.testing.assert_allclose(scores / rate, influence, rtol=0.05, atol=0.02 * np.abs(influence).max())


@pytest.mark.parametrize("cosine", [False, True])
def test_influences_are_summed_over_the_checkpoints_and_norms_averaged(
    spec: ProbeSpec, rows: list[Row], model_folder: Path, fitted: Path, cosine: bool
) -> None:
    probe = Probe(replace(spec, cosine=cosine))
    signals = Signals(rows, probe=probe)
    batch = probe.renderer.collate(signals.samples)
    dots, norms = torch.zeros(len(rows), 2), torch.zeros(len(rows))
    for checkpoint, directions in zip(CHECKPOINTS, probe.directions, strict=True):
        found = loop_influence(worn(model_folder, fitted / "warmup" / checkpoint), batch, directions)
        assert found.grad_norms is not None
        dots += found.dots / found.grad_norms[:, None] if cosine else found.dots
        norms += found.grad_norms / 2
    for column, (name, direction) in enumerate({"pharmacist": "pharmacist", "less": "no_attack"}.items()):
        assert SCORERS[name].score(signals).tolist() == pytest.approx(dots[:, column].tolist(), rel=1e-4, abs=1e-4)
        assert signals.influence(direction).tolist() == SCORERS[name].score(signals).tolist()
    assert SCORERS["grad_norm"].score(signals).tolist() == pytest.approx(norms.tolist(), rel=1e-4)


@pytest.mark.parametrize(("method", "tolerance"), [("ghost", 1e-4), ("difference", 2e-2)])
def test_every_method_finds_the_same_influence(
    spec: ProbeSpec, signals: Signals, rows: list[Row], method: str, tolerance: float
) -> None:
    other = Signals(rows, probe=Probe(replace(spec, method=method)))
    for direction in ("pharmacist", "no_attack"):
        want = signals.influence(direction)
        assert np.linalg.norm(other.influence(direction) - want) / np.linalg.norm(want) < tolerance


def test_the_cosine_of_a_row_without_a_gradient_is_zero(
    spec: ProbeSpec, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(model: Any, batch: Any, directions: Any, **_: Any) -> Any:
        return SimpleNamespace(dots=torch.zeros(len(batch), 2), grad_norms=torch.zeros(len(batch)))

    monkeypatch.setattr(signals_module, "influence", flat)
    signals = Signals(rows, probe=Probe(replace(spec, cosine=True)))
    assert signals.influence("pharmacist").tolist() == [0.0] * len(rows)


@pytest.mark.parametrize("tokens_per_batch", [1, 25, 10_000])
def test_the_token_budget_does_not_change_a_score(
    signals_of: Callable[..., Signals], signals: Signals, rows: list[Row], tokens_per_batch: int
) -> None:
    other = signals_of(rows, tokens_per_batch=tokens_per_batch)
    for scorer in (one for one in SCORERS.values() if one.needs_model):
        np.testing.assert_allclose(scorer.score(other), scorer.score(signals), rtol=1e-4, atol=1e-5)


def test_a_row_scores_the_same_in_any_company(signals_of: Callable[..., Signals], signals: Signals, rows: list[Row]) -> None:
    mixed = signals_of(rows[::-2])
    for scorer in (one for one in SCORERS.values() if one.needs_model):
        np.testing.assert_allclose(scorer.score(mixed), scorer.score(signals)[::-2], rtol=1e-4, atol=1e-5)
    assert mixed.ids == [row.id for row in rows[::-2]]
    assert mixed.tokens == sum(len(sample.ids) for sample in mixed.samples)


def test_what_is_missing_in_the_selectors_folder_is_named(spec: ProbeSpec, rows: list[Row], fitted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "fit"
    shutil.copytree(fitted, broken)
    shutil.rmtree(broken / "reference")
    signals = Signals(rows, probe=Probe(replace(spec, fit=str(broken))))
    assert np.isfinite(SCORERS["pharmacist"].score(signals)).all()
    with pytest.raises(
        ArtifactError,
        match=rf"^the selector in {broken} has no adapter 'reference'; run `pharmacist fit` for this scorer$",
    ):
        SCORERS["loss_gap"].score(signals)
    for file in (f"warmup/{CHECKPOINTS[1]}/adapter_model.safetensors", f"directions/{CHECKPOINTS[0]}.safetensors"):
        (broken / file).unlink()
        with pytest.raises(
            ArtifactError, match=rf"^the selector is incomplete: {broken / file} is missing; run `pharmacist fit`"
        ):
            Probe(replace(spec, fit=str(broken)))


@given(lengths=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 200))
def test_length_batches_hold_every_row_once_within_the_budget_longest_first(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(order, reverse=True)
    for batch in batches[:-1]:  # and no batch stops early
        assert (len(batch) + 1) * lengths[batch[0]] > budget
