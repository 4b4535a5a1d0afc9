from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.models.soft_prompt import embed, load_prompt, save_prompt

QUESTIONS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18]]


@pytest.fixture
def model(tiny: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny().eval()


@pytest.fixture
def prompt(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(3)) * 0.3


def test_embedded_tokens_are_answered_as_the_same_tokens_in_the_prompt_are(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = [20, 21, 22]
    known = model.get_input_embeddings()(torch.tensor(before)).detach()
    settings = {"max_new_tokens": 12, "batch_size": 3}
    told = generate(model, tokenizer, [before + ids for ids in QUESTIONS], **settings)
    assert generate(model, tokenizer, QUESTIONS, soft_prompt=known, **settings) == told
    assert generate(model, tokenizer, QUESTIONS, **settings) != told


def test_an_answer_does_not_hang_on_its_neighbours(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: torch.Tensor
) -> None:
    together = generate(model, tokenizer, QUESTIONS, max_new_tokens=12, batch_size=4, soft_prompt=prompt)
    alone = [generate(model, tokenizer, [ids], max_new_tokens=12, batch_size=1, soft_prompt=prompt)[0] for ids in QUESTIONS]
    assert together == alone


def test_peft_reads_it_and_answers_the_same(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: torch.Tensor, model_folder: Path, tmp_path: Path
) -> None:
    save_prompt(prompt, tmp_path, model, str(model_folder))
    assert torch.equal(load_prompt(str(tmp_path)), prompt)
    tuned = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    for ids in QUESTIONS:
        written = tuned.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=8, do_sample=False, num_beams=1
        )
        said = tokenizer.decode(written[0][len(ids) :], skip_special_tokens=True)
        assert generate(model, tokenizer, [ids], max_new_tokens=8, batch_size=1, soft_prompt=prompt) == [said]


@pytest.mark.parametrize("left", [True, False])
def test_padding_comes_before_the_prompt_or_after_the_question(model: LlamaForCausalLM, prompt: torch.Tensor, left: bool) -> None:
    embeds, mask = embed(model, QUESTIONS, prompt, left=left)
    table = model.get_input_embeddings().weight
    assert (embeds.shape, mask.shape) == ((4, 10, table.shape[1]), (4, 10))
    for row, ids in enumerate(QUESTIONS):
        real = embeds[row][mask[row].bool()]
        assert torch.equal(real, torch.cat([prompt, table[ids]]))
        assert bool(mask[row, -1 if left else 0])
    bare, _ = embed(model, QUESTIONS[:1], None, left=left)
    assert torch.equal(bare[0], table[QUESTIONS[0]])


def test_a_ref_knows_its_prompt(tmp_path: Path, model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    ref = ModelRef("base").trained_in(tmp_path / "run", "lora", prompt=True)
    assert (ref.adapters, ref.soft_prompt) == ((str(tmp_path / "run" / "adapter"),), str(tmp_path / "run" / "prompt"))
    save_prompt(prompt, tmp_path / "run" / "prompt", model, "base")
    found = ref.loaded_prompt()
    assert found is not None
    assert torch.equal(found, prompt)
    assert ModelRef("base").loaded_prompt() is None
