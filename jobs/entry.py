"""What every job does: read ``--config`` and overrides, run some stages, say what there is now, exit as the command line would."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pharmacist_ray.cli.process import plain_failures
from pharmacist_ray.cli.submit import check_paths
from pharmacist_ray.config import Config, load_config

if TYPE_CHECKING:
    from pharmacist_ray.pipeline.run import Run


def job(
    description: str | None,
    stages: Sequence[str] = (),
    *,
    result: Callable[[Run], None] | None = None,
    work: Callable[[Config], object] | None = None,
) -> None:
    """Run stages one after the other; a user's error is one line and its exit code.

    Where all that they make is there already, it is said at once, without torch and Ray.

    Args:
        description: For ``--help``.
        stages: Names of stages.
        result: Says what was made and where, if the last stage does not.
        work: What to do in the place of stages.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config", required=True, help="the run's YAML file; its paths must be absolute ones that all nodes reach"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides by dotted key")
    arguments = parser.parse_args()
    with plain_failures():
        config = load_config(arguments.config, arguments.overrides)
        check_paths(config)
        if work is not None:
            work(config)
            return
        from pharmacist_ray.pipeline.standing import stands

        if stands(stages, config):
            return
        from pharmacist_ray.pipeline.session import run_stages

        run = run_stages(stages, config)
        if result is not None:
            result(run)
