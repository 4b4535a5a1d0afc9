"""Where a model behind an OpenAI-compatible endpoint is, and how it is asked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from pharmacist_ray.config.section import Count, Location, Positive, Section

HOW = ("url", "key_variable", "concurrency", "timeout_s", "patience_s")
"""Keys that say how an endpoint is asked; no reply hangs on them."""


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible endpoint."""

    url: Location | None = None
    """An endpoint's address, up to and with `/v1`; `/chat/completions` below it is asked."""
    model: str | None = None
    """The name by which the endpoint knows its model."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable with the endpoint's key; the key itself stands in no file. None: the endpoint wants none."""
    parameters: dict[str, Any] = {}
    """What a request has besides model, messages, `temperature` (0) and `max_tokens`, or instead of them; null leaves one out."""
    concurrency: Count = 8
    """Requests under way at the same time, of all actors together."""
    timeout_s: Positive = 60.0
    """Seconds for which one request waits."""
    patience_s: Positive = 300.0
    """Seconds for which an endpoint that is busy, fails or is silent is asked the same again (ours)."""
