from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from pharmacist_ray.errors import ModelError, ResourceError
from pharmacist_ray.models.budget import TokenBudget
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.load import LoraConfig, add_lora


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 48, (length,), generator=generator).tolist() for length in (3, 9, 1, 6, 6, 2, 12)]


def test_batches_change_no_answer_and_keep_the_order(tiny: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = tiny()
    alone = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=1)
    assert len(set(alone)) > 3, "the answers must differ for the order to show"
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=4) == alone
    assert generate(model, tokenizer, prompts[::-1], max_new_tokens=12, batch_size=3) == alone[::-1]


def test_with_little_memory_the_answers_are_the_same_and_what_cannot_fit_is_one_line(
    tiny: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model, budget = tiny(), TokenBudget()
    alone = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=1)
    room = 2

    def measure(_: Any, __: Any, given: dict[str, Any]) -> None:
        if len(given["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(measure, with_kwargs=True)
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=7, budget=budget) == alone
    assert budget.tokens <= 2 * 24 + 24
    room = 0
    with pytest.raises(
        ResourceError, match=r"^prompt 6 of 7 cannot be answered: its 24 tokens do not fit in memory, even alone "
    ):
        generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=7, budget=budget)


def test_one_prompt_equals_plain_greedy_search(tiny: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = tiny()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        steps = ids
        for _ in range(8):
            steps = torch.cat([steps, model(steps).logits[:, -1:].argmax(-1)], dim=1)
            if int(steps[0, -1]) == 2:
                break
        assert torch.equal(whole, steps)
        want = tokenizer.decode(steps[0, len(prompt) :], skip_special_tokens=True)
        assert generate(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1) == [want]


def test_an_answer_ends_at_eos_and_shows_no_special_token(tiny: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = tiny()
    free = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=8)
    index = next(i for i, text in enumerate(free) if len(set(text.split())) > 3)
    words = free[index].split()
    stop = next(i for i, word in enumerate(words) if i and word not in words[:i])
    end = tokenizer.convert_tokens_to_ids(words[stop])
    by_template = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=8, end_id=end)
    model.generation_config.eos_token_id = [2, end]  # as chat models name their end of a turn
    stopped = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=8)
    assert stopped[index].split() == words[: stop + 1]
    assert not any("<" in text for text in stopped)
    assert by_template == stopped


def test_the_models_sampling_defaults_are_ignored_and_kept(tiny: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = tiny()
    want = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=4)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=10)
    model.generation_config = own
    model.train()
    assert generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=4) == want
    assert model.generation_config is own
    assert all(module.training for module in model.modules())


def test_an_adapter_takes_part(tiny: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    base = generate(tiny(), tokenizer, prompts, max_new_tokens=8, batch_size=4)
    model = add_lora(tiny(), LoraConfig(r=4), seed=0)
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=4) == base  # B = 0
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.5, generator=torch.Generator().manual_seed(0))
    changed = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=4)
    assert changed != base
    assert changed == generate(model.merge_and_unload(), tokenizer, prompts, max_new_tokens=8, batch_size=2)


def test_nothing_in_nothing_out(tiny: Any, tokenizer: Any) -> None:
    assert generate(tiny(), tokenizer, [], max_new_tokens=4, batch_size=2) == []
    with pytest.raises(ModelError, match="prompt 1 has no tokens to continue"):
        generate(tiny(), tokenizer, [[5], []], max_new_tokens=4, batch_size=2)
