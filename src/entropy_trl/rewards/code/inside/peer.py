"""One end of the line between the program's sandbox and the tests'. The parent process carries the messages.

Messages are JSON lines: `["ask", operation, value, nodes]`, and the answer `["value", value, nodes]` or
`["raised", names, value, nodes]`. Either end may ask while it is being asked: a test may pass a function.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from entropy_trl.rewards.code.inside.wire import Encoded, MalformedError, decode, encode


#: Modules whose exceptions cross as what they are. Those of test runners, which skip a test, are not among them.
_EXCEPTION_MODULES = ("builtins", "decimal", "json.decoder", "queue", "re", "statistics", "struct", "zoneinfo")


class Line:
    """Messages over two file descriptors, which the program's own input and output do not touch."""

    def __init__(self) -> None:
        self._requests = os.fdopen(os.dup(0), "rb", buffering=1 << 16)
        self._replies = os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)

    def read(self) -> Any:
        """Return the next message. The sandbox ends where there is none."""
        line = self._requests.readline()
        if not line:
            os._exit(0)
        return json.loads(line)

    def write(self, message: Any) -> None:
        """Send a message."""
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            rest = rest[os.write(self._replies, rest) :]

    def close(self) -> None:
        """Close both ends, in a child process that has no part in the talk."""
        self._requests.close()
        os.close(self._replies)


def open_streams() -> None:
    """Give the interpreter the streams of descriptors 0 to 2. Old streams do not close them."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


class Remote:
    """An object of the other end."""

    __slots__ = ("_number", "_peer")
    _peer: "Peer"
    _number: int

    def __init__(self, peer: "Peer", number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)


class Opaque:
    """Makes a result cross as a handle, whatever it is."""

    def __init__(self, value: Any):
        self.value = value


class Peer:
    """An end of the line. `serve` carries out what the other end asks for, and `remote` makes its handles."""

    def __init__(
        self,
        line: Line,
        serve: Callable[["Peer", str, Any], Any],
        remote: Callable[["Peer", int, list[str] | None], Any],
    ):
        self.line = line
        self.classes: dict[str, type] = {}
        self.exceptions: dict[str, type[BaseException]] = {}
        self._serve = serve
        self._remote = remote
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def ask(self, operation: str, *values: Any) -> Any:
        """Ask the other end for an operation. Returns its result, or raises its exception."""
        self.line.write(["ask", operation, *self.encode(values)])
        while True:
            message = self.line.read()
            if message[0] == "ask":
                self.answer(message)
            elif message[0] == "value":
                return self.decode(message[1:3])
            elif message[0] == "raised":
                raise self._exception(message)
            else:
                raise MalformedError(f"a message {message[0]!r}")

    def answer(self, message: list[Any]) -> None:
        """Carry out what a message asks for, and send the result."""
        try:
            result = self._serve(self, message[1], self.decode(message[2:4]))
            reply = ["value", *self.encode(result)]
        except MalformedError:
            raise
        except BaseException as error:  # also `SystemExit`: a program that leaves has not passed
            reply = self.raised(error)
        self.line.write(reply)

    def raised(self, error: BaseException) -> list[Any]:
        """Return the message that tells of an exception."""
        try:
            arguments = self.encode(tuple(error.args))
        except Exception:  # the arguments may be anything, with any method
            arguments = self.encode(())
        return ["raised", exception_names(type(error)), *arguments]

    def encode(self, value: Any) -> Encoded:
        """Return a value as data, with handles for what is none."""
        return encode(value, self._export, self.classes)

    def decode(self, encoded: Encoded) -> Any:
        """Return the value of data."""
        return decode(encoded, self._import, self.classes)

    def _import(self, node: list[Any]) -> Any:
        return self._objects[node[2]] if node[1] == "back" else self._remote(self, node[2], node[3])

    def _export(self, item: Any) -> list[Any]:
        if isinstance(item, Remote):
            return ["handle", "back", object.__getattribute__(item, "_number")]
        if type(item) is Opaque:
            item = item.value
        number = self._numbers.setdefault(id(item), len(self._objects))
        if number == len(self._objects):
            self._objects.append(item)
        names = exception_names(item) if isinstance(item, type) and issubclass(item, BaseException) else None
        return ["handle", "object", number, names]

    def _exception(self, message: list[Any]) -> BaseException:
        return self.exception_class(message[1])(*self.decode(message[2:4]))

    def exception_class(self, names: list[str]) -> type[BaseException]:
        """Return the class of an exception of the other end, by its names from the most special to the most general."""
        for index, name in enumerate(names):
            if name in self.exceptions:
                found = self.exceptions[name]
            else:
                module, _, attribute = name.rpartition(".")
                if module not in _EXCEPTION_MODULES:
                    continue
                __import__(module)
                found = getattr(sys.modules[module], attribute, None)  # type: ignore[assignment]
            if not (isinstance(found, type) and issubclass(found, BaseException)):
                raise MalformedError(f"an exception {name!r}")
            for own in reversed(names[:index]):
                found = self.exceptions[own] = type(own.rpartition(".")[2], (found,), {"__init__": _keep})
            return found
        raise MalformedError("an exception without a class")


def _keep(self: BaseException, *values: Any) -> None:
    """An exception of the other end has its arguments already, which need not be what its base class takes."""


def exception_names(kind: type) -> list[str]:
    """Return the names of a class of exceptions and of its bases, up to `BaseException`."""
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__ if base is not object]
