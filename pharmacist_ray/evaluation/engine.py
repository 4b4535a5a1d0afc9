"""Answers by an endpoint that serves the base and is given each model's adapters, in the place of transformers on this cluster's actors.

The base is loaded once, by the endpoint, and a model is a few megabytes that it takes by request. What it is asked are the token ids that
transformers would be asked, and it decodes greedily too; where two tokens all but tie, its rounding may decide otherwise.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

from pharmacist_ray.config.evaluation import EngineConfig, VllmConfig
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.evaluation.vllm import check_vllm
from pharmacist_ray.models.adapters import short_name, stacked
from pharmacist_ray.models.endpoint import Endpoint, request_of
from pharmacist_ray.models.ref import ModelRef

WHAT = "evaluation.engine"


class EndpointEngine:
    """Asks one endpoint for the answers of models that are its base and adapters."""

    def __init__(self, config: EngineConfig, share: int = 1) -> None:
        """Check what can be checked without a request; see `Endpoint`.

        Args:
            config: The endpoint.
            share: Processes that ask it at the same time.
        """
        self.config = config
        self.completions = Endpoint(config, WHAT, share, path="/completions")
        self.loading = Endpoint(config, WHAT, path="/load_lora_adapter", read=_said)
        self.unloading = Endpoint(config, WHAT, path="/unload_lora_adapter", read=_said)
        self.served: tuple[ModelRef, str] | None = None
        self.mark = uuid.uuid4().hex[:8]  # of its names: what one process lets go another may still be asking

    def answers(
        self, model: ModelRef, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_id: int, files: Path
    ) -> list[str]:
        """Return a model's answers to prompts, in their order; empty where the service's filter refused.

        Args:
            model: The model; its base is what the endpoint serves.
            prompts: Token ids.
            max_new_tokens: The longest answer.
            end_id: The token that ends an answer, besides those that the endpoint knows.
            files: Folder that the endpoint reads; the model's adapters are written there as one.

        Raises:
            ConfigError: The endpoint refuses the key, the adapter or a request.
            ResourceError: It did not answer for ``patience_s``.
        """
        fixed = request_of(self.config, max_new_tokens) | {"model": self._name(model, files), "stop_token_ids": [end_id]}
        found = dict(self.completions.ask_all([fixed | {"prompt": list(ids)} for ids in prompts]))
        return [found[place] or "" for place in range(len(prompts))]

    def _name(self, model: ModelRef, files: Path) -> str:
        """Return what the endpoint calls a model, which it has been given by then; the one before it is let go."""
        if self.served and self.served[0] == model:
            return self.served[1]
        if self.served and self.served[1] != self.config.model:
            self._tell(self.unloading, {"lora_name": self.served[1]}, "not")  # somebody else may have let it go
            shutil.rmtree(files / self.served[1], ignore_errors=True)
        name = str(self.config.model)
        if model.adapters:
            name = f"pharmacist-{short_name(model.adapters)}-{self.mark}"
            folder = files / name
            rank = stacked(model.adapters, str(self.config.model), folder)
            try:
                self._tell(self.loading, {"lora_name": name, "lora_path": str(folder.resolve())}, "already")
            except ConfigError as error:
                raise ConfigError(
                    f"{error}; it has to take adapters by request of rank {rank}: vllm serve … --enable-lora --max-lora-rank 64, with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and has to read the run directory"
                ) from None
        self.served = model, name
        return name

    @staticmethod
    def _tell(endpoint: Endpoint, request: dict[str, Any], harmless: str) -> None:
        """Post a request about an adapter; a refusal with a word in it that says that it is done already is none."""
        try:
            list(endpoint.ask_all([request]))
        except ConfigError as error:
            if f" {harmless} " not in str(error):
                raise


def check_engine(config: EngineConfig | VllmConfig, models: Sequence[tuple[str, str]], files: object, *, ready: bool) -> None:
    """Find out whether an endpoint or vLLM can serve all models of a run, without a request.

    Args:
        config: The engine.
        models: Name of a model, and why it cannot be served; empty if it can.
        files: The run directory.
        ready: It is about to be asked, so the environment must have an endpoint's key, and vLLM must be installed.

    Raises:
        ConfigError: It cannot, or the run directory is none that it could read.
    """
    if isinstance(config, EngineConfig):
        EndpointEngine(config if ready else config.model_copy(update={"key_variable": None}))
    elif ready:
        check_vllm()
    for name, why in models:
        if why:
            raise ConfigError(f"{WHAT} serves one base with adapters, and {name} {why}; leave the engine out")
    if not isinstance(files, Path):
        raise ConfigError(f"{WHAT} reads adapters from run_dir={files}, which has to be a folder then")


def _said(response: httpx2.Response) -> str:
    return response.text
