"""What tests use of pytest, in a few lines that need no package: the tests' sandbox has no pytest.

Left out are plugins, fixtures with a scope or of pytest's own (`capsys`, `tmp_path`), and rewritten asserts.
"""

import inspect
import re
import types
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any


class SkippedError(Exception):
    """A test says that it does not apply."""


class Approx:
    """A number, or a collection of numbers, that equals what is close to it."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False):
        self.expected = expected
        self.relative = (1e-6 if abs is None else 0.0) if rel is None else rel
        self.absolute = 1e-12 if abs is None else abs
        self.nan_ok = nan_ok

    def __eq__(self, other: object) -> bool:
        return self._close(self.expected, other)

    def _close(self, expected: Any, other: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(other, dict)
                and expected.keys() == other.keys()
                and all(self._close(value, other[key]) for key, value in expected.items())
            )
        if isinstance(expected, list | tuple):
            return (
                isinstance(other, list | tuple)
                and len(expected) == len(other)
                and all(self._close(*pair) for pair in zip(expected, other, strict=True))
            )
        if not isinstance(expected, int | float | complex) or not isinstance(other, int | float | complex):
            return type(other) is type(expected) and bool(expected == other)
        if expected != expected or other != other:
            return self.nan_ok and expected != expected and other != other
        if expected == other:
            return True
        allowed = max(self.relative * abs(expected), self.absolute)
        return abs(expected - other) <= allowed < float("inf")

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"


class Raised:
    """What `raises` gives: the exception is its `value`."""

    value: Any = None
    type: Any = None


@contextmanager
def _raising(expected: Any, match: str | None) -> Iterator[Raised]:
    found = Raised()
    try:
        yield found
    except expected as error:
        found.value, found.type = error, type(error)
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"{error} does not match {match!r}") from None
    else:
        raise AssertionError(f"{expected} was not raised")


def raises(expected: Any, *function: Any, match: str | None = None, **named: Any) -> Any:
    """A context in which an exception is expected, or the same for a call."""
    if not function:
        return _raising(expected, match)
    with _raising(expected, match) as found:
        function[0](*function[1:], **named)
    return found


def fail(reason: str = "", pytrace: bool = True) -> None:
    """Fail the test."""
    raise AssertionError(reason)


def skip(reason: str = "", **named: Any) -> None:
    """Leave the test out."""
    raise SkippedError(reason)


class Mark:
    """`pytest.mark`: `parametrize`, `skip` and `skipif`. The others change nothing."""

    def parametrize(self, names: Any, values: Any, **named: Any) -> Callable[[Any], Any]:
        """Run a test once for each set of values."""
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        sets = [_values(value, len(names)) for value in values]

        def mark(function: Any) -> Any:
            function.parameters = [
                *getattr(function, "parameters", []),
                [dict(zip(names, s, strict=True)) for s in sets],
            ]
            return function

        return mark

    def skip(self, *function: Any, **named: Any) -> Any:
        """Leave a test out."""
        return self.skipif(True)(function[0]) if function and callable(function[0]) else self.skipif(True)

    def skipif(self, condition: Any, **named: Any) -> Callable[[Any], Any]:
        """Leave a test out where the condition holds."""

        def mark(function: Any) -> Any:
            function.skipped = bool(condition)
            return function

        return mark

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **named: (
            values[0] if len(values) == 1 and not named and callable(values[0]) else lambda function: function
        )


def _values(value: Any, count: int) -> tuple[Any, ...]:
    value = value.values if isinstance(value, Parameter) else value if count > 1 else (value,)
    return tuple(value)


class Parameter:
    """`pytest.param`."""

    def __init__(self, *values: Any, **named: Any):
        self.values = values


def fixture(*function: Any, **named: Any) -> Any:
    """Mark what makes an argument of tests."""

    def mark(function: Any) -> Any:
        function.is_fixture, function.fixture_name = True, named.get("name") or function.__name__
        function.autouse = named.get("autouse", False)
        return function

    return mark(function[0]) if function else mark


def pytest_module() -> types.ModuleType:
    """Return the module `pytest`."""
    made = types.ModuleType("pytest")
    made.__dict__.update(
        raises=raises, approx=Approx, fail=fail, skip=skip, mark=Mark(), fixture=fixture, param=Parameter, main=skip
    )
    made.__dict__["warns"] = lambda *values, **named: nullcontext()
    return made


def collect(names: dict[str, Any]) -> list[Callable[[], None]]:
    """Return the tests among the names of a module, in their order."""
    fixtures = {value.fixture_name: value for value in names.values() if _is_fixture(value)}
    found: list[Callable[[], None]] = []
    for name, value in names.items():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            for method in unittest.defaultTestLoader.getTestCaseNames(value):
                found.append(lambda value=value, method=method: _unittest(value(method)))  # type: ignore[misc]
        elif isinstance(value, type) and name.startswith("Test"):
            for method in [method for method in dir(value) if method.startswith("test")]:
                found += _runs(getattr(value, method), fixtures, value, method)
        elif isinstance(value, types.FunctionType) and name.startswith("test"):
            found += _runs(value, fixtures)
    return found


def _is_fixture(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and hasattr(value, "is_fixture")


def _unittest(case: unittest.TestCase) -> None:
    result = unittest.TestResult()
    type(case).setUpClass()
    case.run(result)
    type(case).tearDownClass()
    if result.skipped:
        raise SkippedError
    if result.errors:
        raise RuntimeError(result.errors[0][1])
    if result.failures or result.unexpectedSuccesses or not result.testsRun:
        raise AssertionError(result.failures)


def _runs(function: Any, fixtures: dict[str, Any], owner: type | None = None, method: str = "") -> Iterator[Any]:
    for chosen in product(*getattr(function, "parameters", [])):
        values = {name: value for part in chosen for name, value in part.items()}
        yield lambda values=values: _run(function, fixtures, values, owner, method)


def _run(function: Any, fixtures: dict[str, Any], values: dict[str, Any], owner: type | None, method: str) -> None:
    if getattr(function, "skipped", False):
        raise SkippedError
    made: dict[str, Any] = dict(values)
    open_fixtures: list[Any] = []
    target, instance = function, None
    if owner is not None:
        instance = owner()
        fixtures = fixtures | {
            value.fixture_name: getattr(instance, name)
            for name, value in inspect.getmembers(owner)
            if _is_fixture(value)
        }
        for name in ("setup_class", "setup_method", "setup"):
            if hasattr(instance, name):
                hook = getattr(instance, name)
                hook(*([function] if inspect.signature(hook).parameters else []))
        target = getattr(instance, method)

    def value(name: str) -> Any:
        if name not in made:
            if name not in fixtures:
                raise LookupError(f"there is no fixture {name!r}")
            result = fixtures[name](**{other: value(other) for other in inspect.signature(fixtures[name]).parameters})
            if inspect.isgenerator(result):
                open_fixtures.append(result)
                result = next(result)
            made[name] = result
        return made[name]

    try:
        for name, other in fixtures.items():
            if getattr(other, "autouse", False):
                value(name)
        target(**{name: value(name) for name in inspect.signature(target).parameters})
    finally:
        for generator in reversed(open_fixtures):
            next(generator, None)
        if hasattr(instance, "teardown_method"):
            hook = instance.teardown_method  # type: ignore[union-attr]
            hook(*([function] if inspect.signature(hook).parameters else []))
