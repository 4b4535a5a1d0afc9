"""What is asked and how answers are judged."""

from __future__ import annotations

from typing import Literal

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
    """Which judge; `pharmacist doctor` lists all."""
    judge_path: Location | None = None
    """The judge's model folder (classifier) or world file (testbed)."""
    max_new_tokens: Count = 128
    """Longest answer in tokens (Vaccine's public code: 128)."""
    batch_size: Count = 64
    """Prompts per generation batch."""
    bootstrap_draws: Count = 2000
    """Draws of the bootstrap over samples and seeds."""
