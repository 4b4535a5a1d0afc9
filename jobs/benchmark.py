"""Measure what each objective costs on one worker of this cluster, what this machine's GPU does, or how well scores find corruption.

`python -m jobs.benchmark --device cuda --model …` does the first, `python -m jobs.benchmark gpu` the second, without Ray and DeepSpeed,
and `python -m jobs.benchmark planted SAFETY BENIGN` the third, on pairs of yours. `python -m jobs.benchmark peers` holds our
scoring against the methods of other systems, `python -m jobs.benchmark cascade` what cascades lose against what they say,
`python -m jobs.benchmark scoring` what Ray Data makes of a scorer's pace against a bare loop, and `python -m jobs.benchmark layers CONFIG`
scores over the last layers alone against those over all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pharmacist_ray.cli.process import plain_failures
from pharmacist_ray.errors import ConfigError


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and measure."""
    given = sys.argv[1:] if arguments is None else arguments
    others = {one.__name__: one for one in (gpu, planted, peers, cascade, scoring, layers)}
    if given and given[0] in others:
        others[given[0]](given[1:])
    else:
        objectives(given)


def objectives(arguments: list[str]) -> None:
    """Measure objectives on a worker."""
    from pharmacist_ray.benchmarks.objectives import Load, measure, show
    from pharmacist_ray.training.objectives import ALIGNING

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(ALIGNING), help="what to measure")
    parser.add_argument("--model", help="folder or hub id; default: a random Llama of 21 M parameters")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda takes a worker with a GPU")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--out", type=Path, help="folder for benchmark.json, an absolute path")
    given = parser.parse_args(arguments)
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
        if given.out is not None and not given.out.is_absolute():
            raise ConfigError(f"--out {given.out} is relative, but a job starts in a temporary folder; give an absolute path")
        import ray

        from pharmacist_ray.config.schema import ResourcesConfig
        from pharmacist_ray.pipeline.session import connected
        from pharmacist_ray.runtime.actors import check_room, per_worker, plain_errors

        resources = ResourcesConfig(gpus_per_worker=1 if given.device == "cuda" else 0)
        with connected(resources), plain_errors():
            check_room(per_worker(resources), 1)
            # On a worker: a job's own process runs on the head, which may have neither the GPUs nor the cores.
            on_worker = ray.remote(num_cpus=1, num_gpus=resources.gpus_per_worker, max_retries=0)(measure)
            costs = ray.get(on_worker.remote(given.objectives, load))
        show(costs, load, given.out)


def gpu(arguments: list[str]) -> None:
    """Measure the GPU of this machine in this process."""
    from pharmacist_ray.benchmarks.gpu import SHAPES, Trial, measure, show

    usual = Trial()
    parser = argparse.ArgumentParser(
        prog="jobs.benchmark gpu",
        description="Measure scoring and a LoRA step on Llamas with random weights, on this machine's GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=list(usual.shapes), choices=list(SHAPES), help="what to measure on")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short rows: whether the program runs")
    parser.add_argument("--device", default=usual.device, choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default=usual.dtype, choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=usual.rows, help="rows of a pass at most; fewer where they would not fit")
    parser.add_argument("--length", type=int, default=usual.length, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="timed passes")
    parser.add_argument("--minutes", type=float, default=usual.budget_s / 60, help="after these nothing more is begun")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for gpu.json")
    given = parser.parse_args(arguments)
    trial = Trial(
        shapes=("tiny",) if given.tiny else tuple(given.shapes),
        device=given.device,
        dtype=given.dtype,
        length=min(given.length, 32) if given.tiny else given.length,
        rows=min(given.rows, 4) if given.tiny else given.rows,
        rounds=given.rounds,
        budget_s=60 * given.minutes,
    )
    with plain_failures():
        show(measure(trial), trial, given.out)


def peers(arguments: list[str]) -> None:
    """Measure what a score for every row costs by our methods and by those of other systems, in this process's machine."""
    from pharmacist_ray.benchmarks.peer_methods import METHODS, SHAPES, Load
    from pharmacist_ray.benchmarks.peers import measure, show

    usual = Load()
    parser = argparse.ArgumentParser(
        prog="jobs.benchmark peers",
        description="Score the same rows on the same model by our methods and by other systems', written from their descriptions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=["1M", "20M"], choices=list(SHAPES), help="Llamas with random weights")
    parser.add_argument("--weights", nargs="+", default=["lora"], choices=["lora", "full"], help="whose gradients")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128], help="tokens of the longest rows")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rows", type=int, default=usual.rows)
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="timed passes over all rows")
    parser.add_argument("--device", default=usual.device, choices=["cpu", "cuda"])
    parser.add_argument("--tokens-per-batch", type=int, default=usual.tokens_per_batch)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for peers.json")
    given = parser.parse_args(arguments)
    loads = [
        Load(shape, weights, given.rows, length, given.tokens_per_batch, given.rounds, given.device)
        for shape in given.shapes
        for weights in given.weights
        for length in given.lengths
    ]
    with plain_failures():
        show(measure(loads, given.methods), given.out)


def cascade(arguments: list[str]) -> None:
    """Hold what cascades say that they lose against what they do lose, over several samples."""
    from pharmacist_ray.benchmarks.cascade import Trial
    from pharmacist_ray.benchmarks.cascade import cascade as measure

    usual = Trial()
    parser = argparse.ArgumentParser(
        prog="jobs.benchmark cascade",
        description="Score all candidates by a proxy and by the model, draw samples, and hold what cascades state against the truth.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run by dotted key")
    parser.add_argument("--config", type=Path, help="a run's YAML file; default: the embedded benchmark")
    parser.add_argument("--model", help="folder or hub id of a model in the place of the configured one")
    parser.add_argument(
        "--proxies", nargs="+", default=list(usual.proxies), help="keys of scoring.proxy, for example path=DIR,layers=4"
    )
    parser.add_argument(
        "--miss", type=float, default=usual.miss, help="expected share of the model's own top rows that may be lost"
    )
    parser.add_argument(
        "--sample", type=int, help="rows of a sample; default: so many that 200 of the top rows are expected in it"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(usual.seeds), help="samples")
    parser.add_argument("--rows", type=int, default=usual.rows, help="candidates of the embedded benchmark")
    parser.add_argument("--world", type=int, default=usual.world, help="its world")
    parser.add_argument("--base", type=Path, help="take the base model of another testbed instead of training one")
    parser.add_argument("--out", type=Path, default=Path("runs/cascade"), help="folder for the run and cascade.json")
    given = parser.parse_intermixed_args(arguments)
    trial = Trial(
        config=given.config,
        model=given.model,
        proxies=tuple(given.proxies),
        miss=given.miss,
        sample=given.sample,
        seeds=tuple(given.seeds),
        rows=given.rows,
        world=given.world,
        base=given.base,
    )
    with plain_failures():
        measure(trial, given.out, given.overrides)


def scoring(arguments: list[str]) -> None:
    """Measure what Ray Data's actors make of a scorer's pace on this machine."""
    from pharmacist_ray.benchmarks.peer_methods import SHAPES
    from pharmacist_ray.benchmarks.scoring import Load, measure, show

    usual = Load()
    parser = argparse.ArgumentParser(
        prog="jobs.benchmark scoring",
        description="Score the same rows by one scorer in a bare loop, by one actor and by two, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=usual.rows)
    parser.add_argument("--shape", default=usual.shape, choices=list(SHAPES), help="a Llama with random weights")
    parser.add_argument("--length", type=int, default=usual.length, help="tokens of the longest rows")
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for scoring.json")
    given = parser.parse_args(arguments)
    load = Load(given.rows, given.shape, given.length, given.rounds)
    with plain_failures():
        show(measure(load), load, given.out)


def layers(arguments: list[str]) -> None:
    """Hold influences over the last layers alone against those over all, for a run's own model and selector."""
    from pharmacist_ray.benchmarks.layers import Trial
    from pharmacist_ray.benchmarks.layers import layers as measure

    usual = Trial(Path())
    parser = argparse.ArgumentParser(
        prog="jobs.benchmark layers",
        description="Score candidates over the last decoder layers alone and over all: what it costs, and how far the scores agree.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "config", type=Path, help="a run's YAML file; its ingestion and its selector are made if they are not there"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run by dotted key")
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[], help="numbers of last layers; default: from a tenth of all on"
    )
    parser.add_argument("--rows", type=int, default=usual.rows, help="candidates, drawn by chance")
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--seed", type=int, default=usual.seed, help="of the draw")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for layers.json")
    given = parser.parse_intermixed_args(arguments)
    trial = Trial(given.config, tuple(given.layers), given.rows, given.rounds, given.seed)
    with plain_failures():
        measure(trial, given.out, given.overrides)


def planted(arguments: list[str]) -> None:
    """Plant corruption in real text, and grade every score, over several seeds."""
    from pharmacist_ray.benchmarks.planted import SEEDS
    from pharmacist_ray.benchmarks.planted import planted as measure

    parser = argparse.ArgumentParser(
        prog="jobs.benchmark planted",
        description="Plant known corruption in safety pairs, and grade every score, over several seeds with a tiny base model each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("safety", type=Path, help="JSONL of trusted prompt/response safety pairs")
    parser.add_argument("benign", type=Path, help="JSONL of ordinary prompt/response pairs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the runs by dotted key")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="draws")
    parser.add_argument("--out", type=Path, default=Path("runs/planted"), help="folder for the runs and planted.json")
    given = parser.parse_intermixed_args(arguments)
    with plain_failures():
        measure(given.safety, given.benign, given.out, given.seeds, given.overrides)


if __name__ == "__main__":
    main()
