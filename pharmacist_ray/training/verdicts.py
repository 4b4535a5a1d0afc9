"""A guard's verdict on how an answer goes on: the probability that it is safe up to each of its tokens (arXiv 2505.17196).

A guard reads a row's prompt with the first k·M words of its answer, for every k; what it says of the last prefix that a token belongs to
is the token's. Verdicts are kept by the rows' ids in blocks, so that a training that goes on, and one of another arm on the same rows, ask
nothing again, and workers ask side by side.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence

import pyarrow as pa
import torch

from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.schema import Row, rows_from_table
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.models.budget import TokenBudget, TooLongError
from pharmacist_ray.models.classifier import fill_template, harm, load_classifier, text_ids, unsafe_places
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.storage import read_table, storage_path, write_parquet
from pharmacist_ray.training.task import TrainTask

BLOCK = 256
"""Rows whose verdicts are in one file (ours)."""
AT_ONCE = 64
"""Prefixes that a guard reads at a time at most; fewer where memory is short (ours)."""


def ends_of(answer: str, words: int) -> list[int]:
    """Return where the prefixes of an answer end: after every so many words, and at the last one.

    Args:
        answer: The text; one without a word is one prefix.
        words: M.
    """
    ends = [found.end() for found in re.finditer(r"\S+", answer)]
    return ends[words - 1 :: words] + ends[-1:] * (len(ends) % words > 0) or [len(answer)]


def token_verdicts(row: Row, renderer: Renderer, words: int, safe: Sequence[float]) -> torch.Tensor:
    """Return the probability for each supervised token of a row, the one that ends its answer too: (T,).

    A token belongs to the first prefix that holds all of it; found by its place in the text, so no merge across a boundary shifts what
    comes after it.

    Args:
        row: The row.
        renderer: Its tokenizer is a fast one.
        words: M.
        safe: The guard's probabilities, one a prefix.
    """
    ends = ends_of(row.response, words)
    rendered = renderer.render(row)
    places = renderer.tokenizer(row.response, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    whole = len(row.response.rstrip())
    found = [safe[min(bisect_left(ends, min(end, whole)), len(ends) - 1)] for _, end in places]
    return torch.tensor([*found, safe[-1]][: len(rendered.ids) - rendered.answer_start])


def verdicts_of(task: TrainTask, table: pa.Table, renderer: Renderer, ranks: Ranks, words: int) -> list[torch.Tensor]:
    """Return the verdicts of every training row, in the table's order; what nobody has asked yet, the guard is asked.

    Args:
        task: Has the guard and the folder of what it has said.
        table: The training rows.
        renderer: Turns a row into token ids.
        ranks: This worker, which asks its share.
        words: M.

    Raises:
        ConfigError: The model's tokenizer does not say where its tokens stand.
        DataError: A row does not fit in the guard's memory.
    """
    assert task.guard is not None
    if not renderer.tokenizer.is_fast:
        raise ConfigError(
            f"{task.name}: {task.objective} needs a fast tokenizer, one with a tokenizer.json, to find words' tokens"
        )
    rows = {row.id: row for row in rows_from_table(table)}
    ids = sorted(rows)
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]
    files = [storage_path(task.verdicts) / f"{_digest(block, words)}.parquet" for block in blocks]
    # By its number and not by what is missing: another arm may write a block while the workers look.
    if mine := [place for place in range(ranks.rank, len(blocks), ranks.workers) if not files[place].exists()]:
        guard = _Guard(task.guard, str(ranks.device))
        for place in mine:
            ranks.set_status(f"{task.name}: the guard reads block {place + 1} of {len(blocks)}")
            block = blocks[place]
            said = guard.safe([rows[id] for id in block], words, task.name)
            write_parquet(pa.table({"id": block, "safe": pa.array(said, pa.list_(pa.float32()))}), files[place])
        del guard
    ranks.barrier()
    known = {row["id"]: row["safe"] for file in files for row in read_table(file).to_pylist()}
    return [token_verdicts(rows[id], renderer, words, known[id]) for id in table.column("id").to_pylist()]


def _digest(block: Sequence[str], words: int) -> str:
    return hashlib.sha256("\n".join([str(words), *block]).encode()).hexdigest()[:16]


class _Guard:
    """A classifier of prompts and answers, loaded once."""

    def __init__(self, config: GuardConfig, device: str) -> None:
        self.config = config
        model, self.tokenizer = load_classifier(config.path, "guard")
        self.model = model.to(torch.device(device))  # type: ignore[arg-type]
        self.unsafe = unsafe_places(model.config, config.unsafe, "scoring.guard.unsafe")
        self.budget = TokenBudget()

    def safe(self, rows: Sequence[Row], words: int, name: str) -> list[list[float]]:
        """Return the probability that each prefix of each row's answer is safe."""
        read, counts = list[list[int]](), list[int]()
        for row in rows:
            prompt, ends = f"{row.prompt}\n{row.input}" if row.input else row.prompt, ends_of(row.response, words)
            texts = [fill_template(self.config.template, prompt, row.response[:end]) for end in ends]
            read += [text_ids(self.tokenizer, text, self.config.max_length) for text in texts]
            counts.append(len(ends))
        said = torch.zeros(len(read))

        def take(places: list[int]) -> None:
            said[places] = 1 - harm(self.model, [read[place] for place in places], self.unsafe).float().cpu()

        try:
            self.budget.run([len(one) for one in read], take, rows=AT_ONCE)
        except TooLongError as error:
            raise DataError(
                f"{name}: an answer does not fit in the guard's memory, {error}; lower scoring.guard.max_length"
            ) from None
        return [one.tolist() for one in torch.split(said, counts)]
