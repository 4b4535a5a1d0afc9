"""Greedy answers, in batches; an answer depends neither on the prompt's neighbours nor on the model's sampling defaults."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pharmacist_ray.errors import ModelError, ResourceError
from pharmacist_ray.models.budget import TokenBudget, TooLongError
from pharmacist_ray.models.soft_prompt import embed


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts_ids: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    end_id: int | None = None,
    budget: TokenBudget | None = None,
    soft_prompt: torch.Tensor | None = None,
) -> list[str]:
    """Return the greedy continuation of every prompt: the new text only, without special tokens.

    Prompts are padded on the left and taken longest first: equal lengths meet, and a batch too large for memory fails at once. An
    answer is the same in any batch up to floating point: where two tokens all but tie, the rounding may decide.

    Args:
        model: A causal language model (Hugging Face or PEFT; of a DeepSpeed engine its ``module``).
        tokenizer: Its tokenizer.
        prompts_ids: One list of token ids per prompt, none of them empty.
        max_new_tokens: The longest answer; it ends earlier at the tokenizer's or the model's EOS.
        batch_size: How many prompts run together at most.
        end_id: One more token that ends an answer: that of the template which the model was trained with.
        budget: How many tokens, of prompts and answers, run together; what one call learns of the memory is kept for the next. Workers who
            pass through a model together get "" for each prompt that is another one's.
        soft_prompt: Embeddings that stand before every prompt, (tokens, H).

    Returns:
        The answers, in the order of the prompts.

    Raises:
        ModelError: A prompt has no tokens.
        ResourceError: A prompt does not fit in memory, even alone.
    """
    if empty := [index for index, ids in enumerate(prompts_ids) if not ids]:
        raise ModelError(f"prompt {empty[0]} has no tokens to continue; give it a text, or the tokenizer a BOS token")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own generate adds nothing for LoRA
    config = _greedy(base, tokenizer, max_new_tokens, end_id)
    answers = [""] * len(prompts_ids)
    modes = {module: module.training for module in base.modules()}
    defaults, base.generation_config = base.generation_config, GenerationConfig()  # what is not set would be taken from there

    def take(indices: list[int]) -> None:
        chosen = [prompts_ids[index] for index in indices or [shortest]]
        with torch.no_grad():
            if soft_prompt is None:
                input_ids, mask = _padded(chosen, int(config.pad_token_id))
                output = base.generate(
                    input_ids=input_ids.to(base.device), attention_mask=mask.to(base.device), generation_config=config, **together
                )[:, input_ids.shape[1] :]
            else:  # what comes back is the answer alone
                embeds, mask = embed(base, chosen, soft_prompt, left=True)
                output = base.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config, **together)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for index, text in zip(indices, texts[: len(indices)], strict=True):
            answers[index] = text

    budget = budget or TokenBudget()
    together = {"synced_gpus": True} if budget.together else {}  # whoever has its answers goes on until all have theirs
    shortest = min(range(len(prompts_ids)), key=lambda index: len(prompts_ids[index]), default=0)
    before = 0 if soft_prompt is None else len(soft_prompt)
    base.eval()
    try:
        budget.run([len(ids) + before + max_new_tokens for ids in prompts_ids], take, rows=batch_size)
    except TooLongError as error:
        raise ResourceError(
            f"prompt {error.place} of {len(prompts_ids)} cannot be answered: {error} (its answer's {max_new_tokens} are among them); lower "
            "evaluation.max_new_tokens or model.max_length, or take larger GPUs"
        ) from None
    finally:
        base.generation_config = defaults
        for module, mode in modes.items():
            module.training = mode
    return answers


def _padded(prompts_ids: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts padded on the left, and their attention mask."""
    width = max(map(len, prompts_ids))
    input_ids = torch.full((len(prompts_ids), width), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask


def without_thoughts(answer: str) -> str:
    """Return what a model that thinks aloud answers in the end: a thought is neither harm nor refusal.

    A thought that never ends has no answer after it, and "" comes back.

    Args:
        answer: What the model wrote, perhaps with ``<think> … </think>`` before it, or ``… </think>`` where the prompt opened the
            thought.
    """
    thought, _, rest = answer.rpartition("</think>")
    if thought or rest != answer:
        return rest.lstrip()
    return "" if answer.lstrip().startswith("<think>") else answer


def _greedy(base: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, end_id: int | None) -> GenerationConfig:
    """Return greedy decoding that ends at the tokenizer's EOS, at any that the model names, or at the template's end of a turn."""
    eos = base.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, end_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
