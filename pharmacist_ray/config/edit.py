"""Put values into a configuration file and leave everything else in it as it is: comments, order, anchors.

PyYAML reads a document into nodes that know where in the text they stand. A value that is there is replaced in its place, and a key that
is missing is added to its section. What comes out is read again and compared with what it should say: an anchor may have more readers
than the one section that was meant, and those that read the wrong value then get their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pharmacist_ray.config.load import assign
from pharmacist_ray.errors import ConfigError

_UNKNOWN = object()

ROUNDS = 4
"""Changes for each key that is to change at first: a change of an anchor may ask for one of its other readers (ours)."""


def with_values(text: str, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, where: str = "the file") -> str:
    """Return a YAML text that says other values under some dotted keys, and the same as before under all others.

    Args:
        text: A configuration.
        values: Dotted key → plain value; items of lists are addressed by number.
        defaults: What other keys are while the text does not say: for those that would say another thing by an anchor that is changed.
        where: The file, for errors.

    Raises:
        ConfigError: The text is no YAML of keys and values, or is written in a way that this cannot follow; names the keys.
    """
    wanted = _plain(text, where)
    for key, value in values.items():
        assign(wanted, key, value)
    wrong = dict(_differences(_plain(text, where), wanted, defaults or {}))
    for _ in range(ROUNDS * len(wrong)):
        if not wrong:
            break
        key, value = next(iter(wrong.items()))  # one at a time: what reads an anchor may be right by then
        if value is _UNKNOWN:
            raise ConfigError(f"{where}: '{key}' would be said by an anchor that others need otherwise; set it there by hand")
        text = _put(text, key.split("."), value, where)
        wrong = dict(_differences(_plain(text, where), wanted, defaults or {}))
    if wrong:
        keys = ", ".join(f"{key}={_written(value)}" for key, value in wrong.items())
        raise ConfigError(f"{where} is written in a way that cannot be changed here; set these by hand: {keys}")
    return text


def _plain(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold keys and values")
    return copy.deepcopy(values)


def _differences(now: Any, wanted: Any, defaults: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys whose values differ, the innermost that can be set, with what they should be."""
    if isinstance(now, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*wanted, *now]):
            place = f"{at}.{key}" if at else str(key)
            if key not in wanted:
                if now[key] != defaults.get(place, _UNKNOWN):
                    yield place, defaults.get(place, _UNKNOWN)
            elif key not in now and isinstance(wanted[key], dict):
                yield from ((f"{place}.{inner}", value) for inner, value in wanted[key].items())
            elif key not in now:
                yield place, wanted[key]
            else:
                yield from _differences(now[key], wanted[key], defaults, place)
    elif isinstance(now, list) and isinstance(wanted, list) and len(now) == len(wanted):
        for number, pair in enumerate(zip(now, wanted, strict=True)):
            yield from _differences(*pair, defaults, f"{at}.{number}")
    elif now != wanted:
        yield at, wanted


def _put(text: str, path: list[str], value: Any, where: str) -> str:
    """Return the text with one value set: replaced where it stands, or added to the innermost section that is there."""
    node: yaml.Node = yaml.compose(text, Loader=yaml.SafeLoader)  # type: ignore[assignment]  # it has keys, or nothing would differ
    for depth, part in enumerate(path):
        found = _child(node, part)
        if found is None:
            return _add(text, node, path[depth:], value, where)
        name, child = found
        alias = _alias(text, name, child) if name is not None else None
        if alias and depth + 1 < len(path):  # of a whole section: this reader gets one of its own, beginning with what it reads
            start, end = alias
            return text[:start] + f"{{<<: {text[start:end]}, {_flow(path[depth + 1 :], value)}}}" + text[end:]
        if depth + 1 == len(path):
            start, end = alias or (child.start_mark.index, child.end_mark.index)
            if isinstance(child, yaml.CollectionNode) and not child.flow_style and not alias:
                raise ConfigError(
                    f"{where}: {'.'.join(path)} is a section over several lines; set it by hand to {_written(value)}"
                )
            gap = " " if name is not None and text[start - 1 : start] == ":" else ""  # of a key with nothing behind it
            return _replaced(text, start, end, gap + _written(value))
        node = child
    return text


def _replaced(text: str, start: int, end: int, written: str) -> str:
    """Return the text with a part replaced; a comment behind it stays in its column, if there is room."""
    gap = re.compile(r" +(?=#)").match(text, end)
    if gap:
        return text[:start] + written + " " * max(1, gap.end() - start - len(written)) + text[gap.end() :]
    return text[:start] + written + text[end:]


def _child(node: yaml.Node, part: str) -> tuple[yaml.Node | None, yaml.Node] | None:
    """Return a key's node and its value's, or an item's value alone; what a section merges in is not its own."""
    if isinstance(node, yaml.MappingNode):
        return next(
            ((name, value) for name, value in node.value if name.value == part and name.tag != "tag:yaml.org,2002:merge"), None
        )
    if isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        return None, node.value[int(part)]
    return None


def _alias(text: str, name: yaml.Node, value: yaml.Node) -> tuple[int, int] | None:
    """Return where an alias stands; its value's own place is the anchor's, further up."""
    if value.start_mark.index >= name.end_mark.index:
        return None
    match = re.compile(r"\s*:\s*(\*[^\s,\]}]+)").match(text, name.end_mark.index)
    return match.span(1) if match else None


def _add(text: str, node: yaml.Node, path: list[str], value: Any, where: str) -> str:
    """Return the text with a key added to a section, after its last one."""
    if isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null"):  # a section with nothing in it
        start, end = node.start_mark.index, node.end_mark.index
        return text[:start] + " " * (text[start - 1 : start] == ":") + f"{{{_flow(path, value)}}}" + text[end:]
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{where}: '{'.'.join(path)}' cannot be added to what is no section; set it by hand to {_written(value)}"
        )
    if node.flow_style:
        end = node.end_mark.index - 1
        inside = text[:end].rstrip()
        comma = "" if inside.endswith(("{", ",")) else ","
        return inside + comma + ("" if inside.endswith("{") else " ") + _flow(path, value) + text[end:]
    indent = " " * node.value[0][0].start_mark.column
    end = _line_end(text, _last(node))
    lines = "".join(f"\n{indent}{'  ' * depth}{part}:" for depth, part in enumerate(path))
    return text[:end] + f"{lines} {_written(value)}" + text[end:]


def _last(node: yaml.Node) -> int:
    """Return where the last thing that is written in a section ends: its end mark lies behind the comments that follow it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        name, value = node.value[-1]
        return max(int(name.end_mark.index), _last(value))  # an alias's value stands further up
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _last(node.value[-1])
    return int(node.end_mark.index)


def _line_end(text: str, place: int) -> int:
    """Return the end of the line that something ends in; a block of text ends at the beginning of the next."""
    if text[place - 1 : place] == "\n":
        place -= 1
    found = text.find("\n", place)
    return len(text) if found < 0 else found


def _flow(path: list[str], value: Any) -> str:
    *outer, last = path
    return "".join(f"{part}: {{" for part in outer) + f"{last}: {_written(value)}" + "}" * len(outer)


def _written(value: Any) -> str:
    """Return a value as YAML on one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("...\n").strip()
