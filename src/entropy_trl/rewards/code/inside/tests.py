"""The tests' sandbox: runs the tests. The program's objects are handles, whose operations the program carries out.

A handle tells the program nothing of what a test expects: a comparison with plain data is decided here.
"""

import resource
import sys
import types
from collections import deque
from typing import Any

from entropy_trl.rewards.code.inside.peer import Line, Peer, Remote, open_streams
from entropy_trl.rewards.code.inside.stand_in import SkippedError, collect, pytest_module
from entropy_trl.rewards.code.inside.wire import MalformedError


def _ask(handle: Any, operation: str, *values: Any) -> Any:
    return object.__getattribute__(handle, "_peer").ask(operation, *values)


class Handle(Remote):
    """An object of the program.

    Operators with another operand than a handle are errors, and equality with plain data is False: the operand may
    be what the test expects, and the program would have the last word.
    """

    __slots__ = ()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result, after = _ask(self, "call", self, arguments, named)
        for before, changed in zip(arguments, after, strict=True):
            _update(before, changed)
        return result

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", self, name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delete", self, name)

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "set_item", self, key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delete_item", self, key)

    def __iter__(self) -> Any:
        return _ask(self, "iterate", self)

    def __enter__(self) -> Any:
        return _ask(self, "enter", self)

    def __exit__(self, *error: Any) -> None:
        _ask(self, "leave", self)

    def __instancecheck__(self, item: Any) -> bool:
        return isinstance(item, Handle) and _ask(self, "instance", item, self) is True

    def __contains__(self, item: Any) -> bool:
        if not isinstance(item, Handle):
            raise TypeError("a test cannot ask an object of the program whether it holds a value")
        return _ask(self, "binary", "contains", self, item) is True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and _ask(self, "binary", "eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))


def _unary(name: str) -> Any:
    return lambda self: _ask(self, "unary", name, self)


def _binary(name: str) -> Any:
    def operate(self: Any, other: Any) -> Any:
        return _ask(self, "binary", name, self, other) if isinstance(other, Handle) else NotImplemented

    return operate


for _name in ("len", "next", "bool", "str", "repr", "int", "float", "round", "abs", "neg", "pos", "invert", "index"):
    setattr(Handle, f"__{_name}__", _unary(_name))
for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    setattr(Handle, f"__{_name}__", _binary(_name + "_" if _name in ("and", "or") else _name))


def _update(before: Any, after: Any) -> None:
    """Give an argument the content that the call left it with."""
    if type(before) is not type(after):
        return
    if isinstance(before, list | bytearray):
        before[:] = after
    elif isinstance(before, dict | set | deque):
        before.clear()
        (before.extend if isinstance(before, deque) else before.update)(after)
    elif type(before).__module__ == "tests" and not isinstance(before, Remote):
        vars(before).clear()
        vars(before).update(vars(after))


class _Solution(types.ModuleType):
    """The module `solution`, whose names are the program's."""

    def __init__(self, peer: Peer, names: list[str]):
        super().__init__("solution")
        self.__dict__["__all__"] = [name for name in names if not name.startswith("_")]
        self.__dict__["_peer"] = peer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_peer":
            raise AttributeError(name)
        self.__dict__[name] = found = self._peer.ask("name", name)
        return found


def main() -> None:
    """Run the tests of the first message. Each gets a message of its own that says how it ended."""
    line = Line()
    start = line.read()
    if start["limits"]:  # the sandbox of a server has its own
        for limit, value in zip((resource.RLIMIT_AS, resource.RLIMIT_CPU), start["limits"], strict=True):
            resource.setrlimit(limit, (value, value))
    sys.path.extend(start["paths"])
    open_streams()
    sys.modules["pytest"] = pytest_module()
    peer = Peer(line, _serve, lambda peer, number, names: _remote(peer, number, names))
    line.write(["hello"])
    names = line.read()[1]  # the program is ready
    sys.modules["solution"] = solution = _Solution(peer, names)
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    namespace = module.__dict__
    try:
        exec(compile(start["prefix"], "<prefix>", "exec", dont_inherit=True), namespace)
        peer.classes.update({name: namespace[name] for name in start["classes"] if name in namespace})
        for name in start["modules"]:
            namespace.setdefault(name, __import__(name))
        for name in start["wanted"]:
            if name in names:
                namespace[name] = getattr(solution, name)
        if start["entry_point"]:
            namespace["candidate"] = peer.ask("entry", start["entry_point"])
        exec(compile(start["setup"], "<setup>", "exec", dont_inherit=True), namespace)
        cases = _cases(start, namespace)
    except BaseException as error:
        line.write(["case", _status(error)])
        return
    line.write(["count", len(cases)])
    for case in cases:
        status = "passed"
        try:
            case()
        except SkippedError:
            status = "skipped"
        except BaseException as error:  # a test that leaves, or is made to, has not passed
            status = _status(error)
        line.write(["case", status])


def _cases(start: dict[str, Any], namespace: dict[str, Any]) -> list[Any]:
    if start["kind"] == "asserts":
        codes = [compile(case, "<case>", "exec", dont_inherit=True) for case in start["cases"]]
        return [lambda code=code: exec(code, namespace) for code in codes]
    found = []
    for case in start["cases"]:
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        module.__dict__.update({name: value for name, value in namespace.items() if not name.startswith("__")})
        names = set(module.__dict__)
        exec(compile(case, "<tests>", "exec", dont_inherit=True), module.__dict__)
        own = {name: value for name, value in vars(module).items() if name not in names or name.startswith("test")}
        found += collect(own)
    return found


def _status(error: BaseException) -> str:
    if isinstance(error, MalformedError):
        return "crashed"
    return "failed" if isinstance(error, AssertionError) else "raised"


def _remote(peer: Peer, number: int, names: list[str] | None) -> Any:
    return peer.exception_class(names) if names else Handle(peer, number)


def _serve(peer: Peer, operation: str, values: Any) -> Any:
    """A function of the tests that was passed to the program may be called, and an iterator be iterated."""
    if operation == "call":
        return values[0](*values[1], **values[2])
    if operation == "iterate":
        return iter(values[0])
    if operation == "next":
        return next(values[0])
    raise MalformedError(f"an operation {operation!r}")
