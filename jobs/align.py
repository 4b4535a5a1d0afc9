"""Align the model on every arm of the comparison; the curated subsets are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.entry import job
from pharmacist_ray.pipeline.console import escaped, say

if TYPE_CHECKING:
    from pharmacist_ray.pipeline.run import Run


def say_models(run: Run) -> None:
    """Print where every aligned model lies."""
    for variant in run.variants:
        model = run.model_of(variant)
        say(f"  {escaped(variant.name)}: {escaped([model.path, *model.adapters][-1])}")


if __name__ == "__main__":
    job(__doc__, ("align",), result=say_models)
