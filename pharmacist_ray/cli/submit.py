"""Send a job to a cluster from here: check what it needs, pack what travels, hand it to the cluster's job server.

Ray's `JobSubmissionClient` does not know what belongs into a package. A package is a zip file that is the same for the same contents,
so it is uploaded once.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import yaml
from pathspec import GitIgnoreSpec
from pydantic import BaseModel

from pharmacist_ray.cli.jobs import plain_refusals
from pharmacist_ray.config.schema import Config, JudgeConfig, SourceConfig
from pharmacist_ray.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("run", "curate", "align", "evaluate", "search", "redteam", "audit", "finetune", "benchmark")
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


_MODELS = ("model.path", "evaluation.judge_path")
"""Keys that take the id of a hub as well."""


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
        local = (isinstance(section, JudgeConfig) and name in ("path", "template_file")) or key == "evaluation.lm_eval.include"
        if isinstance(value, Path) or key in _MODELS or local:
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
    of_hub = path.startswith("hf:") or key in _MODELS or (key.startswith("evaluation.judge.") and key.endswith(".path"))
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


def resources(given: Sequence[str]) -> dict[str, float]:
    """Return what ``NAME=AMOUNT`` stand for.

    Raises:
        ConfigError: One is malformed.
    """
    found = {}
    for one in given:
        name, _, amount = one.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = -1.0
        if not name or found[name] <= 0 or name == "CPU":
            raise ConfigError(
                f"--resource {one}: it takes NAME=AMOUNT with an amount above 0, for example GPU=1; CPUs are --cpus"
            )
    return found


def runtime_env(file: Path) -> dict[str, Any]:
    """Return a runtime environment of Ray's from a YAML file.

    Raises:
        ConfigError: It cannot be read, or says what the command itself says.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    variables = values.get("env_vars", {}) if isinstance(values, dict) else None
    if not isinstance(variables, dict) or not all(isinstance(one, str) for one in variables.values()):
        raise ConfigError(
            f"--runtime-env {file} is no runtime environment: it takes a mapping such as pip, py_modules and env_vars"
        )
    if "working_dir" in values:
        raise ConfigError(
            f"--runtime-env {file} has working_dir, with which the configuration would not travel; give --working-dir"
        )
    return dict(values)


def reached_by_all(config: Config) -> list[str]:
    """Return the local paths of a configuration, which every node has to reach under the same name."""
    return sorted({path.removeprefix("hf:") for _, path in _paths(config) if os.path.isabs(path.removeprefix("hf:"))})


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
    takes: Mapping[str, float] | None = None,
    runtime: Mapping[str, Any] | None = None,
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
        takes: What else it takes: ``GPU``, ``memory`` in bytes, or resources of the cluster's own.
        runtime: A runtime environment of Ray's, for example of `runtime_env`; ``env`` goes before its variables.

    Raises:
        ConfigError: The job is unknown, the id is taken, or the package is too large.
        ResourceError: The cluster cannot be reached, or refuses the job.
    """
    if job not in JOBS:
        raise unknown_name("job", job, JOBS)
    if id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", id):
        raise ConfigError(f"--id {id}: an id is made of letters, digits and _.-")
    line = ["python", "-m", f"jobs.{job}", *(["--config", f"{SUBMITTED}/{config.name}"] if config else []), *arguments]
    given = dict(runtime or {})
    runtime_env: dict[str, Any] = given | {"env_vars": {**given.get("env_vars", {}), **(env or {})}}
    other = dict(takes or {})
    with TemporaryDirectory() as folder, plain_refusals(client.get_address(), secrets=runtime_env["env_vars"].values()):
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
                    entrypoint_num_gpus=other.pop("GPU", None),
                    entrypoint_memory=int(other.pop("memory", 0)) or None,
                    entrypoint_resources=other or None,
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
