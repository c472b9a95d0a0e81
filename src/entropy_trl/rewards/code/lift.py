"""Asserts that compare a call with a literal become calls, whose results this process compares.

Such tests need no sandbox of their own: they are most of MBPP's and of HumanEval's.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from entropy_trl.rewards.code.cases import Tests


@dataclass(frozen=True)
class Call:
    """A call, and the values that its result may have.

    Args:
        lenient (`bool`): Whether a tuple equals a list, and keys are compared as text: the values come from JSON.
        tolerance (`float`): The relative or absolute difference that is allowed where the expected value is a float.
    """

    entry_point: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    expected: list[Any]
    lenient: bool = False
    tolerance: float = 0.0


def calls(tests: Tests) -> list[Call] | None:
    """Return the calls that the tests consist of, or None where they are more than calls."""
    if tests.kind == "function":
        return [
            Call(
                tests.entry_point,
                tuple(case.get("args", [])),
                case.get("kwargs", {}),
                case["any_of"] if "any_of" in case else [case["output"]],
                lenient=True,
                tolerance=tests.tolerance,
            )
            for case in tests.cases
        ]
    if tests.kind != "asserts":
        return None
    statements = [statement for case in tests.cases for statement in ast.parse(case).body]
    names = {}
    if tests.entry_point:
        names["candidate"] = tests.entry_point
    if [ast.unparse(statement) for statement in statements] == ["check(candidate)"]:
        body = _check_body(tests.setup)
        if body is None:
            return None
        return _all(body, names, only=True)
    if len(statements) != len(tests.cases) or _statements(tests.setup):
        return None
    return _all(statements, names, only=False)


def _statements(code: str) -> list[ast.stmt]:
    """The statements of a code that do something: no text, no assignment of a literal to an upper-case name."""
    found = []
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id == "METADATA"
        ):
            continue
        found.append(statement)
    return found


def _check_body(setup: str) -> list[ast.stmt] | None:
    """The asserts of a setup that is a `check(candidate)` alone."""
    statements = _statements(setup)
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
        return None
    function = statements[0]
    if function.name != "check" or [argument.arg for argument in function.args.args] != ["candidate"]:
        return None
    if function.decorator_list or function.args.vararg or function.args.kwarg or function.args.kwonlyargs:
        return None
    return [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]


def _all(statements: list[ast.stmt], names: dict[str, str], only: bool) -> list[Call] | None:
    found = []
    for statement in statements:
        if isinstance(statement, ast.Pass):
            continue
        if (
            isinstance(statement, ast.Assert)
            and isinstance(statement.test, ast.Constant)
            and statement.test.value is True
        ):
            continue  # `assert True`, of which HumanEval has some
        call = _call(statement, names, only)
        if call is None:
            return None
        found.append(call)
    return found or None


def _call(statement: ast.stmt, names: dict[str, str], only: bool) -> Call | None:
    """The call of `assert f(1) == 2`, whose values are literals."""
    if not isinstance(statement, ast.Assert):
        return None
    test = statement.test
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return None
    for call, value in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        entry_point = names.get(call.func.id, None if only else call.func.id)
        if entry_point is None:
            continue
        try:
            return Call(
                entry_point,
                tuple(map(ast.literal_eval, call.args)),
                dict(_named(call)),
                [ast.literal_eval(value)],
            )
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _named(call: ast.Call) -> Iterator[tuple[str, Any]]:
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("a call with **")
        yield keyword.arg, ast.literal_eval(keyword.value)
