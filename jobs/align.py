"""Align the model on every arm of the comparison; the curated subsets are there."""

from jobs.entry import job
from pharmacist_ray.pipeline.console import plain, say
from pharmacist_ray.pipeline.run import Run


def say_models(run: Run) -> None:
    """Print where every aligned model lies."""
    for cell in run.cells:
        model = run.model_of(cell)
        say(f"  {plain(cell.name)}: {plain([model.path, *model.adapters][-1])}")


if __name__ == "__main__":
    job(__doc__, ("align",), result=say_models)
