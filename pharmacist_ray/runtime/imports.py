"""Importing what is large, in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries inside the block, without looking for garbage meanwhile or ever again in what they made.

    They make some hundred thousand objects, all of which stay. To walk through those again and again takes a fifth of the import, a
    good part of every later collection, of which training makes one a model, and seconds when the process ends.
    """
    gc.collect()  # what is garbage now would not be found later
    was, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was:
            gc.enable()
