"""The trusted rows as scorers that need no model see them: read once by an actor, and what is fitted to them kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pharmacist_ray.data.rows import sample_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.storage import storage_path

Fitted = TypeVar("Fitted")


@dataclass(frozen=True)
class TrustedSets:
    """Where the trusted rows lie, and how many of them count: those that the selector's fit takes."""

    folders: Mapping[str, str]
    """``validation``, ``harmful``, ``candidates``, and ``benign`` where it is given → folder of canonical rows."""
    limit: int
    """At most so many trusted rows of each, chosen by id."""
    seed: int
    safe: tuple[str, ...] = ("validation",)
    """The sets that scorers tell harmful rows from."""
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def rows(self, name: str) -> list[Row]:
        """Return the rows of a set, read at the first call.

        Raises:
            ArtifactError: The set was not given, or is empty.
        """
        rows: list[Row] = self.once(name, lambda: self.sample(name, self.limit))
        return rows

    @property
    def safe_rows(self) -> list[Row]:
        """The rows of all `safe` sets."""
        return [row for name in self.safe for row in self.rows(name)]

    def sample(self, name: str, count: int) -> list[Row]:
        """Return at most so many rows of a set, chosen by id; see `rows`."""
        if not (rows := sample_rows(storage_path(self.folders[name]), count, self.seed) if name in self.folders else []):
            raise ArtifactError(f"a scorer needs rows of data.{name} and there are none; ingest them again")
        return rows

    def fitted(self, make: Callable[[TrustedSets], Fitted]) -> Fitted:
        """Return what a function makes of the sets, made at the first call."""
        fitted: Fitted = self.once(make, lambda: make(self))
        return fitted

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under a key, made at the first call."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
