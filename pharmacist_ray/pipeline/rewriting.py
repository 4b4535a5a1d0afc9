"""Have a model behind an endpoint put questions in the manner of a user's: asked once, kept by content in the run directory."""

from __future__ import annotations

from collections.abc import Sequence

from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.data.rewriting import messages_for, taken
from pharmacist_ray.models.endpoint import Cache, Endpoint, request_of
from pharmacist_ray.models.generate import without_thoughts
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.storage import StoragePath

NEW_TOKENS = 1024
"""Longest reply; the model may think first (ours)."""


def rewriter(config: EndpointConfig, *, ready: bool = True) -> Endpoint:
    """Return the endpoint that is asked.

    Args:
        config: Where it is.
        ready: It is about to be asked, so the environment must have its key.

    Raises:
        ConfigError: An address, a name or the key is missing.
    """
    return Endpoint(config if ready else config.model_copy(update={"key_variable": None}), "finetune.parameters.mix.rewriter")


def rewrite(config: EndpointConfig, asked: Sequence[tuple[str, Sequence[str]]], kept: StoragePath) -> list[str | None]:
    """Return each question in the manner of the examples beside it, None where no reply was one.

    Args:
        config: The endpoint.
        asked: Question and examples.
        kept: The folder of what it has replied so far.

    Raises:
        ConfigError: The endpoint refuses the key, the model or a request.
        ResourceError: It did not answer for ``patience_s``.
    """
    fixed = request_of(config, NEW_TOKENS)
    requests = [fixed | {"messages": messages_for(*one)} for one in asked]
    replies = Cache(kept).through(requests, rewriter(config).ask_all)
    found = [taken(reply and without_thoughts(reply), *one) for reply, one in zip(replies, asked, strict=True)]
    say(f"  {sum(text is not None for text in found)} of {len(found)} questions rewritten by {escaped(str(config.model))}")
    return found
