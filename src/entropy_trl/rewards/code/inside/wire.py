"""How plain data cross between sandboxes: as JSON text, with tags for what JSON lacks.

A message holds a value and a table of nodes. A scalar stands for itself, and `[3]` is the third node of the table.
So nesting has no depth, what is shared stays shared, and cycles (linked lists) are no special case. Whatever is no
plain data crosses as a handle: a number for an object that stays where it is.
"""

import builtins
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from itertools import chain
from types import BuiltinFunctionType
from typing import Any


Encoded = list[Any]
"""A value and its table of nodes."""

DICTS: dict[str, Any] = {base.__name__: base for base in (OrderedDict, Counter, defaultdict, dict)}
_COLLECTIONS: tuple[Any, ...] = (list, set, frozenset, deque)
_MISSING = object()
#: Values of other modules, by the attributes that make them again. What has a time zone is no plain data.
_RECORDS = {
    ("datetime", "date"): ("year", "month", "day"),
    ("datetime", "datetime"): ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    ("datetime", "time"): ("hour", "minute", "second", "microsecond"),
    ("datetime", "timedelta"): ("days", "seconds", "microseconds"),
    ("fractions", "Fraction"): ("numerator", "denominator"),
}


class MalformedError(BaseException):
    """A message that no honest peer sends. Not an `Exception`: no test may expect it."""


def encode(value: Any, handle: Callable[[Any], list[Any]], classes: Collection[str] = ()) -> Encoded:
    """Return a value as JSON-like data. `handle` makes the node of what is no plain data.

    Objects of `classes`, which both sides define by the same code, cross as their attributes.
    """
    nodes: list[Any] = []
    seen: dict[int, int] = {}
    pending: list[tuple[int, Any]] = []

    def ref(item: Any) -> Any:
        kind = type(item)
        if item is None or kind is bool or kind is str or kind is float or (kind is int and -(2**63) < item < 2**63):
            return item
        index = seen.get(id(item))
        if index is None:
            index = seen[id(item)] = len(nodes)
            nodes.append(None)
            pending.append((index, item))
        return [index]

    root = ref(value)
    kept = []  # an object that is gone would free its id for another
    while pending:
        index, item = pending.pop()
        kept.append(item)
        nodes[index] = _node(item, ref, handle, classes)
    return [root, nodes]


def _node(item: Any, ref: Callable[[Any], Any], handle: Callable[[Any], list[Any]], classes: Collection[str]) -> Any:
    kind = type(item)
    if isinstance(item, int):
        return ["int", hex(int.__int__(item))]
    if isinstance(item, str):
        return ["value", str.__str__(item)]
    if isinstance(item, float):
        return ["value", float.__float__(item)]
    if isinstance(item, tuple):
        fields = getattr(kind, "_fields", None)
        if isinstance(fields, tuple) and len(fields) == tuple.__len__(item):
            return ["namedtuple", kind.__name__, list(fields), *map(ref, tuple.__iter__(item))]
        return ["tuple", *map(ref, tuple.__iter__(item))]
    for base in _COLLECTIONS:
        if isinstance(item, base):
            return [base.__name__, *map(ref, base.__iter__(item))]
    for base in DICTS.values():
        if isinstance(item, base):
            return [base.__name__, *map(ref, chain.from_iterable(dict.items(item)))]
    if kind.__name__ in classes and isinstance(getattr(item, "__dict__", None), dict):
        return ["object", kind.__name__, *map(ref, chain.from_iterable(vars(item).items()))]
    if kind in (bytes, bytearray):
        return [kind.__name__, item.hex()]
    if kind is complex:
        return ["complex", item.real, item.imag]
    if kind is range:
        return ["range", ref(item.start), ref(item.stop), ref(item.step)]
    if kind.__module__ == "decimal" and kind.__name__ == "Decimal":
        return ["Decimal", str(item)]
    names = _RECORDS.get((kind.__module__, kind.__name__))
    if names and getattr(item, "tzinfo", None) is None:
        return ["record", kind.__module__, kind.__name__, *(ref(getattr(item, name)) for name in names)]
    if kind.__module__ == "numpy" and hasattr(item, "tolist"):
        if kind.__name__ == "ndarray":
            return ["array", str(item.dtype), list(item.shape), *map(ref, item.ravel().tolist())]
        return ["value", ref(item.item())]
    if isinstance(item, type | BuiltinFunctionType):
        name = item.__name__
        if vars(builtins).get(name) is item:
            return ["builtin", name]
    if item is Ellipsis or item is NotImplemented:
        return ["builtin", str(item)]
    return handle(item)


def decode(encoded: Encoded, handle: Callable[[list[Any]], Any], classes: dict[str, type] | None = None) -> Any:
    """Return the value of a message. `handle` makes the object for the node of a handle.

    Raises:
        MalformedError: The message is none that `encode` makes.
    """
    try:
        root, nodes = encoded
        return _Decoder(nodes, handle, classes or {}).value(root)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, ArithmeticError) as error:
        raise MalformedError(f"a value that cannot be read: {error}") from None


class _Decoder:
    def __init__(self, nodes: list[Any], handle: Callable[[list[Any]], Any], classes: dict[str, type]):
        self.nodes = nodes
        self.handle = handle
        self.built: list[Any] = [_MISSING] * len(nodes)
        for index, node in enumerate(nodes):  # what is filled later may be part of a cycle
            if node[0] in ("list", "set", "deque"):
                self.built[index] = {"list": list, "set": set, "deque": deque}[node[0]]()
            elif node[0] in DICTS:
                self.built[index] = DICTS[node[0]]()
            elif node[0] == "object":
                self.built[index] = object.__new__(classes[node[1]])
        for index in range(len(nodes)):
            self._build(index)
        order = {"object": 0, "list": 1, "deque": 1}
        for index in sorted(range(len(nodes)), key=lambda i: order.get(nodes[i][0], 2)):
            self._fill(self.built[index], nodes[index])

    def value(self, item: Any) -> Any:
        return self.built[item[0]] if type(item) is list else item

    def _build(self, start: int) -> None:
        stack, opened = [start], set()
        while stack:
            index = stack[-1]
            if self.built[index] is not _MISSING:
                stack.pop()
                continue
            skipped = {"namedtuple": 3, "record": 3, "array": 3, "handle": 4}.get(self.nodes[index][0], 1)
            missing = [
                item[0]
                for item in self.nodes[index][skipped:]
                if type(item) is list and self.built[item[0]] is _MISSING
            ]
            if missing and index in opened:
                raise ValueError("a cycle of constants")
            opened.add(index)
            stack.extend(missing)
            if not missing:
                self.built[index] = self._constant(self.nodes[index])

    def _constant(self, node: list[Any]) -> Any:
        tag, parts = node[0], node[1:]
        if tag == "handle":
            return self.handle(node)
        if tag in ("tuple", "frozenset"):
            return {"tuple": tuple, "frozenset": frozenset}[tag](map(self.value, parts))
        if tag == "value":
            return self.value(parts[0])
        if tag == "int":
            return int(parts[0], 16)
        if tag in ("bytes", "bytearray"):
            data = bytes.fromhex(parts[0])
            return data if tag == "bytes" else bytearray(data)
        if tag == "complex":
            return complex(*parts)
        if tag == "range":
            return range(*map(self.value, parts))
        if tag == "builtin":
            return vars(builtins)[parts[0]]
        if tag == "namedtuple":
            from collections import namedtuple

            made: Any = namedtuple(parts[0], parts[1])  # type: ignore[misc]
            return made(*map(self.value, parts[2:]))
        if tag == "Decimal":
            from decimal import Decimal

            return Decimal(parts[0])
        if tag == "record" and (parts[0], parts[1]) in _RECORDS:
            __import__(parts[0])
            return getattr(sys.modules[parts[0]], parts[1])(*map(self.value, parts[2:]))
        if tag == "array":
            numpy: Any = __import__("numpy")
            return numpy.array([self.value(part) for part in parts[2:]], dtype=parts[0]).reshape(parts[1])
        raise ValueError(f"an unknown tag {tag!r}")

    def _fill(self, target: Any, node: list[Any]) -> None:
        tag = node[0]
        if tag in ("list", "deque"):
            target.extend(map(self.value, node[1:]))
        elif tag == "set":
            target.update(map(self.value, node[1:]))
        elif tag in DICTS:
            for key, item in zip(node[1::2], node[2::2], strict=True):
                dict.__setitem__(target, self.value(key), self.value(item))
        elif tag == "object":
            for key, item in zip(node[2::2], node[3::2], strict=True):
                name = self.value(key)
                if callable(getattr(type(target), name, None)):
                    raise ValueError(f"an attribute {name!r} in place of a method")
                object.__setattr__(target, name, self.value(item))
