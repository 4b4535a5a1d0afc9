"""What a cascade loses, held against the truth: a proxy and the model score every candidate, and then samples are drawn again and again.

Every cascade is a real one (`curation.cascade`): its sample, its cut, its statement. Only the model is not asked again for what it has
said already: its scores of a row are looked up. The truth is what the model's own top rows are, and how many of them it did not see.

By default the candidates are those of the embedded benchmark, drawn several times over; with a configuration they are the user's, and with
a model another than the one in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from scipy.stats import spearmanr

from pharmacist_ray.config.load import load_config, located
from pharmacist_ray.config.schema import Config, ScoringConfig, SelectorConfig
from pharmacist_ray.config.scoring import STANDS_FOR
from pharmacist_ray.curation.cascade import score_by_cascade
from pharmacist_ray.curation.score import ScoreReport
from pharmacist_ray.curation.scored import find_shards
from pharmacist_ray.curation.scorers import columns_of
from pharmacist_ray.curation.select import Rule, select_ids
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.doctor.cascade import spared
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.proxied import passing_arms
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import connected, run_stages
from pharmacist_ray.pipeline.stages import check, run_fit, run_score
from pharmacist_ray.storage import StoragePath, read_table, remove_tree, storage_path, write_parquet, write_text
from pharmacist_ray.testbed.make import make_testbed
from pharmacist_ray.testbed.plant import write_jsonl
from pharmacist_ray.testbed.world import World

SEEDS = tuple(range(10))
SETTINGS = (
    "scoring.scorers=[pharmacist, loss_gap, low_loss, random]",
    "scoring.random_draws=1",
    "selection.combinations={rank_sum: {pharmacist: 1, loss_gap: 1}}",
    "comparison.selections=[pharmacist, loss_gap, rank_sum]",
    "selection.ratio=0.1",
    "data.shards=8",
    "resources={workers: 0, actors: 0}",
    "attacks=[]",
    "evaluation=null",
)
"""Of the embedded benchmark."""

SHARES = ("sampled", "passed_on", "seen")
"""What of the candidates is drawn, what the proxy passes on (some of that is drawn too), and what the model sees."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What is measured."""

    config: Path | None = None
    """A run's configuration; None: the embedded benchmark."""
    model: str | None = None
    """Folder or hub id of a model in the place of the configured one."""
    proxies: tuple[str, ...] = ("layers=1", "layers=2")
    """A key and a value of the section ``scoring.proxy`` each, or several with commas between them."""
    miss: float = 0.05
    sample: int | None = None
    seeds: tuple[int, ...] = SEEDS
    rows: int = 6000
    """Candidates of the embedded benchmark."""
    world: int = 0
    base: Path | None = None
    """The base of another testbed folder of the same world."""


def cascade(trial: Trial, out: Path, overrides: Sequence[str] = ()) -> list[Row]:
    """Measure, write ``cascade.json``, print it, and return its rows: one for each proxy and arm.

    Args:
        trial: What to measure.
        out: Folder for the runs and the file; what is there is not made again.
        overrides: Dotted keys of the configuration.

    Raises:
        PharmacistError: What cannot work, or what a stage raises.
    """
    out = out.resolve()
    file = trial.config or _testbed(out / "testbed", trial)
    settings = [*(() if trial.config else SETTINGS), *([f"model.path={trial.model}"] if trial.model else ()), *overrides]
    settings.append(f"run_dir={out / 'run'}")
    run = run_stages(("ingest", "fit", "score"), load_config(file, [*settings, "scoring.proxy=null"]))
    rows = []
    for proxy in trial.proxies:
        keys = dict(part.partition("=")[::2] for part in proxy.split(","))
        given = [f"scoring.proxy.{key}={value}" for key, value in keys.items()] + [f"scoring.proxy.miss={trial.miss}"]
        given += [f"scoring.proxy.sample={trial.sample}"] if trial.sample else []
        # As a trial of a search: what each proxy makes lies in folders of its own.
        varied = Run(located(load_config(file, [*settings, *given])), base=run)
        check(varied)
        assert varied.proxied is not None
        say(f"[bold]cascade[/] {escaped(proxy)}")
        resources = varied.config.resources
        with connected(resources) if resources.workers or resources.actors else nullcontext():
            run_fit(varied.proxied)
            run_score(varied.proxied)
        rows += [_measured(proxy, run, varied, arm, trial, out) for arm in passing_arms(varied.config, varied.selections)]
    candidates = sum(len(table) for table in map(partial(read_table, columns=["id"]), _shards(run)))
    facts: Row = {"miss": trial.miss, "sample": trial.sample, "seeds": list(trial.seeds), "candidates": candidates}
    facts |= {"world": None if trial.config else trial.world, "model": _name(run.config)}
    write_text(json.dumps({"cascade": rows} | facts, indent=1), out / "cascade.json")
    show(rows, facts)
    say(f"  written to {escaped(out / 'cascade.json')}")
    return rows


def _testbed(folder: Path, trial: Trial) -> Path:
    """Make the embedded benchmark with more candidates than one draw of it has, and return its configuration."""
    if not (folder / "config.yaml").exists():
        make_testbed(folder, World(0, trial.world), base=trial.base)
    found: dict[tuple[str, str], dict[str, str]] = {}
    seed = 0
    while len(found) < trial.rows:
        found |= {(row["prompt"], row["response"]): row for row in World(seed, trial.world).alignment(1000)}
        seed += 1
    write_jsonl({"alignment": list(found.values())[: trial.rows]}, folder / "data")
    return folder / "config.yaml"


def _measured(proxy: str, run: Run, varied: Run, arm: str, trial: Trial, out: Path) -> Row:
    """Return what cascades with every seed lose by one arm, and what they say of it."""
    config, by_proxy = varied.config, varied.proxied
    assert by_proxy is not None
    truth, own_scores = run.scored.folder / "rows", by_proxy.scored.folder / "rows"
    candidates, selection = run.ingested("candidates").folder, config.selection
    rule = Rule(arm, selection.ratio, selection.count, weights=selection.sums.get(arm, {}), turns=run.turns(arm))
    top = _ids(select_ids(truth, candidates, rule))
    found = []
    for seed in trial.seeds:
        assert config.scoring.proxy is not None
        folder = storage_path(out / "cascade" / f"seed-{seed}")
        remove_tree(folder)
        _, facts = score_by_cascade(
            partial(_looked_up, truth=truth, selector=config.selector),
            scoring=config.scoring.model_copy(update={"proxy": config.scoring.proxy.model_copy(update={"seed": seed})}),
            selector=config.selector,
            candidates=candidates,
            proxy=own_scores,
            rules={arm: rule},
            planted=None,
            out=folder / "rows",
            progress=_silent,
        )
        tables = [read_table(file, columns=["id", STANDS_FOR]) for file in parquet_files(folder / "rows")]
        seen = _ids(table.filter(pc.greater(table[STANDS_FOR], 0)) for table in tables)
        stated = facts["arms"][arm]
        lost = len(top - seen) / len(top)
        inside = stated["low"] <= lost + 1e-12 and lost <= stated["high"] + 1e-12
        shares = {name: facts[name] / facts["candidates"] for name in SHARES}
        found.append({"seed": seed, "lost": lost, "inside": inside} | shares | stated)
        remove_tree(folder)
    shapes = [shape_of(one.config.model, one.model.layers) for one in (run, by_proxy)]
    pace = [one.scored.manifest()["summary"]["usage"].get("tokens_per_s") for one in (run, by_proxy)]
    means = {name: float(np.mean([one[name] for one in found])) for name in (*SHARES, "lost", "estimate")}
    cost = spared(shapes[0], shapes[1], 0, 0).proxy
    return {
        "proxy": proxy,
        "arm": arm,
        "kept": len(top),
        "agreement": _agreement(truth, own_scores, candidates, rule),
        "cost": cost,
        "cost_measured": pace[0] / pace[1] if all(pace) else None,
        **means,
        "saved": 1 - cost - means["seen"],
        "width": float(np.mean([one["high"] - one["low"] for one in found])),
        "inside": sum(one["inside"] for one in found),
        "of_seeds": found,
    }


def _looked_up(
    *, candidates: StoragePath, out: StoragePath, scoring: ScoringConfig, truth: StoragePath, selector: SelectorConfig, **_: Any
) -> ScoreReport:
    """Write the scores that rows have in a folder with those of all, as `curation.score.score` would make them."""
    shards, total, reasons = parquet_files(candidates), 0, list[str]()
    for shard in shards:
        ids = read_table(shard, columns=["id"])["id"].combine_chunks()
        table = read_table(truth / shard.name, columns=["id", *columns_of(scoring, selector)])
        write_parquet(table.filter(pc.is_in(table["id"], value_set=ids)), out / shard.name)
        total += len(ids)
        aside = truth.with_name("quarantine") / shard.name
        if aside.exists():
            broken = read_table(aside)
            mine = [detail.startswith(tuple(f"row {id}:" for id in ids.to_pylist())) for detail in broken["detail"].to_pylist()]
            if any(mine):
                write_parquet(broken.filter(pa.array(mine)), out.with_name("quarantine") / shard.name)
                reasons += broken.filter(pa.array(mine))["reason"].to_pylist()
    of_each = {reason: reasons.count(reason) for reason in set(reasons)}
    return ScoreReport(total, len(shards), columns_of(scoring, selector), 0.0, len(reasons), of_each)


def _ids(tables: Iterator[pa.Table]) -> set[str]:
    return {id for table in tables for id in table["id"].to_pylist()}


def _agreement(truth: StoragePath, proxy: StoragePath, candidates: StoragePath, rule: Rule) -> float:
    """Return Spearman's rank correlation of the two models' scores."""
    sides = []
    for folder in (truth, proxy):
        shards, ranking = find_shards(folder, candidates, rule.scorer, weights=rule.weights, turns=rule.turns)
        tables = [ranking.scores(shard.scores) for shard in shards]
        ids = [id for table in tables for id in table["id"].to_pylist()]
        values = np.concatenate([table["score"].to_numpy() for table in tables])
        sides.append(dict(zip(ids, values.tolist(), strict=True)))
    return float(spearmanr([sides[0][id] for id in sides[0]], [sides[1][id] for id in sides[0]], nan_policy="omit").statistic)


def _shards(run: Run) -> list[StoragePath]:
    return parquet_files(run.ingested("candidates").folder / "rows")


def _name(config: Config) -> str:
    return config.model.path.rstrip("/").rsplit("/", 1)[-1]


@contextmanager
def _silent(what: str) -> Iterator[Callable[..., None]]:
    yield lambda done, total: None


def show(rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Print a line for each proxy and arm."""
    seeds = len(facts["seeds"])
    table = Table(
        title=f"cascades over {facts['candidates']:,} candidates, {seeds} seeds each; the mean loss is to be at most {facts['miss']:.1%}",
        title_justify="left",
    )
    for heading in ("proxy", "selection"):
        table.add_column(heading)
    for heading in (
        "kept", "agreement", "proxy costs", "sample", "passed on", "seen", "saved", "lost", "stated", "width", "in the interval"
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        shares = (f"{row[name]:.1%}" for name in ("cost", *SHARES, "saved", "lost", "estimate", "width"))
        cells = (f"{row['kept']:,}", f"{row['agreement']:.2f}", *shares, f"{row['inside']} of {seeds}")
        table.add_row(escaped(row["proxy"]), escaped(row["arm"]), *cells)
    console.print(table)
