"""Results are made, not typed: what a command measured becomes ``docs/results/NAME.json``, and every table and picture is drawn from that.

    python docs/results.py runs/demo/run --name demo --command "make demo"

takes a finished run, or what a measuring job wrote: the ``benchmark.json`` or ``gpu.json`` of `jobs.benchmark`, the ``growth.json`` of
`jobs.growth`, the ``evidence.json`` of `jobs.evidence`, the ``planted.json``, ``peers.json``, ``cascade.json``, ``scoring.json`` or
``layers.json`` of `jobs.benchmark`, the ``matrix.json`` of `jobs.matrix`.
Run it on the machine that measured, from the commit that was measured: both go into the file.
`python docs/results.py --redraw` only draws anew what is in README and in ``docs/pictures``.
"""

from __future__ import annotations

import json
import subprocess
import textwrap
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from columns import COLUMNS, SHORT
from drawing import METRICS, SHOWN, Row, draw, interval, number

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- made by docs/results.py: {} -->", "<!-- end -->"

PACKAGES = ("pharmacist-ray", "ray", "torch", "transformers", "peft", "deepspeed")


def main(
    source: Annotated[Path | None, typer.Argument(help="A run directory, or the JSON file that a measuring job wrote.")] = None,
    name: Annotated[str, typer.Option(help="Names docs/results/NAME.json.")] = "demo",
    command: Annotated[str, typer.Option(help="The command that made it.")] = "make demo",
    commit: Annotated[str | None, typer.Option(help="The commit that was measured; default: the present one.")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Only draw README's table and the pictures anew.")] = False,
) -> None:
    """Write a result, and what is drawn from it."""
    if not redraw:
        if source is None:
            raise typer.BadParameter("give a run directory, the JSON file that a measuring job wrote, or --redraw")
        taken = measured(source)
        made = taken.pop("date")
        facts = {"command": command, "commit": commit or _commit(), "date": made, "machine": machine()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(facts | taken, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name, result in results().items():
        draw(name, result, PICTURES)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


def results() -> dict[str, dict[str, Any]]:
    """Return every committed result by name."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}


def measured(source: Path) -> dict[str, Any]:
    """Return the kind of a measurement, its date and its rows.

    Args:
        source: The run directory, or the file that a measuring job wrote.
    """
    if source.is_dir():
        manifest = json.loads((source / "evaluation" / "manifest.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
        table = json.loads((source / "evaluation" / "table.json").read_text(encoding="utf-8"))
        return {"kind": "comparison", "date": manifest["made_at"][:10], "attacks": _attacks(config), "rows": _rows(table)}
    date = datetime.fromtimestamp(source.stat().st_mtime, UTC).date().isoformat()
    found = json.loads(source.read_text(encoding="utf-8"))
    if isinstance(found, list):
        return {"kind": "growth", "date": date, "rows": found}
    if "matrix" in found:
        return {"kind": "matrix", "date": date, "worlds": found["worlds"], "rows": found["matrix"]}
    if "worlds" in found:
        return {"kind": "evidence", "date": date, **{name: found[name] for name in ("worlds", "noises", "rows")}}
    if "planted" in found:
        return {"kind": "planted", "date": date, "seeds": found["seeds"], "rows": found["planted"]}
    if "peers" in found:
        return {"kind": "peers", "date": date, "rows": found["peers"]}
    if "cascade" in found:
        rows = [{name: value for name, value in row.items() if name != "of_seeds"} for row in found["cascade"]]
        return {
            "kind": "cascade",
            "date": date,
            "rows": [{**row, "seeds": len(found["seeds"]), "miss": found["miss"]} for row in rows],
        }
    if "scoring" in found:
        return {"kind": "scoring", "date": date, "load": found["load"], "rows": found["scoring"]}
    if "layers" in found:
        return {"kind": "layers", "date": date, "rows": [{**row, "model": found["model"]} for row in found["layers"]]}
    if "gpu" in found:
        load = {name: found["trial"][name] for name in ("dtype", "length", "rank")}
        return {"kind": "gpu", "date": date, "machine": found["machine"], "load": load, "rows": found["gpu"]}
    return {"kind": "objectives", "date": date, "load": found["load"], "rows": found["costs"]}


def _attacks(config: dict[str, Any]) -> list[Row]:
    return [
        {"name": one["name"], "lr": one["train"]["lr"], "rows": one["rows"], "harmful_share": one["harmful_share"]}
        for one in config["attacks"]
    ]


def _rows(table: list[Row]) -> list[Row]:
    before = {(row["selection"], row["defence"]): row["metrics"] for row in table if not row["attack"]}
    return [
        {
            **{name: row[name] for name in ("attack", "defence", "selection", "runs", "kept")},
            "align_seconds": round(row["align_seconds"], 2),
            **{
                f"{name}_before": _rounded(before[row["selection"], row["defence"]][name]["estimate"])
                for name in ("harmful_score", "accuracy_correct", "helpfulness")
            },
            **{name: [_rounded(row["metrics"][name][end]) for end in ("estimate", "low", "high")] for name in METRICS},
        }
        for row in table
        if row["attack"] and "over" not in row
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def machine() -> dict[str, Any]:
    """Return what this machine has: cores, memory, GPU, versions."""
    import torch

    return {
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in PACKAGES},
    }


def _commit() -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table.

    Args:
        result: The content of its file.
    """
    known = COLUMNS[result["kind"]]
    if len({row.get("defence") for row in result["rows"]}) == 1:
        known = {heading: cell for heading, cell in known.items() if heading != "defence"}
    headings = list(known)
    body = [[known[heading](row) for heading in headings] for row in result["rows"]]
    if result["kind"] == "comparison":  # the arms of an attack stand together
        attacks = [one["name"] for one in result["attacks"]]
        body.sort(key=lambda cells: attacks.index(cells[0]))
    rules = [
        "---"
        if heading
        in ("attack", "defence", "aligned on", "stage", "objective", "model", "work", "score", "method", "proxy", "way")
        else "---:"
        for heading in headings
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *body))


def summary(result: dict[str, Any]) -> str:
    """Return the evidence as a small Markdown table: a line an arm of `SHOWN` where most candidates are broken, the best first."""
    noisiest = max(row["noise"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["noise"] == noisiest and row["selection"] in SHOWN]
    shown = {heading: cell for heading, cell in COLUMNS["evidence"].items() if heading in SHORT}
    lines = [f"| {' | '.join(shown)} |", f"| --- |{' ---: |' * (len(shown) - 1)}"]
    for row in sorted(rows, key=lambda row: row["hidden"][0] if row.get("hidden") else 2):
        lines.append(f"| {' | '.join(cell(row) for cell in shown.values())} |")
    return "\n".join(lines)


def findings(result: dict[str, Any]) -> str:
    """Return what the evidence says, in sentences: which arms are apart from which, what they cost, what is left without noise."""
    noisiest = max(row["noise"] for row in result["rows"])
    rows = {row["selection"]: row for row in result["rows"] if row["noise"] == noisiest}
    ranked = sorted((arm for arm in rows if rows[arm].get("gap_closed")), key=lambda arm: -rows[arm]["gap_closed"][0])
    best = rows[ranked[0]]
    lower = [arm for arm in ranked if (found := rows[arm]["minus"].get("random")) and found[2] < 0]
    apart = [arm for arm in ranked[1:] if (found := best["minus"].get(arm)) and found[2] < 0]
    equal = [arm for arm in ranked[1:] if arm not in apart]
    said = [
        f"With {noisiest:.0%} of the candidates broken, over {best['worlds']} worlds, `{ranked[0]}` closes most of the gap from random to "
        f"the oracle on hazards that the trusted rows do not cover: {interval(best['gap_closed'])}.",
        f"Below random, by the interval of the difference, are {_names(lower)}."
        if lower
        else "No arm is below random by its interval.",
        f"`{ranked[0]}` is apart from {_names(apart)}; it is not apart from {_names(equal)}."
        if apart
        else f"`{ranked[0]}` is apart from no other arm.",
        "What it costs against random: task accuracy "
        f"{interval(best['minus_random']['accuracy'])}, helpful on benign {interval(best['minus_random']['helpful'])} (differences).",
    ]
    clean = {row["selection"]: row for row in result["rows"] if row["noise"] == 0}
    if clean:
        chosen = {arm: row["minus"]["random"] for arm, row in clean.items() if arm not in ("all", "random", "trusted", "oracle")}
        off = [arm for arm, (_, low, high) in chosen.items() if low > 0 or high < 0]
        middles = sorted(middle for middle, _, _ in chosen.values())
        said.append(
            f"With no broken candidates at all, {_names(off) if off else 'no selection'} is apart from random (differences "
            f"{number(middles[0])} to {number(middles[-1])}), and random is at {interval(clean['random']['minus']['all'])} of the whole "
            f"data{'' if off else ': what is left is time'}. The alignment on a random part took "
            f"{clean['random']['align_seconds'][0] / clean['all']['align_seconds'][0]:.2f} of that on the whole, as it does on a selection."
        )
    return " ".join(said)


def stood(result: dict[str, Any]) -> str:
    """Return what the matrix says, in sentences: which defences an attacker who adapts does not get past, and what they cost."""
    rows = {(row["selection"], row["defence"]): row for row in result["rows"]}
    bare = rows["none", "sft"]
    plain = next(row for (selection, defence), row in rows.items() if defence == "sft" and selection not in ("none", "all"))
    others = [row for row in rows.values() if row is not bare]
    alive = sorted((row for row in others if row.get("survives")), key=lambda row: row["bounded"][0])
    fallen = [row for row in others if row.get("survives") is False]
    unheld = [row for row in others if "survives" not in row and "bounded" not in row]
    untold = [row for row in others if "survives" not in row and "bounded" in row]
    less = [row for row in fallen if (found := row["minus"].get("mean")) and found[2] < 0]
    said = [
        f"Over {bare['worlds']} worlds the undefended model ends at HS {interval(bare['bounded'])} under the attacker who adapts, and at "
        f"{interval(bare['mean'])} over the fixed attacks.",
        "Below it under the attacker who adapts, by the interval of the difference: "
        + ("; ".join(_costs(row, plain) for row in alive) if alive else "none")
        + f". Plain training on the same rows: {_costs(plain, plain)}.",
        f"These do not survive: {_names([_arm(row) for row in fallen])}." if fallen else "All others survive.",
    ]
    if less:
        said.append(
            f"Of them, against the fixed attacks alone, {_names([_arm(row) for row in less])} would have looked like a defence."
        )
    if unheld:
        said.append(
            f"No fine-tune against {_names([_arm(row) for row in unheld])} left a model within the bound in some world: it is the defence "
            "that takes the model's use away, so there is no figure."
        )
    if untold:
        said.append(f"In too few worlds is there a figure for {_names([_arm(row) for row in untold])}.")
    return " ".join(said)


def _arm(row: Row) -> str:
    return row["defence"] if row["selection"] not in ("none", "all") else f"{row['defence']} on {row['selection']}"


def _costs(row: Row, plain: Row) -> str:
    useless = "" if row["accuracy"][0] >= plain["accuracy"][0] / 2 else ", so it takes the fine-tune itself away"
    numbers = (("worst fixed attack", row["worst"]), ("task accuracy", row["accuracy"]), ("helpful", row["helpful"]))
    said = ", ".join(f"{what} {number(found[0])}" for what, found in numbers)
    return f"`{_arm(row)}` (HS {interval(row['bounded'])}, {said}{useless})"


def _names(arms: list[str]) -> str:
    named = [f"`{arm}`" for arm in arms]
    return ", ".join(named[:-1]) + (" and " if len(named) > 1 else "") + (named[-1] if named else "none")


def provenance(result: dict[str, Any]) -> str:
    """Return command, commit, machine and date of a result as one sentence."""
    machine = result["machine"]
    gpu = machine["gpu"] or "no GPU"
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items())
    load = ", ".join(f"{name} {value}" for name, value in result.get("load", {}).items() if value not in (None, False))
    return (
        f"Made by `{result['command']}` at commit `{result['commit']}` on {result['date']}: {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB of memory, {gpu}; {versions}." + (f" Load: {load}." if load else "")
    )


def filled(text: str) -> str:
    """Return a Markdown text with what stands between its markers made anew: a short table of the result that each names."""
    known = results()
    for name, result in known.items():
        begin = BEGIN.format(name)
        if begin in text:
            head, _, rest = text.partition(begin)
            _, _, tail = rest.partition(END)
            wrapped = textwrap.fill(findings(result), 136, break_long_words=False, break_on_hyphens=False)
            text = f"{head}{begin}\n{summary(result)}\n\n{wrapped}\n{END}{tail}"
    return text


if __name__ == "__main__":
    typer.run(main)
