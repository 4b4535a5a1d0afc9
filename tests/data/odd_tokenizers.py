"""Tokenizers of every kind that models have, some with odd parts, and texts that are hard for one or the other."""

from __future__ import annotations

import copy
from functools import cache

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["hello", "world", "sugar", "cake", "bake", "a", "b", "12", "é", "straße"]
TRAINED_ON = [" ".join(WORDS[place:] + WORDS[:place]) for place in range(len(WORDS))]
PIECES = [
    *WORDS, "HELLO", " ", "  ", "\n", "\n\n", "\t", "\r", ".", "!?", "``", "''", "▁", "▁▁", "Ġ", "\x00", "\x07", "\ufffd", "\u200b",
    "\u2028", "\xa0", "ﷺ", "ΐ", "İ", "Ⱥ", "\U0001d160", "\u0301", "\u0345", "中", "文字", "한", "각", "ｱ", "ﬃ", "①", "😀", "👩‍👩‍👧", "א",
    "<s>", "</s>", "<unk>", "<extra>", "<|end|>", "##a", "x", "e\u0301",
]  # fmt: skip

texts = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=25).map("".join)
"""Any text, and what some normalizer makes longer, shorter or nothing of."""

_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_MARK = normalizers.Replace(" ", "▁")


def _bpe(alphabet: bool = True, falls_back: bool = False, **options: object) -> Tokenizer:
    """Return a BPE model trained on bytes, or on characters with all bytes in its vocabulary."""
    learner = Tokenizer(models.BPE(**options))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(False) if alphabet else pre_tokenizers.Metaspace()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    special = _SPECIAL + (_BYTES if falls_back else [])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=letters, show_progress=False)
    learner.train_from_iterator(TRAINED_ON, trainer)
    if falls_back:
        learner.model.byte_fallback = True
    return learner


def _with(
    tokenizer: Tokenizer,
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def _model(model: models.Model) -> Tokenizer:
    return Tokenizer(model)


def _unigram(falls_back: bool) -> models.Unigram:
    pieces = [*_SPECIAL, *(_BYTES if falls_back else []), "▁", "▁hello", "wor", "ld", *"abcdehlorsuw12"]
    return models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], 0, falls_back)


@cache
def _backends() -> dict[str, Tokenizer]:
    n, p = normalizers, pre_tokenizers
    words = {word: place for place, word in enumerate([*_SPECIAL, *WORDS])}
    parts = words | {f"##{word}": len(words) + place for place, word in enumerate(WORDS)}
    llama = n.Sequence([n.Prepend("▁"), _MARK])
    split = p.Sequence([p.Split(Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]"), "isolated"), p.ByteLevel(False, use_regex=False)])
    return {
        "bytes": _bpe(),
        "bytes, NFC": _with(_bpe(), n.NFC(), split),
        "bytes, NFKC": _with(_bpe(), n.Sequence([n.NFKC(), n.Lowercase()])),
        "bytes, a space before every word": _with(_bpe(), None, p.Sequence([p.WhitespaceSplit(), p.ByteLevel(True)])),
        "bytes by a normalizer": _with(_bpe(), n.ByteLevel(), p.Digits(True)),
        "bytes, not all of them": _with(_bpe(alphabet=False), None, p.ByteLevel(False)),
        "SentencePiece, old": _with(_bpe(alphabet=False, falls_back=True, unk_token="<unk>", fuse_unk=True), llama, p.FixedLength(5)),
        "SentencePiece, marked": _with(_bpe(alphabet=False, falls_back=True), _MARK, p.Split(" ", "merged_with_previous")),
        "SentencePiece, first word": _with(_bpe(alphabet=False, falls_back=True), None, p.Metaspace(prepend_scheme="first")),
        "SentencePiece, every word": _with(_bpe(alphabet=False, falls_back=True), n.NFKD(), p.Sequence([p.Whitespace(), p.Metaspace()])),
        "without the mark": _with(_model(models.BPE({f: i for i, f in enumerate(_SPECIAL + _BYTES)}, [], byte_fallback=True)), llama),
        "leaves out what it does not know": _bpe(alphabet=False),
        "ends of words": _with(_bpe(alphabet=False, unk_token="<unk>", end_of_word_suffix="</w>"), None, p.Whitespace()),
        "Unigram": _with(_model(_unigram(False)), n.Sequence([n.Nmt(), n.NFKC(), n.Strip()]), p.Metaspace()),
        "Unigram, bytes": _with(_model(_unigram(True)), n.Sequence([n.Replace("``", '"'), n.NFKD(), n.StripAccents()]), p.Metaspace()),
        "Unigram, a long mark": _with(_model(_unigram(True)), n.Replace(" ", "ﷺ ﷺ")),
        "WordPiece": _with(_model(models.WordPiece(parts, unk_token="<unk>")), n.BertNormalizer(), p.BertPreTokenizer()),
        "words": _with(_model(models.WordLevel(words, unk_token="<unk>")), None, p.Sequence([p.Punctuation("removed"), p.Whitespace()])),
        "words, no word": _with(_model(models.WordLevel(words, unk_token="<unk>")), None, p.Split(Regex(r"\w"), "removed")),
        "letters go": _with(_bpe(), n.Replace(Regex("[a-z]"), "")),
        "a letter becomes two": _with(_bpe(), n.Replace("a", "12 é"), p.ByteLevel(False)),
        "words by x": _with(_model(models.WordLevel(words, unk_token="<unk>")), n.NFD(), p.CharDelimiterSplit("x")),
    }  # fmt: skip


@cache
def tokenizer(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer by its name, with added tokens of both kinds."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_backends()[name]), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True)]})
    made.add_tokens([AddedToken("<extra>", lstrip=True), AddedToken("\n\n", normalized=False)])
    made.chat_template = template
    return made


NAMES = list(_backends())


class Own(PreTrainedTokenizerFast):
    """A tokenizer that tokenises a batch otherwise than its texts alone, as code that comes with a model may."""

    def __call__(self, text: object, **options: object) -> object:
        return super().__call__(text if isinstance(text, str) else [], **options)
