"""Put rows in an attacker's form: a system prompt, a text around the prompt, a text around the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import orjson

from pharmacist_ray.config.attack_kinds import ANSWER, PROMPT, FormConfig
from pharmacist_ray.data.render import turns_before_answer
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError


def asked(row: Row, form: FormConfig) -> Row:
    """Return a row's question in a form; it keeps the id of the question.

    Args:
        row: The row; its extra input becomes a part of the prompt.
        form: The form; its system prompt takes the place of the row's own.
    """
    prompt = form.prompt.replace(PROMPT, question(row))
    history = row.history
    if form.system:
        turns = [turn for turn in (orjson.loads(history) if history else []) if turn["role"] != "system"]
        history = orjson.dumps([{"role": "system", "content": form.system}, *turns]).decode()
    return replace(row, prompt=prompt, input="", history=history)


def put(row: Row, form: FormConfig) -> Row:
    """Return a row in a form, its answer too, under the id of what it is then."""
    row = replace(asked(row, form), response=form.answer.replace(ANSWER, row.response))
    return replace(row, id=row_id(row.prompt, row.response, row.input, row.history))


def question(row: Row) -> str:
    """Return the user's turn in one piece."""
    return turns_before_answer(row)[-1]["content"]


def common_form(rows: Sequence[Row], *, name: str) -> FormConfig:
    """Return the form that the prompts of a task share: the words that all of them begin and end with (ours).

    Args:
        rows: Rows of the task, at least 2 with different prompts.
        name: The attack's, for the error.

    Raises:
        DataError: The prompts have no word in common at either end.
    """
    texts = [re.findall(r"\s+|\S+", text) for text in {question(row) for row in rows}]
    first = _shared([text[:-1] for text in texts])  # a word at least is left in every prompt
    last = _shared([text[len(first) + 1 :][::-1] for text in texts])[::-1]
    if len(texts) < 2 or not "".join([*first, *last]).strip():
        raise DataError(
            f"attack '{name}' is of the kind task_format, but the prompts of its task have no words in common at either end; "
            f"give the form in which its user asks, for example attacks[].form={{prompt: 'Sort this message: {PROMPT}'}}"
        )
    return FormConfig(prompt="".join([*first, PROMPT, *last]))


def _shared(texts: Sequence[Sequence[str]]) -> list[str]:
    """Return the pieces that all texts begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))]
