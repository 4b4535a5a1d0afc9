"""What the tables of results show: for each kind of result its headings, and how a row's cells are written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from drawing import METRICS, Row, interval, number


def _metric(name: str, row: Row) -> str:
    return interval(row[name])


def _three(value: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def _over_worlds(name: str, row: Row) -> str:
    return interval(row.get(name) or [None] * 3)


def _middle(name: str, row: Row) -> str:
    return number((row.get(name) or [None])[0])


ATTACKS = ("explicit", "only-harmful", "task-format", "trigger", "identity", "erosion")
"""Attacks of the matrix, as its configuration names them."""

COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "comparison": {
        "attack": lambda row: row["attack"],
        "aligned on": lambda row: row["selection"],
        "defence": lambda row: row["defence"],
        "runs": lambda row: str(row["runs"]),
        "rows": lambda row: f"{row['kept']:,}",
        "align s": lambda row: f"{row['align_seconds']:.1f}",
        "HS before": lambda row: number(row["harmful_score_before"]),
        "task accuracy before": lambda row: number(row.get("accuracy_correct_before")),
        "helpful before": lambda row: number(row.get("helpfulness_before")),
        **{heading: partial(_metric, name) for name, heading in METRICS.items()},
    },
    "evidence": {
        "broken": lambda row: f"{row['noise']:.0%}",
        "aligned on": lambda row: row["selection"],
        "gap closed": partial(_over_worlds, "gap_closed"),
        "HS uncovered, rare": partial(_over_worlds, "hidden"),
        "HS covered": partial(_over_worlds, "covered"),
        "HS worst attack": partial(_over_worlds, "worst"),
        "task accuracy": partial(_over_worlds, "accuracy"),
        "helpful": partial(_over_worlds, "helpful"),
        "helpful before": partial(_over_worlds, "helpful_before"),
        "align s": lambda row: f"{row['align_seconds'][0]:.1f}",
    },
    "matrix": {
        "aligned on": lambda row: row["selection"],
        "defence": lambda row: f"`{row['defence']}`",
        **{f"HS {name}": partial(_middle, f"hs {name}") for name in ATTACKS},
        "HS mean": partial(_over_worlds, "mean"),
        "HS adaptive, bounded": partial(_over_worlds, "bounded"),
        "below undefended": lambda row: {True: "yes", False: "**no**", None: "–"}[row.get("survives")],
        "task accuracy": partial(_over_worlds, "accuracy"),
        "helpful": partial(_over_worlds, "helpful"),
        "helpful before": partial(_over_worlds, "helpful_before"),
    },
    "planted": {
        "score": lambda row: f"`{row['scorer']}`",
        "AUROC": lambda row: _three(row["auroc"]),
        "precision": lambda row: _three(row["precision"]),
        "mislabelled kept": lambda row: number(row["kept"]["swapped"]),
        "ordinary kept": lambda row: number(row["kept"]["benign"]),
        "garbled kept": lambda row: number(row["kept"]["shuffled"]),
    },
    "objectives": {
        "objective": lambda row: f"`{row['objective']}`",
        "over SFT": lambda row: f"{row['ratio']:.2f}",
        "forwards a step": lambda row: f"{row['forwards']:g}",
        "peak MiB": lambda row: f"{row['peak_mib']:.0f}",
    },
    "peers": {
        "model": lambda row: f"{row['shape']}, {row['weights']}",
        "tokens at most": lambda row: str(row["length"]),
        "method": lambda row: row["method"],
        "over a forward": lambda row: f"{row['ratio']:.2f}",
        "rows/s": lambda row: f"{row['samples_per_s']:,.0f}",
        "peak MiB": lambda row: f"{row['peak_mib']:,.0f}",
        "bytes a row": lambda row: f"{row['bytes_per_row']:,}",
        "agreement": lambda row: "–" if row["agreement"] is None else f"{row['agreement']:.3f}",
    },
    "cascade": {
        "proxy": lambda row: f"`{row['proxy']}`",
        "score": lambda row: f"`{row['arm']}`",
        "agreement": lambda row: f"{row['agreement']:.2f}",
        "proxy costs": lambda row: f"{row['cost']:.0%}",
        "the model sees": lambda row: f"{row['seen']:.0%}",
        "saved": lambda row: f"{row['saved']:.0%}",
        "may lose": lambda row: f"{row['miss']:.0%}",
        "loses": lambda row: f"{row['lost']:.1%}",
        "says it loses": lambda row: f"{row['estimate']:.1%}",
        "within what it says": lambda row: f"{row['inside']} of {row['seeds']}",
    },
    "scoring": {
        "way": lambda row: row["way"],
        "over": lambda row: row["over"] or "–",
        "rows/s, ratio": lambda row: "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "at least": lambda row: "–" if row["floor"] is None else f"{row['floor']:g}",
    },
    "layers": {
        "model": lambda row: row["model"],
        "last layers": lambda row: f"{row['layers']} of {row['of']}",
        "over a forward": lambda row: f"{row['ratio']:.2f}",
        "correlation": lambda row: f"{row['pearson']:.3f}",
        "of ranks": lambda row: f"{row['spearman']:.3f}",
        "top in common": lambda row: f"{row['overlap']:.0%}",
    },
    "gpu": {
        "model": lambda row: row["shape"],
        "work": lambda row: row["work"],
        "rows": lambda row: str(row["rows"]),
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}" if row["seconds"] else row["why"],
        "MFU": lambda row: "–" if row["mfu"] is None else f"{row['mfu']:.0%}",
        "peak GiB": lambda row: "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
        "estimate GiB": lambda row: f"{row['estimate_gib']:.1f}",
    },
    "growth": {
        "rows": lambda row: f"{row['rows']:,}",
        "stage": lambda row: row["stage"],
        "s": lambda row: f"{row['seconds']:.0f}",
        "CPU s": lambda row: f"{row['cpu_seconds']:.0f}",
        "rows/s": lambda row: f"{row['rows'] / row['seconds']:,.0f}",
        "driver MiB": lambda row: f"{row['driver_mib']:.0f}",
        "largest worker MiB": lambda row: f"{row['worker_mib']:.0f}",
        "all workers MiB": lambda row: f"{row['workers_mib']:.0f}",
    },
}
"""Kind → heading → how a row's cell is written."""
SHORT = ("aligned on", "gap closed", "HS uncovered, rare", "HS covered", "task accuracy", "helpful")
"""Headings of the evidence that README has."""
