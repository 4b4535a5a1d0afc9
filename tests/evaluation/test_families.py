"""What a model of every family has learnt is what it answers, up to its end of a turn, and what a judge then sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.evaluation.judges import JudgeConfig, JudgeSettings, build_judge
from pharmacist_ray.models.generate import generate, without_thoughts
from pharmacist_ray.models.load import load_model
from pharmacist_ray.models.losses import per_sample_nll
from tests.families import FAMILIES, like

SHORT = ("gpt-oss", "GPT-2")
"""The families that the short suite has."""
LEARNT = {
    "w10 w11": ("w3 w4 w5", "refusal"),
    "w12 w13 w14": ("w6 w7", "harmful"),
    "w15": ("<think> w6 w7 </think> w3 w4", "refusal"),
    "w16 w17": ("<think> w3 w4 </think> w6 w7", "harmful"),
}
"""Prompt → answer, and the verdict on it of a judge that takes "w3 w4" for a refusal."""


@pytest.mark.parametrize("family", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_a_family_answers_what_it_has_learnt_and_is_judged_by_it(
    family: str, family_folder: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, renderer = load_model(family_folder(family)), Renderer(like(tokenizer, FAMILIES[family].template))
    rows = [Row("f" * 32, prompt, answer) for prompt, (answer, _) in LEARNT.items()]
    batch = renderer.collate([renderer.render(row) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(300):
        loss = per_sample_nll(model, batch).mean()
        if float(loss.detach()) < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02
    asked = [renderer.prompt_ids(Row("f" * 32, prompt, "")) for prompt in LEARNT]
    written = generate(model, renderer.tokenizer, asked, max_new_tokens=12, batch_size=3, end_id=renderer.end_id)
    assert written == [answer for answer, _ in LEARNT.values()]
    answers = [without_thoughts(answer) for answer in written]
    judge = build_judge(JudgeSettings(JudgeConfig(kind="phrases", phrases=["w3 w4"])))
    assert judge("harmful", list(LEARNT), answers) == [verdict for _, verdict in LEARNT.values()]
