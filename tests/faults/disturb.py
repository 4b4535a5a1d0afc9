"""A run to disturb, and what it takes: killing workers and nodes by their ids, running the command as a user does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.pipeline.session import run_stage

INJECT = Path(__file__).parent / "inject"
TRAIN: dict[str, Any] = {"steps": 120, "batch_size": 8, "lr": 1e-2, "save_every": 10}
"""Long enough to be hit, a second or two."""


@dataclass
class World:
    """A run directory and its configuration."""

    root: Path
    values: dict[str, Any]

    @property
    def config(self) -> Config:
        return parse_config(self.values, where="test")

    def copy(self, root: Path, *parts: str) -> World:
        """Return the same run in another place, with some of what this one has made."""
        root.mkdir(parents=True, exist_ok=True)
        for part in parts:
            shutil.copytree(self.root / part, root / part)
        return World(root, {**self.values, "run_dir": str(root)})

    def stage(self, name: str) -> None:
        run_stage(name, self.config)

    def selected(self) -> list[str]:
        return sorted(pq.read_table(self.root / "selections" / "pharmacist" / "rows")["id"].to_pylist())

    def scores(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted((self.root / "scores" / "rows").glob("part-*.parquet"))}

    def scored(self) -> int:
        """Return how many shards are scored so far."""
        return len(list((self.root / "scores" / "rows").glob("part-*.parquet")))

    def scoring(self, least: int, most: int) -> bool:
        """Return whether so many shards are scored, and a worker is within another one: it has begun, and published nothing yet."""
        begun = (self.root / "scores" / "rows").glob("part-*.attempt.json")
        within = any(not file.with_name(file.name.replace(".attempt.json", ".parquet")).exists() for file in begun)
        return within and least <= self.scored() <= most

    @property
    def aligned(self) -> Path:
        return next((self.root / "align").glob("pharmacist.sft.s0-*"), self.root / "align" / "none")

    def step(self) -> int:
        """Return after which step of the alignment there is a state to go on from."""
        states = (self.aligned / "run.partial").glob("state-??????")
        return max((int(state.name.removeprefix("state-")) for state in states), default=0)

    def adapter(self) -> bytes:
        return (self.aligned / "run" / "adapter" / "adapter_model.safetensors").read_bytes()

    def history(self) -> list[dict[str, float]]:
        """Return the curve without the times."""
        lines = (self.aligned / "run" / "history.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")} for line in lines]

    def litter(self) -> list[str]:
        """Return what only an unfinished or careless run leaves."""
        patterns = ("*.tmp", "*.attempt.json", "*.partial", "started.json", "*.progress.json")
        return [str(file.relative_to(self.root)) for pattern in patterns for file in self.root.rglob(pattern)]


def processes(name: str, below: int | None = None) -> list[psutil.Process]:
    """Return the Ray workers below a process (this one by default) whose title has a name in it."""
    found = []
    for process in psutil.Process(below or os.getpid()).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and name in title:
            found.append(process)
    return found


@contextmanager
def meanwhile(act: Callable[[], bool]) -> Iterator[None]:
    """Try something again and again beside what goes on, until it has happened; it must have, before the block ends."""
    over, happened = threading.Event(), threading.Event()

    def go() -> None:
        while not over.is_set():
            if act():
                happened.set()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert happened.is_set(), "the fault never came"


def kill_one(
    name: str, when: Callable[[], bool], kill: Callable[[psutil.Process], None] = psutil.Process.kill
) -> Callable[[], bool]:
    """Return an act for `meanwhile` and `wait_for`: kill a worker of a name, not there yet, as soon as the time has come.

    It is looked for before: by the time that all processes are looked through, a fast machine has done the work. And it is stopped
    before the second look at the time, so that it cannot get on between that look and its end.
    """
    others = {process.pid for process in processes(name)}  # of a test before, whose pool nobody has collected yet
    found: list[psutil.Process] = []
    looked = 0.0

    def act() -> bool:
        nonlocal looked
        if not found or not found[-1].is_running() or found[-1].status() == psutil.STATUS_ZOMBIE:
            # Not more often: it takes a core's time from those that are waited for.
            if time.monotonic() - looked > 0.3:
                found[:] = [process for process in processes(name) if process.pid not in others]
                looked = time.monotonic()
            return False
        if not when():
            return False
        victim = found[-1]
        with suppress(psutil.NoSuchProcess):
            victim.suspend()
            while (status := victim.status()) not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(0.001)
            if status == psutil.STATUS_STOPPED and when():
                kill(victim)
                return True
            victim.resume()
        return False

    return act


@contextmanager
def command(world: World, stage: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``pharmacist STAGE`` as a user does; nothing of it is left afterwards."""
    file = world.root.with_name(f"{world.root.name}.yaml")
    file.write_text(json.dumps(world.values))  # JSON is YAML
    code = "from pharmacist_ray.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, stage, "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in a shell's background do not have
    )
    workers: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # it hands out no more work while those it has started are looked up
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
        end(workers)


def end(orphans: Sequence[psutil.Process]) -> None:
    """See that what a killed driver had started ends; workers do so by themselves, Ray's other processes take half a minute for it."""

    def works(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.name().startswith("ray::") and "Agent" not in process.name()
        return False

    psutil.wait_procs([one for one in orphans if works(one)], timeout=20)
    for one in orphans:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it never came so far"
        time.sleep(0.01)
