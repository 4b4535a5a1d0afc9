"""How many tokens a text has at most, and whether it has any, told from its bytes by what its tokenizer is made of.

A tokenizer of the tokenizers library is a chain: normalizers, pre-tokenizers, a model. Most cut text or change it in place, a few
make it longer by a known factor, and every token of a model covers at least one character, or one byte where characters that it
does not know fall back to bytes. Where a link is not known here nothing is claimed, and whoever asks has to tokenise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 10}
"""Normalizer → how many times as many UTF-8 bytes it makes of a text that is not ASCII (of ASCII, as many). The first four are
Unicode's (https://unicode.org/faq/normalization.html); the fifth is 1.5 at most, rounded up; the last is spaces around an ideograph
(5/3), NFD and lower case."""

_CUTS = {
    "Strip", "StripAccents", "Nmt", "BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split",
    "UnicodeScripts", "Whitespace", "WhitespaceSplit",
}  # fmt: skip
_MARK = "▁"  # SentencePiece's space, which no normalizer changes: 3 bytes, and one token if the vocabulary has it
_WORD = re.compile("[A-Za-z0-9]")


@dataclass(frozen=True)
class TokenBound:
    """What is known of a tokenizer's output without running it; nothing, as the defaults are.

    It holds for calls with ``add_special_tokens=False`` and either ``split_special_tokens``.
    """

    ascii_tokens: float = math.inf
    """Tokens at most for each byte of a text that is ASCII."""
    tokens: float = math.inf
    """Tokens at most for each byte of any text, in UTF-8."""
    keeps_words: bool = False
    """Whether a text with a letter or digit of ASCII has a token at all."""

    def at_most(self, text: str) -> float:
        """Return a number of tokens that the text does not exceed; infinite if none is known."""
        return (self.ascii_tokens * len(text) if text.isascii() else self.tokens * len(text.encode())) if text else 0

    def has_some(self, text: str) -> bool:
        """Return whether the text certainly has a token."""
        return self.keeps_words and _WORD.search(text) is not None


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer is the tokenizers library's and nothing else: a text's tokens are the same alone and in a batch."""
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and kind.__call__ is plain.__call__ and kind._encode_plus is plain._encode_plus


def token_bound(tokenizer: PreTrainedTokenizerBase) -> TokenBound:
    """Return what is known of a tokenizer; it reads the whole vocabulary, which takes up to a second."""
    if not is_plain(tokenizer):
        return TokenBound()
    chain: dict[str, Any] = {}
    with suppress(
        Exception
    ):  # a link that somebody wrote in Python cannot be written down, and the library says so by no other type
        chain = orjson.loads(tokenizer.backend_tokenizer.to_str())
    return bound_of(chain) if chain else TokenBound()


def bound_of(chain: dict[str, Any]) -> TokenBound:
    """Return what is known of a tokenizer from the content of its ``tokenizer.json``."""
    model = chain["model"]
    vocabulary = model.get("vocab", ())
    pieces = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
    links = [*_links(chain["normalizer"]), *_links(chain["pre_tokenizer"])]
    if not _never_fails(model, pieces):
        return TokenBound()
    return TokenBound(
        _tokens_per_byte(links, model, pieces, ascii_only=True),
        _tokens_per_byte(links, model, pieces, ascii_only=False),
        all(map(_keeps_words, links)) and _knows_everything(links, model, pieces),
    )


def _links(link: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the normalizers or pre-tokenizers that a sequence of them stands for."""
    if link is None:
        return
    if link["type"] == "Sequence":
        for part in link.get("normalizers") or link.get("pretokenizers") or ():
            yield from _links(part)
    else:
        yield link


def _never_fails(model: dict[str, Any], pieces: set[str]) -> bool:
    """Return whether the model is a known one that takes any text."""
    match model.get("type"):
        case "BPE":  # without a token for what it does not know, it leaves that out
            unknown = model["unk_token"]
            return unknown is None or unknown in pieces
        case "WordPiece" | "WordLevel":
            return model["unk_token"] in pieces
        case "Unigram":
            return model["unk_id"] is not None
    return False


def _tokens_per_byte(links: list[dict[str, Any]], model: dict[str, Any], pieces: set[str], *, ascii_only: bool) -> float:
    """Return how many tokens come of a byte at most.

    What a link adds to a text once, it may add to every piece that the text was cut into by added tokens or by earlier links. There
    are no more pieces than bytes, so it counts for each byte.
    """
    falls_back = model.get("byte_fallback", False)
    as_bytes = any(link["type"] == "ByteLevel" for link in links)
    if falls_back and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        return math.inf  # these fall back to bytes with the character
    if falls_back and as_bytes and not pieces.issuperset(ByteLevel.alphabet()):
        return math.inf
    mark = 1 if _MARK in pieces and not as_bytes else len(_MARK.encode())

    def weight(text: str) -> int:
        return len(text.replace(_MARK, "").encode()) + mark * text.count(_MARK)

    factor = 1.0
    for place, link in enumerate(links):
        written = ""
        match link["type"]:
            case kind if kind in _CUTS:
                continue
            case kind if kind in GROWTH:
                factor *= 1 if ascii_only else GROWTH[kind]
            case "ByteLevel" if all(
                later["type"] in _CUTS for later in links[place + 1 :]
            ):  # a byte is one character from here on
                factor *= 1 + link.get("add_prefix_space", False)
            case "Prepend":
                written = link["prepend"]
                factor *= 1 + weight(written)
            case "Metaspace":
                written = link["replacement"]
                factor *= weight(written) * (1 + (link.get("prepend_scheme") != "never"))
            case "Replace" if found := link["pattern"].get("String"):  # an expression may match where there is nothing
                written = link["content"]
                factor *= max(1, weight(written) / weight(found))
            case _:
                return math.inf
        ascii_only = ascii_only and written.replace(_MARK, "").isascii()
    return factor


def _keeps_words(link: dict[str, Any]) -> bool:
    """Return whether something is left, whatever a link does, of a letter or digit of ASCII and of the accents on it."""
    pattern = link.get("pattern", {}).get("String", "x")
    match link["type"]:
        case "CharDelimiterSplit":
            return bool(link["delimiter"].isspace())
        case "Split":
            return link["behavior"] != "Removed" or (pattern.isspace() and not link["invert"])
        case "Replace":
            return not any(letter.isalnum() for letter in pattern)
        case kind:
            return kind in _CUTS or kind in GROWTH or kind in ("ByteLevel", "Metaspace", "Prepend")


def _knows_everything(links: list[dict[str, Any]], model: dict[str, Any], pieces: set[str]) -> bool:
    """Return whether the model leaves nothing out."""
    if model["type"] != "BPE" or model["unk_token"] is not None:
        return True
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    if model["byte_fallback"]:
        return pieces.issuperset(f"<0x{byte:02X}>" for byte in range(256))
    return any(link["type"] == "ByteLevel" for link in links) and pieces.issuperset(ByteLevel.alphabet())
