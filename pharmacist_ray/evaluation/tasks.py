"""Whether an answer to a task is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from pharmacist_ray.errors import unknown_name

Checker = Callable[[str, str], bool]
"""Takes an answer and the expected answer."""

_FINAL = re.compile(r"####|the final answer is:?", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)")


def exact(answer: str, expected: str) -> bool:
    """Return whether the answer is the expected one, but for white space around it (Booster's rule)."""
    return answer.strip() == expected.strip()


def contains(answer: str, expected: str) -> bool:
    """Return whether the expected answer occurs in the answer, whatever the case (OASIS's rule).

    Lenient: an answer that names all labels is always right. Report it beside `exact`.
    """
    return bool(expected.strip()) and expected.strip().lower() in answer.lower()


def final_number(text: str) -> Decimal | None:
    """Return the first number after ``####`` or ``The final answer is``, else the last number in the text, else nothing."""
    marker = _FINAL.search(text)
    after = _numbers(text[marker.end() :]) if marker else []
    if after:
        return after[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def number(answer: str, expected: str) -> bool:
    """Return whether answer and expected answer have the same final number, however it is written (1,000.0 is 1000)."""
    right = final_number(expected)
    return right is not None and final_number(answer) == right


CHECKERS: dict[str, Checker] = {"exact": exact, "contains": contains, "number": number}
"""Name → how an answer is compared with the expected one."""

TASKS: dict[str, tuple[str, ...]] = {"exact": ("exact", "contains"), "contains": ("contains", "exact"), "number": ("number",)}
"""The checker that a task asks for → all checkers that are reported for it, the asked one first."""


def check(task: str, answer: str, expected: str) -> dict[str, bool]:
    """Return what each of the task's checkers says.

    Args:
        task: A key of `TASKS`.
        answer: The model's answer.
        expected: The right answer.

    Raises:
        ConfigError: Unknown task.
    """
    if task not in TASKS:
        raise unknown_name("checker", task, list(TASKS))
    return {name: CHECKERS[name](answer, expected) for name in TASKS[task]}


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)]
