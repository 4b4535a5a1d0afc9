"""Measure how time and memory of curation grow with the number of synthetic rows: `python -m jobs.growth 10000 100000`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pharmacist_ray.benchmarks.growth import STAGES, growth
from pharmacist_ray.cli.process import plain_failures


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("sizes", nargs="+", type=int, help="numbers of rows")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for data, runs and growth.json")
    parser.add_argument("--actors", type=int, default=2, help="scoring actors")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to measure")
    parser.add_argument("--row-bytes", type=int, default=0, help="bytes of a row, about; 0: 12 to 24 words")
    parser.add_argument("--max-length", type=int, default=64, help="longest sequence in tokens")
    given = parser.parse_args()
    stages = STAGES[: STAGES.index(given.until) + 1]
    with plain_failures():
        growth(given.sizes, given.out, actors=given.actors, stages=stages, row_bytes=given.row_bytes, max_length=given.max_length)


if __name__ == "__main__":
    main()
