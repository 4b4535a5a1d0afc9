from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.data.render import IGNORE, Batch, Renderer
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError, ModelError
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import current_ranks
from pharmacist_ray.training.objectives.repnoise import RepNoiseSettings, repnoise_fits, squared_mmd
from pharmacist_ray.training.objectives.step import mixed_seed
from pharmacist_ray.training.streams import alignment_stream, harmful_stream
from pharmacist_ray.training.task import TrainTask

Apart = Callable[..., tuple[float, float]]
STRONG = {"alpha": 1.0, "beta": 2.0}
"""β so large that the noise loss is a good part of the gradient."""


def _slow_mmd(x: torch.Tensor, y: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """Point by point, from the formula."""
    n, points = len(x), [*x.double(), *y.double()]
    distance = {(a, b): (points[a] - points[b]).square().sum() for a in range(2 * n) for b in range(2 * n)}
    sigma = float(sum(d.detach() for (a, b), d in distance.items() if a != b)) / (2 * n * (2 * n - 1)) / 4

    def kernel(a: int, b: int) -> torch.Tensor:
        return torch.stack([torch.exp(-distance[a, b] / (sigma * 2**i)) for i in range(5)]).sum()

    def mean(first: range, second: range) -> torch.Tensor:
        leave_out = unbiased and first == second
        return torch.stack([kernel(a, b) for a in first for b in second if not (leave_out and a == b)]).mean()

    left, right = range(n), range(n, 2 * n)
    return mean(left, left) + mean(right, right) - 2 * mean(left, right)


def _by_hand(
    model: Any, batch: Batch, harmful: Batch, alpha: float, beta: float, unbiased: bool = True, everywhere: bool = True
) -> tuple[torch.Tensor, float, float]:
    """L_stab + β·L_noise − α·log L_asc on whole batches in one graph, L_noise and L_asc; seed 3, step 0."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    outputs: list[torch.Tensor] = []
    depths: list[torch.Tensor] = []
    handles = [
        plain.model.embed_tokens.register_forward_hook(lambda _, __, output: depths.append(output)),
        *[layer.mlp.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in plain.model.layers],
        *[layer.register_forward_hook(lambda _, __, output: depths.append(output)) for layer in plain.model.layers],
    ]
    model(input_ids=harmful.input_ids, attention_mask=harmful.attention_mask)
    for handle in handles:
        handle.remove()

    supervised = harmful.labels != IGNORE
    mask = supervised.float()[:, :, None]
    noise_losses = []
    for layer, output in enumerate(outputs):
        noise = [
            torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(mixed_seed(3, 0, "noise", layer, row)))
            for row in range(len(harmful))
        ]
        noise_losses.append(_slow_mmd((output * mask).flatten(1), (torch.stack(noise) * mask).flatten(1), unbiased))
    noise_loss = torch.stack(noise_losses).mean()

    lens = []
    for depth in depths if everywhere else depths[-1:]:
        logits = plain.lm_head(plain.model.norm(depth))
        for row in range(len(harmful)):
            places = [place for place in range(1, supervised.shape[1]) if supervised[row, place]]
            lens.append(torch.stack([F.cross_entropy(logits[row, p - 1], harmful.labels[row, p]) for p in places]).mean())
    ascent = 1 + torch.stack(lens).mean()
    total = per_sample_nll(model, batch).mean() + beta * noise_loss.float() - alpha * torch.log(ascent)
    return total, float(noise_loss.detach()), float(ascent.detach())


@pytest.mark.parametrize(
    ("changed", "by_hand"),
    [
        ({}, {}),
        ({"mmd": "biased"}, {"unbiased": False}),
        ({"ascent": "last"}, {"everywhere": False}),
        ({"alpha": 0.0}, {"alpha": 0.0}),
        ({"beta": 0.0}, {"beta": 0.0}),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_value_and_gradient_are_those_of_the_objective_in_one_graph(
    changed: dict[str, Any],
    by_hand: dict[str, Any],
    accumulation: int,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Apart,
) -> None:
    taken = bench("repnoise", accumulation=accumulation).take(*pair, RepNoiseSettings(**{**STRONG, **changed}))
    model = adapted()
    total, noise, ascent = _by_hand(model, *pair, **{**STRONG, **by_hand})
    angle, length = apart(taken.gradients, by_autograd(model, total))
    assert angle < 1e-8
    assert length < 1e-4
    assert sum(taken.losses) / accumulation == pytest.approx(float(total.detach()), rel=1e-5)
    assert taken.step.measured["ascent_loss"] == pytest.approx(ascent, rel=1e-5)
    if changed.get("beta") != 0:
        assert taken.step.measured["noise_loss"] == pytest.approx(noise, rel=1e-4)


def test_every_term_is_a_good_part_of_what_is_compared(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Apart
) -> None:
    whole = bench("repnoise").take(*pair, RepNoiseSettings(**STRONG)).gradients
    for name in STRONG:
        without = bench("repnoise").take(*pair, RepNoiseSettings(**{**STRONG, name: 0.0})).gradients
        assert apart(whole, without)[0] > 1e-3
    neither = bench("repnoise").take(*pair, RepNoiseSettings(alpha=0.0, beta=0.0)).gradients
    assert max(apart(neither, bench("sft").take(pair[0]).gradients)) < 1e-9


def test_full_weights_too(
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Apart,
) -> None:
    model = adapted(weights="full")
    expected = by_autograd(model, _by_hand(model, *pair, **STRONG)[0])
    taken = bench("repnoise", weights="full", accumulation=4).take(*pair, RepNoiseSettings(**STRONG))
    angle, length = apart(taken.gradients, expected)
    assert angle < 1e-8
    assert length < 1e-4


def test_micro_batches_make_no_difference(bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Apart) -> None:
    one, four = (bench("repnoise", accumulation=count).take(*pair, RepNoiseSettings(**STRONG)) for count in (1, 4))
    assert max(apart(four.gradients, one.gradients)) < 1e-5
    assert four.step.measured == pytest.approx(one.step.measured, rel=1e-5)
    assert sum(four.losses) / 4 == pytest.approx(one.losses[0], rel=1e-5)


def _wider(batch: Batch, columns: int) -> Batch:
    return Batch(
        F.pad(batch.input_ids, (0, columns)), F.pad(batch.attention_mask, (0, columns)), F.pad(batch.labels, (0, columns), value=IGNORE)
    )  # fmt: skip


def test_the_noise_does_not_depend_on_padding(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    measured = []
    for columns in (0, 1, 5):
        running = bench("repnoise")
        measured.append(running.take(pair[0], _wider(pair[1], columns), RepNoiseSettings(**STRONG)).step.measured)
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    assert measured[2] == pytest.approx(measured[0], rel=1e-5)


def test_the_noise_is_new_at_every_step_and_the_same_for_a_seed(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    def noise(number: int, seed: int = 3) -> float:
        running = bench("repnoise")
        running.seed = seed
        return float(running.take(*pair, RepNoiseSettings(**STRONG), number=number).step.measured["noise_loss"])

    assert noise(0) == noise(0)
    assert noise(0) != noise(1)
    assert noise(0) != noise(0, seed=4)


@pytest.fixture
def cut(tokenizer: Any, model_folder: Path, tmp_path: Path) -> Callable[..., tuple[Batch, Batch]]:
    """Return what makes 4 safe answers and 4 harmful ones, as the streams cut them; prompts from number ``start`` on are harmful."""
    return lambda start=0: _cut(tokenizer, model_folder, tmp_path, start)


@pytest.fixture
def pairs(cut: Callable[..., tuple[Batch, Batch]]) -> tuple[Batch, Batch]:
    """Return them to the same prompts."""
    return cut()


def _cut(tokenizer: Any, model_folder: Path, tmp_path: Path, start: int) -> tuple[Batch, Batch]:
    def write(name: str, answers: list[str], start: int = 0) -> tuple[str, ...]:
        rows = [
            Row(row_id(f"w{index} w1", answer), f"w{index} w1", answer, source="made", raw="{}")
            for index, answer in enumerate(answers, start)
        ]
        write_rows(rows, tmp_path / name)
        return (str(tmp_path / name),)

    task = TrainTask(
        name="pairs",
        out=str(tmp_path / "out"),
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        rows=write("safe.parquet", ["w20 w7 w8"] * 4),
        harmful=write("harmful.parquet", ["w30 w7 w9", "w31 w7 w8 w9 w9", "w32", "w20 w7 w8 w8"], start),
        train=TrainConfig(batch_size=4),
        seed=0,
        objective="repnoise",
    )
    renderer = Renderer(tokenizer, "plain", 32)
    safe = alignment_stream(task, renderer)
    (batch,), _ = safe.step(0, current_ranks(), 1)
    (harmful,), _ = harmful_stream(task, renderer, "pairs", safe).step(0, current_ranks(), 1)
    order = harmful.input_ids[:, 1].argsort()  # by prompt, so as the answers are listed
    return batch, Batch(harmful.input_ids[order], harmful.attention_mask[order], harmful.labels[order])


def test_labels_are_integers_where_the_answers_differ(pairs: tuple[Batch, Batch], tokenizer: Any) -> None:
    harmful = pairs[1]
    assert harmful.labels.dtype == torch.int64
    words = [
        [None if label == IGNORE else tokenizer.convert_ids_to_tokens(int(label)) for label in row] for row in harmful.labels
    ]
    no = None
    assert words == [
        [no, no, no, "w30", no, "w9", no, no, no],  # both end at the same place
        [no, no, no, "w31", no, no, "w9", "w9", "<eos>"],
        [no, no, no, "w32", "<eos>", no, no, no, no],
        [no, no, no, no, no, no, "w8", "<eos>", no],
    ]
    assert all(
        label in (IGNORE, token) for label, token in zip(harmful.labels.flatten(), harmful.input_ids.flatten(), strict=True)
    )


def test_rows_without_a_safe_answer_count_whole_if_there_is_none_for_any_and_are_left_out_if_there_is(
    cut: Callable[..., Any],
) -> None:
    harmful = cut(start=4)[1]
    assert [(row != IGNORE).sum() for row in harmful.labels] == [4, 6, 2, 5]  # the answer's words, and its end
    with pytest.raises(DataError, match=r"batch_size=4 harmful rows whose prompt is also among the alignment rows, got 1;"):
        cut(start=3)


def test_the_first_differing_token_has_a_gradient(
    pairs: tuple[Batch, Batch],
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Apart,
) -> None:
    """Masking the logits by the mask of their own position, as the public code does, makes it zero: the token before is shared."""
    safe, harmful = pairs
    labels = torch.full_like(harmful.labels, IGNORE)
    for row in range(4):
        first = int((harmful.labels[row] != IGNORE).nonzero()[0])
        assert harmful.labels[row, first - 1] == IGNORE
        labels[row, first] = harmful.labels[row, first]
    only_first = Batch(harmful.input_ids, harmful.attention_mask, labels)
    step = bench("repnoise").take(safe, only_first, RepNoiseSettings(alpha=1.0, beta=0.0, ascent="last"))
    plain = bench("sft").take(safe).gradients
    model = adapted()
    loss = per_sample_nll(model, only_first).mean()
    ascent = -torch.log(1 + loss)
    pulled = {name: step.gradients[name] - plain[name] for name in plain}
    assert max(float(g.abs().max()) for g in pulled.values()) > 1e-3
    angle, length = apart(pulled, by_autograd(model, ascent))
    assert angle < 1e-7
    assert length < 1e-4


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_discrepancy_and_its_gradient_against_two_loops(unbiased: bool) -> None:
    for seed, (n, size) in enumerate([(2, 3), (4, 30), (7, 5)]):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, size, generator=generator, requires_grad=True)
        y = torch.randn(n, size, generator=generator) * 2 + 0.5
        ours, slow = squared_mmd(x, y, unbiased), _slow_mmd(x, y, unbiased)
        torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (ours, slow)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n", [4, 8, 32])
def test_two_samples_of_one_distribution_are_at_no_distance_on_average(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    draws = torch.stack([squared_mmd(*torch.randn(2, n, 20, generator=generator)) for _ in range(400)])
    error = float(draws.std()) / 20
    assert abs(float(draws.mean())) < 4 * error
    assert error < 0.02
    # The same in a place that is not: the estimator can say more than zero.
    apart = [squared_mmd(*(torch.randn(2, n, 20, generator=generator) + torch.tensor([[[0.0]], [[1.0]]]))) for _ in range(50)]
    assert float(torch.stack(apart).mean()) > 20 * error


@pytest.mark.parametrize(("n", "documented"), [(4, 1.54), (32, 0.19)])
def test_the_biased_estimator_has_an_offset_that_grows_as_the_batch_shrinks(n: int, documented: float) -> None:
    """In many dimensions all distances are alike, and it is 2 (5 − Σ_i exp(−4 / 2^i)) / n."""
    generator = torch.Generator().manual_seed(n)
    mean = float(torch.stack([squared_mmd(*torch.randn(2, n, 4000, generator=generator), False) for _ in range(20)]).mean())
    assert mean == pytest.approx(2 * (5 - sum(math.exp(-4 / 2**i) for i in range(5))) / n, rel=0.03)
    assert mean == pytest.approx(documented, abs=0.01)


def test_points_that_are_all_the_same_are_at_no_distance() -> None:
    """Nothing supervised would give nothing but zeros; no NaN comes of it."""
    for unbiased in (True, False):
        assert float(squared_mmd(torch.zeros(4, 3), torch.zeros(4, 3), unbiased)) == 0.0


def test_a_learning_rate_of_zero_leaves_the_weights_as_they_are(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("repnoise", lr=0.0)
    before = running.weights()
    for number in range(3):
        running.take(*pair, RepNoiseSettings(**STRONG), number=number)
    assert all(torch.equal(before[name], weight) for name, weight in running.weights().items())


def test_both_harmful_passes_see_the_same_dropout(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("repnoise", dropout=0.3, accumulation=4)
    seen: list[torch.Tensor] = []
    running.engine.module.get_base_model().model.layers[1].mlp.register_forward_hook(
        lambda _, __, output: seen.append(output.detach())
    )
    running.take(*pair, RepNoiseSettings(**STRONG))
    assert len(seen) == 12  # four harmful, then aligned and harmful in turn
    for first, second in zip(seen[:4], seen[5::2], strict=True):
        assert torch.equal(first, second)
    running.take(*pair, RepNoiseSettings(**STRONG), number=1)
    assert not torch.equal(seen[0], seen[12])


def test_checkpointing_changes_nothing(bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Apart) -> None:
    plain, recomputed = (
        bench("repnoise", checkpointing=flag, dropout=0.2).take(*pair, RepNoiseSettings(**STRONG)).gradients
        for flag in (False, True)
    )
    assert max(apart(recomputed, plain)) < 1e-6


def test_it_takes_three_passes_and_leaves_no_hook(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("repnoise", accumulation=4)
    hooks = [len(module._forward_hooks) for module in running.engine.module.modules()]
    assert running.take(*pair).step.forwards == 12
    assert [len(module._forward_hooks) for module in running.engine.module.modules()] == hooks


def test_a_model_without_mlps_is_refused() -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OPTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=8))
    with pytest.raises(ModelError, match=r"^OPTForCausalLM has no mlp module under any of the names"):
        repnoise_fits(model, {})
