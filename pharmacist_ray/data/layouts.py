"""From a user's record to a canonical row and back: which column means what.

A record that cannot become a row raises `BadRow` with a short, stable reason code; ingestion puts it into quarantine. Text is
never trimmed, normalised or interpreted: what the user wrote is what the model will see.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import orjson

from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ConfigError, DataError, unknown_name

REASONS: dict[str, str] = {
    "bad_json": "the line is not JSON, or not a JSON object",
    "invalid_utf8": "the bytes are not UTF-8, or an escape is half of a surrogate pair",
    "line_too_long": "the line is longer than the reader's limit",
    "missing_field": "a column the layout needs is absent or null",
    "empty_field": "the prompt or the response has no visible text",
    "wrong_type": "a column holds something other than text (or messages)",
    "bad_turns": "the messages do not end with a user turn and the assistant's answer to it",
    "unknown_layout": "layout is 'auto' and the columns fit no layout",
    "ambiguous_layout": "layout is 'auto' and the columns fit several layouts",
    "no_room": "the prompt fills the model's max_length and leaves no room for an answer",
    "control_token": "the prompt holds a control token of the model's tokenizer, which its chat template would take for its own",
    "unrenderable": "the model's chat template or tokenizer refuses the row",
}
"""Why a record cannot become a row; the keys are written to quarantine files and never change their meaning."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles a turn may have: those of OpenAI's and TRL's messages."""


class BadRow(DataError):
    """One record that cannot become a row.

    Args:
        reason: One of `REASONS`.
        detail: What exactly is wrong, for the person who mends the file.
        text: The beginning of the offending line, where the caller cannot have it.
    """

    def __init__(self, reason: str, detail: str, text: str = "") -> None:
        super().__init__(reason, detail, text)
        self.reason, self.detail, self.text = reason, detail, text

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns a layout reads. ``prompt`` and ``response`` may hold text or a list of messages."""

    prompt: str = ""
    response: str = ""
    input: str = ""
    """Optional extra input; an absent column is an empty input."""
    messages: str = ""
    """The whole conversation in one column; then the three above are not used."""

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that must be there, the answer last."""
        return (self.messages,) if self.messages else (self.prompt, self.response)


LAYOUTS: dict[str, Layout] = {
    "prompt_response": Layout(prompt="prompt", response="response"),
    "instruction": Layout(prompt="instruction", response="output", input="input"),
    "messages": Layout(messages="messages"),
    "prompt_completion": Layout(prompt="prompt", response="completion"),
    "sharegpt": Layout(messages="conversations"),
    "preference": Layout(prompt="prompt", response="chosen"),
    "preference_messages": Layout(messages="chosen"),
}
"""The layouts by name: plain pairs, Alpaca, TRL's two (conversational where the columns hold message lists), ShareGPT, and TRL's preference
pairs with and without a prompt of their own, of which the chosen answer is read: what is kept is the record, so pairs stay pairs."""

LATER = ("sharegpt", "preference", "preference_messages")
"""Layouts that are looked for only where the columns fit none of the others."""

SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""ShareGPT's word in a turn's ``from`` → its role."""


def to_row(
    record: Mapping[str, Any],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    category_column: str = "category",
    source: str = "",
    require_response: bool = True,
    raw: str | None = None,
) -> Row:
    """Return a record as a row, with its id and all its columns kept in ``raw``.

    Args:
        record: The user's columns.
        layout: A name of `LAYOUTS`, or ``"auto"`` to decide by the record's columns.
        columns: The user's column for ``prompt``, ``response``, ``input`` or ``messages``, where it is not the layout's own name.
            A column named here has to be present.
        category_column: Where the category is; a record without it has the empty category.
        source: Where the record was read, ``file:line``.
        require_response: False for evaluation prompts, which may come without an answer.
        raw: The record's JSON exactly as it was read, where there is one; else it is made from ``record``.

    Raises:
        BadRow: The record cannot become a row.
        ConfigError: Unknown layout, or a name in ``columns`` that is none of the four.
    """
    columns = columns or {}
    filled = frozenset(name for name, value in record.items() if value is not None)
    chosen = _choose(layout, tuple(sorted(columns.items())), frozenset(record), filled, require_response)
    turns, input_text = _turns(record, chosen, require_response), ""
    if chosen.input in filled or ("input" in columns and chosen.input not in record):
        input_text = _text(record, chosen.input)
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    asked = turns[:-1] if answered else turns
    if require_response and not answered:
        raise BadRow("bad_turns", "the last turn is not the assistant's")
    if not asked or asked[-1]["role"] != "user":
        raise BadRow("bad_turns", "the turn before the answer is not the user's")
    prompt, response = asked[-1]["content"], turns[-1]["content"] if answered else ""
    for what, text in (("prompt", prompt), ("response", response)):
        if not text.strip() and (what == "prompt" or answered):
            raise BadRow("empty_field", f"the {what} is empty")
    history = orjson.dumps(asked[:-1]).decode() if asked[:-1] else ""
    return Row(
        id=row_id(prompt, response, input_text, history),
        prompt=prompt,
        response=response,
        input=input_text,
        history=history,
        category=_category(record.get(category_column)),
        source=source,
        raw=to_json(record) if raw is None else raw,
    )


def from_row(row: Row) -> dict[str, Any]:
    """Return the record a row was made from: all original columns, bytes as base64 and times as ISO 8601 text."""
    record: dict[str, Any] = orjson.loads(row.raw)
    return record


def to_json(record: Mapping[str, Any]) -> str:
    """Return a record as JSON; bytes become base64, times ISO 8601, anything JSON does not know its text.

    Raises:
        BadRow: A text in it is not Unicode.
    """
    try:
        return orjson.dumps(dict(record), default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError as error:
        raise BadRow("invalid_utf8" if "UTF-8" in str(error) else "wrong_type", str(error)) from None


def check_columns(layout: str, columns: Mapping[str, str]) -> None:
    """Check what a configuration says about columns, before any row is read.

    Raises:
        ConfigError: Unknown layout, a name in ``columns`` that is none of the four, or one the layout does not have.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise unknown_name("layout", layout, ["auto", *LAYOUTS])
    for name in columns:
        if name not in Layout.__slots__:
            raise unknown_name("name in columns", name, list(Layout.__slots__))
    whole = layout != "auto" and bool(LAYOUTS[layout].messages)
    if "messages" in columns and (len(columns) > 1 or not (whole or layout == "auto")):
        raise ConfigError("columns.messages holds the whole conversation; give it alone, with layout 'auto' or 'messages'")
    if whole and set(columns) - {"messages"}:
        raise ConfigError(f"layout '{layout}' reads one column; name it with columns.messages")


@lru_cache(maxsize=256)  # the rows of a file have the same columns, and this would cost more than the rest of `to_row`
def _choose(
    name: str, named: tuple[tuple[str, str], ...], keys: frozenset[str], filled: frozenset[str], require_response: bool
) -> Layout:
    """Return the layout of a record with columns ``keys``, of which ``filled`` are not null; ``named`` are the user's columns."""
    columns = dict(named)
    check_columns(name, columns)
    if name != "auto":
        return replace(LAYOUTS[name], **columns)
    if "messages" in columns or {"prompt", "response"} <= set(columns):
        return Layout(**columns)
    candidates = {replace(known, **columns): known_as for known_as, known in LAYOUTS.items() if not (known.messages and columns)}
    fitting = [layout for layout in candidates if filled.issuperset(layout.required)]
    fitting = [layout for layout in fitting if candidates[layout] not in LATER] or fitting
    fitting = [one for one in fitting if not any(set(one.required) < set(other.required) for other in fitting)]
    if not fitting and not require_response:
        # Without an answer the two prompt layouts are one and the same; the first is as good as the second.
        fitting = list({one.prompt: one for one in reversed(candidates) if one.required[0] in filled}.values())
    if len(fitting) > 1:
        names = " and ".join(candidates[layout] for layout in fitting)
        raise BadRow("ambiguous_layout", f"the columns fit {names}; say which in layout, or name the columns")
    # A record that has half of a layout is one with a missing field, which is the more useful thing to say.
    nearest = fitting[0] if fitting else max(candidates, key=lambda one: sum(column in keys for column in one.required))
    if keys.isdisjoint(nearest.required):
        known = "; ".join(f"{candidates[layout]}: {', '.join(layout.required)}" for layout in candidates)
        have = ", ".join(sorted(map(str, keys)))[:200] or "(none)"
        raise BadRow("unknown_layout", f"columns {have} fit no layout ({known}); name the columns")
    return nearest


def _turns(record: Mapping[str, Any], layout: Layout, require_response: bool) -> list[dict[str, str]]:
    """Return the whole conversation as a list of ``{"role", "content"}``."""
    if layout.messages:
        return _messages(_present(record, layout.messages), layout.messages)
    turns: list[dict[str, str]] = []
    for column, role in ((layout.prompt, "user"), (layout.response, "assistant")):
        if role == "assistant" and not require_response and record.get(column) in (None, "", []):
            continue
        value = _present(record, column)
        if isinstance(value, list):
            found = _messages(value, column)
            if role == "assistant" and found and found[0]["role"] != "assistant":
                return found  # the whole conversation, its prompt once more
            turns += found
        else:
            turns.append({"role": role, "content": _text(record, column)})
    return turns


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    """Return a message list with nothing but roles and texts."""
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("wrong_type", f"'{column}' is not a list of messages")
    turns = []
    for turn in value:
        told = "from" in turn and "role" not in turn
        role = SHAREGPT.get(str(turn["from"])) if told else turn.get("role")
        if role not in ROLES:
            said = turn["from" if told else "role"] if told or "role" in turn else None
            known = SHAREGPT if told else ROLES
            raise BadRow("bad_turns", f"'{column}' has a turn with role {said!r}; known: {', '.join(known)}")
        turns.append({"role": role, "content": _text(turn, "value" if told else "content")})
    return turns


def _present(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column)
    if value is None:
        raise BadRow("missing_field", f"'{column}' is {'null' if column in record else 'missing'}")
    return value


def _text(record: Mapping[str, Any], column: str) -> str:
    """Return a column's text; bytes are read as UTF-8, which is how Parquet's untyped strings arrive."""
    value = _present(record, column)
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if isinstance(text, str):
            text.encode()
            return text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRow("invalid_utf8", f"'{column}' is not Unicode text: {error.reason}") from None
    raise BadRow("wrong_type", f"'{column}' is {type(value).__name__}, not text")


def _category(value: Any) -> str:
    """Return a category as text; one that is not text already as its JSON."""
    return value if isinstance(value, str) else "" if value is None else to_json({"category": value})[12:-1]


def _plain(value: Any) -> Any:
    """Return what `orjson` does not know as something it does."""
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
