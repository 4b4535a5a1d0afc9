"""Where rows come from."""

from __future__ import annotations

from typing import Literal

from pharmacist_ray.config.section import Count, Paths, Section


class SourceConfig(Section):
    """Where rows come from and how they look."""

    path: Paths
    """File, glob, folder, URI (s3://, gs://) or Hugging Face data set; one or a list."""
    layout: Literal["auto", "prompt_response", "instruction", "messages", "prompt_completion"] = "auto"
    """How a record is laid out; `auto` decides by its keys."""
    columns: dict[str, str] = {}
    """Your column names, where they differ: canonical name (prompt, response, input) → column."""
    category_column: str = "category"
    """The column with a row's category, for per-category quotas; may be absent from the data."""
    split: str = "train"
    """The split of a Hugging Face data set."""


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
