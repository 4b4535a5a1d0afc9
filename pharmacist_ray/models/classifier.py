"""Sequence classifiers on a prompt and its answer, such as moderation models: load one, write its input, read its logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from pharmacist_ray.errors import ModelError, unknown_name

if TYPE_CHECKING:  # seconds to import, and only whoever loads a classifier needs it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_classifier(path: str, what: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a sequence classifier and its tokenizer, from safetensors and without running code from the folder.

    Args:
        path: Its folder or hub id.
        what: What it is here, for errors.

    Raises:
        ModelError: It cannot be loaded that way, or weights are missing: transformers would fill them with random numbers and the
            verdicts would be noise.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise ModelError(
            f"{what} {path} has no *.safetensors file; convert its weights with save_pretrained (pickle is not loaded)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{what} {path} is no sequence classifier that can be loaded: {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{what} {path} lacks the weights {', '.join(missing[:3])}: it is no trained sequence classifier")
    return model.eval(), tokenizer


def fill_template(template: str, prompt: str, answer: str) -> str:
    """Fill ``{prompt}`` and ``{answer}`` in one go, so that a prompt with ``{answer}`` in it stays what it is."""
    head, _, rest = template.partition("{prompt}")
    if "{answer}" in head:
        head, _, middle = head.partition("{answer}")
        return head + answer + middle + prompt + rest
    middle, _, tail = rest.partition("{answer}")
    return head + prompt + middle + answer + tail


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, *, append_eos: bool = True) -> list[int]:
    """Return a text as ids, cut on the right. Special tokens written out in the text are text: the text is hostile.

    Args:
        tokenizer: The classifier's.
        text: What it is to read.
        max_length: The longest input in tokens.
        append_eos: End with the end-of-sequence token, if there is one.
    """
    ids = list(tokenizer(text, split_special_tokens=True)["input_ids"])
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids[:max_length]


def unsafe_places(config: Any, labels: Sequence[str], where: str) -> list[int]:
    """Return the places of labels among a classifier's.

    Args:
        config: The classifier's configuration.
        labels: Those that say unsafe.
        where: The key that has them, for the error.

    Raises:
        ConfigError: It has no such label.
    """
    names = [str(name) for _, name in sorted(config.id2label.items())]
    for label in labels:
        if label not in names:
            raise unknown_name(f"label of {where}", label, names)
    return [names.index(label) for label in labels]


@torch.no_grad()
def harm(model: PreTrainedModel, samples: list[list[int]], unsafe: Sequence[int]) -> torch.Tensor:
    """Return the probability of harm of each sample, (B,) in float64.

    It is the sum over the unsafe labels, or the largest where each label has a probability of its own.

    Args:
        model: The classifier.
        samples: Token ids of B samples.
        unsafe: Places of the labels that say unsafe.
    """
    logits = classifier_logits(model, samples).double()
    if model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1:
        return torch.sigmoid(logits[:, list(unsafe)]).amax(dim=1)
    return torch.softmax(logits, dim=1)[:, list(unsafe)].sum(dim=1)


def classifier_logits(model: PreTrainedModel, samples: list[list[int]]) -> torch.Tensor:
    """Return a float32 logit per sample and label, (B, labels), differentiable where gradients are on.

    Decoders pool at the last token that is not the padding token, which they find by its id. The padding token is therefore one
    that no sample of the batch contains: with the end-of-sequence token as padding, as many tokenizers have it, they would pool
    one token too early.

    Args:
        model: The classifier.
        samples: Token ids of B samples.
    """
    present = {token for sample in samples for token in sample}
    pad = model.config.pad_token_id
    if pad is None or pad in present:
        pad = next(token for token in range(model.config.vocab_size) if token not in present)
    width = max(len(sample) for sample in samples)
    input_ids = torch.full((len(samples), width), pad, dtype=torch.long)
    mask = torch.zeros((len(samples), width), dtype=torch.long)
    for index, sample in enumerate(samples):
        input_ids[index, : len(sample)] = torch.tensor(sample)
        mask[index, : len(sample)] = 1
    before, model.config.pad_token_id = model.config.pad_token_id, pad
    try:
        logits: torch.Tensor = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
    finally:
        model.config.pad_token_id = before
    return logits.float()
