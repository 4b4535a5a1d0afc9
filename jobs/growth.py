"""Measure how time and memory of curation grow with the number of synthetic rows: `python -m jobs.growth 10000 100000`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pharmacist_ray.benchmarks.growth import growth
from pharmacist_ray.cli.process import plain_failures


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("sizes", nargs="+", type=int, help="numbers of rows")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for data, runs and growth.json")
    parser.add_argument("--actors", type=int, default=2, help="scoring actors")
    given = parser.parse_args()
    with plain_failures():
        growth(given.sizes, given.out, actors=given.actors)


if __name__ == "__main__":
    main()
