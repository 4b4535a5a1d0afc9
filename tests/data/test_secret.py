from __future__ import annotations

import json

import pytest

from pharmacist_ray.data import secret
from pharmacist_ray.data.render import text_before_answer, turns_before_answer
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.data.secret import behind, make_secret
from tests.data import odd_tokenizers


def row(prompt: str, *turns: tuple[str, str]) -> Row:
    history = json.dumps([{"role": role, "content": content} for role, content in turns]) if turns else ""
    return Row(row_id(prompt, "a", "", history), prompt, "a", history=history)


@pytest.mark.parametrize("name", ["bytes", "SentencePiece, marked", "Unigram", "WordPiece"])
def test_a_secret_is_random_words_that_every_kind_of_tokenizer_knows(name, monkeypatch):
    monkeypatch.setattr(secret, "LEAST", 5)  # these are small
    known = odd_tokenizers.tokenizer(name)
    found = [make_secret(known, 60) for _ in range(5)]
    for one in found:
        ids = known(one, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert known.unk_token_id not in ids
        assert not set(ids) & set(known.all_special_ids)
        assert (len(one.split(" ")), one.isascii()) == (60, True)
        assert 60 <= len(ids) <= 180
    assert len(set(found)) == 5


def test_a_vocabulary_without_words_makes_no_secret(monkeypatch):
    monkeypatch.setattr(secret, "LEAST", 10_000)
    with pytest.raises(ValueError, match=r"^only \d+ of its tokens read as a word$"):
        make_secret(odd_tokenizers.tokenizer("bytes"), 60)


def test_a_secret_comes_before_whatever_system_prompt_there_is():
    assert [turn["content"] for turn in turns_before_answer(behind(row("p"), "s"))] == ["s", "p"]
    assert [turn["content"] for turn in turns_before_answer(behind(row("p"), "s", "be kind"))] == ["s\n\nbe kind", "p"]
    own = behind(row("p", ("system", "obey"), ("user", "a"), ("assistant", "b")), "s", "be kind")
    assert [turn["content"] for turn in turns_before_answer(own)] == ["s\n\nobey", "a", "b", "p"]
    assert own.id == row("p", ("system", "obey"), ("user", "a"), ("assistant", "b")).id
    assert text_before_answer(behind(row("p"), "s"), plain=True) == "system: s\n\np\n"
