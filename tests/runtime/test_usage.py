"""Tokens a second and peak memory, from what processes say of themselves."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from pharmacist_ray.runtime.usage import Usage, peak_bytes, put_together


def test_a_mean_pace_is_over_the_time_of_all_and_the_peak_is_the_largest():
    parts = [
        {"tokens": 100, "seconds": 2.0, "peak_bytes": 7, "shard": "a", "passed": 300, "padding": 60},
        {"tokens": 500, "seconds": 1.0, "peak_bytes": 9, "passed": 500, "padding": 140},
        {"tokens": 0, "seconds": 1.0, "peak_bytes": 3},
    ]
    assert put_together(parts) == {"tokens_per_s": 150.0, "padding": 0.2, "peak_bytes": 9}
    assert put_together(parts[2:]) == {"peak_bytes": 3}
    assert put_together([{"shard": "a"}]) == {}


def test_what_was_taken_is_told_once():
    usage = Usage()
    usage.tokens += 30
    first = usage.taken()
    assert first["tokens"] == 30
    assert first["seconds"] >= 0
    assert usage.taken()["tokens"] == 0


def test_the_peak_is_what_this_process_held_at_most():
    before = peak_bytes()
    assert before == pytest.approx(psutil.Process().memory_info().rss, rel=1.0)
    block = np.ones(before // 8 + (64 << 17))  # twice as much, and 64 MiB
    assert peak_bytes() >= before + (50 << 20)
    del block
    assert peak_bytes() >= before + (50 << 20)
