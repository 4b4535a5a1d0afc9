"""`pharmacist audit`: score the rows of a fine-tune as candidates are scored, flag what looks harmful, and write what is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rich.table import Table

from pharmacist_ray.config.load import located, parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.config.scoring import CALIBRATED
from pharmacist_ray.curation.audit import FLAGS, AuditReport, Threshold, doubts, thresholds, together, write_flags
from pharmacist_ray.curation.calibrate import calibration_columns
from pharmacist_ray.curation.planted import FILE
from pharmacist_ray.curation.score import planted_scores
from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.session import run_stages
from pharmacist_ray.storage import StoragePath, read_table, remove_tree, write_text


def run_audit(config: Config, data: Sequence[str] = ()) -> StoragePath:
    """Audit rows, and return the folder with what was found; it is a run directory of its own below the run's.

    ``audit.json`` has the thresholds and what they do to known rows, ``flags/rows`` what every row got, ``flags/left_out`` the rows that
    are left out, and ``cleaned`` the others, written as a curated set is. No row is lost: rows = cleaned + left out + those that could not
    be read or scored, which are in quarantine.

    Args:
        config: A run's configuration; its trusted sets say what safe and harmful rows look like.
        data: Files of the rows, in the place of ``audit.data``.

    Raises:
        PharmacistError: No data is given, what is configured cannot work, or nothing is left.
    """
    plan = config.audit
    run = run_stages(("ingest", "fit", "score"), audit_config(config, data))
    assert run.planted is not None
    scorers = plan.scorers
    known = read_table(planted_scores(run.scored.folder / "rows") / FILE, columns=["id", *scorers])
    kinds = read_table(run.planted.folder / "rows" / FILE, columns=["category"])["category"].to_pylist()
    found = thresholds(known, kinds, scorers, plan.alarm)
    rows, flags = run.ingested("candidates").folder, run.root / "flags"
    remove_tree(flags)
    report = write_flags(rows / "rows", run.scored.folder / "rows", found, flags, agree=plan.agree)
    rates = together(known, kinds, found, plan.agree)
    said = doubts(report, found, plan.alarm)
    facts: dict[str, Any] = {
        "rows": report.rows,
        "kept": report.kept,
        "left_out": report.left_out,
        "not_scored": report.rows - report.scored,
        "flagged": report.by_scorer,
        "thresholds": [one.facts() for one in found],
        "together": rates,
        "alarm": plan.alarm,
        "agree": plan.agree,
        "doubts": said,
    }
    if not report.kept:
        raise DataError(f"the audit leaves none of the {report.scored} rows; {flags / 'rows'} says why; {'; '.join(said)}")
    rule = Rule(scorer=FLAGS, threshold=0.5 - plan.agree)
    write_selection(rows, flags / "rows", rule, run.root / "cleaned", provenance={"audit": facts}, jsonl=True)
    write_text(json.dumps(facts, indent=1), run.root / "audit.json")
    _show(report, found, rates)
    for line in said:
        say(f"  [yellow]warning[/]: {escaped(line)}")
    say(f"  left out: {escaped(flags / 'left_out')}; what every row got: {escaped(flags / 'rows')}")
    say(f"  cleaned: {report.kept} of {report.rows} rows: {escaped(run.root / 'cleaned')}")
    return run.root


def audit_config(config: Config, data: Sequence[str] = ()) -> Config:
    """Return the configuration of an audit's run: its candidates are the rows, and half of the trusted ones stays out.

    Raises:
        ConfigError: No rows are given, a score cannot be calibrated, or there are no trusted ordinary rows.
    """
    plan = config.audit
    values = config.model_dump(
        mode="json", exclude={"search", "redteam", "evaluation", "attacks", "audit", "comparison", "selection"}
    )
    source = plan.data.model_dump(mode="json") if plan.data else {}
    if data:
        source |= {"path": [str(one) for one in data]}
    if not source:
        raise ConfigError("there is nothing to audit: give a file, or audit.data")
    if config.data.benign is None:
        raise ConfigError("an audit needs data.benign, trusted ordinary rows: most rows of a fine-tune are ordinary; add it")
    usable = calibration_columns(plan.scorers, "audit.scorers")
    if left_out := [name for name in plan.scorers if name not in usable]:
        raise ConfigError(
            f"audit.scorers: {', '.join(left_out)} cannot flag rows, for no threshold can be set by known ones: only scores that see the "
            f"model or trusted rows have one; take out what has none and leave {', '.join(usable)}"
        )
    values["data"] |= {"candidates": source, "shards": None}
    values["scoring"] |= {"scorers": plan.scorers, "safe": ["validation", "benign"], "proxy": None}  # every row is judged
    values["selection"] = {"scorer": CALIBRATED}
    values["comparison"] = {"selections": [CALIBRATED]}
    values["alignment"] |= {"replay": 0}
    name = f"{PurePath(source['path'][0]).stem[:40] or 'rows'}-{digest(source)[:8]}"
    values["run_dir"] = f"{str(config.run_dir).rstrip('/')}/audit/{name}"
    return located(parse_config(values, where="audit"))


def _show(report: AuditReport, found: Sequence[Threshold], rates: dict[str, list[float]]) -> None:
    """Print a line for each score, and one for all together."""
    table = Table(title=f"audit: {report.left_out} of {report.rows} rows left out", title_justify="left")
    table.add_column("score")
    for heading in ("flags below", "of the rows", "known harmful rows caught", "known safe rows flagged"):
        table.add_column(heading, justify="right")
    for one in found:
        caught = "{:.2f} [{:.2f}, {:.2f}]".format(*one.recall)
        share = f"{report.by_scorer[one.scorer]:,} ({report.by_scorer[one.scorer] / max(1, report.scored):.1%})"
        table.add_row(escaped(one.scorer), f"{one.below:.4g}", share, caught, f"{one.alarms} of {one.safe}")
    share = f"{report.left_out:,} ({report.left_out / max(1, report.scored):.1%})"
    both = ("{:.2f} [{:.2f}, {:.2f}]".format(*rates[name]) for name in ("harmful", "safe"))
    table.add_row("left out", "", share, *both)
    console.print(table)
