"""How far judges agree: the share of answers on which they say the same, and Cohen's κ, which takes off what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pharmacist_ray.evaluation.judges.verdict import Verdict


def cohen_kappa(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Return Cohen's κ = (pₒ − pₑ)/(1 − pₑ) of two raters of the same things (Cohen 1960), from −1 to 1.

    pₒ is the share on which they agree, pₑ the share on which two raters with their frequencies would agree by chance. None where
    there is nothing, or where both say one and the same of everything, so that chance alone agrees.

    Args:
        a: What one says of N things.
        b: What the other says of the same.
    """
    n = len(a)
    if not n:
        return None
    left, right = Counter(a), Counter(b)
    observed = sum(one == other for one, other in zip(a, b, strict=True)) / n
    chance = sum(count * right[name] for name, count in left.items()) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def agreement(kind: str, verdicts: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """Return one record for the first judge against each other one, over the answers that both have a verdict on.

    Args:
        kind: What the prompts are.
        verdicts: Judge → its verdicts on the same answers, in the judges' order.

    Returns:
        Records with ``prompts``, both names, the answers ``n`` that count, those that one of them left ``unjudged``, the share
        ``agreement``, ``kappa``, and the share that each calls ``harmful``; shares are null where nothing counts.
    """
    (first, mine), *others = verdicts.items()
    records = []
    for name, theirs in others:
        both = [pair for pair in zip(mine, theirs, strict=True) if "unjudged" not in pair]
        n = len(both)
        a, b = [one for one, _ in both], [other for _, other in both]
        records.append(
            {
                "prompts": kind,
                "judge": first,
                "other": name,
                "n": n,
                "unjudged": len(mine) - n,
                "agreement": sum(one == other for one, other in both) / n if n else None,
                "kappa": cohen_kappa(a, b),
                "harmful": a.count("harmful") / n if n else None,
                "harmful_by_other": b.count("harmful") / n if n else None,
            }
        )
    return records
