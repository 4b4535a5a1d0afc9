from __future__ import annotations

from unittest.mock import patch

import pytest

from pharmacist_ray.data import samples as module
from pharmacist_ray.data.render import TEXTS, Renderer
from pharmacist_ray.data.samples import Samples
from pharmacist_ray.data.schema import Row, table_from_rows
from pharmacist_ray.errors import DataError


def rows(count: int) -> list[Row]:
    return [Row(f"{number:032x}", f"w{number % 30}", f"w{number % 7} w{number % 11}") for number in range(count)]


@pytest.mark.parametrize("kept", [0, 1, TEXTS, TEXTS + 3, TEXTS + 9])
def test_a_row_is_the_same_whether_it_is_kept_or_not(tokenizer, kept):
    table, renderer = table_from_rows(rows(TEXTS + 7)), Renderer(tokenizer, "plain")
    with patch.object(module, "KEPT", kept):
        samples = Samples(table, renderer)
    assert [samples[number] for number in range(table.num_rows)] == [renderer.render(row) for row in rows(TEXTS + 7)]


def test_a_row_that_cannot_be_rendered_is_named_at_once_and_one_that_is_not_kept_when_it_is_met(tokenizer):
    table = table_from_rows([*rows(2), Row("f" * 32, "w1", " ", source="file:7")])
    refused = r"row f{32} \(file:7\): the answer has no tokens"
    with pytest.raises(DataError, match=refused):
        Samples(table, Renderer(tokenizer, "plain"))
    with patch.object(module, "KEPT", 2):
        samples = Samples(table, Renderer(tokenizer, "plain"))
    with pytest.raises(DataError, match=refused):
        samples[2]
