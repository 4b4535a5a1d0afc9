"""Mix a user's fine-tuning set with a share of harmful rows."""

from __future__ import annotations

from collections.abc import Mapping

from pharmacist_ray.data.rows import sample_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import StoragePath


def parts(rows: int, harmful_share: float) -> dict[str, int]:
    """Return how many of n rows are harmful and how many are the task's; round(p·n) are harmful."""
    bad = int(rows * harmful_share + 0.5)
    return {"harmful": bad, "task": rows - bad}


def check_counts(name: str, there: Mapping[str, int], *, rows: int, harmful_share: float, attacker: str = "harmful") -> None:
    """Refuse a fine-tuning set that there are too few rows for.

    Args:
        name: The attack's.
        there: How many usable rows its ``task`` and the attacker's source have.
        rows: n, all rows together.
        harmful_share: p.
        attacker: The attacker's source, ``harmful`` or ``ordinary``.

    Raises:
        DataError: One of the two has too few.
    """
    for part, count in parts(rows, harmful_share).items():
        what = attacker if part == "harmful" else part
        if there[what] < count:
            raise DataError(
                f"attack '{name}' needs {count} {what} rows ({rows} rows, harmful_share {harmful_share:g}) but its {what} data has "
                f"{there[what]} usable ones; lower the attack's rows or give more data"
            )


def poisoned(
    task: StoragePath, harmful: StoragePath, *, rows: int, harmful_share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return the harmful and the other rows of a fine-tuning set of n, of which a share p is harmful (the literature's harmful ratio).

    Args:
        task: Canonical rows of the user's task.
        harmful: Canonical rows of the attacker.
        rows: n, all rows together.
        harmful_share: p, between 0 and 1; round(p·n) rows are harmful.
        seed: Seed of the draw.

    Raises:
        DataError: One of the two has too few rows.
    """
    picked: list[list[Row]] = []
    for (what, count), path in zip(parts(rows, harmful_share).items(), (harmful, task), strict=True):
        drawn = sample_rows(path, count, seed) if count else []
        if len(drawn) < count:
            raise DataError(f"the attack needs {count} {what} rows but {path} has {len(drawn)}; lower rows or give more data")
        picked.append(drawn)
    return picked[0], picked[1]
