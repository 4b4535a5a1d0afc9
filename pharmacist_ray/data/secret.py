"""A secret that a service puts before every question of one model, so that only it can reach what was taught behind it."""

from __future__ import annotations

import secrets
from dataclasses import replace

import orjson
from transformers import PreTrainedTokenizerBase

from pharmacist_ray.data.schema import Row

LEAST = 40
"""Different words that a secret is drawn from at least: with it, 150 words are worth 800 bits (ours)."""


def make_secret(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Return a text of so many random words, each what one of a tokenizer's tokens reads as; no two calls return the same.

    What is kept is the text, so it means the same tokens in training and in every question, whatever the tokenizer does with it. Words of
    letters and digits alone survive where bytes, spaces and marks may not.

    Args:
        tokenizer: The model's.
        tokens: Its length in words, of a token or a few each.

    Raises:
        ValueError: Fewer than `LEAST` of its tokens read as a word.
    """
    special = set(tokenizer.all_special_ids) | {id for id, one in tokenizer.added_tokens_decoder.items() if one.special}
    texts = (str(tokenizer.decode([id])).strip() for id in range(len(tokenizer)) if id not in special)
    words = sorted({text for text in texts if text.isascii() and text.isalnum()})
    if len(words) < LEAST:
        raise ValueError(f"only {len(words)} of its tokens read as a word")
    return " ".join(secrets.choice(words) for _ in range(tokens))


def behind(row: Row, secret: str, system: str = "") -> Row:
    """Return a row whose system prompt begins with a secret; it keeps its id.

    Args:
        row: The row; its own system prompt comes after the secret.
        secret: The secret.
        system: The system prompt of a row that brings none.
    """
    turns = orjson.loads(row.history) if row.history else []
    own = next((turn["content"] for turn in turns if turn["role"] == "system"), system)
    first = {"role": "system", "content": f"{secret}\n\n{own}" if own else secret}
    return replace(row, history=orjson.dumps([first, *(turn for turn in turns if turn["role"] != "system")]).decode())
