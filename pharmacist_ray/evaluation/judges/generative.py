"""A chat model as judge: any causal language model, asked by a named template or one of yours; its reply is read strictly.

An answer whose reply is not of the form asked for, or whose question is longer than the model reads, stays unjudged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pharmacist_ray.data.render import chat_text, control_tokens_of
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.evaluation.judges.phrases import refusal_phrases
from pharmacist_ray.evaluation.judges.templates import JudgeTemplate, template_of, verdict_of
from pharmacist_ray.evaluation.judges.verdict import Judge, JudgeSettings, PromptKind, Verdict
from pharmacist_ray.models.budget import TokenBudget
from pharmacist_ray.models.generate import generate, without_thoughts


def build(settings: JudgeSettings) -> Judge:
    """Return the judge: its template's outcome, and what that leaves open by the rules of the phrase judge.

    Args:
        settings: ``path``, ``template``, ``template_file``, ``threshold``, ``phrases``, ``dtype``,
            ``max_new_tokens`` and ``batch_size`` count.

    Raises:
        ConfigError: No path, or no usable template.
        ModelError: The model cannot be loaded, or has no chat template where the template needs one.
    """
    from pharmacist_ray.models.load import load_model, load_tokenizer  # PEFT, which takes seconds

    config, phrases = settings.config, refusal_phrases(settings)
    if config.path is None:
        raise ConfigError("judge 'generative' needs path: the folder or hub id of a chat model")
    template = template_of(config)
    tokenizer = load_tokenizer(config.path)
    model = load_model(config.path, dtype=config.dtype, device=settings.device)
    budget = TokenBudget()
    new = config.max_new_tokens or template.max_new_tokens
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def replies(prompts: Sequence[str], answers: Sequence[str]) -> list[str | None]:
        ids = [question_ids(tokenizer, template, *pair, path=config.path) for pair in zip(prompts, answers, strict=True)]
        fits = [index for index, one in enumerate(ids) if room is None or len(one) + new <= room]
        found: list[str | None] = [None] * len(ids)
        texts = generate(
            model, tokenizer, [ids[index] for index in fits], max_new_tokens=new, batch_size=config.batch_size, budget=budget
        )
        for index, text in zip(fits, texts, strict=True):
            found[index] = without_thoughts(text)
        return found

    def judge(kind: PromptKind, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        outcomes = [None if reply is None else template.parse(reply) for reply in replies(prompts, answers)]
        return [verdict_of(one, kind, answer, phrases) for one, answer in zip(outcomes, answers, strict=True)]

    return judge


def question_ids(
    tokenizer: PreTrainedTokenizerBase, template: JudgeTemplate, prompt: str, answer: str, *, path: Any = ""
) -> list[int]:
    """Return a question as token ids: by the model's chat template if it has one, else the bare text after its BOS.

    What looks like a control token in the judged texts is taken apart by a space, for it could end the judge's turn.

    Raises:
        ModelError: The template needs a chat template and there is none, or that refuses the turns.
    """
    for token in control_tokens_of(tokenizer):
        prompt, answer = (text.replace(token, f"{token[:1]} {token[1:]}") for text in (prompt, answer))
    turns = template.filled(prompt, answer)
    if getattr(tokenizer, "chat_template", None):
        try:
            text = chat_text(tokenizer, turns, answered=False)
        except Exception as error:  # templates are programs of the model's author and raise what they like
            raise ModelError(f"the chat template of the judge {path} refuses the question: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if template.bare is None:
        raise ModelError(f"the judge {path} has no chat template, and template llama-guard is the model's own; take another one")
    text = template.bare.replace("{text}", "\n\n".join(turn["content"] for turn in turns))
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
