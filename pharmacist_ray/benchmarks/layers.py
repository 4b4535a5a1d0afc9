"""What influences over the last decoder layers' adapters alone agree with, and what they cost, for a run's own model and selector.

`scoring.last_layers` ends the backward pass early. How far its scores are those of all layers depends on the model and on the data, so it
is measured on both: the selector is fitted as the run does, and candidates that had no part in weighing the layers are scored over more and
more of them, in turns with a pass that does nothing but compute losses.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy.stats import spearmanr

from pharmacist_ray.config.load import load_config
from pharmacist_ray.curation.last_layers import weighed
from pharmacist_ray.curation.score import probe_spec
from pharmacist_ray.curation.scorers import parts_of
from pharmacist_ray.curation.scorers.signals import Probe, Signals
from pharmacist_ray.data.rows import iterate_rows, sample_rows
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.taps import decoder_layers
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.session import run_stages
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.storage import write_text

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75)
"""Of the layers, from the last, where no numbers are given."""
TOP = 0.2
"""Share of the rows whose overlap is counted (ours)."""


@dataclass(frozen=True)
class Trial:
    """What is measured."""

    config: Path
    """A run's configuration."""
    layers: tuple[int, ...] = ()
    """Numbers of last layers; none given: `SHARES` of all."""
    rows: int = 256
    """Candidates, drawn by chance."""
    rounds: int = 3
    seed: int = 0


def layers(trial: Trial, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, write ``layers.json``, print it, and return it.

    Args:
        trial: What to measure.
        out: Folder for the file.
        overrides: Dotted keys of the configuration.

    Raises:
        ConfigError: There are not so many layers, or no influences are to be computed.
        PharmacistError: What a stage raises.
    """
    always = ["scoring.last_layers=1", "scoring.proxy=null"]  # whose weights are those of any number
    config = load_config(trial.config, [*overrides, *always])
    if "directions" not in parts_of(config.scoring.scorers, config.selector):
        raise ConfigError(f"scoring.scorers in {trial.config} has no score that is an influence: add pharmacist")
    run = run_stages(("ingest", "fit"), config)
    config, device = run.config, "cuda" if run.config.resources.gpus_per_worker else "cpu"
    whole = config.scoring.model_copy(update={"last_layers": None})
    probe = Probe(probe_spec(run.model, config.selector, whole, config.resources, run.fitted.folder))
    weighed_by = {row.id for row in iterate_rows(run.fitted.folder / "rows" / "last_layers.parquet")}
    drawn = sample_rows(run.ingested("candidates").folder / "rows", trial.rows + len(weighed_by), trial.seed)
    rows = [row for row in drawn if row.id not in weighed_by][: trial.rows]
    most = len(decoder_layers(probe.model))
    counts = sorted({*(trial.layers or (max(1, round(share * most)) for share in SHARES)), most})
    if counts[0] < 1 or counts[-1] > most:
        raise ConfigError(f"--layers {' '.join(map(str, trial.layers))}: the model has {most} layers")
    weights = probe.fit / "last_layers" / "directions.safetensors"
    every = probe.directions
    over = {count: [weighed(weights, place, count, one) for place, one in enumerate(every)] for count in counts}
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[int, list[float]] = {count: [] for count in (0, *counts)}
    scores: dict[int, np.ndarray] = {}
    use_cores(max(1, int(config.resources.cpus_per_worker)))
    for number in range(trial.rounds + 1):  # the first warms up
        for count in (0, *counts):
            probe.directions = over.get(count, every)
            signals = Signals(rows, probe=probe)
            assert signals.samples
            began = clock()
            found = signals.influence(probe.spec.directions[0]) if count else _forwards(signals)
            if number:
                times[count].append(clock() - began)
            scores[count] = found
        say(f"  round {number} of {trial.rounds}")
    measured = [_measured(count, most, scores, times) for count in counts]
    record = {
        "layers": measured,
        "model": config.model.path.rstrip("/").rsplit("/", 1)[-1],
        "direction": probe.spec.directions[0],
        "rows": len(rows),
        "rounds": trial.rounds,
        "top": TOP,
    }
    write_text(json.dumps(record, indent=1), out / "layers.json")
    show(record)
    say(f"  written to {escaped(out / 'layers.json')}")
    return record


def _forwards(signals: Signals) -> np.ndarray:
    """Return the losses at each checkpoint, one after the other, by the model as PEFT has it: the floor of what an influence costs."""
    losses, samples, collate = np.zeros(len(signals.rows)), signals.samples, signals.probe.renderer.collate
    for checkpoint in signals.probe.spec.checkpoints:
        model = signals.probe.set_adapter(checkpoint)

        def take(places: list[int], model: Any = model) -> None:
            batch = collate([samples[place] for place in places]).to(signals.probe.spec.device)
            losses[places] = per_sample_nll(model, batch).cpu().numpy()

        with torch.no_grad():
            signals.in_batches([len(sample.ids) for sample in samples], take)
    return losses


def _measured(count: int, most: int, scores: dict[int, np.ndarray], times: dict[int, list[float]]) -> dict[str, Any]:
    mine, whole = scores[count], scores[most]
    top = max(1, round(TOP * len(whole)))
    both = {*np.argsort(-mine, kind="stable")[:top].tolist()} & {*np.argsort(-whole, kind="stable")[:top].tolist()}
    return {
        "layers": count,
        "of": most,
        "ratio": statistics.median(one / floor for one, floor in zip(times[count], times[0], strict=True)),
        "pearson": float(np.corrcoef(mine, whole)[0, 1]),
        "spearman": float(spearmanr(mine, whole).statistic),
        "overlap": len(both) / top,
    }


def show(record: dict[str, Any]) -> None:
    """Print a line for each number of layers."""
    title = f"last layers of {record['model']}, score {record['direction']}, {record['rows']} rows, {record['rounds']} rounds"
    table = Table(title=escaped(title), title_justify="left")
    for heading in ("layers", "over a forward", "correlation", "of ranks", f"top {record['top']:.0%} in common"):
        table.add_column(heading, justify="right")
    for row in record["layers"]:
        values = (f"{row[name]:.3f}" for name in ("pearson", "spearman"))
        table.add_row(f"{row['layers']} of {row['of']}", f"{row['ratio']:.2f}", *values, f"{row['overlap']:.0%}")
    console.print(table)
