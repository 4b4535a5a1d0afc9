"""What every job does: read ``--config`` and overrides, run some stages, exit as the command line would."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from pharmacist_ray.cli.app import plain_failures
from pharmacist_ray.config import Config, load_config
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.session import run_stage


def job(description: str | None, stages: Sequence[str] = (), work: Callable[[Config], object] | None = None) -> None:
    """Run stages one after the other; a user's error is one line and its exit code.

    Args:
        description: For ``--help``.
        stages: Names of stages.
        work: What to do after them.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="the run's YAML file; run_dir must be an absolute path all nodes reach")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides by dotted key")
    arguments = parser.parse_args()
    with plain_failures():
        config = load_config(arguments.config, arguments.overrides)
        if not config.run_dir.is_absolute():
            raise ConfigError(
                f"run_dir={config.run_dir} is relative, but a job starts in a temporary copy of its working directory; "
                "give an absolute path that all nodes reach"
            )
        for stage in stages:
            run_stage(stage, config)
        if work is not None:
            work(config)
