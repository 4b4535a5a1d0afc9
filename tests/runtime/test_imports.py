"""Imports without collections of garbage."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType

import pytest

from pharmacist_ray.runtime.imports import importing


class Loop:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_inside_and_what_was_made_there_is_left_alone(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weakref.ref(Loop())
    (gc.enable if enabled else gc.disable)()
    try:
        with importing():
            assert before() is None, "garbage of before is found"
            assert not gc.isenabled()
            stays = Loop()
            monkeypatch.setitem(sys.modules, "imported_here", ModuleType("imported_here"))
        assert gc.isenabled() == enabled
        assert not any(one is stays for one in gc.get_objects())
        with importing():
            goes = Loop()
        assert any(one is goes for one in gc.get_objects()), "nothing was imported"
    finally:
        gc.enable()


def test_an_import_that_fails_leaves_collections_on() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        import nothing_of_this_name  # noqa: F401
    assert gc.isenabled()
