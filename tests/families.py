"""The families of models that users bring: what the tests of each family are made of, and the table of families in the documentation.

A family has a tiny model from its own configuration class, and a tokenizer whose chat template behaves as its own does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the documentation reads the table, and needs no model
    from transformers import PreTrainedTokenizerFast

OBJECTIVES = ("sft", "vaccine", "t_vaccine", "repnoise", "booster", "booster+vaccine")


@dataclass(frozen=True)
class Template:
    """How a family's chat template writes a question and its answer."""

    text: str
    control: tuple[str, ...]
    """Its control tokens."""
    end: str
    """Which of them ends a turn."""
    before: str
    """What stands before the answer to the question ``w0 w1``."""
    system: str = ""
    """What a system prompt ``w7`` adds to it; empty where the template takes none."""


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.first %}{{ first }}{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    "Llama 2": Template(
        "{% set first = '' %}{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}" + _INST,
        (), "<eos>", "<bos>[INST] w0 w1 [/INST]", "<<SYS>>\nw7\n<</SYS>>\n\n",
    ),
    "Llama 3": Template(
        "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ day }}\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
        "<bos><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "w0 w1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "w7",
    ),
    "Qwen2.5, SmolLM2": Template(
        _CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_start|>user\nw0 w1<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nw7<|im_end|>\n",
    ),
    "Qwen3": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_start|>user\nw0 w1<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nw7<|im_end|>\n",
    ),
    "Gemma 2": Template(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% set first = '' %}" + _GEMMA,
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<bos><start_of_turn>user\nw0 w1<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Gemma 3": Template(
        "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}" + _GEMMA,
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<bos><start_of_turn>user\nw0 w1<end_of_turn>\n<start_of_turn>model\n",
        "w7\n\n",
    ),
    "Phi-3": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", "<|user|>\nw0 w1<|end|>\n<|assistant|>\n",
        "<|system|>\nw7<|end|>\n",
    ),
    "Phi-4": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>",
        "<|im_start|>user<|im_sep|>w0 w1<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>w7<|im_end|>",
    ),
    "Mistral": Template("{% set first = '' %}" + _INST, (), "<eos>", "<bos>[INST] w0 w1 [/INST]"),
    "gpt-oss": Template(
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% if messages[0].role == 'system' %}"
        "<|start|>developer<|message|># Instructions\n\n{{ messages[0].content }}<|end|>{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}<|start|>{{ m.role }}"
        "{% if m.role == 'assistant' %}<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), "<|return|>",
        "<|start|>system<|message|>Current date: 2024-07-26<|end|><|start|>user<|message|>w0 w1<|end|><|start|>assistant"
        "<|channel|>final<|message|>",
        "<|start|>developer<|message|># Instructions\n\nw7<|end|>",
    ),
}  # fmt: skip
"""By the family, or families, that have it. A Mistral's drops a system prompt without a word, as its first versions do."""


def like(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a template and its control tokens; its EOS stays what it was, as Gemma's and Phi's do."""
    from tokenizers import AddedToken

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<think>", "</think>"])  # which are plain words to a tokenizer that has them
    if template:
        control = [AddedToken(token, special=True) for token in TEMPLATES[template].control]
        other.add_special_tokens({"additional_special_tokens": control})
        other.chat_template = TEMPLATES[template].text
    return other


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    config: str
    """Its configuration class in transformers."""
    settings: dict[str, Any]
    """What a tiny model of the family has."""
    template: str
    """Its chat template; empty where it has none."""
    adapted: frozenset[str]
    """The modules that ``all-linear`` adapts."""
    cannot: dict[str, str] = field(default_factory=dict)
    """Objective → the error that says it before work begins."""


_DENSE = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_FUSED = frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
_SEES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_HEAD = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2}

FAMILIES = {
    "Llama 2": Family("LlamaConfig", _TEXT | {"num_key_value_heads": 4}, "Llama 2", _DENSE),
    "Llama 3": Family("LlamaConfig", _TEXT | {"rope_parameters": _LLAMA_3}, "Llama 3", _DENSE),
    "SmolLM2": Family("LlamaConfig", _TEXT | {"tie_word_embeddings": True}, "Qwen2.5, SmolLM2", _DENSE),
    "Qwen2.5": Family("Qwen2Config", _TEXT, "Qwen2.5, SmolLM2", _DENSE),
    "Qwen3": Family("Qwen3Config", _TEXT | _HEAD, "Qwen3", _DENSE),
    "Qwen3-MoE": Family(
        "Qwen3MoeConfig", _TEXT | _HEAD | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16}, "Qwen3", _ATTENTION
    ),
    "Mistral": Family("MistralConfig", _TEXT, "Mistral", _DENSE),
    "Mixtral": Family("MixtralConfig", _TEXT | _EXPERTS | {"num_local_experts": 4}, "Mistral", _ATTENTION),
    "Gemma 2": Family("Gemma2Config", _TEXT | _HEAD, "Gemma 2", _DENSE),
    "Gemma 3, text": Family("Gemma3TextConfig", _TEXT | _HEAD, "Gemma 3", _DENSE),
    "Gemma 3, with images": Family(
        "Gemma3Config", {"text_config": _TEXT | _HEAD, "vision_config": _SEES, "mm_tokens_per_image": 4}, "Gemma 3", _DENSE
    ),
    "Phi-3": Family("Phi3Config", _TEXT, "Phi-3", _FUSED),
    "Phi-4": Family("Phi3Config", _TEXT | {"num_key_value_heads": 1}, "Phi-4", _FUSED),
    "gpt-oss": Family("GptOssConfig", _TEXT | _HEAD | _EXPERTS | {"num_local_experts": 4}, "gpt-oss", _ATTENTION),
    "GPT-2": Family("GPT2Config", _GPT2, "", frozenset({"c_attn", "c_proj", "c_fc"})),
}
"""By name."""


def table() -> str:
    """Return the families as a table in Markdown: what the tests of this repository hold every one of them to."""
    heads = (
        "family",
        "configuration",
        "a turn ends with",
        "system prompt",
        "`all-linear` adapts",
        "trained by",
        "scored, asked, judged",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for name, family in FAMILIES.items():
        template = TEMPLATES.get(family.template)
        can = [f"`{objective}`" for objective in OBJECTIVES if objective not in family.cannot]
        end = "its EOS" if not template or template.end == "<eos>" else f"`{template.end}`".replace("|", "\\|")
        cells = (
            name,
            f"`{family.config}`",
            end if template else f"{end}, in Alpaca's frame",
            "yes" if template and template.system else "refused",
            "attention" if family.adapted == _ATTENTION else "attention, MLP",
            "every objective" if len(can) == len(OBJECTIVES) else ", ".join(can),
            "yes",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
