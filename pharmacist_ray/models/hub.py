"""Where models' files are: those on a hub held at one commit, for what is there under a name can change from one day to the next.

``owner/name@commit`` is a model at a commit. A name alone, or with a branch or a tag behind the @, is resolved once a run, and every
process then takes the files of that commit, from the hub's cache on its own machine or from the hub.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml

from pharmacist_ray.config.schema import Config
from pharmacist_ray.errors import ModelError
from pharmacist_ray.storage import StoragePath, local_copy

KEPT = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
"""Files of a model that are taken; not the same weights in other formats."""

_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def on_hub(path: str) -> bool:
    """Whether a model's path can only be that of a hub: it has the form ``owner/name`` or ``owner/name@revision``, and is nothing here."""
    return _ID.fullmatch(path) is not None and not path.startswith(".") and not Path(path).exists()


def pinned(path: str, before: str = "") -> str:
    """Return a hub id with the commit that it means, ``owner/name@commit``; any other path, and a commit, as it is.

    Offline, the commit in the hub's cache on this machine counts. Where none can be found, the path stays as it is, and whoever loads
    the model says what is wrong.

    Args:
        path: Of a model.
        before: What the path was pinned to in the same run directory; a name without a revision keeps to that.
    """
    if not on_hub(path):
        return path
    name, _, revision = path.partition("@")
    if not revision and before.startswith(f"{name}@"):
        return before
    commit = revision if _COMMIT.fullmatch(revision) else _commit(name, revision or "main")
    return f"{name}@{commit}" if commit else path


def at_one_commit(config: Config, before: str | None = None) -> Config:
    """Return the configuration with a hub's models, the one to harden and a cascade's proxy, at one commit; any other as it is.

    Args:
        config: A run's.
        before: What the model's path was pinned to, by default in the ``config.yaml`` of the run directory; the proxy's is always there.
    """
    path, proxy = config.model.path, config.scoring.proxy
    if on_hub(path):
        config = with_model_path(config, pinned(path, _before(config, "model") if before is None else before))
    if proxy is not None and proxy.path is not None and on_hub(proxy.path):
        config = with_proxy_path(config, pinned(proxy.path, _before(config, "scoring", "proxy")))
    return config


def _before(config: Config, *keys: str) -> str:
    """Return the path of a model in the ``config.yaml`` of a run directory; nothing where there is none, or none that can be read."""
    try:
        section = yaml.safe_load((config.run_dir / "config.yaml").read_text(encoding="utf-8"))
        for key in keys:
            section = section[key]
        return str(section["path"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""


def with_model_path(config: Config, path: str) -> Config:
    """Return the configuration with its model at another path."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def with_proxy_path(config: Config, path: str | None) -> Config:
    """Return the configuration with the proxy of its cascade at another path; one without a cascade as it is."""
    if (proxy := config.scoring.proxy) is None:
        return config
    scoring = config.scoring.model_copy(update={"proxy": proxy.model_copy(update={"path": path})})
    return config.model_copy(update={"scoring": scoring})


@cache  # a question a process
def _commit(name: str, revision: str) -> str | None:
    from huggingface_hub import HfApi, try_to_load_from_cache  # only where a model has a hub id

    try:
        return HfApi().model_info(name, revision=revision, timeout=10).sha
    except Exception:  # noqa: BLE001 - offline, no such model, no access: it raises what it likes
        file = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(file).parent.name if isinstance(file, str) else None


@cache  # of many loads in a process the first one asks
def snapshot(path: str) -> Path:
    """Return the folder on this machine with a model's files at a revision.

    Args:
        path: ``owner/name@revision``.

    Raises:
        ModelError: They are not in the cache, and cannot be had from the hub.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = path.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=KEPT, ignore_patterns=["*/*"]))
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise ModelError(
            f"'{path}' is no folder here and cannot be had from the hub: {first} ({type(error).__name__})"
        ) from error


def on_disk(path: str | StoragePath) -> str | Path:
    """Return where a model's files lie here: the local copy of one in an object store or of a hub's commit; else its path as it is.

    Raises:
        ModelError: There is nothing at the URI, or the commit cannot be had.
    """
    if isinstance(path, str) and "@" in path and on_hub(path):
        return snapshot(path)
    if isinstance(path, Path) or "://" not in str(path):
        return path if isinstance(path, Path) else str(path)
    try:
        return local_copy(path)
    except FileNotFoundError as error:
        raise ModelError(f"{error}; check model.path") from None
