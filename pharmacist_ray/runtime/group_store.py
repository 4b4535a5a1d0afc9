"""Notes of one worker group in Ray's own key-value store, which outlives workers and machines.

Ray Train hands over what workers return, but only if all of them do, and starts the group again for whatever any of them raises. So an
error of ours that one worker alone meets, and that would come again, is pinned up here; and so is what a worker is about to do, for
the case that it never says anything again.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from pharmacist_ray.errors import PharmacistError

_NAMESPACE = "pharmacist"


@dataclass(frozen=True)
class GroupStore:
    """The notes of one worker group; plain data that travels to the workers."""

    name: str
    """Unique among the runs of a cluster."""

    def post_error(self, rank: int, error: PharmacistError) -> None:
        """Pin up the error that ends a worker's work."""
        _internal_kv_put(f"{self.name}/error/{rank}", pickle.dumps(error), namespace=_NAMESPACE)

    def error(self) -> PharmacistError | None:
        """Return an error that any worker, of this group or of one before it, has pinned up."""
        for key in sorted(_internal_kv_list(f"{self.name}/error/", namespace=_NAMESPACE)):
            found: PharmacistError = pickle.loads(_internal_kv_get(key, namespace=_NAMESPACE))  # noqa: S301 - our own
            return found
        return None

    def all_posted(self, workers: int, within_s: float = 3.0) -> bool:
        """Wait a little for every worker's error; return whether they are all there."""
        until = time.monotonic() + within_s
        while len(_internal_kv_list(f"{self.name}/error/", namespace=_NAMESPACE)) < workers:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def set_status(self, what: str) -> None:
        """Say what the group is about to do; replaces what was said before."""
        _internal_kv_put(f"{self.name}/doing", what.encode(), namespace=_NAMESPACE)

    def status(self) -> str:
        """Return what the group was about to do last."""
        return (_internal_kv_get(f"{self.name}/doing", namespace=_NAMESPACE) or b"").decode()

    def clear(self) -> None:
        """Take everything down."""
        _internal_kv_del(f"{self.name}/", del_by_prefix=True, namespace=_NAMESPACE)
