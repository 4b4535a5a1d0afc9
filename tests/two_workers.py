"""Two workers for a whole session, because to start a group takes three processes ten seconds each."""

from __future__ import annotations

import itertools
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import cloudpickle

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.workers import Work, run_on_workers
from pharmacist_ray.storage import replacing


class TwoWorkers:
    """Calls ``work(payload, ranks)`` on two workers, and returns what the first one does; a failure ends the group, and the next
    call starts another."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._thread, self._group = folder, ThreadPoolExecutor(1), None
        self._starts = itertools.count()

    def __call__(self, work: Work, payload: Any) -> Any:
        if self._group is None:
            self._mail = self._folder / f"group-{next(self._starts)}"
            self._mail.mkdir()
            self._numbers = itertools.count()
            resources = ResourcesConfig(workers=2, cpus_per_worker=0.5, max_failures=0)
            self._group = self._thread.submit(
                run_on_workers, _serve, str(self._mail), name="shared", storage=self._mail / "ray", resources=resources
            )
        number = next(self._numbers)
        _post(cloudpickle.dumps((work, payload)), _asked(self._mail, number))
        answer = _answer(self._mail, number)
        while not answer.exists():
            if self._group.done():
                group, self._group = self._group, None
                group.result()
            time.sleep(0.02)
        return pickle.loads(answer.read_bytes())

    def end(self) -> None:
        """End the group, if there is one."""
        if self._group is not None:
            _post(b"", _asked(self._mail, next(self._numbers)))
            self._group.result()
        self._thread.shutdown()


def _asked(folder: Path, number: int) -> Path:
    return folder / f"{number}.asked"


def _answer(folder: Path, number: int) -> Path:
    return folder / f"{number}.answer"


def _post(content: bytes, file: Path) -> None:
    with replacing(file) as draft:
        draft.write_bytes(content)


def _serve(folder: str, ranks: Ranks) -> None:
    for number in itertools.count():
        file = _asked(Path(folder), number)
        while not file.exists():
            time.sleep(0.02)
        if not (asked := file.read_bytes()):
            return
        work, payload = pickle.loads(asked)
        value = work(payload, ranks)
        ranks.barrier()
        if ranks.first:
            _post(cloudpickle.dumps(value), _answer(Path(folder), number))
