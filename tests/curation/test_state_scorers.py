"""Scorers that look at hidden states or ask a classifier, against the same written out one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pharmacist_ray.config.schema import LoraConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.curation.grades import auroc
from pharmacist_ray.curation.score import _teacher, check_scorers
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.curation.scorers.naive_bayes import naive_bayes
from pharmacist_ray.curation.scorers.refusal_feature import choose_layer as refusal_feature_layer
from pharmacist_ray.curation.scorers.refusal_feature import refusal_feature
from pharmacist_ray.curation.scorers.representation import choose_layer, direction, layer_curve
from pharmacist_ray.curation.scorers.signals import Probe, ProbeSpec, Signals
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import sample_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.models.linear import RIDGE, logistic
from pharmacist_ray.models.load import add_lora, load_model, load_tokenizer, save_adapter
from pharmacist_ray.models.ref import ModelRef

Make = Callable[..., Signals]


@pytest.fixture(scope="module")
def rows(rows_of: Callable[..., list[Row]]) -> list[Row]:
    return rows_of(8, seed=4)


@pytest.fixture(scope="module")
def folders(rows_of: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("trusted")
    for seed, name, count in ((11, "validation", 9), (12, "harmful", 6), (13, "single", 1), (14, "benign", 7)):
        write_rows(rows_of(count, seed=seed), out / name / "part-00000.parquet")
    return {name: str(out / name) for name in ("validation", "harmful", "single", "benign")}


@pytest.fixture(scope="module")
def signals_of(model_folder: Path, folders: dict[str, str]) -> Make:
    """Return a maker of signals without a selector: signals_of(rows, tokens=40, validation="harmful")."""
    model = ModelRef(str(model_folder), template="plain", max_length=32)

    def make(
        rows: list[Row],
        *,
        tokens: int = 40,
        fit: str = "",
        guard: GuardConfig | None = None,
        teacher: ModelRef | None = None,
        **sets: str,
    ) -> Signals:
        chosen = {name: folders[sets.get(name, name)] for name in ("validation", "harmful", "benign")}
        probe = Probe(ProbeSpec(model, fit, (), ("pharmacist", "no_attack"), "hooks", tokens, cosine=False, teacher=teacher))
        return Signals(rows, probe=probe, trusted=TrustedSets(chosen, 200, 0), guard=guard)

    return make


def plain_states(model_folder: Path, rows: list[Row], of_prompt: bool = False) -> np.ndarray:
    """(N, L + 1, D): each row by itself, through the whole model, the answer's positions averaged, or the last one before it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    renderer = Renderer(load_tokenizer(model_folder), "plain", 32)
    found = []
    for row in rows:
        sample = renderer.render(row)
        with torch.no_grad():
            layers = model(input_ids=torch.tensor([sample.ids]), output_hidden_states=True).hidden_states
        first = sample.answer_start
        found.append([(layer[0, first - 1] if of_prompt else layer[0, first:].mean(dim=0)).numpy() for layer in layers])
    return np.array(found)


def trusted_states(model_folder: Path, folders: dict[str, str], name: str) -> np.ndarray:
    return plain_states(model_folder, sample_rows(folders[name], 200, 0))


def test_states_are_the_bases_own_averaged_over_the_answer_with_and_without_a_selector(
    signals_of: Make, rows: list[Row], model_folder: Path, tmp_path: Path
) -> None:
    model = add_lora(load_model(model_folder), LoraConfig(r=2), seed=0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "tov" / "adapter")
    want = plain_states(model_folder, rows)
    for signals in (signals_of(rows), signals_of(rows, tokens=1000), signals_of(rows, fit=str(tmp_path))):
        np.testing.assert_allclose(signals.states(), want, rtol=1e-4, atol=1e-5)
        for layer in (0, 1, -1):
            np.testing.assert_allclose(signals.states(layer), want[:, layer], rtol=1e-4, atol=1e-5)


def test_what_was_asked_of_one_shard_comes_out_of_one_pass_over_the_next(
    signals_of: Make, rows: list[Row], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = signals_of(rows, tokens=1000)
    second = Signals(rows[::-1], probe=first.probe)
    passes = []
    whole = Signals._passed
    monkeypatch.setattr(Signals, "_passed", lambda self, keys: passes.append(list(keys)) or whole(self, keys))
    for signals in (first, second):
        found = [signals.states(1), signals.prompt_states(0), signals.states(-1), signals.states(1)]
    assert [len(keys) for keys in passes] == [1, 1, 1, 3]
    answers, prompts = (plain_states(model_folder, rows[::-1], of_prompt=one) for one in (False, True))
    for mine, want in zip(found, (answers[:, 1], prompts[:, 0], answers[:, -1], answers[:, 1]), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-4, atol=1e-5)


def test_representation_is_the_mean_cosine_to_validation_less_that_to_harmful_rows(
    signals_of: Make, rows: list[Row], model_folder: Path, folders: dict[str, str]
) -> None:
    signals = signals_of(rows)
    layer = signals.of_trusted(choose_layer).layer
    states = plain_states(model_folder, rows)[:, layer]
    good, bad = (trusted_states(model_folder, folders, name)[:, layer] for name in ("validation", "harmful"))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    want = [np.mean([cosine(state, one) for one in good]) - np.mean([cosine(state, one) for one in bad]) for state in states]
    np.testing.assert_allclose(SCORERS["representation"].score(signals), want, atol=1e-5)
    swapped = SCORERS["representation"].score(signals_of(rows, validation="harmful", harmful="validation"))
    np.testing.assert_allclose(swapped, np.negative(want), atol=1e-5)


def test_a_refusal_teacher_reads_in_the_place_of_the_base_and_nobody_else_asks_it(
    signals_of: Make, rows: list[Row], model_folder: Path, tmp_path: Path
) -> None:
    def saved(model: Any, name: str) -> Path:
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(model, tmp_path / name)
        return tmp_path / name

    torch.manual_seed(0)
    adapter = saved(add_lora(load_model(model_folder), LoraConfig(r=2), seed=0), "teacher")
    base = ModelRef(str(model_folder), template="plain", max_length=32)
    merged = base.plus(str(adapter)).load()
    merged.save_pretrained(tmp_path / "whole")
    load_tokenizer(model_folder).save_pretrained(tmp_path / "whole")
    for folder in (adapter, tmp_path / "whole"):
        teacher = _teacher(base, str(folder))
        signals = signals_of(rows, teacher=teacher)
        alone = signals_of(rows)
        alone.probe.model = merged
        np.testing.assert_allclose(refusal_feature(signals), refusal_feature(alone), atol=1e-5)
        np.testing.assert_allclose(signals.states(-1), signals_of(rows).states(-1), atol=1e-6)
    assert np.abs(refusal_feature(signals) - refusal_feature(signals_of(rows))).max() > 0.01
    assert _teacher(base, None) is None
    with pytest.raises(
        ConfigError, match=r"^scoring.refusal_teacher '\S+' is no folder of a model or of an adapter: it has neither"
    ):
        check_scorers(ScoringConfig(scorers=["refusal_feature"], refusal_teacher=str(tmp_path)), SelectorConfig())


@pytest.mark.parametrize("tokens", [24, 400])
def test_the_refusal_feature_is_the_mean_cosine_of_prompts_to_benign_less_that_to_harmful_ones(
    signals_of: Make, rows: list[Row], model_folder: Path, folders: dict[str, str], tokens: int
) -> None:
    signals = signals_of(rows, tokens=tokens)
    found = refusal_feature(signals)
    layer = signals.of_trusted(refusal_feature_layer, ("benign", "harmful")).layer
    mine = plain_states(model_folder, rows, of_prompt=True)[:, layer]
    sets = {
        name: plain_states(model_folder, sample_rows(folders[name], 200, 0), of_prompt=True)[:, layer]
        for name in ("benign", "harmful")
    }

    def mean_cosine(one: np.ndarray, others: np.ndarray) -> float:
        return float(np.mean([one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in others]))

    expected = [mean_cosine(one, sets["benign"]) - mean_cosine(one, sets["harmful"]) for one in mine]
    assert found == pytest.approx(expected, abs=1e-5)
    answers = [replace(row, response="w1 w2 w3") for row in rows]
    assert refusal_feature(signals_of(answers, tokens=tokens)) == pytest.approx(found, abs=1e-5)  # it reads no answer


def test_safe_rows_are_those_of_all_sets_that_count_as_safe(signals_of: Make, rows: list[Row], folders: dict[str, str]) -> None:
    one, both = (TrustedSets(folders, 200, 0, safe) for safe in (("validation",), ("validation", "benign")))
    ids = {name: [row.id for row in sample_rows(folders[name], 200, 0)] for name in ("validation", "benign")}
    assert [row.id for row in one.safe_rows] == ids["validation"]
    assert [row.id for row in both.safe_rows] == ids["validation"] + ids["benign"]
    words = [naive_bayes(Signals(rows, trusted=trusted)) for trusted in (one, both)]
    assert not np.allclose(*words)


def test_the_layer_is_chosen_by_rows_that_were_held_out() -> None:
    generator = np.random.default_rng(0)
    good, bad = generator.normal(size=(20, 4, 60)), generator.normal(size=(17, 4, 60))
    good[:, 2, 0] += 5.0  # only at layer 2 do the sets differ
    curve = layer_curve(good, bad)
    assert curve[2, 0] > 0.95
    assert (np.abs(curve[[0, 1, 3], 0] - 0.5) < 0.25).all()
    # Judged by the rows it was fitted on, every layer would look as good: sixty dimensions fit any 37 rows.
    fitted = np.concatenate([good[:, 0], bad[:, 0]])
    fitted /= np.linalg.norm(fitted, axis=1, keepdims=True)
    assert auroc(fitted @ direction(good[:, 0], bad[:, 0]), np.arange(37) < 20) > 0.95
    halves = []
    for fit_on, held in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        ours, others = ([row / np.linalg.norm(row) for row in states[held, 2]] for states in (good, bad))
        toward = np.mean([row / np.linalg.norm(row) for row in good[fit_on, 2]], axis=0)
        toward = toward - np.mean([row / np.linalg.norm(row) for row in bad[fit_on, 2]], axis=0)
        halves.append(np.mean([float(a @ toward > b @ toward) for a in ours for b in others]))
    assert curve[2, 0] == pytest.approx(np.mean(halves))


def test_between_layers_of_the_same_area_the_one_with_the_widest_gap_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    good, bad = generator.normal(size=(2, 10, 3, 8)) * 0.1
    good[..., 0] += 1.0
    bad[:, :, 1] += 1.0
    good[:, 1, 0] += 2.0

    class Fixed:
        def __init__(self, states: np.ndarray) -> None:
            self.rows, self.states = range(len(states)), lambda: states

    curve = layer_curve(good, bad)
    assert curve[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert choose_layer(Fixed(good), Fixed(bad)).layer == int(np.argmax(curve[:, 1])) == 1  # type: ignore[arg-type]


def test_a_set_without_halves_cannot_choose_a_layer(signals_of: Make, rows: list[Row]) -> None:
    with pytest.raises(ConfigError, match=r"^the representation scorer chooses its layer by halves of .* give two rows each$"):
        SCORERS["representation"].score(signals_of(rows, harmful="single"))


def test_the_linear_guard_is_a_ridge_logistic_regression_between_sets_of_equal_weight(
    signals_of: Make, rows: list[Row], model_folder: Path, folders: dict[str, str]
) -> None:
    safe, unsafe = (trusted_states(model_folder, folders, name)[:, -1].astype(np.float64) for name in ("validation", "harmful"))
    both = np.concatenate([safe, unsafe])
    features = (both - both.mean(axis=0)) / both.std(axis=0)

    def loss(values: np.ndarray) -> float:
        logits = features @ values[:-1] + values[-1]
        own, other = np.log1p(np.exp(-logits[: len(safe)])).mean(), np.log1p(np.exp(logits[len(safe) :])).mean()
        return float((own + other) / 2 + RIDGE / 2 * (values[:-1] ** 2).sum())

    best = minimize(loss, np.zeros(both.shape[1] + 1), method="BFGS", options={"gtol": 1e-7}).x
    states = (plain_states(model_folder, rows)[:, -1] - both.mean(axis=0)) / both.std(axis=0)
    want = 1 / (1 + np.exp(-(states @ best[:-1] + best[-1])))
    scores = SCORERS["guard"].score(signals_of(rows))
    np.testing.assert_allclose(scores, want, atol=1e-3)
    swapped = SCORERS["guard"].score(signals_of(rows, validation="harmful", harmful="validation"))
    np.testing.assert_allclose(swapped, 1 - scores, atol=1e-6)


def test_a_feature_that_never_varies_among_the_trusted_rows_has_no_say() -> None:
    generator = np.random.default_rng(0)
    safe, unsafe = generator.normal(1.0, 1.0, (8, 3)), generator.normal(-1.0, 1.0, (8, 3))
    safe[:, 1] = unsafe[:, 1] = 2.0
    model = logistic(safe, unsafe)
    rows = generator.normal(size=(4, 3))
    moved = rows + np.array([0.0, 1e6, 0.0])
    np.testing.assert_array_equal(model.probability(moved), model.probability(rows))
    assert model.probability(np.array([[9e9, 2.0, 9e9]])) == 1.0  # and nothing overflows


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_classifier_of_yours_gives_its_probability_of_safe(
    moderator: Callable[[str | None], Path], signals_of: Make, rows: list[Row], tokenizer: PreTrainedTokenizerFast, problem: str
) -> None:
    folder = moderator(problem)
    config = GuardConfig(path=str(folder), unsafe=["theft", "violence"], template="w1 {answer} w2 {prompt}", max_length=9)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    want = []
    for row in rows:
        ids = [*tokenizer(f"w1 {row.response} w2 {row.prompt}", add_special_tokens=True)["input_ids"], 2][:9]
        with torch.no_grad():
            fine, theft, violence = model(input_ids=torch.tensor([ids])).logits[0].double().tolist()
        if problem.startswith("single"):
            want.append(np.exp(fine) / (np.exp(fine) + np.exp(theft) + np.exp(violence)))
        else:
            want.append(1 - 1 / (1 + np.exp(-max(theft, violence))))
    for tokens in (1, 25, 1000):
        scores = SCORERS["guard"].score(signals_of(rows, guard=config, tokens=tokens))
        np.testing.assert_allclose(scores, want, rtol=1e-4)
    mixed = SCORERS["guard"].score(signals_of(rows[::-2], guard=config))
    np.testing.assert_allclose(mixed, want[::-2], rtol=1e-4)
    assert np.ptp(want) > 0.05


def test_what_is_wrong_with_a_classifier_is_found_before_anything_runs(
    moderator: Callable[[str | None], Path], signals_of: Make, rows: list[Row], tmp_path: Path, model_folder: Path
) -> None:
    folder = moderator(None)

    def check(**changed: Any) -> None:
        guard = GuardConfig(**{"path": str(folder), "unsafe": ["theft"], **changed})
        check_scorers(ScoringConfig(scorers=["guard"], guard=guard), SelectorConfig())

    check()
    with pytest.raises(ConfigError, match=r"^unknown label of scoring\.guard\.unsafe 'thefts' \(did you mean 'theft'\?\)"):
        check(unsafe=["thefts"])
    with pytest.raises(ConfigError, match=r"^scoring\.guard\.template must contain \{prompt\} and \{answer\}, got '\{prompt\}'$"):
        check(template="{prompt}")
    with pytest.raises(ConfigError, match=r"^scoring\.guard\.path 'owner/name' is not a folder here; give that of a sequence cl"):
        check(path="owner/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"^guard {tmp_path} is no model that can be loaded: "):
        check(path=str(tmp_path))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    pickled = signals_of(rows, guard=GuardConfig(path=str(tmp_path), unsafe=["theft"]))
    with pytest.raises(ModelError, match=rf"^guard {tmp_path} has no \*\.safetensors file; convert"):
        SCORERS["guard"].score(pickled)
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path / "chat")
    with pytest.raises(ConfigError, match=r"^unknown label of scoring\.guard\.unsafe 'theft'"):
        check(path=str(tmp_path / "chat"))
