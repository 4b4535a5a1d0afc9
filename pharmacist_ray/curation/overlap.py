"""Which sets of a run share prompts: a model that is asked what it was trained on says nothing of other questions.

Prompts are compared without regard to case and white space, earlier turns and the input field included. Two meet exactly where the
text is the same, and nearly where they share a MinHash signature (`near_duplicates.signatures`, over the prompt alone): any of four
for 99 of 100 pairs that have .9 of their runs of words in common, and for 3 of 100 that have .3.

In memory are 8 bytes for each prompt of all sets but the candidates, 40 where near matches are looked for, and one batch of candidates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pharmacist_ray.curation.near_duplicates import signatures
from pharmacist_ray.data.rows import count_rows, parquet_files
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import StoragePath, opened_parquet, write_text

NEAR_ROWS = 200_000
"""Near matches are looked for where a pair of sets has at most so many rows together: about 20 seconds (ours)."""

_BATCH = 4096  # rows
_COLUMNS = ("history", "prompt", "input")


@dataclass(frozen=True)
class _Prompts:
    """Prompts of a set or a part of it, as numbers."""

    exact: NDArray[np.uint64]
    """A hash of each prompt."""
    near: NDArray[np.uint64] | None
    """Its signatures, (n, bands)."""


def find_overlaps(sets: Mapping[str, StoragePath], out: StoragePath) -> dict[str, Any]:
    """Compare every set with every other one, and write ``overlap.json``.

    Args:
        sets: Name → folder of canonical rows. Those of the largest are streamed; what is held for the others is said above.
        out: Folder for the file.

    Returns:
        ``pairs``: for each pair that shares prompts ``set``, ``within``, ``rows`` (of the first), and of these ``exact``, those whose
        prompt the second has too, and ``near``, those that it only nearly has; null where that was not looked for.
    """
    rows = {name: count_rows(folder) for name, folder in sets.items()}
    largest = max(rows, key=lambda name: rows[name])
    small = [name for name in rows if name != largest]
    near = {name: rows[name] <= NEAR_ROWS for name in rows}
    held = {name: _together(list(_prompts(sets[name], near[name]))) for name in small}
    met = {
        (name, other): _Meeting(held[name], rows[name] + rows[other] <= NEAR_ROWS)
        for number, name in enumerate(small)
        for other in (*small[number + 1 :], largest)
    }
    for (_, other), meeting in met.items():
        if other != largest:
            meeting.see(held[other])
    for batch in _prompts(sets[largest], near[largest]):
        for name in small:
            met[name, largest].see(batch)
    counted = [meeting.counted(*names) for names, meeting in met.items()]
    found = {"pairs": [pair for pair in counted if pair["exact"] or pair["near"]]}
    write_text(json.dumps(found, indent=1), out / "overlap.json")
    return found


def in_words(pair: Mapping[str, Any]) -> str:
    """Return a pair of `find_overlaps` as a few words."""
    counts = [f"{pair[kind]:,} {how}" for kind, how in (("exact", "exactly"), ("near", "nearly")) if pair[kind]]
    return f"{' and '.join(counts)} of the {pair['rows']:,} of {pair['set']} in {pair['within']}"


def refuse_trained(pairs: Iterable[Mapping[str, Any]]) -> None:
    """Stop where prompts of the evaluation are in a set that is trained on, word for word.

    Args:
        pairs: As `find_overlaps` has them.

    Raises:
        DataError: Says which prompts meet which, and what to do.
    """
    met = [pair for pair in pairs if pair["exact"] and pair["set"].startswith("eval-") != pair["within"].startswith("eval-")]
    if met:
        raise DataError(
            f"prompts of the evaluation are trained on too: {'; '.join(in_words(pair | {'near': 0}) for pair in map(dict, met))}; a "
            "figure on them says nothing of others. Take them out of one of the two, or set evaluation.allow_trained_prompts=true"
        )


class _Meeting:
    """Which prompts of a set another one has too."""

    def __init__(self, mine: _Prompts, near: bool) -> None:
        self.mine = mine
        self.exact = np.zeros(len(mine.exact), np.bool_)
        self.near = np.zeros(len(mine.exact), np.bool_) if near else None

    def see(self, theirs: _Prompts) -> None:
        """Mark the prompts that a part of the other set has."""
        self.exact |= np.isin(self.mine.exact, theirs.exact)
        if self.near is not None and self.mine.near is not None and theirs.near is not None:
            self.near |= np.isin(self.mine.near, theirs.near).any(axis=1)

    def counted(self, name: str, within: str) -> dict[str, Any]:
        """Return the counts as `find_overlaps` has them."""
        near = None if self.near is None else int((self.near & ~self.exact).sum())
        return {"set": name, "within": within, "rows": len(self.exact), "exact": int(self.exact.sum()), "near": near}


def _prompts(folder: StoragePath, near: bool) -> Iterator[_Prompts]:
    for file in parquet_files(folder):
        with opened_parquet(file) as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=list(_COLUMNS)):
                columns = (batch[name].to_pylist() for name in _COLUMNS)
                texts = [" ".join("\n".join(parts).casefold().split()) for parts in zip(*columns, strict=True)]
                hashes = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
                yield _Prompts(np.frombuffer(b"".join(hashes), np.uint64), signatures(texts) if near else None)


def _together(parts: list[_Prompts]) -> _Prompts:
    near = [part.near for part in parts if part.near is not None]
    return _Prompts(np.concatenate([part.exact for part in parts]), np.concatenate(near) if near else None)
