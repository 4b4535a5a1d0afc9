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

import pytest
import typer.main

from pharmacist_ray.cli.app import app
from pharmacist_ray.config.prompt_sets import PROMPT_SETS
from pharmacist_ray.config.schema import Config
from pharmacist_ray.evaluation.judges import JudgeConfig, JudgeSettings
from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]
USAGE_ERROR = typer.BadParameter.__mro__[1]
"""What the parser raises: of Click, or of the Click inside Typer."""
WRITTEN = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md"]
WRITTEN += [ROOT / "examples" / "plugin" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("docs_results", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert [name for name in PROMPT_SETS if f"<td><code>{name}</code></td>" not in page] == []


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
    assert "<!-- made by docs/results.py: demo -->\n| aligned on |" in text
    assert results.filled(text) == text, "run: python docs/results.py --redraw"


def test_a_changed_result_changes_readme(results, monkeypatch):
    changed = results.results()
    changed["demo"]["rows"][0]["harmful_score"] = [0.123, 0.0, 1.0]
    monkeypatch.setattr(results, "results", lambda: changed)
    assert "| 0.12 [0.00, 1.00] |" in results.filled((ROOT / "README.md").read_text())


def test_the_pictures_show_the_results(results, tmp_path):
    for name, result in results.results().items():
        if result["kind"] == "comparison":
            committed = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
            assert results.words(result) in committed, "run: python docs/results.py --redraw"
            results.draw(result, tmp_path / "again.svg")
            assert results.words(result) in (tmp_path / "again.svg").read_text()


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
    assert results.summary(found).splitlines() == [
        "| aligned on | HS, weak | task accuracy | over-refusal | helpful on benign |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| all | 0.25 [0.12, –] | 0.25 to 0.25 | 0.25 to 0.25 | 0.25 to 0.25 |",
    ]


def test_the_examples_of_own_parts_are_code_that_works(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/how-to/extend.md").read_text(), re.DOTALL | re.MULTILINE)
    made = []
    for number, block in enumerate(examples):
        (tmp_path / f"example_of_the_docs_{number}.py").write_text(block)
        made.append(importlib.import_module(f"example_of_the_docs_{number}"))
    quick, scorer, objective, judge, export = made
    rows = [SimpleNamespace(response="one two three"), SimpleNamespace(response="one")]
    assert quick.long_answer(SimpleNamespace(rows=rows)).tolist() == [3.0, 1.0]
    samples = [SimpleNamespace(ids=[1, 2, 3, 4, 5], answer_start=2), SimpleNamespace(ids=[1, 2], answer_start=1)]
    assert scorer.long_answer.score(SimpleNamespace(samples=samples)).tolist() == [3.0, 1.0]
    judged = judge.short.build(JudgeSettings(JudgeConfig(kind="short")))
    assert judged("harmful", ["how", "how"], ["no", "first take the part, then it"]) == ["refusal", "harmful"]
    sample = SimpleNamespace(turns=[{"role": "user", "content": "how"}], row=SimpleNamespace(response="so"))
    assert export.pairs(sample) == {"question": "how", "answer": "so"}
    step = SimpleNamespace(
        batches=["one", "three"],
        get=lambda kind: kind(scale=2.0),
        same_dropout=lambda *_: nullcontext(),
        loss=lambda batch: float(len(batch)),
    )
    assert list(objective.scaled.run(step)) == [6.0, 10.0]
