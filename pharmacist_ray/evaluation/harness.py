"""Models measured by tasks of lm-evaluation-harness, on stateless Ray Data actors: one model is one unit of work."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from pharmacist_ray.config.evaluation import HarnessConfig
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.actors import on_actors
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.storage import StoragePath, local_copy, storage_path, write_text

RETRIES = 3
"""Times that a model is measured anew after its actor died (ours)."""

_LEFT_OUT = ("alias", "name", "sample_len", "sample_count")


def check_harness(settings: HarnessConfig) -> None:
    """Check that the library and all tasks are there, before any model is trained.

    Raises:
        ConfigError: Says what to install, or which task is unknown.
    """
    if not settings.tasks:
        return
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluation.lm_eval needs a package that is not installed; pip install 'pharmacist-ray[lm-eval]'")
    known = _manager(settings).all_tasks
    for name in settings.tasks:
        if name not in known:
            close = get_close_matches(name, known, 1)
            meant = f" (did you mean '{close[0]}'?)" if close else ""
            raise ConfigError(
                f"evaluation.lm_eval: unknown task '{name}'{meant}; `lm-eval ls tasks` lists all, and include is for a folder of your own"
            )


def measure_by_tasks(
    models: Mapping[StoragePath, ModelRef],
    *,
    settings: HarnessConfig,
    resources: ResourcesConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``<folder>/results.json`` for every model: task → metric → value, and the versions of tasks and library.

    Args:
        models: Folder → model.
        settings: The tasks.
        resources: Actors and what each may use.
        progress: Called with (models done, models in all).

    Raises:
        DataError: A task's data cannot be had.
    """
    arguments = {
        "settings": settings,
        "models": [(str(folder), model) for folder, model in models.items()],
        "device": "cuda" if resources.gpus_per_worker else "cpu",
        "threads": max(1, int(resources.cpus_per_worker)),
    }
    units = [{"model": number} for number in range(len(models))]
    measured = on_actors(Measurer, arguments, units, attempts=RETRIES, resources=resources, what="lm_eval")
    for done, _ in enumerate(measured, 1):
        if progress:
            progress(done, len(models))


class Measurer:
    """Measures one model after the other."""

    def __init__(self, settings: HarnessConfig, models: Sequence[tuple[str, ModelRef]], device: str, threads: int) -> None:
        """Take what is the same for all units.

        Args:
            settings: The tasks.
            models: (folder, model), addressed by number.
            device: Where models go.
            threads: CPU threads of a model.
        """
        use_cores(threads)
        self.settings, self.models, self.device = settings, models, device
        self.tasks = _manager(settings)  # which reads thousands of small files

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Measure a model and write its results; return the unit."""
        folder, ref = self.models[unit["model"]]
        write_text(json.dumps(self._measure(ref), indent=1), storage_path(folder) / "results.json")
        return unit

    def _measure(self, ref: ModelRef) -> dict[str, Any]:
        model, renderer = ref.load(self.device), ref.renderer()
        with _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            arguments = {"chat_template_args": dict(ref.template_arguments)} if ref.template_arguments else {}
            subject = HFLM(pretrained=model, tokenizer=renderer.tokenizer, batch_size=self.settings.batch_size, **arguments)
            try:
                found = simple_evaluate(
                    subject,
                    tasks=list(self.settings.tasks),
                    limit=self.settings.limit,
                    task_manager=self.tasks,
                    apply_chat_template=renderer.template == "chat",
                    system_instruction=renderer.system or None,
                    log_samples=False,
                )
            except (OSError, ConnectionError) as error:
                raise DataError(
                    f"evaluation.lm_eval: the data of {', '.join(self.settings.tasks)} cannot be had: "
                    f"{' '.join(str(error).split())[:300]}; without a network its data sets have to be in the cache of `datasets`"
                ) from error
        assert found is not None  # it is None on other ranks of a process group, and there is none
        results = {
            task: {name: value for name, value in values.items() if name not in _LEFT_OUT and isinstance(value, float | int)}
            for task, values in found["results"].items()
        }
        return {
            "results": results,
            "versions": dict(found["versions"]),
            "lm_eval": version("lm_eval"),
            "limit": self.settings.limit,
        }


def _manager(settings: HarnessConfig) -> Any:
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(local_copy(settings.include)) if settings.include else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own words and bars from the screen inside a block."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):
        yield
