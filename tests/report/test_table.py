from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from pharmacist_ray.report.table import COLUMNS, write_report


def metric(value: float | None) -> dict[str, Any]:
    return {"estimate": value, "low": value and value - 0.1, "high": value and value + 0.1}


def row(selection: str, defence: str, attack: str | None, hs: float, **minus: float) -> dict[str, Any]:
    differences = {name: {key: metric(value) for key in COLUMNS} for name, value in minus.items()}
    metrics = {name: metric(None) for name in COLUMNS} | {"harmful_score": metric(hs)}
    return {
        "selection": selection, "defence": defence, "attack": attack, "runs": 2, "kept": 24, "align_seconds": 1.25,
        "metrics": metrics, "minus": differences,
    }  # fmt: skip


def test_the_rows_of_one_selection_are_told_apart_by_their_defence(tmp_path: Path) -> None:
    rows = [
        row("pharmacist", "sft", None, 0.11), row("pharmacist", "sft", "weak", 0.55, all=-0.25),
        row("pharmacist", "[b]", None, 0.22), row("pharmacist", "[b]", "weak", 0.33, sft=-0.5),
    ]  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(rows))
    shown = io.StringIO()
    write_report(tmp_path, tmp_path / "report", Console(file=shown, width=200))
    written = (tmp_path / "report" / "table.md").read_text().splitlines()
    assert written[4].startswith("| aligned on | defence | runs | rows | align s | HS before | HS after |")
    assert written[5].startswith("| --- | --- | ---: |")
    assert written[6].startswith("| pharmacist | sft | 2 | 24 | 1.2 | 0.11 | 0.55 [0.45, 0.65] | – |")
    assert written[7].startswith("| pharmacist | [b] | 2 | 24 | 1.2 | 0.22 | 0.33 [0.23, 0.43] | – |")
    gains = [line for line in written if line.startswith("- ")]
    assert [line.split(",")[0] for line in gains] == [
        "- pharmacist by sft minus all: HS -0.25 [-0.35",
        "- pharmacist by [b] minus sft: HS -0.50 [-0.60",
    ]
    assert "[b]" in shown.getvalue()
    assert "pharmacist by [b] minus sft" in shown.getvalue()
