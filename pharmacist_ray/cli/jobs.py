"""Look at the jobs of a cluster from here: connect to its job server, follow a log, say how a job is, stop one.

A thin layer over Ray's `JobSubmissionClient`, which does not know what a mistake is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
from rich.table import Table

from pharmacist_ray.data.printable import printable
from pharmacist_ray.errors import ConfigError, ResourceError
from pharmacist_ray.pipeline.console import console, escaped, say

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

INTERRUPTED = 130
"""Exit code of who pressed Ctrl-C while following, by the shells' convention."""

_LOST_AFTER = 5  # attempts to follow a log, without a new character in between


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of a cluster's job server.

    Args:
        address: URL of the head's dashboard; default: ``RAY_API_SERVER_ADDRESS``, or ``RAY_ADDRESS`` where that is a URL.

    Raises:
        ConfigError: No address is given, or RAY_JOB_HEADERS is malformed.
        ResourceError: Nothing answers there, or it refuses us.
    """
    variables = (os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    address = address or next((one for one in variables if one and re.match(r"https?://", one)), None)
    if not address:
        raise ConfigError("which cluster? give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS to that")
    if "://" not in address:
        address = f"http://{address}"
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets it overrule the argument
    with plain_refusals(address):
        from ray.job_submission import JobSubmissionClient

        for name in ("sdk", "dashboard_sdk"):  # they tell of every step of an upload
            logging.getLogger(f"ray.dashboard.modules.{'job.' if name == 'sdk' else ''}{name}").setLevel(logging.ERROR)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        return JobSubmissionClient(address, headers=_headers())


def _headers() -> dict[str, str] | None:
    """Return what a proxy before the dashboard wants to see, from the variable that `ray job` reads; it may be a secret."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError('RAY_JOB_HEADERS is not a JSON object of texts, such as {"Cookie": "…"}')
    return found


def follow(client: JobSubmissionClient, id: str) -> int:
    """Print a job's log until it ends, and return its exit code; Ctrl-C ends the printing, not the job.

    Raises:
        ConfigError: There is no such job.
        ResourceError: The cluster was lost.
    """
    shown, failures = 0, 0

    async def print_from(start: int) -> int:
        """Print what lies behind the first ``start`` characters, which were printed before the connection broke."""
        read = 0
        async for text in client.tail_job_logs(id):
            _print_log(text[max(0, start - read) :])
            read += len(text)
            nonlocal shown
            shown = max(shown, read)
        return read

    import aiohttp

    try:
        with plain_refusals(client.get_address(), id):
            info = client.get_job_info(id)
            while True:
                before = shown
                try:
                    asyncio.run(print_from(shown))
                    info = client.get_job_info(id)
                    if info.status.is_terminal():
                        return _told(info)
                except (aiohttp.ClientError, RuntimeError, OSError) as error:
                    lost = error
                else:
                    lost = RuntimeError("its log ended too early")
                failures = failures + 1 if shown == before else 1
                if failures > _LOST_AFTER:
                    raise ResourceError(
                        f"lost the job server at {client.get_address()} ({lost}); the job may go on, look again by: "
                        f"pharmacist job logs {id} --follow"
                    )
                time.sleep(1)
    except KeyboardInterrupt:
        say(f"\njob {id} goes on; follow it: pharmacist job logs {id} --follow; stop it: pharmacist job stop {id}")
        return INTERRUPTED


def show_log(client: JobSubmissionClient, id: str) -> None:
    """Print what a job has written so far.

    Raises:
        ConfigError: There is no such job.
    """
    with plain_refusals(client.get_address(), id):
        _print_log(client.get_job_logs(id))


def show_status(client: JobSubmissionClient, id: str) -> None:
    """Print how a job is.

    Raises:
        ConfigError: There is no such job.
    """
    with plain_refusals(client.get_address(), id):
        info = client.get_job_info(id)
    if info.status.is_terminal():
        _told(info)
    else:
        say(f"job {escaped(id)}: {info.status}, {_took(info)}")


def show_jobs(client: JobSubmissionClient) -> None:
    """Print the submitted jobs of a cluster, the latest first."""
    with plain_refusals(client.get_address()):
        jobs = [info for info in client.list_jobs() if info.submission_id]
    table = Table(box=None)
    for heading in ("id", "job", "status", "exit code", "started (UTC)", "took"):
        table.add_column(heading, overflow="fold")
    for info in sorted(jobs, key=lambda info: -(info.start_time or 0)):
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime((info.start_time or 0) / 1000)) if info.start_time else "–"
        job = (info.metadata or {}).get("pharmacist", info.entrypoint)
        code = "–" if info.driver_exit_code is None else str(info.driver_exit_code)
        table.add_row(escaped(info.submission_id), escaped(job), str(info.status), code, started, _took(info))
    console.print(table)


def stop(client: JobSubmissionClient, id: str) -> None:
    """Stop a job and wait until it has ended; what it had finished stays.

    Raises:
        ConfigError: There is no such job.
    """
    with plain_refusals(client.get_address(), id):
        running = client.stop_job(id)
        while not (info := client.get_job_info(id)).status.is_terminal():
            time.sleep(0.5)
    if not running:
        say(f"job {escaped(id)} had ended already")
    _told(info)


def _told(info: Any) -> int:
    """Print how a job ended, and return its exit code: by the shells' convention 128 + N for one ended by signal N."""
    id, code = escaped(info.submission_id), info.driver_exit_code
    if str(info.status) == "SUCCEEDED":
        say(f"job {id} succeeded, {_took(info)}")
        return 0
    code = 1 if not code else 128 - code if code < 0 else code
    if str(info.status) == "STOPPED":
        say(f"job {id} was stopped, {_took(info)}; submit the same line again to go on where it was")
    elif info.driver_exit_code is None:  # it never came to run, or its node was lost
        say(f"job {id} failed: {escaped(str(info.message or '').strip()[-500:])}")
    else:
        say(f"job {id} failed with exit code {code}, {_took(info)}; its log: pharmacist job logs {id}")
    return int(code)


def _took(info: Any) -> str:
    if not info.start_time:
        return "–"
    return f"{(info.end_time or time.time() * 1000) / 1000 - info.start_time / 1000:.0f} s"


def _print_log(text: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # Ray colours its own warnings
    print(printable(text, keep="\n\t"), end="", flush=True)  # noqa: T201 (lines of a log, not ours to lay out)


@contextmanager
def plain_refusals(address: str, id: str | None = None, secrets: Any = ()) -> Iterator[None]:
    """Raise what Ray's client raises as an error that says what to do.

    Args:
        address: Of the job server.
        id: The job that is asked for.
        secrets: What must not be quoted.

    Raises:
        ConfigError: There is no such job.
        ResourceError: Everything else.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        if "Invalid authentication token" not in str(error):  # none was sent
            raise ResourceError(
                f"Unauthorized: the cluster at {address} wants a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH, or the file ~/.ray/auth_token) to the token of its head; only a cluster started with "
                "RAY_AUTH_MODE=disabled wants none"
            ) from None
        raise ResourceError(
            f"Unauthorized: the cluster at {address} refuses this token; RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or the file "
            "~/.ray/auth_token) must hold the token of its head"
        ) from None
    except (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.Timeout):
        raise ResourceError(
            f"nothing answers at {address}; is that the head's dashboard (`ray start --head --include-dashboard=true`, port 8265), "
            "and reachable from here?"
        ) from None
    except requests.exceptions.RequestException as error:
        raise ResourceError(
            f"what answers at {address} is no Ray job server ({printable(error)}); give the head's dashboard"
        ) from None
    except RuntimeError as error:
        text = str(error)
        if id is not None and "does not exist" in text:
            raise ConfigError(f"the cluster at {address} has no job {id}; `pharmacist job list` shows those it has") from None
        if "Version check returned 404" in text:
            raise ResourceError(f"what answers at {address} is no Ray job server; give the head's dashboard") from None
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        raise ResourceError(f"the cluster at {address} refuses: {' '.join(text.split())[-500:]}") from None
