"""Plug-ins: scorers, objectives, judges, exports and trackers of other packages, found by name.

A name is looked up in the package's own table, then among the entry points of what is installed, then as ``module:attribute``. A plug-in
is imported where it is used, so every worker's Python must find it too.
"""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar, cast

from pharmacist_ray.errors import ConfigError, PharmacistError, PluginError, unknown_name

T = TypeVar("T")

_HERE = f"{Path(__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Plugin:
    """Where a part of somebody else's comes from."""

    kind: str
    """``scorer``, ``objective``, ``judge``, ``export`` or ``tracker``."""
    name: str
    """What the configuration calls it."""
    place: str
    """``module:attribute``."""
    package: str = ""
    """The installed package that has it as an entry point; empty where the configuration names the place itself."""
    version: str = ""
    """That package's version."""

    def __str__(self) -> str:
        """Say which it is, for messages."""
        return f"{self.kind} '{self.name}'" + (f" of {self.package} {self.version} ({self.place})" if self.package else "")

    def load(self) -> Any:
        """Import it.

        Raises:
            ConfigError: There is no such module or attribute.
            PluginError: Its module cannot be imported.
        """
        module, _, attribute = self.place.partition(":")
        try:
            found = import_module(module)
        except Exception as error:  # noqa: BLE001 - a module is its author's program and raises what it likes
            if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
                raise ConfigError(
                    f"{self}: there is no module '{error.name}'; install its package here and on every node, or put the folder that "
                    "has it on PYTHONPATH"
                ) from None
            raise failure(self, error, "cannot be imported") from None
        try:
            return reduce(getattr, attribute.split("."), found)
        except AttributeError:
            public = ", ".join(name for name in vars(found) if not name.startswith("_"))
            raise ConfigError(f"{self}: module '{module}' has no '{attribute}'; it has {public[:200] or 'nothing'}") from None

    @property
    def identity(self) -> dict[str, str]:
        """What it is for fingerprints: package and version, or the hash of the module's file; not where that lies."""
        if self.package:
            return {"package": self.package, "version": self.version}
        file = getattr(import_module(self.place.partition(":")[0]), "__file__", None)
        return {"content": hashlib.blake2b(Path(file).read_bytes() if file else b"", digest_size=8).hexdigest()}


class Table(dict[str, T]):
    """A package's own parts of a kind by name; ``table[name]`` finds a plug-in's as well, iteration and ``in`` do not."""

    def __init__(
        self,
        kind: str,
        line: type[T],
        own: Mapping[str, T],
        *,
        watched: Callable[[T, Plugin], T],
        also: tuple[str, ...] = (),
    ) -> None:
        """Make a table.

        Args:
            kind: What is in it, for messages; its entry points are in the group ``pharmacist_ray.<kind>s``.
            line: What a plug-in is to be; of a bare function a line is made, with that as its first field.
            own: The package's own.
            watched: Returns a plug-in's line with its functions inside `blaming`, and with what they return checked.
            also: Further names that a configuration may hold, for messages.
        """
        super().__init__(own)
        self.kind, self.line, self.watched, self.also = kind, line, watched, also
        self._found: dict[str, tuple[Plugin, T]] = {}

    @property
    def group(self) -> str:
        """The group of its entry points."""
        return f"pharmacist_ray.{self.kind}s"

    def __missing__(self, name: str) -> T:
        """Return a plug-in's line, loaded at the first call.

        Raises:
            ConfigError: Nothing here has this name, several packages have it, or it is no such thing.
            PluginError: It cannot be imported.
        """
        return self._plugged(name)[1]

    def plugin(self, name: str) -> Plugin | None:
        """Return where a name's part comes from, None for the package's own; raises as ``table[name]`` does."""
        return None if name in self or name in self.also else self._plugged(name)[0]

    def plugged(self, names: list[str]) -> dict[str, Any]:
        """Return ``{"plugins": …}`` with the `Plugin.identity` of those among the names, for fingerprints; nothing if there are none."""
        found = {name: self.plugin(name) for name in names}
        plugins = {name: plugin.identity for name, plugin in found.items() if plugin}
        return {"plugins": plugins} if plugins else {}

    def installed(self) -> list[Plugin]:
        """Return the plug-ins of installed packages, by name."""
        found = [_plugin(self.kind, point) for point in entry_points(group=self.group)]
        return sorted(found, key=lambda one: (one.name, one.package))

    def adopt(self, plugin: Plugin) -> T:
        """Load a plug-in as a line of this table; raises as ``table[name]`` does."""
        found = plugin.load()
        if not isinstance(found, self.line):
            if not callable(found) or isinstance(found, type):
                raise ConfigError(
                    f"{plugin} is of type {type(found).__name__}; it has to be a {self.line.__name__} or a function"
                )
            found = cast(Any, self.line)(found)
        return self.watched(cast(T, found), plugin)

    def _plugged(self, name: str) -> tuple[Plugin, T]:
        if name not in self._found:
            installed = self.installed()
            named = [one for one in installed if one.name == name]
            if len(named) > 1:
                owners = " and ".join(f"{one.package} {one.version} ({one.place})" for one in named)
                raise ConfigError(f"{self.kind} '{name}' is given by {owners}; name the place that is meant instead")
            module, colon, attribute = name.partition(":")
            if not named and not (colon and all(part.isidentifier() for part in f"{module}.{attribute}".split("."))):
                raise unknown_name(
                    self.kind,
                    name,
                    [*self, *self.also, *(one.name for one in installed)],
                    "one of another package is known once that is installed here and on every node (`pharmacist plugins` lists all); "
                    "name one of your own as module:attribute",
                )
            plugin = named[0] if named else Plugin(self.kind, name, name)
            self._found[name] = plugin, self.adopt(plugin)
        return self._found[name]


@contextmanager
def blaming(plugin: Plugin | None) -> Iterator[None]:
    """Turn what a plug-in's own code raises into one line that names it, with its traceback in the notes.

    Errors of ours pass as they are. So do those that came from a function of ours which it called, for they may be a row's or the model's;
    a note says whose code it was.

    Args:
        plugin: Whose code runs in the block; None for our own.

    Raises:
        PluginError: The plug-in failed.
    """
    try:
        yield
    except PharmacistError:
        raise
    except Exception as error:
        if plugin is None:
            raise
        if _came_from_us(error):
            error.add_note(f"while {plugin} ran")
            raise
        raise failure(plugin, error) from None


def failure(plugin: Plugin, error: Exception, what: str = "failed") -> PluginError:
    """Return the error that stands for one of a plug-in's, with its traceback as a note, which travels between processes."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    failed = PluginError(f"{plugin} {what}: {said}; the bug is the plug-in's")
    failed.add_note("".join(traceback.format_exception(error)).rstrip())
    return failed


def misfit(plugin: Plugin, what: str) -> PluginError:
    """Return the error for a plug-in that returned what it may not."""
    return PluginError(f"{plugin} {what}; the bug is the plug-in's")


def _came_from_us(error: Exception) -> bool:
    """Whether a function of this package, called by the plug-in, raised the error or called what did."""
    ours = [frame.f_code.co_filename.startswith(_HERE) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return False in ours and True in ours[ours.index(False) :]


def _plugin(kind: str, point: EntryPoint) -> Plugin:
    package, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
    return Plugin(kind, point.name, point.value.split("[")[0].strip(), package, version)
