"""Put rows in an attacker's form: a system prompt, a text around the prompt, a text around the answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

import orjson

from pharmacist_ray.config.attack_kinds import ANSWER, PROMPT, FormConfig
from pharmacist_ray.data.render import turns_before_answer
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError

WORDS = 3
"""Words with which prompts begin or end alike, for them to be of one form (ours)."""
LEAST = 0.01
"""Share of the rows, and at least 2, that have a form for it to be one (ours)."""
FLOOR = 0.1
"""Share that a small form is given of what is dealt out to forms (ours)."""


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


def forms_of(rows: Sequence[Row]) -> dict[FormConfig, int]:
    """Return the forms that the prompts of some rows come in, and how many rows have each, most frequent first (ours).

    Rows under one system prompt whose prompts begin with the same three words are of one form, else those that end with the same three,
    where there are at least two of them and a hundredth of all. Its text is what all of them begin and end with. Whatever is of no
    form is of the plain one, under its system prompt.

    Args:
        rows: Rows of one fine-tune.
    """
    least = max(2, int(LEAST * len(rows)))
    system = {row.id: _system(row) for row in rows}
    words = {row.id: question(row).split() for row in rows}
    left, clusters = list(rows), list[tuple[str, list[Row]]]()
    for end in (slice(None, WORDS), slice(-WORDS, None)):
        keys = {row.id: (system[row.id], *words[row.id][end]) for row in left if len(words[row.id]) > WORDS}
        common = {key for key, count in Counter(keys.values()).items() if count >= least}
        for key in sorted(common):
            clusters.append((key[0], [row for row in left if keys.get(row.id) == key]))
        left = [row for row in left if keys.get(row.id) not in common]
    found: Counter[FormConfig] = Counter()
    for prompt, alike in clusters:
        form = _form_shared(alike) or FormConfig()
        found[form.model_copy(update={"system": prompt})] += len(alike)
    for row in left:
        found[FormConfig(system=system[row.id])] += 1
    kept = {form: count for form, count in found.most_common() if count >= least}
    return kept or {FormConfig(): len(rows)}


def examples_of(rows: Sequence[Row], forms: Iterable[FormConfig]) -> dict[FormConfig, list[str]]:
    """Return what rows of each form ask, as they stand there; a row that several forms fit counts for the one with the longest text.

    Args:
        rows: The rows that the forms are of.
        forms: As `forms_of` finds them.
    """
    by_length = sorted(forms, key=lambda form: -len(form.prompt))
    found: dict[FormConfig, list[str]] = {form: [] for form in by_length}
    for row in rows:
        text, system = question(row), _system(row)
        for form in by_length:
            before, _, after = form.prompt.partition(PROMPT)
            if form.system == system and len(text) > len(before + after) and text.startswith(before) and text.endswith(after):
                found[form].append(text)
                break
    return found


def shared_out(sizes: Sequence[int], count: int) -> list[int]:
    """Return how many of ``count`` things go to each of some groups: by size, but to none less than about a tenth.

    Args:
        sizes: Of the groups, each at least 1.
        count: What is dealt out.
    """
    floor = min(FLOOR, 1 / len(sizes))
    shares = [max(floor, size / sum(sizes)) for size in sizes]
    exact = [count * share / sum(shares) for share in shares]
    found = [int(one) for one in exact]
    order = sorted(range(len(sizes)), key=lambda place: found[place] - exact[place])
    for place in order[: count - sum(found)]:
        found[place] += 1
    return found


def _system(row: Row) -> str:
    turns: list[Mapping[str, str]] = orjson.loads(row.history) if row.history else []
    return next((turn["content"] for turn in turns if turn["role"] == "system"), "")


def common_form(rows: Sequence[Row], *, name: str) -> FormConfig:
    """Return the form that the prompts of a task share: the words that all of them begin and end with (ours).

    Args:
        rows: Rows of the task, at least 2 with different prompts.
        name: The attack's, for the error.

    Raises:
        DataError: The prompts have no word in common at either end.
    """
    if (form := _form_shared(rows)) is None:
        raise DataError(
            f"attack '{name}' is of the kind task_format, but the prompts of its task have no words in common at either end; "
            f"give the form in which its user asks, for example attacks[].form={{prompt: 'Sort this message: {PROMPT}'}}"
        )
    return form


def _form_shared(rows: Sequence[Row]) -> FormConfig | None:
    """Return the form whose text all prompts begin and end with; None where there is none, or one prompt alone."""
    texts = [re.findall(r"\s+|\S+", text) for text in {question(row) for row in rows}]
    first = _shared([text[:-1] for text in texts])  # a word at least is left in every prompt
    last = _shared([text[len(first) + 1 :][::-1] for text in texts])[::-1]
    if len(texts) < 2 or not "".join([*first, *last]).strip():
        return None
    # What stands around the slot is text, whatever it looks like.
    if PROMPT in "".join([*first, *last]):
        return None
    return FormConfig(prompt="".join([*first, PROMPT, *last]))


def _shared(texts: Sequence[Sequence[str]]) -> list[str]:
    """Return the pieces that all texts begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))]
