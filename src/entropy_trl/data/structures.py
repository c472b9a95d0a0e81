"""Values that are written as text: the JSON, or the Python literal, of a list, a structure or a chat."""

import ast
import json
from collections.abc import Mapping
from typing import Any


class Number(str):
    """The digits of a number in a JSON text, as they are written: a float, and a 64-bit integer, would lose some."""


_CLOSING = {"[": "]", "{": "}", '"': '"'}
#: What the two parsers raise, on text that is deeply nested too.
_FAILURES = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError)


def parsed(text: str) -> Any:
    """Return the list, the structure or the text that a text is the JSON of, or the Python literal; else the text.

    Python literals are what `str` and pandas write for a list of texts. A text without quotes is none, since `{1}` and
    `[a]` are mathematics.
    """
    stripped = text.strip()
    if len(stripped) < 2 or _CLOSING.get(stripped[0]) != stripped[-1]:
        return text
    try:
        return json.loads(stripped, parse_int=Number, parse_float=Number, parse_constant=lambda _: None)
    except _FAILURES:
        pass
    if "'" not in stripped or stripped[0] == '"':
        return text
    try:
        value = ast.literal_eval(stripped)
    except _FAILURES:
        return text
    return list(value) if isinstance(value, set) else value


def chat(text: str) -> list[dict[str, str]] | None:
    """Return the messages that a text is the JSON of, none if they have no text; None for any other text."""
    if "role" not in text or not text.lstrip().startswith(("[", "{")):
        return None
    value = parsed(text)
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) and "role" in one for one in messages):
        return None
    if not all(isinstance(one["role"], str) and isinstance(one.get("content"), str) for one in messages):
        return []
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def field_of(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or of a field of a structure in it, which may be written as text."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = parsed(value) if isinstance(value, str) else value
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
