"""Python runs this at the start of every process that has this folder on its path: a word that kills the process that reads it.

What the out-of-memory killer or a broken kernel does to a worker, as seen from outside. The product knows nothing of it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from types import ModuleType
from typing import Any

DEADLY = int(os.environ.get("FAULTS_DEADLY_TOKEN", "-1"))


class _AfterImport:
    """Changes torch's embedding once torch is imported, and imports nothing by itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch.nn.functional":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            embedding = module.embedding

            def deadly(input: Any, *args: Any, **kwargs: Any) -> Any:
                if bool((input == DEADLY).any()):
                    os.kill(os.getpid(), signal.SIGKILL)
                return embedding(input, *args, **kwargs)

            module.embedding = deadly

        spec.loader.exec_module = exec_module
        return spec


if DEADLY >= 0:
    sys.meta_path.insert(0, _AfterImport())
