"""Compare defences of every stage against kinds of attack and an attacker who adapts, over worlds of the benchmark: `make matrix`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pharmacist_ray.benchmarks.matrix import DEFENCES, WORLDS, matrix
from pharmacist_ray.cli.process import plain_failures


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the runs by dotted key")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"), help="folder for the runs and matrix.json")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="numbers of worlds")
    parser.add_argument("--defences", nargs="+", default=list(DEFENCES), help="what is compared on the curated selection")
    parser.add_argument("--fixed-only", action="store_true", help="leave the adaptive attacker out")
    given = parser.parse_intermixed_args()
    with plain_failures():
        matrix(given.out, given.worlds, given.defences, adaptive=not given.fixed_only, overrides=given.overrides)


if __name__ == "__main__":
    main()
