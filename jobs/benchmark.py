"""Measure what each objective costs on one worker of this cluster: `python -m jobs.benchmark --device cuda --model …`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pharmacist_ray.cli.app import plain_failures
from pharmacist_ray.pipeline.benchmark import Load, benchmark
from pharmacist_ray.training.objectives import OBJECTIVES


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="what to measure")
    parser.add_argument("--model", help="folder or hub id; default: a random Llama of 21 M parameters")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--out", type=Path, help="folder for benchmark.json")
    given = parser.parse_args()
    load = Load(
        model=given.model,
        dtype=given.dtype,
        rows=given.rows,
        length=given.length,
        rounds=given.rounds,
        device=given.device,
        checkpointing=given.checkpointing,
    )
    with plain_failures():
        benchmark(given.objectives, load, given.out)


if __name__ == "__main__":
    main()
