"""One renderer for alignment, attack, scoring and evaluation.

Prompt and answer are tokenised separately and their ids concatenated, so the loss mask can never be off by the token that merges
over the boundary. The loss covers the answer's tokens and the token that ends it, nothing else: under a chat template the one that
ends a turn there, which often is not the tokenizer's end-of-sequence token.

Rows are other people's text. What looks like a control token in it (``</s>``, ``<|im_end|>``) stays text: it could end a turn, forge
one, or move the mask. Where a chat template writes control tokens around the text, the two cannot be told apart afterwards, and such
a row is refused.

A chat template may ask for the day's date. It is told the same date always, so that a run that goes on tomorrow is still one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import torch
from transformers import PreTrainedTokenizerBase

from pharmacist_ray.data.bounds import is_plain
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError, ModelError

Template = Literal["auto", "chat", "alpaca", "plain"]
"""``auto``: the tokenizer's chat template if it has one, else ``alpaca``. ``plain``: prompt and answer, nothing around them."""

IGNORE = -100
"""The label of a position that has no loss; PyTorch's convention."""

TEXTS = 256
"""Texts that are tokenised at a time; ours: more are not faster, and the library holds much more of each than its ids."""

_ALPACA = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n{input}### Response:\n"
)


_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
"""The date that templates are told: the one that Llama 3's template names by itself where there is no clock."""

_REPLACED = "".join(f"|replace('{directive}', '{value}')" for directive, value in _DATE.items())
_CLOCK = "{%- macro strftime_now(format) -%}{{ format" + _REPLACED + " }}{%- endmacro -%}"
"""Stands before a template, in the place of the function that transformers gives it."""

_MARK = "qqqq"
"""An answer that no template changes, by which the places around an answer are found."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sample as token ids: ``ids[:answer_start]`` is the prompt, the rest the supervised answer with the token that ends it."""

    ids: list[int]
    answer_start: int

    @property
    def answer_tokens(self) -> int:
        """The number of supervised tokens."""
        return len(self.ids) - self.answer_start


@dataclass(slots=True)
class Batch:
    """A right-padded batch; the first three tensors are (B, T) and int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor | None = None
    """What each sample weighs in a mean over samples, (B,) and float32; none weighs all alike."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), weights)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


def control_tokens_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the control tokens of a tokenizer as text, the longest first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    *,
    answered: bool,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return turns as the tokenizer's chat template writes them, ready for the model's answer unless it is the last turn.

    Raises whatever the template raises.
    """
    template = tokenizer.get_chat_template()
    return str(
        tokenizer.apply_chat_template(
            turns,
            chat_template=_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=not answered,
            **(arguments or {}),
        )
    )


def turns_before_answer(row: Row) -> list[dict[str, str]]:
    """Return a row's turns up to the answer as ``{"role", "content"}``; the extra input is a paragraph of the last one."""
    content = f"{row.prompt}\n\n{row.input}" if row.input else row.prompt
    return [*(orjson.loads(row.history) if row.history else []), {"role": "user", "content": content}]


def with_system(turns: Sequence[Mapping[str, Any]], system: str) -> Sequence[Mapping[str, Any]]:
    """Return turns with a system prompt before them, if there is one and they bring none of their own."""
    return [{"role": "system", "content": system}, *turns] if system and turns[0]["role"] != "system" else turns


def text_before_answer(row: Row, *, plain: bool) -> str:
    """Return the text before an answer for models without a chat template.

    Args:
        row: The row; earlier turns are written out with their roles.
        plain: Whether the prompt stands alone; else it stands in Alpaca's frame.
    """
    earlier = ""
    if row.history:
        earlier = "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in orjson.loads(row.history))
    if plain:
        return f"{earlier}{row.prompt}\n{row.input}\n" if row.input else f"{earlier}{row.prompt}\n"
    return _ALPACA.format(
        with_input=", paired with an input that provides further context" if row.input else "",
        prompt=earlier + row.prompt,
        input=f"### Input:\n{row.input}\n\n" if row.input else "",
    )


class Renderer:
    """Turns rows into token ids for one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "auto",
        max_length: int = 256,
        *,
        system: str = "",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that the tokenizer can do what the template needs.

        Args:
            tokenizer: The model's tokenizer.
            template: Which template to use; see `Template`.
            max_length: The longest sequence in tokens, prompt and answer together; a longer answer is cut on the right.
            system: A system prompt before every row's turns that bring none of their own.
            arguments: What the chat template is given besides the turns.

        Raises:
            ModelError: The tokenizer has no EOS token, ``chat`` was asked for and it has no chat template, or the chat template
                refuses or drops a system prompt.
        """
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_chat:
            raise ModelError("model.template is 'chat' but the tokenizer has no chat template; use 'alpaca' or 'auto'")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token in it")
        self.tokenizer = tokenizer
        self.plain = is_plain(tokenizer)
        self.template: Template = ("chat" if has_chat else "alpaca") if template == "auto" else template
        self.max_length = max_length
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id)
        self.control_tokens = control_tokens_of(tokenizer)
        self.system = system
        self.arguments = dict(arguments or {})
        if system and self.template != "chat":
            raise ModelError(
                f"model.system needs a chat template, and model.template is '{self.template}'; leave model.system out"
            )
        self.opening, self.end_id = self._around_an_answer() if self.template == "chat" else ("", self.eos_id)

    def _around_an_answer(self) -> tuple[str, int]:
        """Return what the chat template writes between the prompt and an answer, and the control token with which it ends one.

        The first is text only where a template has control tokens there (as gpt-oss has a channel's name); an answer to learn begins
        after them. Where a template ends a turn with no control token, the tokenizer's EOS does.
        """
        turns = [{"role": "user", "content": "a"}]
        try:
            prompt = self._chat(turns, answered=False)
            before, found, after = self._chat([*turns, {"role": "assistant", "content": _MARK}], answered=True).rpartition(_MARK)
        except Exception as error:  # templates are programs of the model's author and raise what they like
            hint = "; it may take no system prompt: leave model.system out" if self.system else ""
            raise ModelError(f"the model's chat template refuses a question with its answer: {error}{hint}") from error
        if self.system.strip() not in prompt:
            raise ModelError(
                "the model's chat template drops a system prompt; leave model.system out, or write it into the prompts"
            )
        if not found:
            raise ModelError("the model's chat template leaves answers out; set model.template to alpaca or plain")
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        control = {self.tokenizer.convert_tokens_to_ids(token) for token in self.control_tokens}
        ends = (id for id in self._ids(after, all_text=False) if id in control)
        return opening if opening.startswith(tuple(self.control_tokens)) else "", next(ends, self.eos_id)

    def _chat(self, turns: Sequence[Mapping[str, Any]], *, answered: bool) -> str:
        """Return turns as the chat template writes them, ready for the model's answer unless it is the last turn."""
        return chat_text(self.tokenizer, with_system(turns, self.system), answered=answered, arguments=self.arguments)

    def prompt_text(self, row: Row) -> str:
        """Return the text before the answer, as the model sees it.

        Raises:
            DataError: The chat template refuses the row's turns, or they hold a control token of its tokenizer.
        """
        if self.template == "chat":
            if found := next((token for token in self.control_tokens if token in f"{row.prompt}{row.input}{row.history}"), None):
                raise DataError(
                    f"row {row.id} ({row.source}): the prompt holds the control token {found!r}, which the model's chat template would "
                    "take for its own; remove it from the text"
                )
            try:
                return self._chat(turns_before_answer(row), answered=False) + self.opening
            except Exception as error:  # templates are programs of the model's author and raise what they like
                raise DataError(f"the model's chat template refuses row {row.id} ({row.source}): {error}") from error
        return text_before_answer(row, plain=self.template == "plain")

    def prompt_ids(self, row: Row) -> list[int]:
        """Return the prompt's token ids, with the tokenizer's BOS where the template does not write it itself."""
        return self._begun(self._ids(self.prompt_text(row), all_text=self.template != "chat"))

    def _begun(self, ids: list[int]) -> list[int]:
        """Return a prompt's ids with the BOS that no template has written."""
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or self.template == "chat" else [bos, *ids]

    def _ids(self, text: str, *, all_text: bool = True) -> list[int]:
        """Return a text's token ids; if it is all text, nothing in it is a control token."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=all_text)["input_ids"])

    def render(self, row: Row) -> Rendered:
        """Return prompt and answer as ids; the answer ends with the token that ends it unless it was cut at ``max_length``.

        Raises:
            DataError: The prompt alone fills ``max_length`` (no room for an answer), or the answer has no tokens.
        """
        return self._joined(row, self.prompt_ids(row), self._ids(row.response))

    def render_all(self, rows: Sequence[Row]) -> list[Rendered]:
        """Return what `render` returns of each row, tokenised many at a time: by as many threads as the machine has cores.

        Raises:
            DataError: What `render` raises of the first row that it refuses.
        """
        if self.plain:
            try:
                prompts = self.many_ids([self.prompt_text(row) for row in rows], all_text=self.template != "chat")
                answers = self.many_ids([row.response for row in rows], all_text=True)
                return [self._joined(*one) for one in zip(rows, map(self._begun, prompts), answers, strict=True)]
            except DataError:
                pass  # perhaps not of the first of them
        return [self.render(row) for row in rows]

    def many_ids(self, texts: Sequence[str], *, all_text: bool) -> Iterator[list[int]]:
        """Yield each text's token ids, as `_ids` returns them; only where the tokenizer is `plain`.

        It is transformers' way through the tokenizers library without the texts' offsets, a fifth of the time.
        """
        library = self.tokenizer.backend_tokenizer
        for first in range(0, len(texts), TEXTS):
            library.no_truncation()
            library.no_padding()
            library.encode_special_tokens = all_text
            for encoded in library.encode_batch_fast(list(texts[first : first + TEXTS]), add_special_tokens=False):
                yield encoded.ids

    def _joined(self, row: Row, prompt: list[int], answer: list[int]) -> Rendered:
        """Return a row's prompt and answer as one sample; raises as `render` says."""
        if not answer:
            raise DataError(f"row {row.id} ({row.source}): the answer has no tokens")
        room = self.max_length - len(prompt)
        if room < 1:
            raise DataError(
                f"row {row.id} ({row.source}): the prompt has {len(prompt)} tokens and leaves no room for an answer "
                f"within model.max_length={self.max_length}"
            )
        return Rendered([*prompt, *[*answer, self.end_id][:room]], len(prompt))

    def collate(self, samples: list[Rendered]) -> Batch:
        """Return samples as one right-padded batch.

        The attention mask follows the lengths, not ``ids != pad``, so a tokenizer whose pad token is its EOS loses no EOS.
        """
        width = max(len(sample.ids) for sample in samples)
        input_ids = torch.full((len(samples), width), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros((len(samples), width), dtype=torch.long)
        labels = torch.full((len(samples), width), IGNORE, dtype=torch.long)
        for index, sample in enumerate(samples):
            ids = torch.tensor(sample.ids, dtype=torch.long)
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, sample.answer_start : len(ids)] = ids[sample.answer_start :]
        return Batch(input_ids, attention_mask, labels)
