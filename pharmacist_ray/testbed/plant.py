"""Plants label errors of known kind in any safety data set, so that a selector can be measured on real text.

Out of trusted safety pairs (prompt → safe answer) and ordinary pairs come candidates of four qualities, and the trusted sets that
a selector needs. There are no harmful answers in it: an unrelated ordinary answer to a safety prompt stands in for a mislabelled
one, in the candidates as well as in the harmful set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from pharmacist_ray.curation.planted import shuffled
from pharmacist_ray.errors import ConfigError, DataError

SHARES = {"clean": 0.5, "swapped": 0.2, "benign": 0.2, "shuffled": 0.1}
"""Shares of the qualities among the candidates (ours)."""

CANDIDATES = 800
"""How many candidates are planted (ours)."""

TRUSTED = 150
"""The size of each trusted set (ours)."""


def plant(
    safety_rows: Sequence[Mapping[str, Any]],
    benign_rows: Sequence[Mapping[str, Any]],
    seed: int = 0,
    *,
    candidates: int = CANDIDATES,
    trusted: int = TRUSTED,
    shares: Mapping[str, float] = SHARES,
) -> dict[str, list[dict[str, str]]]:
    """Return ``candidates``, ``validation``, ``harmful`` and ``benign`` as rows of ``prompt`` and ``response``.

    ``candidates`` have a ``quality`` too: ``clean`` (untouched safety pairs), ``swapped`` (safety prompt → the answer of an
    ordinary pair), ``benign`` (untouched ordinary pairs) and ``shuffled`` (the safe answer's words in random order).
    ``validation`` is clean, ``harmful`` swapped and ``benign`` ordinary. No prompt is in two sets. The answers swapped in come
    from the ordinary pairs left over, again and again where those are few.

    Args:
        safety_rows: Trusted pairs with a safe answer; columns ``prompt`` and ``response``.
        benign_rows: Ordinary pairs; the same columns.
        seed: Fixes the draw.
        candidates: How many candidates.
        trusted: The size of each of the other three sets.
        shares: Quality → share of the candidates; must sum to 1.

    Raises:
        ConfigError: A quality is unknown, or the shares do not sum to 1.
        DataError: There are too few rows.
    """
    if set(shares) - set(SHARES) or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise ConfigError(f"testbed.plant shares must name only {', '.join(SHARES)} and sum to 1, but are {dict(shares)}")
    draw = random.Random(seed)
    safety, ordinary = distinct(safety_rows), distinct(benign_rows)
    draw.shuffle(safety)
    draw.shuffle(ordinary)
    counts = _counts(candidates, shares)
    for name, rows, needed in zip(("safety", "benign"), (safety, ordinary), _needed(counts, trusted), strict=True):
        if len(rows) < needed:
            raise DataError(
                f"planting {candidates} candidates and sets of {trusted} needs {needed} distinct {name} pairs, "
                f"but there are {len(rows)}; {_advice(len(safety), len(ordinary), candidates, trusted, shares)}"
            )

    take_safety, take_ordinary = iter(safety), iter(ordinary)
    clean = [next(take_safety) for _ in range(counts["clean"])]
    to_swap = [next(take_safety) for _ in range(counts["swapped"])]
    to_shuffle = [next(take_safety) for _ in range(counts["shuffled"])]
    validation = [next(take_safety) for _ in range(trusted)]
    to_harm = [next(take_safety) for _ in range(trusted)]
    benign = [next(take_ordinary) for _ in range(counts["benign"])]
    trusted_benign = [next(take_ordinary) for _ in range(trusted)]
    spare = list(take_ordinary)
    answers = [spare[index % len(spare)]["response"] for index in range(len(to_swap) + len(to_harm))]

    def swap(rows: list[dict[str, str]], responses: list[str]) -> list[dict[str, str]]:
        return [{**row, "response": response} for row, response in zip(rows, responses, strict=True)]

    planted = {
        "clean": clean,
        "swapped": swap(to_swap, answers[: len(to_swap)]),
        "benign": benign,
        "shuffled": [{**row, "response": shuffled(row["response"], draw)} for row in to_shuffle],
    }
    rows = [{**row, "quality": quality} for quality, group in planted.items() for row in group]
    draw.shuffle(rows)
    return {
        "candidates": rows,
        "validation": validation,
        "harmful": swap(to_harm, answers[len(to_swap) :]),
        "benign": trusted_benign,
    }


def _counts(candidates: int, shares: Mapping[str, float]) -> dict[str, int]:
    counts = {quality: round(candidates * shares.get(quality, 0.0)) for quality in SHARES}
    counts["clean"] += candidates - sum(counts.values())
    return counts


def _needed(counts: Mapping[str, int], trusted: int) -> tuple[int, int]:
    """Return how many safety pairs and how many ordinary pairs are used up."""
    from_safety = counts["clean"] + counts["swapped"] + counts["shuffled"] + 2 * trusted
    return from_safety, counts["benign"] + trusted + 1  # at least one answer to swap in


def _advice(safety: int, ordinary: int, candidates: int, trusted: int, shares: Mapping[str, float]) -> str:
    """Return what to do where there are too few pairs: the largest numbers in the same proportion that there is enough for."""
    for fewer in range(candidates - 1, 0, -1):
        smaller = max(1, trusted * fewer // candidates)
        from_safety, from_ordinary = _needed(_counts(fewer, shares), smaller)
        if from_safety <= safety and from_ordinary <= ordinary:
            return f"lower the numbers, for example --candidates {fewer} --trusted {smaller}"
    return "no --candidates and --trusted are low enough: give more pairs"


def write_jsonl(sets: Mapping[str, Sequence[Mapping[str, str]]], folder: str | Path) -> list[Path]:
    """Write each set to ``<folder>/<name>.jsonl`` and return the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        path.write_bytes(b"".join(orjson.dumps(dict(row)) + b"\n" for row in rows))
        paths.append(path)
    return paths


def distinct(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the first row of each prompt, with both sides non-empty."""
    kept: dict[str, dict[str, str]] = {}
    for row in rows:
        prompt, response = str(row.get("prompt") or ""), str(row.get("response") or "")
        if prompt.strip() and response.strip():
            kept.setdefault(prompt, {"prompt": prompt, "response": response})
    return list(kept.values())


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Return the pairs of a JSONL file, as ``prompt`` and ``response``.

    Raises:
        DataError: The file cannot be read, or a line is no such pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({"prompt": str(row["prompt"]), "response": str(row["response"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not an object with prompt and response ({error}); mend the line") from error
    return rows
