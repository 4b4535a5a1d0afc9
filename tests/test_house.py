"""The house keeps its rooms: no file imports in a circle, and no module grows past a page count that somebody reads."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import pharmacist_ray

PACKAGE = Path(pharmacist_ray.__file__).parent

LONG = 400
"""Lines of a module; a longer one has its reason beside it here."""

REASONS: dict[str, str] = {}
"""Module → why it is longer."""


def test_no_file_imports_in_a_circle():
    graph = grimp.build_graph("pharmacist_ray", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' ← '.join(error.args[1])}")


def test_no_module_is_longer_than_anybody_reads():
    lines = {str(file.relative_to(PACKAGE)): file.read_text().count("\n") for file in PACKAGE.rglob("*.py")}
    assert {module for module, count in lines.items() if count > LONG} == set(REASONS)
