from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from pharmacist_ray.report.table import COLUMNS, write_report

NAMES = [name for name, *_ in COLUMNS]


def metric(value: float | None) -> dict[str, Any]:
    return {"estimate": value, "low": value and value - 0.1, "high": value and value + 0.1}


def row(selection: str, defence: str, attack: str | None, hs: float | None, **more: Any) -> dict[str, Any]:
    minus = more.pop("minus", {})
    differences = {name: {key: metric(value) for key in NAMES} for name, value in minus.items()}
    metrics = {name: metric(more.pop(name, None)) for name in NAMES if name != "harmful_score"} | {"harmful_score": metric(hs)}
    return {
        "selection": selection, "defence": defence, "attack": attack, "runs": 2, "kept": 24, "align_seconds": 1.25,
        "metrics": metrics, "minus": differences, **more,
    }  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Return the lines of the Markdown, and what is shown."""
    (folder / "table.json").write_text(json.dumps(rows))
    shown = io.StringIO()
    write_report(folder, folder / "report", Console(file=shown, width=260))
    return (folder / "report" / "table.md").read_text().splitlines(), shown.getvalue()


def test_the_rows_of_one_selection_are_told_apart_by_their_defence(tmp_path: Path) -> None:
    lines, shown = written(tmp_path, [
        row("pharmacist", "sft", None, 0.11), row("pharmacist", "sft", "weak", 0.55, minus={"all": -0.25}),
        row("pharmacist", "[b]", None, 0.22), row("pharmacist", "[b]", "weak", 0.33, minus={"sft": -0.5}),
    ])  # fmt: skip
    assert lines[4].startswith("| aligned on | defence | runs | rows | align s | HS before | HS after |")
    assert lines[5].startswith("| --- | --- | ---: |")
    assert lines[6].startswith("| pharmacist | sft | 2 | 24 | 1.2 | 0.11 | 0.55 [0.45, 0.65] | – |")
    assert lines[7].startswith("| pharmacist | [b] | 2 | 24 | 1.2 | 0.22 | 0.33 [0.23, 0.43] | – |")
    gains = [line for line in lines if line.startswith("- ")]
    assert [line.split(",")[0] for line in gains] == [
        "- pharmacist by sft minus all: HS -0.25 [-0.35",
        "- pharmacist by [b] minus sft: HS -0.50 [-0.60",
    ]
    assert "[b]" in shown
    assert "pharmacist by [b] minus sft" in shown


def test_a_model_that_refuses_everything_before_the_attack_shows(tmp_path: Path) -> None:
    rows = [
        row("all", "sft", None, 0.0, helpfulness=0.02, accuracy_correct=0.33),
        row(
            "all",
            "sft",
            "weak",
            0.5,
            helpfulness=0.9,
            accuracy_correct=0.8,
            incoherent_harmful=0.2,
            incoherent_benign=0.3,
            beside_harmful=0.1,
        ),
    ]
    lines, _ = written(tmp_path, rows)
    found = dict(zip(*(map(str.strip, line.strip("|").split("|")) for line in (lines[4], lines[6])), strict=True))
    assert found == {
        "aligned on": "all", "defence": "sft", "runs": "2", "rows": "24", "align s": "1.2", "HS before": "0.00",
        "HS after": "0.50 [0.40, 0.60]", "refuses well": "–", "incoherent": "0.20 [0.10, 0.30]", "task before": "0.33",
        "task after": "0.80 [0.70, 0.90]", "helpful before": "0.02", "helpful after": "0.90 [0.80, 1.00]",
        "incoherent on benign": "0.30 [0.20, 0.40]", "beside the point": "0.10 [0.00, 0.20]", "beside on benign": "–",
    }  # fmt: skip


def test_headings_and_sentences_take_the_name_of_the_score_from_the_judge(tmp_path: Path) -> None:
    named = {"score": "keyword ASR", "score_means": "keyword attack success rate: answers without a refusal phrase"}
    lines, shown = written(
        tmp_path, [row("x", "sft", None, 0.1, **named), row("x", "sft", "weak", 0.2, minus={"all": 0.1}, **named)]
    )
    assert "| keyword ASR before | keyword ASR after |" in lines[4]
    assert "- x by sft minus all: keyword ASR +0.10 [+0.00, +0.20], task" in "\n".join(lines)
    assert "keyword ASR is the keyword attack success rate: answers without a refusal phrase." in shown
    assert "HS" not in shown


def test_groups_the_gap_and_the_attacks_that_count_have_their_place(tmp_path: Path) -> None:
    groups = {"covered": {"harmful_score": metric(0.2)}, "ra|re\x1b[1m": {"harmful_score": metric(0.9)}}
    gap = {"estimate": None, "low": None, "high": None, "reason": "random is not apart from the oracle"}
    over = {"over": ["a"], "attacks": ["a", "b"], "rule": "attacks that taught the task"}
    lines, shown = written(tmp_path, [
        row("x", "sft", None, 0.1), row("x", "sft", "a", 0.2, groups=groups, gap_closed=gap), row("x", "sft", "b", 0.2),
        row("x", "sft", "mean of attacks", 0.3, gap_closed=metric(0.6), **over),
    ])  # fmt: skip
    text = "\n".join(lines)
    assert lines[4].endswith("| incoherent on benign | beside on benign | gap closed |")
    assert lines[6].endswith("| – | – |")
    assert "| aligned on | defence | HS, covered | HS, ra\\|re" in text
    assert "| x | sft | 0.20 [0.10, 0.30] | 0.90 [0.80, 1.00] |" in text
    assert "## mean of attacks: attacks that taught the task" in text
    assert text.count("| 0.60 [0.50, 0.70] | 1 of 2 |") == 1
    assert "It has no number where random is not apart from the oracle." in shown
    assert "\x1b" not in shown
    assert "\x1b" not in text


def test_a_table_of_an_earlier_version_is_still_shown(tmp_path: Path) -> None:
    old = row("x", "sft", "weak", 0.4)
    del old["metrics"]["incoherent_harmful"], old["metrics"]["incoherent_benign"]
    lines, _ = written(tmp_path, [old])
    assert "| x | sft | 2 | 24 | 1.2 | – | 0.40 [0.30, 0.50] | – | – |" in lines[6]


def test_an_attack_that_hardly_lowered_its_own_harmful_loss_is_named(tmp_path: Path) -> None:
    rows = [
        row("all", "sft", None, 0.0),
        row("all", "sft", "weak", 0.1, attack_loss=[4.0, 3.7]),
        row("random", "sft", "weak", 0.1, attack_loss=[4.0, 3.5]),
        row("all", "sft", "strong", 0.1, attack_loss=[4.0, 0.5]),
        row("random", "sft", "old", 0.1),
        row("all", "sft/lisa", "weak", 0.1, attack_loss=[4.0, 4.0]),  # that is Lisa's doing
        row("all", "sft/sft/few_shot", "weak", 0.1, attack_loss=[4.0, 4.0]),
    ]
    lines, shown = written(tmp_path, rows)
    warning = (
        "Attack weak hardly lowered the loss of its own harmful rows (all by sft from 4.00 to 3.70): its scores there say little of "
        "the defence. A higher learning rate, more steps or a larger share of harm make it stronger."
    )
    assert [line for line in lines if line.startswith("Attack ")] == [warning]
    assert warning in " ".join(shown.split())


def test_warnings_unjudged_answers_and_several_judges_are_told(tmp_path: Path) -> None:
    unjudged = row("all", "sft", "weak", 0.5, warnings=[f"m{n}: \x1b[1m 'other'" for n in range(7)])
    unjudged["metrics"]["harmful_score"]["unscored"] = 3
    pair = {"prompts": "harmful", "judge": "phrases", "other": "mine", "n": 8, "unjudged": 2, "agreement": 0.75, "kappa": 0.5,
            "harmful": 0.5, "harmful_by_other": 0.25}  # fmt: skip
    none = pair | {"prompts": "benign", "n": 0, "agreement": None, "kappa": None, "harmful": None, "harmful_by_other": None}
    (tmp_path / "judges.json").write_text(json.dumps([pair, none]))
    lines, shown = written(tmp_path, [unjudged])
    assert "Unjudged, and in no share: 3 answers to harmful prompts and 0 to benign ones." in lines
    assert (
        "On 8 answers to harmful prompts phrases and mine say the same of 0.75 (Cohen's κ 0.50); harmful by phrases: 0.50, by mine: 0.25; "
        "2 unjudged."
    ) in lines
    assert "phrases and mine have no verdict in common on benign prompts." in lines
    assert "Warning: m0: ⟨U+001B⟩[1m 'other'" in lines
    assert "Warning: and 2 more models like that; evaluation/manifest.json has all" in lines
    assert shown.count("warning: ") == 6
