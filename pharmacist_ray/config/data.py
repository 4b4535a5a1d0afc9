"""Where rows come from."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.public_sets import PROMPT_SETS, ROW_SETS, PublicSet
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


class NamedConfig(SourceConfig):
    """A source, or a public set by name."""

    sets: ClassVar[dict[str, PublicSet]]
    """The sets that it can name."""
    what: ClassVar[tuple[str, str]]
    """What is in them, and what one of them is called."""

    name: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A public set in the place of a path, for example harmbench, xstest-safe or dolly; its columns are known. With `path` beside it the
    set is read from that folder or file."""
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
                raise ValueError(f"{cls.what[0]} need a path, or the name of a public set: {', '.join(sorted(cls.sets))}")
            return values
        if not isinstance(name, str) or name not in cls.sets:
            raise ValueError(
                str(unknown_name(cls.what[1], name, list(cls.sets), f"of your own {cls.what[0]} give the path alone"))
            )
        if named := [key for key in ("layout", "columns") if values.get(key, "auto") not in ("auto", {})]:
            raise ValueError(f"the columns of {cls.what[1]} '{name}' are known; leave {', '.join(named)} out")
        return {"path": cls.sets[name].path, "split": cls.sets[name].split} | values


class PromptsConfig(NamedConfig):
    """Prompts to ask: a source, or a public set by name."""

    sets = PROMPT_SETS
    what = ("prompts", "prompt set")


class RowsConfig(NamedConfig):
    """Trusted rows with answers: a source, or a public set by name."""

    sets = ROW_SETS
    what = ("rows", "set of rows")


ROW_KINDS = {"validation": "safe", "harmful": "harmful", "benign": "ordinary"}
"""Trusted set → what its rows are."""


class DataConfig(Section):
    """The candidates to curate and the trusted sets to judge them by."""

    candidates: SourceConfig
    """The alignment samples of mixed quality: prompt → safe answer."""
    validation: RowsConfig
    """Trusted safety samples, disjoint from the candidates (paper: 200)."""
    harmful: RowsConfig
    """Harmful prompt → harmful answer, for the simulated attack (paper: 200). Never the attacker's data, never test prompts."""
    benign: RowsConfig | None = None
    """Trusted ordinary prompt → helpful answer; for the loss gap's reference and for replay."""
    shards: Count | None = None
    """Shards of the candidates; default: one per 1,024 rows up to 1,024 shards, then one per 16,384 rows or 16 MB; at least 8. Never
    depends on the number of workers."""

    @model_validator(mode="after")
    def _sets_are_what_they_stand_for(self) -> DataConfig:
        for key, kind in ROW_KINDS.items():
            source = getattr(self, key)
            if source is not None and source.name and (found := ROW_SETS[source.name].kind) != kind:
                fitting = ", ".join(name for name, one in ROW_SETS.items() if one.kind == kind)
                raise ValueError(f"{key} takes {kind} rows and '{source.name}' has {found} ones; of the public sets: {fitting}")
        return self
