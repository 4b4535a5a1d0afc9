"""One loop on one engine."""

import sys
from typing import Any

# DeepSpeed's autotuner, which nothing here uses, imports MLflow where that is installed: a third of what a worker's start takes.
_modules: dict[str, Any] = sys.modules
_hidden = "mlflow" not in _modules
if _hidden:
    _modules["mlflow"] = None
try:
    import deepspeed  # noqa: F401 - before any part of it
finally:
    if _hidden:
        del _modules["mlflow"]
