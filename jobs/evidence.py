"""Compare all arms over several worlds of the embedded benchmark, each with a base model of its own: `make evidence`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pharmacist_ray.benchmarks.evidence import NOISES, WORLDS, evidence
from pharmacist_ray.cli.process import plain_failures


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the runs by dotted key")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder for the runs and evidence.json")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="numbers of worlds")
    parser.add_argument("--noises", type=float, nargs="+", default=list(NOISES), help="shares of the candidates that are broken")
    given = parser.parse_intermixed_args()
    with plain_failures():
        evidence(given.out, given.worlds, given.noises, given.overrides)


if __name__ == "__main__":
    main()
