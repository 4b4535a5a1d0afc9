from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pharmacist_ray.runtime.threads import side_by_side


@pytest.mark.parametrize("at_a_time", [1, 2, 7])
def test_results_come_in_the_order_of_their_items_and_no_more_run_than_may(at_a_time):
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(min(at_a_time, 5))  # the first ones wait for each other, however slow the machine starts them

    def square(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if number < together.parties:
            together.wait(60)
        time.sleep(0.01 * (5 - number))
        with lock:
            running -= 1
        return number * number

    assert side_by_side(square, range(5), at_a_time=at_a_time) == [0, 1, 4, 9, 16]
    assert most == min(at_a_time, 5)
    assert side_by_side(square, [], at_a_time=at_a_time) == []


def test_the_first_error_is_raised_once_all_have_ended():
    ended = []

    def work(number: int) -> None:
        if number:
            time.sleep(0.02 * (3 - number))
            ended.append(number)
            raise ValueError(f"item {number}")
        ended.append(number)

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(work, range(3), at_a_time=3)
    assert sorted(ended) == [0, 1, 2]


def test_an_interruption_does_not_wait_for_what_is_waited_for():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in a shell's background do not have
    forever = threading.Event()
    try:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            side_by_side(lambda _: forever.wait(60), [1, 2], at_a_time=2)
    finally:
        signal.signal(signal.SIGINT, before)
        forever.set()
