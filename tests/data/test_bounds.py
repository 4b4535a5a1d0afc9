from __future__ import annotations

import json
import math
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

from pharmacist_ray.data.bounds import GROWTH, TokenBound, bound_of, is_plain, token_bound
from tests.data.odd_tokenizers import NAMES, texts, tokenizer

BOUNDS = {name: token_bound(tokenizer(name)) for name in NAMES}


def chain(name: str) -> dict:
    return json.loads(tokenizer(name).backend_tokenizer.to_str())


@settings(max_examples=500, deadline=None)
@given(name=st.sampled_from(NAMES), text=texts, split=st.booleans())
@example(name="without the mark", text=" a" * 9, split=True)
@example(name="SentencePiece, every word", text="ﷺ" * 9, split=True)
@example(name="SentencePiece, old", text="a\n\n" * 9, split=True)
@example(name="SentencePiece, marked", text="▁ 😀" * 9, split=True)
@example(name="a letter becomes two", text="a" * 9, split=True)
def test_no_text_has_more_tokens_than_its_bound_and_one_with_a_word_has_some(name, text, split):
    count = len(tokenizer(name)(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])
    assert count <= BOUNDS[name].at_most(text)
    assert count or not BOUNDS[name].has_some(text)


def test_what_is_known_of_the_usual_tokenizers():
    """Worked out by hand; the first number is for ASCII, the second for any text."""
    known = {name: (bound.ascii_tokens, bound.tokens, bound.keeps_words) for name, bound in BOUNDS.items()}
    assert known == {
        "bytes": (1, 1, True),
        "bytes, NFC": (1, 3, True),
        "bytes, NFKC": (1, 22, True),
        "bytes, a space before every word": (2, 2, True),
        "bytes by a normalizer": (1, 1, True),
        "bytes, not all of them": (1, 1, False),
        "SentencePiece, old": (2, 2, True),
        "SentencePiece, marked": (1, 1, True),
        "SentencePiece, first word": (2, 2, True),
        "SentencePiece, every word": (2, 22, True),
        "without the mark": (12, 12, True),
        "leaves out what it does not know": (2, 2, False),
        "ends of words": (1, 1, True),
        "Unigram": (2, 22, True),
        "Unigram, bytes": (2, 22, True),
        "Unigram, a long mark": (7, 7, True),
        "WordPiece": (1, 10, True),
        "words": (1, 1, True),
        "words, no word": (1, 1, False),
        "letters go": (math.inf, math.inf, False),
        "a letter becomes two": (5, 5, False),
        "words by x": (1, 3, False),
    }


@pytest.mark.parametrize(("kind", "grows"), [*((form, 1) for form in ("NFC", "NFD", "NFKC", "NFKD")), ("Lowercase", 0.75)])
def test_a_normalizer_makes_no_character_longer_than_its_factor_says(kind, grows):
    longest = 0.0
    for code in range(0x110000):
        letter = chr(code)
        if unicodedata.category(letter) != "Cs":
            made = letter.lower() if kind == "Lowercase" else unicodedata.normalize(kind, letter)
            longest = max(longest, len(made.encode()) / len(letter.encode()))
    assert longest == GROWTH[kind] * grows


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "a table that may write anything"),
        ({"pre_tokenizer": {"type": "Tomorrows"}}, "a link that is not known here"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}}, "bytes of bytes"),
    ],
)
def test_of_a_link_that_is_not_known_nothing_is_claimed(change, why):
    bound = bound_of(chain("bytes") | change)
    assert (bound.ascii_tokens, bound.tokens) == (math.inf, math.inf), why
    assert bound.at_most("a") == math.inf


def test_of_a_model_that_may_fail_or_is_not_known_nothing_is_claimed():
    for name, change in (("words", {"unk_token": "<none>"}), ("Unigram", {"unk_id": None}), ("bytes", {"type": "Tomorrows"})):
        found = chain(name)
        found["model"] |= change
        assert bound_of(found) == TokenBound()


def test_parts_that_fall_back_to_bytes_with_more_than_the_character_have_no_bound():
    found = chain("SentencePiece, marked")
    found["model"]["end_of_word_suffix"] = "</w>"
    assert bound_of(found) == TokenBound()


def test_of_a_tokenizer_that_is_more_than_its_file_nothing_is_claimed():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: object, **kwargs: object) -> object:
            return super()._encode_plus(*args, **kwargs)

    own = Own(tokenizer_object=tokenizer("bytes").backend_tokenizer)
    assert not is_plain(own)
    assert token_bound(own) == TokenBound()

    class Nothing:
        def pre_tokenize(self, text: object) -> None:
            pass

    written = PreTrainedTokenizerFast(tokenizer_object=tokenizer("words").backend_tokenizer)
    written.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Nothing())
    assert is_plain(written)
    assert token_bound(written) == TokenBound()
