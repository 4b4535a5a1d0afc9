"""Run a job on a cluster from here: pack what travels, hand it to the cluster's job server, follow its log.

A thin layer over Ray's `JobSubmissionClient`, which knows neither what belongs into a package nor what a mistake is. A package is a
zip file that is the same for the same contents, so it is uploaded once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from pathspec import GitIgnoreSpec
from pydantic import BaseModel
from rich.table import Table

from pharmacist_ray.config.schema import Config, SourceConfig
from pharmacist_ray.data.printable import printable
from pharmacist_ray.errors import ConfigError, ResourceError, unknown_name
from pharmacist_ray.pipeline.console import console, escaped, say

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("curate", "align", "evaluate", "search", "benchmark")
"""The modules of `jobs/`."""

PACKAGE_LIMIT = 100 << 20
"""Bytes of a package: the job server takes no larger request (Ray 2.60)."""

EXCLUDED = (
    ".git",
    ".venv/",
    "venv/",
    "runs/",
    "__pycache__/",
    ".*_cache/",
    ".hypothesis/",
    "node_modules/",
    "wandb/",
    "mlruns/",
    ".env",
)
"""What stays here, in the syntax of a `.gitignore`; a `.rayignore` adds to it, and takes back by ``!name``."""

SUBMITTED = ".submitted"
"""Folder of a package in which the configuration travels."""

INTERRUPTED = 130
"""Exit code of who pressed Ctrl-C while following, by the shells' convention."""

_LOST_AFTER = 5  # attempts to follow a log, without a new character in between


def check_paths(config: Config) -> None:
    """Refuse paths that would mean something else in a job: it starts in a temporary copy of its working directory.

    The copy is another one at every submission, so even data inside it would be taken for new data, and everything be made again. An
    artifact's place that is no local path is none of ours.

    Raises:
        ConfigError: Names every such path with its key.
    """
    found = [f"{key}={path}" for key, path in _paths(config) if _relative(key, path)]
    if found:
        named = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ConfigError(
            f"{named} {'is' if len(found) == 1 else 'are'} relative, but a job starts in a temporary copy of its working "
            "directory; give an absolute path that all nodes reach, or a URI"
        )


def _paths(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every path of a configuration by its dotted key."""
    for name in type(section).model_fields:
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Path) or key in ("model.path", "evaluation.judge_path"):
            yield from [(key, str(value))] if value else []
        elif name == "path" and isinstance(section, SourceConfig):
            yield from ((key, path) for path in value)
        else:
            listed = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, one in listed:
                if isinstance(one, BaseModel):
                    yield from _paths(one, f"{key}." if index is None else f"{key}.{index}.")


def _relative(key: str, path: str) -> bool:
    """Whether a path depends on where it is read; what could be a hub's id and is no folder here is taken for one."""
    if "://" in path or os.path.isabs(path.removeprefix("hf:")):
        return False
    of_hub = path.startswith("hf:") or key in ("model.path", "evaluation.judge_path")
    name = path.removeprefix("hf:")
    return not of_hub or name.startswith((".", "~")) or Path(name).exists()


def environment(given: Sequence[str]) -> dict[str, str]:
    """Return the variables that ``NAME=VALUE`` and ``NAME`` stand for; the latter takes its value from here.

    Raises:
        ConfigError: One is malformed, or is not set here. A value is never quoted: it may be a secret.
    """
    found = {}
    for number, one in enumerate(given, 1):
        name, equals, value = one.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env takes NAME=VALUE or NAME, of letters, digits and _; the {number}. given is neither")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: {name} is not set here; export it, or write {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of a cluster's job server.

    Args:
        address: URL of the head's dashboard; default: ``RAY_API_SERVER_ADDRESS``, or ``RAY_ADDRESS`` where that is a URL.

    Raises:
        ConfigError: No address is given.
        ResourceError: Nothing answers there, or it refuses us.
    """
    variables = (os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    address = address or next((one for one in variables if one and re.match(r"https?://", one)), None)
    if not address:
        raise ConfigError("which cluster? give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS to that")
    if "://" not in address:
        address = f"http://{address}"
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets it overrule the argument
    with _plain_refusals(address):
        from ray.job_submission import JobSubmissionClient

        for name in ("sdk", "dashboard_sdk"):  # they tell of every step of an upload
            logging.getLogger(f"ray.dashboard.modules.{'job.' if name == 'sdk' else ''}{name}").setLevel(logging.ERROR)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        return JobSubmissionClient(address)


def submit(
    client: JobSubmissionClient,
    job: str,
    arguments: Sequence[str] = (),
    *,
    config: Path | None = None,
    working_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    id: str | None = None,
    cpus: float = 0,
) -> str:
    """Submit a job and return its id.

    Args:
        client: From `connect`.
        job: One of `JOBS`.
        arguments: Overrides, or a benchmark's options.
        config: The run's YAML file; it travels with the job, wherever it lies.
        working_dir: A folder that travels, too, and that the job starts in: a checkout whose code is to run in place of what the nodes
            have installed.
        env: Variables of the job and its workers. Whoever has access to the cluster can read them.
        id: An id of the user's; default: one that Ray makes.
        cpus: CPUs that the job's own process takes; with 0 it runs on the head.

    Raises:
        ConfigError: The job is unknown, the id is taken, or the package is too large.
        ResourceError: The cluster cannot be reached, or refuses the job.
    """
    if job not in JOBS:
        raise unknown_name("job", job, JOBS)
    if id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", id):
        raise ConfigError(f"--id {id}: an id is made of letters, digits and _.-")
    line = ["python", "-m", f"jobs.{job}", *(["--config", f"{SUBMITTED}/{config.name}"] if config else []), *arguments]
    runtime_env: dict[str, Any] = {"env_vars": dict(env or {})}
    with TemporaryDirectory() as folder, _plain_refusals(client.get_address(), secrets=(env or {}).values()):
        if config or working_dir:
            package = Path(folder) / "job.zip"
            pack(package, config, working_dir)
            runtime_env["working_dir"] = str(package)
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join(line),
                    runtime_env=runtime_env,
                    submission_id=id,
                    metadata={"pharmacist": job},
                    entrypoint_num_cpus=cpus or None,
                )
            )
        except RuntimeError as error:
            if id is None or "already exists" not in str(error):
                raise
            raise ConfigError(
                f"--id {id} is taken on this cluster; choose another, or look at that job: pharmacist job logs {id}"
            ) from None


def pack(package: Path, config: Path | None, working_dir: Path | None) -> None:
    """Write what travels with a job into a zip file.

    Args:
        package: The file to write.
        config: The run's YAML file.
        working_dir: A folder; `EXCLUDED` and what its ``.gitignore`` and ``.rayignore`` files name stays here.

    Raises:
        ConfigError: There is no such folder, a file in it cannot be read, or the package is larger than `PACKAGE_LIMIT`.
    """
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir} is not a folder")
    try:
        files = dict(_travelling(working_dir, working_dir)) if working_dir else {}
        if config:
            files[f"{SUBMITTED}/{config.name}"] = config
        _write_package(package, files)
    except OSError as error:
        raise ConfigError(
            f"cannot send {error.filename}: {error.strerror}; make it readable, or name it in a .rayignore file"
        ) from error


def _write_package(package: Path, files: Mapping[str, Path]) -> None:
    with ZipFile(package, "w") as archive:
        for name, file in sorted(files.items()):
            entry = ZipInfo(name)  # without the file's time
            entry.compress_type, entry.external_attr = ZIP_DEFLATED, (file.stat().st_mode & 0o777) << 16
            with file.open("rb") as source, archive.open(entry, "w") as target:
                while block := source.read(1 << 20):
                    target.write(block)
                    if package.stat().st_size > PACKAGE_LIMIT:
                        raise _too_large(files)


def _travelling(folder: Path, top: Path, ignored: Sequence[tuple[Path, GitIgnoreSpec]] = ()) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder that no ignore file names, by their names in the package; links to folders are not followed."""
    lines = [*EXCLUDED] if folder == top else []
    for file in (folder / ".gitignore", folder / ".rayignore"):
        lines += file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    ignored = [*ignored, (folder, GitIgnoreSpec.from_lines(lines))]
    for place in sorted(folder.iterdir()):
        mark = "/" if place.is_dir() else ""
        if any(spec.match_file(f"{place.relative_to(base).as_posix()}{mark}") for base, spec in ignored):
            continue
        if place.is_dir() and not place.is_symlink():
            yield from _travelling(place, top, ignored)
        elif place.is_file():
            yield place.relative_to(top).as_posix(), place


def _too_large(files: Mapping[str, Path]) -> ConfigError:
    sizes: dict[str, int] = {}
    for name, file in files.items():
        top = name.split("/")[0] + ("/" if "/" in name else "")
        sizes[top] = sizes.get(top, 0) + file.stat().st_size
    largest = sorted(sizes, key=lambda top: -sizes[top])[:3]
    named = ", ".join(f"{top} ({sizes[top] / 2**20:.0f} MiB)" for top in largest)
    return ConfigError(
        f"the working directory packs to more than {PACKAGE_LIMIT >> 20} MiB, which the cluster does not take; largest: {named}; "
        "name what is not needed in a .rayignore file there: data and models belong where all nodes reach them"
    )


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
        with _plain_refusals(client.get_address(), id):
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
    with _plain_refusals(client.get_address(), id):
        _print_log(client.get_job_logs(id))


def show_status(client: JobSubmissionClient, id: str) -> None:
    """Print how a job is.

    Raises:
        ConfigError: There is no such job.
    """
    with _plain_refusals(client.get_address(), id):
        info = client.get_job_info(id)
    if info.status.is_terminal():
        _told(info)
    else:
        say(f"job {escaped(id)}: {info.status}, {_took(info)}")


def show_jobs(client: JobSubmissionClient) -> None:
    """Print the submitted jobs of a cluster, the latest first."""
    with _plain_refusals(client.get_address()):
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
    with _plain_refusals(client.get_address(), id):
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
def _plain_refusals(address: str, id: str | None = None, secrets: Any = ()) -> Iterator[None]:
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
