"""The sections on scores: how they are distributed, and rows near the top, the cut and the bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow.compute as pc

from pharmacist_ray.config.scoring import CALIBRATED
from pharmacist_ray.report.blocks import Block, Example, Figure, Note, Plot, SideBySide, Table, brief, cut
from pharmacist_ray.report.figures import histogram
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.report.scores import Histogram, Scores
from pharmacist_ray.storage import read_table


def distributions(run: RunFiles, scores: Scores | None) -> list[Block]:
    """Return one histogram a score; the first is the one selected by, with what was kept."""
    if scores is None:
        return []
    blocks = _cascade(run)
    worst = _cut(run) if scores.main else None
    order = sorted(scores.columns, key=lambda name: name != scores.main)
    plots = []
    for name in order:
        found = scores.columns[name]
        lower, middle, upper = found.quartiles
        text = f"{found.rows:,} rows: median {brief(middle)}, middle half from {brief(lower)} to {brief(upper)}"
        text += f", range from {brief(found.low)} to {brief(found.high)}." if found.rows else "."
        if found.unscored:
            text += f" {found.unscored:,} rows have no such score."
        if found.kept is not None:
            kept = int(found.kept.sum())
            text += f" {kept:,} kept, {found.rows - kept:,} dropped; the worst score kept is {brief(worst)}."
        plots.append(Plot(histogram(name, found, text, worst if name == scores.main else None), text, _bins(name, found)))
    if scores.main:
        # One figure for the score that decides, one for the others.
        blocks.append(Figure(f"{scores.main}, the score that the main selection ranks by", plots[:1]))
        blocks += _categories(run)
        plots = plots[1:]
    elif made_of := _made_of(run):
        blocks += [Note(f"The main selection ranks by {run.main_arm}, which is made of {made_of}."), *_categories(run)]
    else:
        blocks.append(Note("No selection by these scores is there yet; pharmacist select makes it."))
    blocks += _planted(run)
    if plots:
        caption = "The other scores" if scores.main else "The scores"
        blocks.append(Figure(f"{caption}, one panel each. The end bins also hold what lies beyond them.", plots))
    return blocks


def examples(run: RunFiles, scores: Scores | None) -> list[Block]:
    """Return a few kept rows beside a few dropped ones."""
    if scores is None or not scores.main:
        return []
    kept, dropped = scores.kept, scores.dropped
    # A row stands in one group only, also where there are few.
    near = [row for row in kept.worst if row not in kept.best]
    low = [row for row in dropped.worst if row not in dropped.best]
    groups = [_look_up(run, rows, scores.descending) for rows in (kept.best, near, dropped.best, low)]
    return [
        Note("Texts come from the data as they are; characters that could not be seen are written out, long texts are cut."),
        SideBySide(
            [("Best scores", groups[0]), ("Just kept", groups[1][::-1])],
            [("Just missed", groups[2]), ("Worst scores", groups[3][::-1])],
            ("Kept", "Dropped"),
        ),
    ]


def _made_of(run: RunFiles) -> str:
    """Return what the main selection's score is made of, in words; nothing if it is one score."""
    manifest = run.manifest("selections", run.main_arm) if run.main_arm else {}
    if slopes := manifest.get("calibration", {}).get("scores"):
        return "the ranks by " + ", ".join(f"{name} (slope {slope:.2f})" for name, slope in slopes.items())
    if turns := manifest.get("rule", {}).get("turns"):
        return "the best rank by any of " + ", ".join(turns)
    weights = manifest.get("rule", {}).get("weights", {})
    return (
        "the sum of ranks by " + ", ".join(f"{name} (weight {weight:g})" for name, weight in weights.items()) if weights else ""
    )


def _cascade(run: RunFiles) -> list[Block]:
    """Return what a cascade showed to the model, and what it loses of the model's own top rows."""
    found = run.manifest("scores").get("summary", {}).get("cascade")
    if not found:
        return []
    seen, whole, drawn = (found[name] for name in ("seen", "candidates", "sampled"))
    rows = [
        (
            arm,
            f"{one['wanted']:,}",
            f"{one['members']:,}",
            f"{one['missed']:,}",
            f"{one['estimate']:.1%} [{one['low']:.1%}, {one['high']:.1%}]",
        )
        for arm, one in found["arms"].items()
    ]
    few = [arm for arm, one in found["arms"].items() if not one["enough"]]
    return [
        Note(
            f"A proxy scored all {whole:,} candidates, and the model {seen:,} of them ({seen / max(1, whole):.0%}): {drawn:,} drawn at "
            f"random, and {seen - drawn:,} more that stand high with the proxy. The others have no score that needs it, and no selection "
            "by one takes them."
        ),
        *(
            Note(
                f"The sample has too few of the top rows by {arm} to leave any row out: raise scoring.proxy.sample.", warning=True
            )
            for arm in few
        ),
        Table(
            "What the cascade loses of the rows that the model would keep if it had seen all, estimated by the sample, with "
            f"{found['level']:.0%} intervals; the mean was to be at most {found['miss']:.1%}",
            ("selection", "kept", "of these in the sample", "missed of those", "lost"),
            rows,
        ),
    ]


def _planted(run: RunFiles) -> list[Block]:
    """Return what planted rows say about a calibrated selection: what is kept of each kind, and which score finds what."""
    found = run.manifest("selections", CALIBRATED).get("calibration")
    if not found:
        return []

    def interval(one: Mapping[str, float]) -> str:
        return f"{one['estimate']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"

    kinds = [kind for kind in found["kept"] if kind != "good"]
    shares = [(kind, found["kept"][kind]) for kind in ("good", *kinds)]
    kept = [(kind, f"{one['planted']:,}", f"{one['kept']:,}", interval(one)) for kind, one in shares]
    areas = [(name, *(interval(by_kind[kind]) for kind in kinds)) for name, by_kind in found["auroc"].items()]
    return [
        *(Note(line, warning=True) for line in found["warnings"]),
        Table(
            "How good the kept rows are, by planted ones: what the calibrated cut would keep of trusted rows that the selector has "
            f"not seen, as they are and broken. Estimated with {found['level']:.0%} intervals, as if there were no quotas",
            ("kind", "planted", "kept", "share"),
            kept,
        ),
        Table("How often a planted good row scores above a bad one of each kind (0.5 is chance)", ("score", *kinds), areas),
    ]


def _categories(run: RunFiles) -> list[Block]:
    """Return how much of each category the main selection kept: the 30 largest."""
    found = run.manifest("selections", run.main_arm).get("categories", {}) if run.main_arm else {}
    largest = sorted(found.items(), key=lambda item: (-item[1]["candidates"], item[0]))
    rows = [
        (name or "(none)", f"{one['candidates']:,}", f"{one['kept']:,}", f"{one['kept'] / max(one['candidates'], 1):.0%}")
        for name, one in largest[:30]
    ]
    if len(rows) < 2:
        return []
    more = f", the {len(rows)} largest of {len(largest):,}" if len(largest) > len(rows) else ""
    return [
        Table(
            f"Kept by category{more}", ("category", "candidates", "kept", "share"), rows, summary="What was kept of each category"
        )
    ]


def _cut(run: RunFiles) -> float | None:
    value = run.manifest("selections", run.main_arm).get("cut") if run.main_arm else None
    return float(value) if value is not None else None


def _bins(name: str, found: Histogram) -> Table:
    edges = [brief(float(edge)) for edge in found.edges]
    header = ["from", "to", "rows"] + (["kept"] if found.kept is not None else [])
    counts = [found.all] if found.kept is None else [found.all, found.kept]
    rows = [
        (low, high, *(f"{int(count):,}" for count in numbers))
        for low, high, *numbers in zip(edges[:-1], edges[1:], *counts, strict=True)
    ]
    return Table(f"Rows by {name}", header, rows, words=0, summary=f"Numbers: {name}")


def _look_up(run: RunFiles, rows: Sequence[tuple[float, str, str]], descending: bool) -> list[Example]:
    found: dict[str, dict[str, str]] = {}
    for shard in sorted({shard for _, _, shard in rows}):
        wanted = [id for _, id, place in rows if place == shard]
        file = run.root / "ingest" / "candidates" / "rows" / shard
        columns = ["id", "prompt", "input", "response", "category", "source"]
        with readable(file):
            table = read_table(file, columns=columns, filters=pc.field("id").isin(wanted))
        found |= {row["id"]: row for row in table.to_pylist()}
    texts = []
    for rank, id, _ in rows:
        if id in found:
            row = found[id]
            place = [f"score {brief(rank if descending else -rank)}", cut(row["category"], 60), cut(row["source"], 120)]
            prompt = row["prompt"] + (f"\n{row['input']}" if row["input"] else "")
            texts.append(Example(" · ".join(part for part in place if part), cut(prompt), cut(row["response"])))
    return texts
