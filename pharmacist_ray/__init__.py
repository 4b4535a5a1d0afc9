"""Pharmacist on Ray: rank safety-alignment data, align on the best of it, and measure what that is worth."""

from __future__ import annotations

import logging
import os
from typing import Any

__version__ = "0.1.0"

# PEFT imports bitsandbytes where it is there, which tells of a CPU kernel that it could have on a line of its own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Said in every process before the libraries are imported: they draw bars of their own, and DeepSpeed warns of each CPU it meets.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

__all__ = [
    "Curated",
    "PharmacistError",
    "__version__",
    "align",
    "attack",
    "configure",
    "curate",
    "evaluate",
    "score",
    "search_settings",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: torch and Ray take seconds. Its types stand in ``__init__.pyi``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"{__name__}.errors" if name == "PharmacistError" else f"{__name__}.api"), name)
    globals()[name] = found
    return found
