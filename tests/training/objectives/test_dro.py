from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pharmacist_ray.data.render import IGNORE, Batch, Renderer
from pharmacist_ray.models.soft_prompt import embed
from pharmacist_ray.training.objectives.dro import Directions, DroSettings, directions_of, dro, prompt_loss, questions_of, states

SETTINGS = DroSettings(text="w1 w2 w3", epochs=3, batch_size=4, answer_tokens=4, lr=0.05)


@pytest.fixture
def sets(batch_of: Callable[..., Batch]) -> dict[str, Batch]:
    return {"safe": batch_of(8, seed=12), "ordinary": batch_of(8, seed=13)}


def _directions(d: int = 12, m: int = 3) -> Directions:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(d, m, generator=generator)).Q.T
    return Directions(rows, *(torch.randn(m, generator=generator) @ rows for _ in range(2)))


def test_where_nothing_has_moved_the_loss_is_that_of_two_coins() -> None:
    loss = prompt_loss(torch.zeros(5, 12), torch.tensor([0.0, 1, 1, 0, 1]), _directions(), DroSettings())
    assert float(loss) == pytest.approx(1.01 * math.log(2))


def test_the_loss_is_that_of_the_paper_in_a_completed_basis() -> None:
    directions, generator = _directions(), torch.Generator().manual_seed(1)
    moved, labels = torch.randn(6, 12, generator=generator), torch.tensor([0.0, 1, 1, 0, 1, 0])
    basis = torch.linalg.qr(torch.cat([directions.components.T, torch.randn(12, 9, generator=generator)], 1)).Q
    others = (moved @ basis)[:, 3:]
    expected = 0.0
    for weight, slope in ((1.0, directions.refusal), (0.5, directions.harm)):
        p = torch.sigmoid(moved @ slope)
        expected += weight * float(-(labels * p.log() + (1 - labels) * (1 - p).log()).mean())
    expected += 0.2 * float(others.square().mean())
    assert float(prompt_loss(moved, labels, directions, DroSettings(harm=0.5, hold=0.2))) == pytest.approx(expected, rel=1e-5)


def test_directions_tell_refused_from_answered_and_harmful_from_harmless() -> None:
    generator = torch.Generator().manual_seed(2)
    harmless, refused = torch.arange(80) % 2 == 0, torch.arange(80) % 4 < 2
    x = 0.1 * torch.randn(80, 10, generator=generator)
    x[harmless, 3] += 1
    x[~refused, 5] += 1
    found = directions_of(x, refused, harmless, 2)
    assert torch.allclose(found.components @ found.components.T, torch.eye(2), atol=1e-5)
    assert int(found.harm.argmax()) == 3
    assert int(found.refusal.argmax()) == 5
    for one_kind in (torch.zeros(80, dtype=torch.bool), torch.ones(80, dtype=torch.bool)):
        same = directions_of(x, one_kind, harmless, 2)
        assert torch.equal(same.refusal, same.harm)


def test_states_are_those_of_each_question_alone(adapted: Callable[..., Any], sets: dict[str, Batch]) -> None:
    model = adapted().get_base_model().eval()
    questions = questions_of([sets["safe"]])
    starts = (sets["safe"].labels != IGNORE).int().argmax(1).tolist()
    assert list(map(len, questions)) == starts
    prompt = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = states(model, questions, prompt)
        for row, ids in enumerate(questions):
            embeds, _ = embed(model, [ids], prompt, left=True)
            alone = model.model(inputs_embeds=embeds).last_hidden_state[0, -1]
            assert torch.allclose(found[row], alone, atol=1e-5)
        assert torch.allclose(
            states(model, questions[:1], None)[0], model.model(torch.tensor(questions[:1])).last_hidden_state[0, -1], atol=1e-5
        )


def test_the_prompt_moves_questions_as_it_should_and_the_model_stays(
    bench: Callable[..., Any], sets: dict[str, Batch], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[dro.__module__], "is_refusal", lambda answer: "w1" in answer)
    running = bench("dro", dropout=0.3)
    before = running.weights()
    modes = {name: one.training for name, one in running.engine.module.named_modules()}
    renderer = Renderer(tokenizer, "plain", 64)
    settings = SETTINGS.model_copy(update={"epochs": 30})
    step = running.step(sets["safe"], None, settings, **sets, renderer=renderer)
    dro(step)
    assert all(torch.equal(before[name], one) for name, one in running.weights().items())
    assert modes == {name: one.training for name, one in running.engine.module.named_modules()}
    model = running.engine.module.get_base_model().eval()
    start = model.get_input_embeddings()(torch.tensor(tokenizer("w1 w2 w3", add_special_tokens=False)["input_ids"]))
    assert step.state["prompt"].shape == start.shape
    assert not torch.allclose(step.state["prompt"], start)
    assert step.measured["prompt_loss"] < 0.9 * 1.01 * math.log(2)
    again = bench("dro", dropout=0.3).step(sets["safe"], None, settings, **sets, renderer=renderer)
    dro(again)
    assert torch.equal(again.state["prompt"], step.state["prompt"])
