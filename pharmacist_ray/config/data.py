"""Where rows come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.prompt_sets import PROMPT_SETS
from pharmacist_ray.config.section import Count, Paths, Section
from pharmacist_ray.errors import unknown_name


class SourceConfig(Section):
    """Where rows come from and how they look."""

    path: Paths
    """File, glob, folder, URI (s3://, gs://) or Hugging Face data set; one or a list."""
    layout: Literal[
        "auto", "prompt_response", "instruction", "messages", "prompt_completion", "sharegpt", "preference", "preference_messages"
    ] = "auto"
    """How a record is laid out; `auto` decides by its keys."""
    columns: dict[str, str] = {}
    """Your column names, where they differ: canonical name (prompt, response, input) → column."""
    category_column: str = "category"
    """The column with a row's category, for per-category quotas; may be absent from the data."""
    split: str = "train"
    """The split of a Hugging Face data set."""


class PromptsConfig(SourceConfig):
    """Prompts to ask: a source, or a public set by name."""

    name: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A public set in the place of a path, for example harmbench or xstest-safe; its columns are known. With `path` beside it the set is
    read from that folder or file."""
    path: Paths = []
    """File, glob, folder, URI or Hugging Face data set; one or a list. With `name`, where the set lies; default: the hub."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, values: Any) -> Any:
        if isinstance(values, SourceConfig):
            return values.model_dump()
        if not isinstance(values, dict):
            return values
        name = values.get("name")
        if name is None:
            if "path" not in values:
                raise ValueError(f"prompts need a path, or the name of a public set: {', '.join(sorted(PROMPT_SETS))}")
            return values
        if not isinstance(name, str) or name not in PROMPT_SETS:
            raise ValueError(str(unknown_name("prompt set", name, list(PROMPT_SETS), "of your own prompts give the path alone")))
        if named := [key for key in ("layout", "columns") if values.get(key, "auto") not in ("auto", {})]:
            raise ValueError(f"the columns of prompt set '{name}' are known; leave {', '.join(named)} out")
        return {"path": PROMPT_SETS[name].path, "split": PROMPT_SETS[name].split} | values


class DataConfig(Section):
    """The candidates to curate and the trusted sets to judge them by."""

    candidates: SourceConfig
    """The alignment samples of mixed quality: prompt → safe answer."""
    validation: SourceConfig
    """Trusted safety samples, disjoint from the candidates (paper: 200)."""
    harmful: SourceConfig
    """Harmful prompt → harmful answer, for the simulated attack (paper: 200). Never the attacker's data, never test prompts."""
    benign: SourceConfig | None = None
    """Trusted ordinary prompt → helpful answer; for the loss gap's reference and for replay."""
    shards: Count | None = None
    """Shards of the candidates; default: one per 1,024 rows up to 1,024 shards, then one per 16,384 rows or 16 MB; at least 8. Never
    depends on the number of workers."""
