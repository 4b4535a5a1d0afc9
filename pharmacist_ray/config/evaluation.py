"""What is asked and how answers are judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pharmacist_ray.config.data import SourceConfig
from pharmacist_ray.config.section import Count, Location, Section


class TaskEvaluation(Section):
    """Accuracy on the user's task."""

    source: SourceConfig
    """Test rows: prompt → expected answer."""
    checker: Literal["exact", "contains", "number"] = "exact"
    """How an answer is compared with the expected one; `exact` and `contains` are reported both."""


class EvaluationConfig(Section):
    """What is asked and how answers are judged."""

    harmful_prompts: SourceConfig
    """Harmful prompts never trained on."""
    benign_prompts: SourceConfig
    """Ordinary prompts, for over-refusal."""
    task: TaskEvaluation
    judge: str = "phrases"
    """Which judge; `pharmacist plugins` lists all. One of your own is `module:attribute`."""
    judge_path: Location | None = None
    """The judge's model folder (classifier) or world file (testbed)."""
    max_new_tokens: Count = 128
    """Longest answer in tokens (Vaccine's public code: 128)."""
    batch_size: Count = 64
    """Prompts per generation batch."""
    bootstrap_draws: Count = 2000
    """Draws of the bootstrap over runs and clusters of prompts."""
    group_column: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column of `harmful_prompts` by which the harmful score and refusals are reported apart too, for example what your trusted
    rows cover and what they do not."""
    cluster_column: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column of the prompts that says which belong together, for example what they ask for; intervals count such prompts as one.
    A prompt without it is on its own."""
