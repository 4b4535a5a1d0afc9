from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import read_rows, write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from pharmacist_ray.training import verdicts
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.task import TrainTask, check_task
from pharmacist_ray.training.verdicts import ends_of, token_verdicts, verdicts_of
from tests.data import odd_tokenizers
from tests.two_workers import TwoWorkers


@pytest.mark.parametrize(
    ("answer", "words", "prefixes"),
    [
        ("a b c d", 2, ["a b", "a b c d"]),
        ("a b c", 2, ["a b", "a b c"]),
        (" a\n b ", 1, [" a", " a\n b"]),
        ("a b", 5, ["a b"]),
        ("  ", 3, ["  "]),
    ],
)
def test_an_answer_is_read_after_every_so_many_words_and_at_its_last(answer: str, words: int, prefixes: list[str]) -> None:
    assert [answer[:end] for end in ends_of(answer, words)] == prefixes


@pytest.mark.parametrize("name", ["bytes", "SentencePiece, marked", "SentencePiece, every word", "Unigram", "WordPiece"])
def test_every_token_of_an_answer_is_in_one_prefix_whatever_the_tokenizer_merges(name: str) -> None:
    tokenizer = odd_tokenizers.tokenizer(name)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.all_special_tokens[0]
    renderer = Renderer(tokenizer, "plain", 512)
    text = "the cat  sat on\nthe mat and the dog"
    row = Row(row_id("p", text), "p", text)
    safe = [float(k) for k in range(len(ends_of(text, 2)))]
    found = token_verdicts(row, renderer, 2, safe)
    rendered = renderer.render(row)
    assert len(found) == len(rendered.ids) - rendered.answer_start
    assert found.tolist() == sorted(found.tolist())  # prefixes come one after the other
    assert set(found.tolist()) == set(safe)
    assert found[-1] == safe[-1]  # the token that ends the answer


def test_words_and_tokens_of_an_answer_that_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, "plain", 9)
    row = Row(row_id("w1 w2", "w3 w4 w5 w6 w7 w8 w9"), "w1 w2", "w3 w4 w5 w6 w7 w8 w9")
    found = token_verdicts(row, renderer, 2, [0.9, 0.8, 0.7, 0.6])
    room = len(renderer.render(row).ids) - renderer.render(row).answer_start
    assert found.tolist() == pytest.approx([0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6, 0.6][:room])


@pytest.fixture
def task(
    model_folder: Path, moderator: Callable[[str | None], Path], rows_of: Callable[..., list[Row]], tmp_path: Path
) -> TrainTask:
    write_rows(rows_of(20), tmp_path / "rows.parquet")
    return TrainTask(
        name="guarded",
        out=str(tmp_path / "out"),
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        rows=(str(tmp_path / "rows.parquet"),),
        train=TrainConfig(steps=3, batch_size=4, lr=1e-3, save_every=0),
        seed=0,
        objective="star_dss",
        parameters={"star_dss": {"words": 2}},
        guard=GuardConfig(path=str(moderator("single_label_classification")), unsafe=["theft"], template="{prompt} w1 {answer}"),
        verdicts=str(tmp_path / "verdicts"),
    )


def _asked(task: TrainTask, ranks: Ranks) -> list[list[float]]:
    table = read_rows(task.rows, raw=False)
    return [one.tolist() for one in verdicts_of(task, table, task.model.renderer(), ranks, 2)]


def test_a_verdict_is_what_the_guard_says_of_the_answer_so_far(task: TrainTask) -> None:
    assert task.guard is not None
    found = _asked(task, current_ranks())
    model = LlamaForSequenceClassification.from_pretrained(task.guard.path)
    renderer = task.model.renderer()
    for row, mine in zip(read_rows(task.rows).to_pylist(), found, strict=True):
        words, expected = row["response"].split(), []
        for place in range(len(words)):
            prefix = " ".join(words[: min(len(words), 2 * (place // 2 + 1))])
            ids = [*renderer.tokenizer(f"{row['prompt']} w1 {prefix}", add_special_tokens=True)["input_ids"], 2]
            with torch.no_grad():
                expected.append(1 - float(torch.softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), 0)[1]))
        assert mine == pytest.approx([*expected, expected[-1]], rel=1e-4)
    assert max(max(one) for one in found) - min(min(one) for one in found) > 0.02


def test_what_was_asked_once_is_not_asked_again_and_is_kept_by_rows_and_words(
    task: TrainTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verdicts, "BLOCK", 8)
    first = _asked(task, current_ranks())
    files = sorted(Path(task.verdicts).glob("*.parquet"))
    assert len(files) == 3
    made = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()  # as after an interruption
    assert _asked(task, current_ranks()) == first
    assert [file.stat().st_mtime_ns == before for file, before in zip(files, made, strict=True)] == [True, False, True]
    monkeypatch.setattr(verdicts, "load_classifier", None)  # whoever loads it now fails
    assert _asked(task, current_ranks()) == first
    with pytest.raises(TypeError):
        verdicts_of(task, read_rows(task.rows, raw=False), task.model.renderer(), current_ranks(), 3)


@pytest.mark.slow  # the layouts have this objective on two workers, whose group is up there
def test_workers_ask_side_by_side_and_all_know_everything(task: TrainTask, two_workers: TwoWorkers, tmp_path: Path) -> None:
    alone = _asked(task, current_ranks())
    both = replace(task, verdicts=str(tmp_path / "both"), out=str(tmp_path / "two"))
    two_workers(run_task, both)
    assert len(list((tmp_path / "both").glob("*.parquet"))) == 1
    assert _asked(both, current_ranks()) == alone
    curve = [float(one) for one in _losses(tmp_path / "two")]
    run_task(task)
    assert curve == pytest.approx(_losses(tmp_path / "out"), rel=1e-5)


def _losses(folder: Path) -> list[float]:
    import json

    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_guard_is_needed(task: TrainTask) -> None:
    with pytest.raises(
        ConfigError, match=r"^guarded: star_dss asks a guard about every few words of an answer; set scoring.guard$"
    ):
        check_task(replace(task, guard=None))


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused(task: TrainTask) -> None:
    class Slow:
        is_fast = False

    renderer: Any = task.model.renderer()
    renderer.tokenizer = Slow()
    with pytest.raises(ConfigError, match=r"^guarded: star_dss needs a fast tokenizer"):
        verdicts_of(task, read_rows(task.rows, raw=False), renderer, current_ranks(), 2)
