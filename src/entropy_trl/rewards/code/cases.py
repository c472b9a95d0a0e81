"""The tests of a programming problem, as a row of the data holds them: one JSON text."""

import ast
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any


KINDS = ("asserts", "stdin", "function", "pytest")
_KEYS = {"kind", "cases", "prefix", "setup", "entry_point", "language", "time_limit", "tolerance"}
_SHOWN = 80


class TestsError(ValueError):
    """The tests of a row cannot be read."""

    __test__ = False  # pytest takes classes of this name for tests


@dataclass(frozen=True)
class Tests:
    """The tests of one problem. docs/code.md has the meaning of each part."""

    kind: str
    cases: list[Any] = field(hash=False)
    prefix: str = ""
    setup: str = ""
    entry_point: str = ""
    time_limit: float | None = None
    tolerance: float = 1e-6

    __test__ = False

    @property
    def classes(self) -> list[str]:
        """The classes that the prefix defines: their objects cross between the sandboxes as their attributes."""
        return [node.name for node in _parsed(self.prefix, "prefix").body if isinstance(node, ast.ClassDef)]


@lru_cache(maxsize=256)
def read_tests(text: str) -> Tests:
    """Read the tests of a row.

    Args:
        text (`str`): The JSON text of a column `tests`.

    Returns:
        [`Tests`]: The tests.

    Raises:
        TestsError: The text is no JSON, or lacks or has what it should not.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise TestsError(f"tests is no JSON text ({_short(text)}): {error}. {_REMEDY}") from None
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        kind = data.get("kind") if isinstance(data, dict) else data
        raise TestsError(f"tests has the kind {_short(kind)}: it has to be one of {', '.join(KINDS)}. {_REMEDY}")
    if unknown := sorted(set(data) - _KEYS):
        raise TestsError(f"tests has unknown keys ({', '.join(unknown)}): known are {', '.join(sorted(_KEYS))}.")
    if (language := data.pop("language", None) or "python") != "python":
        raise TestsError(f"tests has the language {_short(language)}: only python runs. Leave the row out.")
    tests = Tests(**{"cases": None} | {key: value for key, value in data.items() if value is not None})
    _check(tests)
    return tests


_REMEDY = "docs/code.md has the form; read the data with entropy_trl's loader, which writes it."


def _check(tests: Tests) -> None:
    for name in ("prefix", "setup", "entry_point"):
        if not isinstance(getattr(tests, name), str):
            raise TestsError(f"tests has a {name} that is no text ({_short(getattr(tests, name))}).")
    for name in ("time_limit", "tolerance"):
        value = getattr(tests, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and (value > 0 or (name == "tolerance" and value == 0))):
            raise TestsError(f"tests has a {name} of {_short(value)}: it has to be a positive number.")
    if not isinstance(tests.cases, list) or not tests.cases:
        raise TestsError(f"tests has no cases ({_short(tests.cases)}): a program without tests has no reward.")
    _parsed(tests.prefix, "prefix")
    _parsed(tests.setup, "setup")
    if tests.entry_point:
        try:
            ast.parse(tests.entry_point, mode="eval")
        except (SyntaxError, ValueError) as error:
            raise TestsError(
                f"tests has an entry_point that is no expression ({tests.entry_point!r}): {error}."
            ) from None
    for index, case in enumerate(tests.cases):
        if problem := _problem(tests.kind, case):
            raise TestsError(f"case {index} of tests {problem} ({_short(case)}). {_REMEDY}")
    if tests.kind == "function" and not tests.entry_point:
        raise TestsError("tests of the kind function has no entry_point: there is nothing to call.")


def _problem(kind: str, case: Any) -> str | None:
    if kind in ("asserts", "pytest"):
        if not isinstance(case, str):
            return "is no text of Python"
        try:
            ast.parse(case)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"does not parse: {error}"
        return None
    if not isinstance(case, dict):
        return "is no object"
    if kind == "stdin":
        texts = set(case) == {"input", "output"} and all(isinstance(value, str) for value in case.values())
        return None if texts else "needs the texts input and output"
    if not isinstance(case.get("args", []), list) or not isinstance(case.get("kwargs", {}), dict):
        return "needs args, a list, or kwargs, an object"
    if ("output" in case) == ("any_of" in case) or set(case) - {"args", "kwargs", "output", "any_of"}:
        return "needs args or kwargs, and either output or any_of"
    if "any_of" in case and not (isinstance(case["any_of"], list) and case["any_of"]):
        return "has an any_of that is no list with values"
    return None


def _parsed(code: str, name: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TestsError(f"the {name} of tests does not parse: {error}.") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
