"""Where two expressions are compared: the values of their unknowns, and the arithmetic of each thread."""

import threading
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath  # type: ignore[import-untyped]


_POINTS = 5  # where every unknown is positive
_INTEGERS = 41  # a prime
_KINKS = {"abs", "max", "min", "lfloor", "lceil"}
_ROUNDINGS = {"lfloor", "lceil"}
_SIGNED = {"x", "y", "z"}  # other letters are often lengths and masses, so that a root of `m^2` is `m`
_INDICES = {"n", "m", "k", "N", "M", "K"}


class Arithmetic(threading.local):
    """A context of mpmath for each thread: its precision is a setting of the context."""

    def __init__(self) -> None:
        self.context = mpmath.MPContext()


arithmetic = Arithmetic()


@dataclass(frozen=True)
class Point:
    """Values for all unknowns: positive, of both signs for the names in `signed`, or positive integers."""

    index: int
    signed: Collection[str] = frozenset()
    whole: bool = False


ANYWHERE = Point(0)


@lru_cache(maxsize=4096)
def sample(name: str, index: int, is_signed: bool, is_whole: bool) -> Fraction:
    """The value of an unknown at a point."""
    seed = zlib.crc32((name if is_whole else f"{name} {index}").encode("utf-8", "surrogatepass"))
    other = zlib.crc32(f"{seed}".encode())
    if is_whole:
        return Fraction(1 + index * (1 + seed % (_INTEGERS - 1)) % _INTEGERS)  # each of them once
    value = Fraction(seed, 2**30) + Fraction(other, 2**62) + Fraction(1, 7)
    if not is_signed:
        return value
    is_negative = index == 0 or (zlib.crc32(f"{name} sign".encode("utf-8", "surrogatepass")) + index * (other % 3)) % 2
    return (-1 if is_negative else 1) * value * Fraction(10) ** (index % 4 - 1)


def calls(node: Any, names: set[str]) -> bool:
    """Whether a tree has a call of one of these functions."""
    if isinstance(node, tuple) and node[:1] == ("call",) and node[1] in names:
        return True
    return isinstance(node, tuple | list) and any(calls(part, names) for part in node)


def points(first: Any, second: Any, names: frozenset[str]) -> list[Point]:
    """Return where two trees with these unknowns are compared.

    Values at positive numbers tell nothing about `|x|` and `x`, nor about `\\max(1, x)` and `x` if all are above 1. So
    there are points of both signs, and many of several sizes for a function with kinks. Rounding is compared at
    integers too, and only there if the unknowns are indices.
    """
    if not names:
        return [ANYWHERE]
    has_kinks = calls([first, second], _KINKS)
    integers = [Point(number, whole=True) for number in range(_INTEGERS)] if calls([first, second], _ROUNDINGS) else []
    if integers and names <= _INDICES:
        return integers
    points = [Point(number) for number in range(_POINTS)]
    if has_kinks or names & _SIGNED:
        points += [Point(number, signed=names if has_kinks else _SIGNED) for number in range(24 if has_kinks else 4)]
    return points + integers
