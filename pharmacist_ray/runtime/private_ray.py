"""A Ray of this process's own, on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import ray
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from pharmacist_ray.errors import ResourceError
from pharmacist_ray.runtime.ranks import gpus_in_sight

ATTEMPTS = 3
"""Times that Ray is started. It ends itself where its agents, two Python processes, are not up within 15 seconds, which no setting
changes; on a busy machine, or where Python's files are read for the first time, that happens (ours)."""

_TOO_LATE = "The current node timed out during startup"


def start_ray(*, cpus: int, store_bytes: int) -> None:
    """Start it and connect to it; ``ray.shutdown()`` ends it.

    Args:
        cpus: Logical CPUs, which may be more than there are.
        store_bytes: Size of its object store.

    Raises:
        ResourceError: It did not start.
    """
    # By default Ray's workers yield to everything else on the machine; here they are the work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Nobody announces to a private Ray that its one machine will go; a process that listens for it costs seconds of every run.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Hide the machine's GPUs from processes that asked for none: PEFT would take any that it sees.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    with _without_log_level_line(), gpus_in_sight():
        try:
            for attempt in Retrying(
                stop=stop_after_attempt(ATTEMPTS), retry=retry_if_exception_message(match=_TOO_LATE), reraise=True
            ):
                with attempt:
                    ray.init(
                        address="local",  # else Ray would look for a head that somebody started on this machine
                        num_cpus=cpus,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        object_store_memory=store_bytes,
                    )
        except Exception as error:
            if not str(error).startswith(_TOO_LATE):
                raise
            raise ResourceError(
                f"Ray did not start in {ATTEMPTS} tries of half a minute each: the machine has too much else to do; try again later, or "
                "set resources.workers=0 and resources.actors=0, which need less of it"
            ) from error


@contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Keep from standard error the one line by which Ray's C++ code says, at its start, that it heeds RAY_BACKEND_LOG_LEVEL.

    It has no switch and writes past Python. Everything else is passed on when the block ends.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with TemporaryFile() as caught:  # not a pipe, which could fill up
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            caught.seek(0)
            for line in caught:
                if b"Set ray log level from environment variable" not in line:
                    os.write(2, line)
