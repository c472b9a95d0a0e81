"""Compares what a program gave with what a test expects. Both are data: no method of the program has a say.

The result is never built as a value, whose sets could be made to collide: it is walked along the expected value, so
that a comparison takes no longer than that is large.
"""

import math
from decimal import Decimal, InvalidOperation
from typing import Any

from entropy_trl.rewards.code.inside.wire import DICTS, Encoded


def equals(encoded: Encoded, expected: Any, lenient: bool = False, tolerance: float = 0.0) -> bool:
    """Whether a result equals the expected value by Python's rules.

    Args:
        encoded (`list[Any]`): The result, as the program's sandbox has sent it. It may be anything.
        expected (`Any`): The expected value, of built-in types.
        lenient (`bool`, *optional*, defaults to `False`): Whether a tuple equals a list, and keys of a dict are
            compared as text, because the expected value comes from JSON.
        tolerance (`float`, *optional*, defaults to `0.0`): The relative or absolute difference that is allowed where
            the expected value is a float.

    Returns:
        `bool`: Whether they are equal. False for a message that cannot be read.
    """
    try:
        root, nodes = encoded
        return _Comparison(nodes, lenient, tolerance).same(root, expected)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        return False


class _Comparison:
    def __init__(self, nodes: list[Any], lenient: bool, tolerance: float):
        self.nodes = nodes
        self.lenient = lenient
        self.tolerance = tolerance

    def same(self, item: Any, expected: Any) -> bool:
        node = self._node(item)
        tag = node[0]
        if isinstance(expected, list | tuple):
            tags = ("list", "tuple", "namedtuple", "array") if self.lenient else _TAGS[type(expected)]
            if tag not in tags:
                return False
            if tag == "array" and len(node[2]) != 1:
                return False
            parts = node[3:] if tag in ("namedtuple", "array") else node[1:]
            return len(parts) == len(expected) and all(map(self.same, parts, expected))
        if isinstance(expected, set | frozenset):
            return tag in ("set", "frozenset") and self._same_set(node[1:], set(expected))
        if isinstance(expected, dict):
            return tag in DICTS and self._same_dict(node[1:], dict(expected))
        found = self._scalar(node)
        if isinstance(expected, float) and self.tolerance and type(found) in (int, float):
            return found == expected or math.isclose(found, expected, rel_tol=self.tolerance, abs_tol=self.tolerance)
        return found is not _NOT_PLAIN and bool(found == expected)

    def _node(self, item: Any) -> list[Any]:
        """The node of an item; a scalar is one too."""
        for _ in range(3):  # a node may stand for a scalar, which may be one of a table again
            if type(item) is not list:
                return ["value", item]
            node = self.nodes[item[0]] if item[0] >= 0 else []
            if type(node) is not list or node[0] != "value":
                return list(node)
            item = node[1]
        raise ValueError("a value of a value")

    def _scalar(self, node: list[Any]) -> Any:
        tag = node[0]
        if tag == "value":
            return node[1]
        if tag == "int":
            return int(node[1], 16)
        if tag in ("bytes", "bytearray"):
            return bytes.fromhex(node[1])
        if tag == "complex":
            return complex(*node[1:])
        if tag == "builtin" and node[1] == "Ellipsis":
            return ...
        return _NOT_PLAIN

    def _same_set(self, parts: list[Any], rest: set[Any]) -> bool:
        if len(parts) != len(rest):
            return False
        size = sum(map(_size, rest))
        for part in parts:
            element = self._hashable(part, [size])
            if element not in rest:
                return False
            rest.remove(element)
        return True

    def _same_dict(self, parts: list[Any], rest: dict[Any, Any]) -> bool:
        if len(parts) != 2 * len(rest):
            return False
        size = sum(map(_size, rest))
        for part, value in zip(parts[::2], parts[1::2], strict=True):
            key = self._hashable(part, [size])
            if self.lenient and key not in rest:
                key = json_key(key)
            if key not in rest or not self.same(value, rest.pop(key)):
                return False
        return True

    def _hashable(self, item: Any, left: list[int]) -> Any:
        """An element as a value. One that is larger than all that is expected is none of it."""
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("a large element")
        node = self._node(item)
        if node[0] in ("tuple", "namedtuple"):
            return tuple(self._hashable(part, left) for part in node[1 if node[0] == "tuple" else 3 :])
        if node[0] == "frozenset":
            return frozenset([self._hashable(part, left) for part in node[1:]])
        return self._scalar(node)


_NOT_PLAIN = object()
_TAGS: dict[type, tuple[str, ...]] = {list: ("list",), tuple: ("tuple", "namedtuple")}


def _size(value: Any) -> int:
    return 1 + sum(map(_size, value)) if isinstance(value, tuple | frozenset) else 1


def json_key(key: Any) -> Any:
    """The text that JSON makes of a key."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return str(key) if isinstance(key, int | float) else key


def same_output(output: str, expected: str, tolerance: float) -> bool:
    """Whether a program printed what a test expects.

    White space at the end of lines and empty lines at the end do not count. Lines whose texts differ are equal if
    their tokens are: numbers by their value, with a tolerance where the expected one has a point or an exponent.
    """
    lines, targets = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (output, expected))
    return len(lines) == len(targets) and all(
        line == target or _same_tokens(line.split(), target.split(), tolerance)
        for line, target in zip(lines, targets, strict=True)
    )


def _same_tokens(tokens: list[str], targets: list[str], tolerance: float) -> bool:
    return len(tokens) == len(targets) and all(
        token == target or _same_number(token, target, tolerance) for token, target in zip(tokens, targets, strict=True)
    )


_LONGEST_NUMBER = 400


def _same_number(token: str, target: str, tolerance: float) -> bool:
    if len(token) > _LONGEST_NUMBER or not (set(token) | set(target)) <= set("0123456789+-.eE"):
        return False
    try:
        if not set(target) & set(".eE"):
            return Decimal(token) == Decimal(target)
        number, wanted = float(token), float(target)
    except (ValueError, InvalidOperation):
        return False
    return number == wanted or math.isclose(number, wanted, rel_tol=tolerance, abs_tol=tolerance)
