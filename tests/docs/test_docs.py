"""The documentation holds what it says: its links lead somewhere, its commands exist, its figures are those of the results."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import typer.main
from scipy.stats import spearmanr

from pharmacist_ray.cli.app import app
from pharmacist_ray.config.public_sets import PUBLIC_SETS
from pharmacist_ray.config.schema import Config
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.evaluation.judges import JudgeConfig, JudgeSettings
from pharmacist_ray.storage import write_parquet
from pharmacist_ray.training.objectives import OBJECTIVES
from pharmacist_ray.training.tracking import Tracked
from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]
USAGE_ERROR = typer.BadParameter.__mro__[1]
"""What the parser raises: of Click, or of the Click inside Typer."""
WRITTEN = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md"]
WRITTEN += [ROOT / "examples" / "plugin" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("results")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def commands(text: str) -> Iterator[list[str]]:
    """Yield what the ``bash`` blocks of a Markdown text run, as words."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((place for place, word in enumerate(words) if word in ("&&", "||", ";", "|")), len(words))
                if words[:end]:
                    yield words[:end]
                words = words[end + 1 :]


def problem(words: list[str]) -> str | None:
    """Say what is wrong with a command of ours; others pass."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"no target {word}" for word in words[1:] if "=" not in word and word not in targets), None)
    if words[:2] == ["python", "-m"] and words[2].startswith("jobs."):
        return None if importlib.util.find_spec(words[2]) else f"no module {words[2]}"
    if words[0] == "python" and words[1].endswith(".py"):
        return None if (ROOT / words[1]).is_file() else f"no file {words[1]}"
    if words[0] != "pharmacist":
        return None
    command, rest = typer.main.get_command(app), words[1:]
    while rest and hasattr(command, "commands"):
        if rest[0] not in command.commands:
            return f"no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        with command.make_context(" ".join(words[:2]), [word for word in rest if not word.startswith("[")]):
            return None
    except USAGE_ERROR as error:
        return f"{type(error).__name__}: {error.message}"


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_parses(file):
    wrong = {" ".join(words): found for words in commands(file.read_text()) if (found := problem(words))}
    assert not wrong


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("make demp", "no target demp"),
        ("pharmacist runn --config a.yaml", "no command runn"),
        ("pharmacist run --config a.yaml --stric", "NoSuchOption: No such option: --stric"),
        ("pharmacist run", "MissingParameter: Missing parameter: config"),
        ("python -m jobs.grow 10", "no module jobs.grow"),
        ("python docs/result.py", "no file docs/result.py"),
        ("ray status", None),
    ],
)
def test_a_wrong_command_is_found(line, found):
    said = [problem(words) for words in commands(f"```bash\nls && {line}    # why\n```\n")][1]
    assert said == found if found is None or "Parameter" not in found else said.startswith("MissingParameter")


@pytest.mark.parametrize("file", WRITTEN[:5], ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_of_a_file_outside_the_site_leads_to_a_file(file):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", file.read_text())
    assert [target for target in targets if "://" not in target and not (file.parent / target).exists()] == []


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(site):
    loaded = {
        found
        for page in site.rglob("*.html")
        for found in re.findall(
            r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)|<link[^>]*href="(https?:[^"]*)', page.read_text()
        )
    }
    assert not loaded
    assert not list(site.rglob("*.py*"))


def test_every_page_says_where_it_stands(site):
    pages = [page for page in site.rglob("*.html") if page.name not in ("404.html", "index.html")]
    assert len(pages) > 10
    lost = [
        page.name
        for page in pages
        if 'class="md-path"' not in page.read_text() and "md-tabs__item--active" not in page.read_text()
    ]
    assert not lost


def test_the_reference_has_every_key_and_every_command(site):
    keys = (site / "reference" / "configuration.html").read_text()
    assert [name for name in Config.model_fields if f"<code>{name}</code>" not in keys] == []
    assert "Optimiser steps between two saved states" in keys
    lines = (site / "reference" / "command-line.html").read_text()
    shown = [name for name, command in typer.main.get_command(app).commands.items() if not command.hidden]
    assert [name for name in shown if f"pharmacist {name}" not in lines] == []


def test_the_families_and_the_public_prompt_sets_are_tables(site):
    page = (site / "how-to" / "own-model.html").read_text()
    assert [name for name in FAMILIES if f"<td>{name}</td>" not in page] == []
    page = (site / "how-to" / "own-data.html").read_text()
    assert [name for name in PUBLIC_SETS if f"<td><code>{name}</code></td>" not in page] == []


def test_the_results_say_where_they_come_from(site, results):
    page = (site / "reference" / "results.html").read_text()
    for name, result in results.results().items():
        assert f'id="{name}"' in page
        assert re.fullmatch(r"[0-9a-f]{7,40}", result["commit"])
        assert {"command", "date", "machine", "rows"} <= set(result)
        assert result["commit"] in page


def test_readme_is_short_and_its_table_is_what_the_result_gives(results):
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    assert "<!-- made by docs/results.py: evidence -->\n| aligned on |" in text
    assert results.filled(text) == text, "run: python docs/results.py --redraw"


def test_a_changed_result_changes_readme(results, monkeypatch):
    changed = results.results()
    noisiest = max(row["noise"] for row in changed["evidence"]["rows"])
    next(row for row in changed["evidence"]["rows"] if row["noise"] == noisiest)["hidden"] = [0.123, 0.0, 1.0]
    monkeypatch.setattr(results, "results", lambda: changed)
    assert "| 0.12 [0.00, 1.00] |" in results.filled((ROOT / "README.md").read_text())


def test_the_pictures_show_the_results(results, tmp_path):
    drawn = [file for name, result in results.results().items() for file in results.draw(name, result, tmp_path)]
    assert {file.name for file in drawn} == {file.name for file in (ROOT / "docs" / "pictures").glob("*.svg")}

    def said(file: Path) -> str:
        return re.search(r"<dc:description>(.*?)</dc:description>", file.read_text(), re.DOTALL)[1]

    for file in drawn:
        assert said(ROOT / "docs" / "pictures" / file.name) == said(file), "run: python docs/results.py --redraw"


def evidence(noise: float, **hidden: float) -> list[dict[str, object]]:
    """Rows of the evidence in which each arm has this harmful score, with intervals of a tenth to each side."""

    def around(value: float) -> list[float]:
        return [value, value - 0.1, value + 0.1]

    return [
        {
            "noise": noise, "selection": arm, "worlds": 3, "align_seconds": around(3.0 if arm == "all" else 1.2),
            **{name: around(value) for name in ("hidden", "covered", "uncovered", "rare", "worst", "hidden weak", "hidden strong")},
            **{name: around(0.9) for name in ("accuracy", "helpful", "helpful_before")},
            "minus": {other: around(value - theirs) for other, theirs in hidden.items() if other != arm},
            "minus_random": {"accuracy": around(0.01), "helpful": around(-0.02)},
            **({"gap_closed": around((hidden["random"] - value) / (hidden["random"] - hidden["oracle"]))}
               if arm not in ("random", "oracle") and noise else {}),
        }
        for arm, value in hidden.items()
    ]  # fmt: skip


def test_the_findings_are_what_the_rows_say(results, tmp_path):
    rows = evidence(0.6, all=0.85, random=0.8, oracle=0.1, rank_sum=0.2, tov=0.25, keyword=0.75)
    rows += evidence(0.0, all=0.15, random=0.2, oracle=0.2, rank_sum=0.05, tov=0.1, keyword=0.3)
    result = {"kind": "evidence", "rows": rows}
    found = results.findings(result)
    assert "With 60% of the candidates broken, over 3 worlds, `rank_sum` closes most of the gap" in found
    assert "0.86 [0.76, 0.96]" in found
    assert "Below random, by the interval of the difference, are `rank_sum` and `tov`." in found
    assert "`rank_sum` is apart from `keyword` and `all`; it is not apart from `tov`." in found
    assert "task accuracy 0.01 [-0.09, 0.11], helpful on benign -0.02 [-0.12, 0.08]" in found
    assert (
        "`rank_sum` is apart from random (differences -0.15 to 0.10), and random is at 0.05 [-0.05, 0.15] of the whole data. The"
        in found
    )
    assert "The alignment on a random part took 0.40 of that on the whole, as it does on a selection." in found
    rows = [row for row in rows if row["noise"]] + evidence(0.0, all=0.15, random=0.2, oracle=0.2, rank_sum=0.25)
    none = results.findings({"kind": "evidence", "rows": rows})
    assert (
        "no selection is apart from random (differences 0.05 to 0.05), and random is at 0.05 [-0.05, 0.15] of the whole data: what"
        in none
    )
    assert [line.split(" | ")[0] for line in results.summary(result).splitlines()[2:]] == [
        "| oracle", "| rank_sum", "| tov", "| keyword", "| random", "| all"
    ]  # fmt: skip
    pictures = results.draw("made", result, tmp_path)
    assert [picture.name for picture in pictures] == ["made.svg", "made-noise.svg", "made-strength.svg"]
    assert "rank_sum: gap closed 0.86 [0.76, 0.96], HS covered 0.20 [0.10, 0.30]" in pictures[0].read_text()
    assert "rank_sum at 0%: HS uncovered, rare 0.05" in pictures[1].read_text()
    assert "tov after strong: HS uncovered, rare 0.25" in pictures[2].read_text()


def test_the_matrix_says_who_survives_and_what_that_costs(results):
    def row(
        arm: tuple[str, str], bounded: float | None, mean: float, accuracy: float = 0.5, width: float = 0.1
    ) -> dict[str, object]:
        def around(value: float) -> list[float]:
            return [value, value - width, value + width]

        made: dict[str, object] = {"selection": arm[0], "defence": arm[1], "worlds": 3, "minus": {"mean": around(mean - 0.6)}}
        made |= {"mean": around(mean), "worst": around(mean + 0.2), "accuracy": around(accuracy), "helpful": around(0.9)}
        if bounded is not None:
            made |= {"bounded": around(bounded)}
            made |= {"survives": bounded - 1.0 + width < 0} if arm != ("none", "sft") else {}
        return made

    rows = [
        row(("none", "sft"), 1.0, 0.6),
        row(("all", "sft"), 1.0, 0.6),
        row(("rank_sum", "sft"), 0.95, 0.55),
        row(("rank_sum", "booster"), 1.0, 0.2),
        row(("rank_sum", "sft/star_dss"), 0.0, 0.0),
        row(("rank_sum", "sft/sft/safe_lora"), 0.01, 0.0, accuracy=0.0),
        row(("rank_sum", "sft/backdoor"), None, 0.3),
    ]
    found = results.stood({"kind": "matrix", "rows": rows})
    assert (
        "Over 3 worlds the undefended model ends at HS 1.00 [0.90, 1.10] under the attacker who adapts, and at 0.60 [0.50, 0.70]"
        in found
    )
    assert (
        "difference: `sft/star_dss` (HS 0.00 [-0.10, 0.10], worst fixed attack 0.20, task accuracy 0.50, helpful 0.90); `sft/"
        in found
    )
    assert "task accuracy 0.00, helpful 0.90, so it takes the fine-tune itself away)" in found
    assert "These do not survive: `sft on all`, `sft` and `booster`." in found
    assert "against the fixed attacks alone, `booster` would have looked like a defence." in found
    assert "No fine-tune against `sft/backdoor` left a model within the bound in some world" in found


def test_a_result_is_taken_from_a_run(results, tmp_path):
    metrics = {name: {"estimate": 0.25, "low": 0.123456, "high": None} for name in results.METRICS}
    row = {"defence": "sft", "selection": "all", "runs": 2, "kept": 1000, "align_seconds": 1.234, "metrics": metrics}
    (tmp_path / "evaluation").mkdir()
    table = [row | {"attack": None}, row | {"attack": "weak"}, row | {"attack": "mean of attacks", "over": ["weak"]}]
    (tmp_path / "evaluation" / "table.json").write_text(json.dumps(table))
    (tmp_path / "evaluation" / "manifest.json").write_text(json.dumps({"made_at": "2030-01-02T03:04:05+00:00"}))
    (tmp_path / "config.yaml").write_text("attacks: [{name: weak, train: {lr: 0.1}, rows: 7, harmful_share: 0.5}]")
    found = results.measured(tmp_path)
    assert found["date"] == "2030-01-02"
    assert found["attacks"] == [{"name": "weak", "lr": 0.1, "rows": 7, "harmful_share": 0.5}]
    assert results.table(found).splitlines()[-1] == (
        "| weak | all | 2 | 1,000 | 1.2 | 0.25 | 0.25 | 0.25 | 0.25 [0.12, –] | 0.25 [0.12, –] | 0.25 [0.12, –] | 0.25 [0.12, –] |"
    )
    metrics = {name: [0.25, 0.1, 0.4] for name in results.METRICS}
    [picture] = results.draw("made", found | {"rows": [found["rows"][0] | metrics]}, tmp_path)
    assert "all by sft after weak: HS after 0.25 [0.10, 0.40], task accuracy 0.25 [0.10, 0.40]" in picture.read_text()


def test_the_queries_of_the_page_run(tmp_path, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    text = (ROOT / "docs/how-to/query.md").read_text()
    queries = re.findall(r"^```sql\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(queries) == text.count("\n## ") == 7
    run = tmp_path / "runs/first"
    rows = [Row(f"id{number}", f"ask {number}", "so", category=f"kind {number % 2}") for number in range(10)]
    scores = {
        "id": [row.id for row in rows],
        "pharmacist": [float(n) for n in range(9)] + [float("nan")],
        "random_0": [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3, 5.8, 9.7, 0.0],
    }
    broken = {"source": ["a.jsonl"] * 3, "line": [1, 2, 3], "reason": ["bad_json", "bad_json", "no_room"], "detail": ["x"] * 3}
    trials = {
        "trial": ["a", "b"],
        "status": ["finished", "failed"],
        "front": [True, False],
        "param.selection.ratio": ["0.2", "0.4"],
    }
    trials |= {key: [0.5, None] for key in ("worst_hs", "task_accuracy", "over_refusal", "align_seconds")}
    answers = {"set": ["harmful", "harmful", "task"], "verdict": ["refusal", "harmful", None]}
    write_rows(rows, run / "ingest/candidates/rows/part-00000.parquet")
    write_rows(rows[4:7], run / "selections/pharmacist/rows/part-00000.parquet")
    for place, table in (
        ("scores/rows/part-00000", scores), ("ingest/candidates/quarantine/part-00000", broken), ("search/trials", trials),
        ("answers/one-0123/harmful-000000", answers),
    ):  # fmt: skip
        write_parquet(pa.table(table), run / f"{place}.parquet")
    monkeypatch.chdir(tmp_path)
    best, kept, agree, cuts, missing, front, answered = (duckdb.sql(query).fetchall() for query in queries)
    assert best[0] == (8.0, "ask 8", "so")
    assert len(best) == 9
    assert kept == [("kind 0", 5, 2, 0.4), ("kind 1", 5, 1, 0.2)]
    assert agree[0][0] == pytest.approx(spearmanr(scores["pharmacist"][:9], scores["random_0"][:9]).statistic)
    assert cuts == [([1.6, 3.2, 4.8, 6.4],)]
    assert missing == [("bad_json", 2, "a.jsonl:1", "x"), ("no_room", 1, "a.jsonl:3", "x")]
    assert front == [("a", 0.5, 0.5, 0.5, 0.5, "0.2")]
    assert answered == [("one-0123", "harmful", "harmful", 1), ("one-0123", "harmful", "refusal", 1)]


def test_every_objective_has_its_card():
    page = (ROOT / "docs/defences.md").read_text().partition("## What is not here")[0]
    cards = {part.partition("\n")[0]: " ".join(part.split()) for part in page.split("\n### ")[1:]}
    assert set(cards) == set(OBJECTIVES)
    for name, card in cards.items():
        for word in ("Computes", "Passes", "Sees", "Does not protect"):
            assert f"**{word}**" in card, (name, word)
        assert ("**Faithful**" in card) != ("**Variant" in card), name


def test_the_examples_of_own_parts_are_code_that_works(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/how-to/extend.md").read_text(), re.DOTALL | re.MULTILINE)
    made = []
    for number, block in enumerate(examples):
        (tmp_path / f"example_of_the_docs_{number}.py").write_text(block)
        made.append(importlib.import_module(f"example_of_the_docs_{number}"))
    quick, scorer, objective, judge, export, tracker = made
    rows = [SimpleNamespace(response="one two three"), SimpleNamespace(response="one")]
    assert quick.long_answer(SimpleNamespace(rows=rows)).tolist() == [3.0, 1.0]
    samples = [SimpleNamespace(ids=[1, 2, 3, 4, 5], answer_start=2), SimpleNamespace(ids=[1, 2], answer_start=1)]
    assert scorer.long_answer.score(SimpleNamespace(samples=samples)).tolist() == [3.0, 1.0]
    judged = judge.short.build(JudgeSettings(JudgeConfig(kind="short")))
    assert judged("harmful", ["how", "how"], ["no", "first take the part, then it"]) == ["refusal", "harmful"]
    sample = SimpleNamespace(turns=[{"role": "user", "content": "how"}], row=SimpleNamespace(response="so"))
    assert export.pairs(sample) == {"question": "how", "answer": "so"}
    for step in (1, 2):  # the second opens again what the first left
        with tracker.table(Tracked("align", tmp_path, "demo", {})) as log:
            log(step, {"loss": 1 / step})
    assert (tmp_path / "curves.csv").read_text().split() == ["1,loss,1.0", "2,loss,0.5"]
    step = SimpleNamespace(
        batches=["one", "three"],
        get=lambda kind: kind(scale=2.0),
        same_dropout=lambda *_: nullcontext(),
        loss=lambda batch: float(len(batch)),
    )
    assert list(objective.scaled.run(step)) == [6.0, 10.0]
