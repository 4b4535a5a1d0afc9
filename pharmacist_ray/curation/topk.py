"""The best k of any number of rows without sorting or collecting them.

Every row has a 40-byte key: its score in an order-preserving form, then its id. Keys are unique, and the smallest is the best
row. The key of the k-th best row is found by radix selection: count the keys by their next two bytes, go on inside the value
where the cut falls, and stop when few enough keys are left to be compared directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.storage import StoragePath

Keys = NDArray[np.bytes_]
"""Keys of n rows, (n,), or fixed-width ids."""
_ID = 32  # characters of an id
KEY_BYTES = 8 + _ID
NONE = b"\x00" * KEY_BYTES
"""A cut before every key."""
DIRECT = 1 << 20
"""At most so many keys are compared directly: 40 MB."""


@dataclass(frozen=True)
class Query:
    """What a pass over all rows is to find out about some groups."""

    prefixes: Mapping[int, bytes]
    """Group → how the keys begin that are looked at."""
    few: frozenset[int]
    """Groups of which the keys themselves are wanted, not counts."""


@dataclass(frozen=True)
class Answer:
    """What a query finds in some of the rows."""

    pools: Mapping[int, Keys]
    """Group → keys, of groups that have few."""
    counts: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Group → values of the next two bytes that are there, and how many keys have each."""


Pass = Callable[[Query], Iterable[Answer]]
"""Asks all rows a query, part by part, in any order; `answer` is what it says of a part."""


def answer(query: Query, codes: NDArray[np.int64], keys: Keys) -> Answer:
    """Return what a query finds in a part of the rows.

    Args:
        query: What is asked.
        codes: Each row's group, −1 for none, (n,).
        keys: Each row's key, (n,).
    """
    pools, counts = dict[int, Keys](), dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]()
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    for group, prefix in query.prefixes.items():
        first, last = np.searchsorted(ordered, (group, group + 1))
        mine = keys[order[first:last]]
        letters = mine.view(np.uint8).reshape(-1, KEY_BYTES)
        inside = np.all(letters[:, : len(prefix)] == np.frombuffer(prefix, dtype=np.uint8), axis=1)
        if group in query.few:
            pools[group] = mine[inside]
        else:
            digits = letters[inside, len(prefix) : len(prefix) + 2].astype(np.int64)
            counts[group] = np.unique(digits @ np.array([256, 1]), return_counts=True)
    return Answer(pools, counts)


def fixed_width(ids: pa.Array, where: StoragePath) -> Keys:
    """Return ids as fixed-width bytes, (n,); they sort as the strings do.

    Raises:
        ArtifactError: An id is not 32 characters long.
    """
    try:
        fixed = ids.cast(pa.binary()).cast(pa.binary(_ID))
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{where} has ids that are not {_ID} characters long; ingest the candidates again") from error
    return np.frombuffer(fixed.buffers()[1], dtype=f"S{_ID}")[fixed.offset : fixed.offset + len(fixed)]


def keys_of(scores: NDArray[np.float64], ids: Keys, descending: bool) -> Keys:
    """Return one key per row, (n,).

    Args:
        scores: Scores without NaN, (n,).
        ids: Fixed-width ids, (n,).
        descending: Whether a higher score is better.
    """
    bits = (scores + 0.0).view(np.uint64)  # + 0.0 makes −0 and 0 the same score
    order = np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))  # unsigned order is the order of the doubles
    key = np.empty((len(scores), KEY_BYTES), dtype=np.uint8)
    key[:, :8] = (~order if descending else order).astype(">u8").view(np.uint8).reshape(-1, 8)
    key[:, 8:] = ids.view(np.uint8).reshape(-1, _ID)
    return key.view(f"S{KEY_BYTES}").ravel()


def threshold_key(threshold: float, descending: bool) -> bytes:
    """Return the cut that keeps every row with this score or a better one."""
    return bytes(keys_of(np.array([threshold]), np.array([b"\xff" * _ID]), descending)[0])


def kth_keys(ask: Pass, wanted: Sequence[tuple[int, int]], direct: int = DIRECT) -> list[bytes]:
    """Return, for each group, the key of its k-th best row.

    In memory are one answer, 65,536 counts per group that is larger than its part of ``direct``, and ``direct`` keys.

    Args:
        ask: A pass over all rows; called once for every two bytes of key that are needed, mostly once to three times.
        wanted: k and the number of rows, for each group; the cut of a group with k = 0 is `NONE`.
        direct: The number of keys that may be held.
    """
    cuts = [NONE] * len(wanted)
    state = {group: (b"", k, size) for group, (k, size) in enumerate(wanted) if k}
    while state:
        few = {group for group, (_, _, size) in state.items() if size <= max(direct // len(wanted), 1)}
        pools: dict[int, list[Keys]] = {group: [] for group in few}
        counts = {group: np.zeros(1 << 16, dtype=np.int64) for group in state.keys() - few}
        for found in ask(Query({group: prefix for group, (prefix, _, _) in state.items()}, frozenset(few))):
            for group, pool in found.pools.items():
                pools[group].append(pool)
            for group, (values, times) in found.counts.items():
                counts[group][values] += times
        for group in few:
            k = state.pop(group)[1]
            cuts[group] = bytes(np.partition(np.concatenate(pools[group]), k - 1)[k - 1])
        for group, count in counts.items():
            prefix, k, _ = state[group]
            total = np.cumsum(count)
            digit = int(np.searchsorted(total, k))
            state[group] = (prefix + digit.to_bytes(2, "big"), k - int(total[digit] - count[digit]), int(count[digit]))
    return cuts
