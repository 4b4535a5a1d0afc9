"""What a person sees while a run goes on: a bar in a terminal, a line every few seconds in a log.

Everything that may hold text from data goes through `escaped`, so that no escape sequence or markup of a data set reaches a terminal.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pharmacist_ray.data.printable import printable
from pharmacist_ray.storage import RemotePath, StoragePath, json_of

LOG_EVERY_S = 10.0

console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
"""Where the package prints; wide where nobody's window limits it."""


def escaped(text: object) -> str:
    """Return `printable` text on one line with rich's markup switched off, for `say`."""
    return escape(printable(text))


def say(line: str) -> None:
    """Print one line of ours; may carry rich markup."""
    console.print(line, soft_wrap=True)


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """Show progress of one piece of work; yields a function to call with (done, total) and perhaps a note of ours."""
    if not console.is_terminal:
        at, said = time.monotonic(), (-1.0, "")

        def log(done: float, total: float, note: str = "") -> None:
            nonlocal at, said
            now = time.monotonic()
            if ((done, note) != said and now - at > LOG_EVERY_S) or (done != said[0] and done >= total):
                at, said = now, (done, note)
                say(f"  {what}: {done:g} of {total:g}{note}")

        yield log
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escaped(what), total=None)

        def show(done: float, total: float, note: str = "") -> None:
            progress.update(task, completed=done, total=total, description=escaped(what) + note)

        yield show


@contextmanager
def followed(look: Callable[[], None], places: Sequence[StoragePath]) -> Iterator[None]:
    """Look at what lies in some places again and again while something else goes on, and once when that is over.

    Args:
        look: Reads what there is and shows it.
        places: Where it looks; in an object store, where each look is some requests, it does so every five seconds, else twice a second.
    """
    over, every = threading.Event(), 5.0 if any(isinstance(place, RemotePath) for place in places) else 0.5

    def follow() -> None:
        while not over.wait(every):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


@contextmanager
def watch_training(what: str, folders: Sequence[StoragePath], steps: list[int]) -> Iterator[None]:
    """Show how far training runs are, read from the small files they leave beside their outputs.

    Args:
        what: Shown before the bar.
        folders: The runs' output folders.
        steps: Their optimiser steps.
    """
    attempts: dict[StoragePath, int] = {}

    def done(tell: bool = True) -> tuple[float, str]:
        count, latest = 0.0, []
        for folder, number in zip(folders, steps, strict=True):
            if (folder / "result.json").exists():
                count += number
                continue
            try:
                values = json_of(folder.with_name(f"{folder.name}.progress.json"))
                attempt = values.get("attempt", 1)
                if tell and attempt > attempts.get(folder, 1):
                    say(
                        f"  {escaped(values['name'])} was interrupted; it goes on after step {values['resumed']} of {values['total']} "
                        f"(attempt {attempt})"
                    )
                attempts[folder] = attempt
                count += values["step"]
                latest.append(
                    f"loss {values['loss']:.3g}, gradient {values['grad_norm']:.2g}, {values['tokens_per_s']:.0f} tokens/s"
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return count, f" · {latest[-1]}" if latest else ""

    def look() -> None:
        count, note = done()
        show(count, sum(steps), note)

    done(tell=False)  # what an earlier command left
    with bar(what) as show, followed(look, folders):
        yield
