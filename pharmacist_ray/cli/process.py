"""What a command's process is: what Ray reads from its environment, who may reach its private Ray, and how it ends."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pharmacist_ray.errors import PharmacistError, ResourceError


@contextmanager
def plain_failures() -> Iterator[None]:
    """End the program on an error of ours with one line and an exit code; a bug keeps its traceback, a plug-in's before that line.

    An interruption is one line too, and ends with 130 as shells have it.

    Messages may quote data, so nothing in them reaches the terminal but what can be printed.
    """
    try:
        yield
    except PharmacistError as error:
        from pharmacist_ray.data.printable import printable

        for line in "\n".join(getattr(error, "__notes__", ())).splitlines():  # a plug-in's own traceback
            print(printable(line), file=sys.stderr)  # noqa: T201
        print(f"pharmacist: {printable(' '.join(str(error).split()))}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\npharmacist: interrupted; the same command goes on", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Exception as error:
        from pharmacist_ray.storage import is_disk_full  # a library that writes by itself, as Ray does

        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None) or "the run directory or Ray's temporary folder"
        print(  # noqa: T201
            f"pharmacist: no space is left to write {where}; free some, then run the same command again: it goes on",
            file=sys.stderr,
        )
        sys.exit(ResourceError.exit_code)


def private_ray() -> None:
    """Keep everybody else out of a private Ray, whose ports are reachable from the machine's network, by a token of this process.

    Ray reads it when it is imported. Whoever has set a mode keeps it, and a cluster has a token of its own.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _environment() -> None:
    """Set what Ray reads when it is imported; whoever sets these keeps theirs."""
    defaults: dict[str, Any] = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    if (
        os.environ.get("PHARMACIST_AUTOSCALING") == "1"
    ):  # a node with GPUs takes minutes to come, and Ray Train gives up after one
        defaults["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "1800"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


_environment()
