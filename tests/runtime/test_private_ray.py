"""Ray's start is tried again where its own deadline was too short for the machine."""

from __future__ import annotations

import pytest

from pharmacist_ray.errors import ResourceError
from pharmacist_ray.runtime import private_ray

LATE = Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")


@pytest.fixture
def failing(monkeypatch):
    """Return a function that lets the first starts fail with these errors, and a list of the starts."""
    starts: list[int] = []

    def fail(*errors: Exception) -> list[int]:
        left = list(errors)

        def init(**settings: object) -> None:
            starts.append(int(str(settings["num_cpus"])))
            if left:
                raise left.pop(0)

        monkeypatch.setattr(private_ray.ray, "init", init)
        return starts

    return fail


def test_a_start_that_came_too_late_is_tried_again(failing):
    starts = failing(LATE, LATE)
    private_ray.start_ray(cpus=3, store_bytes=1)
    assert starts == [3, 3, 3]


def test_a_machine_that_is_always_too_busy_is_one_line(failing):
    starts = failing(*[LATE] * 5)
    with pytest.raises(
        ResourceError, match=r"^Ray did not start in 3 tries of half a minute each: the machine has too much else to do"
    ):
        private_ray.start_ray(cpus=3, store_bytes=1)
    assert len(starts) == 3


def test_any_other_error_is_raised_at_once(failing):
    starts = failing(ValueError("no such setting"))
    with pytest.raises(ValueError, match=r"^no such setting$"):
        private_ray.start_ray(cpus=3, store_bytes=1)
    assert len(starts) == 1
