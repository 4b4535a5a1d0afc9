"""Measure what each objective costs on one worker of this cluster: `python -m jobs.benchmark --device cuda --model …`."""

from __future__ import annotations

import argparse
from pathlib import Path

import ray

from pharmacist_ray.benchmarks.objectives import Load, measure, show
from pharmacist_ray.cli.process import plain_failures
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.session import connected
from pharmacist_ray.runtime.actors import check_room, per_worker, plain_errors
from pharmacist_ray.training.objectives import OBJECTIVES


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="what to measure")
    parser.add_argument("--model", help="folder or hub id; default: a random Llama of 21 M parameters")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda takes a worker with a GPU")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--out", type=Path, help="folder for benchmark.json, an absolute path")
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
    resources = ResourcesConfig(gpus_per_worker=1 if given.device == "cuda" else 0)
    with plain_failures():
        if given.out is not None and not given.out.is_absolute():
            raise ConfigError(f"--out {given.out} is relative, but a job starts in a temporary folder; give an absolute path")
        with connected(resources), plain_errors():
            check_room(per_worker(resources), 1)
            # On a worker: a job's own process runs on the head, which may have neither the GPUs nor the cores.
            on_worker = ray.remote(num_cpus=1, num_gpus=resources.gpus_per_worker, max_retries=0)(measure)
            costs = ray.get(on_worker.remote(given.objectives, load))
        show(costs, load, given.out)


if __name__ == "__main__":
    main()
