"""One self-contained HTML page of a run: it loads nothing, runs nothing, and opens from disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.report.blocks import Block, Note, Section, render
from pharmacist_ray.report.comparison import comparison
from pharmacist_ray.report.elsewhere import by_tasks
from pharmacist_ray.report.facts import data, reproduce, what_ran
from pharmacist_ray.report.redteam import redteam
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.scores import read_scores
from pharmacist_ray.report.selection import distributions, examples
from pharmacist_ray.report.training import training
from pharmacist_ray.report.trials import search
from pharmacist_ray.report.under_way import under_way
from pharmacist_ray.storage import StoragePath, write_text


def write_page(run: StoragePath, out: StoragePath) -> StoragePath:
    """Write a run's `page` to ``out/report.html``, and return its path.

    Args:
        run: The run directory.
        out: The folder to write to; readers never see half a page.

    Raises:
        ArtifactError: ``run`` is not a run directory.
    """
    write_text(page(run), out / "report.html")
    return out / "report.html"


def page(run: StoragePath) -> str:
    """Return the page of a run, whatever part of it there is.

    Only artifacts on disk are read. A section whose artifacts are not there says what makes them; one whose artifacts cannot be
    read says which file is broken. What is under way stands first, while there is such.

    Args:
        run: The run directory.

    Raises:
        ArtifactError: It is not one.
    """
    files = RunFiles(run)
    sections = [_filled(section, make) for section, make in _sections(files)]
    if (now := _filled(Section("now", "Under way", ""), lambda: under_way(files))).blocks:
        sections = [now, *sections]
    style = Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))
    return render("page.html.j2", name="/".join(run.resolve().parts[-2:]), run=str(run), sections=sections, style=style)


def _sections(files: RunFiles) -> list[tuple[Section, Callable[[], list[Block]]]]:
    found: dict[str, object] = {}

    def scored(make: Callable[..., list[Block]]) -> list[Block]:
        if "scores" not in found:
            found["scores"] = read_scores(files)
        return make(files, found["scores"])

    def by(stage: str) -> str:
        return f"pharmacist {stage} {files.command}"

    return [
        (Section("ran", "What ran", by("run")), lambda: what_ran(files)),
        (Section("data", "Data", by("ingest")), lambda: data(files)),
        (Section("scores", "Scores", by("score")), lambda: scored(distributions)),
        (Section("examples", "Kept and dropped", by("select")), lambda: scored(examples)),
        (Section("comparison", "What the selection is worth", by("evaluate")), lambda: comparison(files) + by_tasks(files)),
        (Section("search", "Search", by("search")), lambda: search(files)),
        (Section("redteam", "The attacker's search", by("redteam")), lambda: redteam(files)),
        (Section("training", "Training", by("fit")), lambda: training(files)),
        (Section("reproduce", "How to reproduce", by("run")), lambda: reproduce(files)),
    ]


def _filled(section: Section, make: Callable[[], list[Block]]) -> Section:
    try:
        return replace(section, blocks=make())
    except ArtifactError as error:
        return replace(section, blocks=[Note(str(error), warning=True)])
