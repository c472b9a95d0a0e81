"""The values of expressions: exact for rational numbers, else at points, with as many digits as their sizes ask for.

Two expressions are equal if their values are at every point. Enough digits are used that two numbers made of
integers as large as theirs cannot agree by chance: `1/16001` is not `1/16000`, and `1 - 2^{-2016}` is not 1.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from operator import methodcaller
from typing import Any

from entropy_trl.rewards.atoms import Node
from entropy_trl.rewards.budget import TooLargeError, spend
from entropy_trl.rewards.points import ANYWHERE, Point, arithmetic, calls, points, sample
from entropy_trl.rewards.tokens import UnreadableError


_MOST_DIGITS = 3000  # in the largest number or the smallest
_CONSTANTS = {"pi", "e", "i"}
_TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
_MOST_SIGNS = 4
_IN_PROCESS_BITS = 4000
_MOST_BITS = 40_000  # of an exact number: an answer such as 9^{9^{9^9}} has more than any machine holds


def symbols(node: Any) -> frozenset[str]:
    """The names of the unknowns in a tree, but not the constants."""
    if isinstance(node, tuple) and node and node[0] in ("symbol", "apply"):
        own = frozenset({node[1]} - _CONSTANTS)
        return own | symbols(node[2]) if node[0] == "apply" else own
    if isinstance(node, tuple | list):
        return frozenset().union(*map(symbols, node))
    return frozenset()


def constants(node: Any) -> frozenset[str]:
    """The names of the constants in a tree, as `pi`."""
    if isinstance(node, tuple) and node and node[0] == "symbol":
        return frozenset({node[1]} & _CONSTANTS)
    return frozenset().union(*map(constants, node)) if isinstance(node, tuple | list) else frozenset()


def contains(node: Any, names: set[str]) -> bool:
    """Whether a node of one of these kinds is in a tree."""
    stack = [node]
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            if part and isinstance(part[0], str) and part[0] in names:
                return True
            stack.extend(part)
        elif isinstance(part, list):
            stack.extend(part)
    return False


def exact(node: Node, bits: int = _MOST_BITS) -> Fraction | None:
    """The value of an expression of rational numbers, None of any other, or of one with more bits than `bits`."""
    kind = node[0]
    if kind == "number":
        return Fraction(node[1])
    if kind in ("add", "multiply"):
        total = Fraction(kind == "multiply")
        for part in node[1]:
            value = exact(part, bits)
            if value is None or _bits(total) + _bits(value) > bits:
                return None
            _spend_bits(_bits(total) + _bits(value))
            total = total + value if kind == "add" else total * value
        return total
    if kind == "power":
        base, exponent = exact(node[1], bits), exact(node[2], bits)
        if base is None or exponent is None or exponent.denominator != 1:
            return None
        if _bits(base) * abs(exponent) > bits:
            return None
        _spend_bits(_bits(base) * abs(exponent))
        if not base and exponent <= 0:
            raise UnreadableError("a division by zero")
        return base**exponent.numerator
    if kind == "factorial" or node[:2] == ("call", "binom"):
        numbers = [exact(part, bits) for part in ([node[1]] if kind == "factorial" else node[2])]
        if any(n is None or n.denominator != 1 or n < 0 for n in numbers):
            return None
        integers = [n.numerator for n in numbers if n is not None]
        if integers[0] > bits // 10:
            return None
        _spend_bits(10 * integers[0])
        return Fraction(math.factorial(integers[0]) if kind == "factorial" else math.comb(*integers))
    return None


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _spend_bits(bits: int | Fraction) -> None:
    spend(2 + 3e-6 * float(bits) ** 2)


def is_decimal(node: Node) -> bool:
    """Whether a number is written as a decimal that is no integer, so that it may be rounded."""
    value = exact(node, _IN_PROCESS_BITS)
    return value is not None and value.denominator != 1 and _has_decimal(node)


def _has_decimal(node: Any) -> bool:
    if isinstance(node, tuple) and node and node[0] == "number":
        return bool(node[2])
    return isinstance(node, tuple | list) and any(map(_has_decimal, node))


def equal_values(reference: Node, answer: Node, quick: bool = False) -> bool | None:
    """Whether two expressions are equal; with `quick`, None where it takes more than small rational numbers to know."""
    bits = _IN_PROCESS_BITS if quick else _MOST_BITS
    target, value = exact(reference, bits), exact(answer, bits)
    if target is not None and value is not None:
        return target == value or (is_decimal(reference) and is_close(value, target))
    if quick:
        return None
    if symbols(reference) != symbols(answer):
        readings = combinations(reference), combinations(answer)
        return readings != (reference, answer) and equal_values(*readings)
    if target is not None and is_decimal(reference):
        context = arithmetic.context
        with context.workdps(40):
            number = _Evaluator(40).value(answer)
            decimals = str(context.nstr(context.re(number), 30))
        return bool(context.im(number) == 0) and is_close(Fraction(decimals), target)
    return all(_agree(reference, answer, point) for point in points(reference, answer, symbols([reference, answer])))


def combinations(node: Any) -> Any:
    r"""A tree in which `C_n^k` is the number of combinations, as Chinese textbooks write it."""
    if isinstance(node, tuple) and node[:1] == ("power",) and node[1][0] == "symbol" and node[1][1].startswith("C_"):
        size = node[1][1].removeprefix("C_")
        if size.isdecimal():
            return ("call", "binom", [("number", Fraction(size), False), node[2]])
        if len(size) == 1:
            return ("call", "binom", [("symbol", size), node[2]])
    return type(node)(map(combinations, node)) if isinstance(node, tuple | list) else node


def is_close(value: Fraction, target: Fraction) -> bool:
    """Equal to six decimals, and small numbers to four digits; else 1e-7 would be 0. Never for an integer."""
    if 1 in (value.denominator, target.denominator):
        return value == target
    difference = abs(value - target)
    return difference < Fraction(1, 10**6) and difference <= Fraction(1, 10**4) * abs(target)


def _agree(first: Node, second: Node, point: Point) -> bool:
    """Whether two expressions have one value at a point, to twice as many digits as their parts have."""
    context = arithmetic.context
    try:
        with context.workdps(30):
            probe = _Evaluator(30, point)
            values = [probe.value(first), probe.value(second)]
            if point.signed and not probe.is_real:
                return _is_real(first, point) == _is_real(second, point) or not calls([first, second], {"abs"})
            if probe.size < 5 and abs(values[0] - values[1]) > context.mpf(10) ** -8 * max(1, abs(values[0])):
                return False  # far more than what 30 digits leave open
        size = probe.size + 2
        with context.workdps(5 * size + 60):
            evaluator = _Evaluator(5 * size + 60, point)
            difference = evaluator.value(first) - evaluator.value(second)
            return bool(abs(difference) < context.mpf(10) ** (-(3 * size) - 30))
    except TooLargeError:
        raise
    except UnreadableError:
        if not point.signed and not point.whole:
            raise
        return True  # there is no value to compare


def _is_real(node: Node, point: Point) -> bool:
    probe = _Evaluator(30, point)
    probe.value(node)
    return probe.is_real


def proportional(first: Node, second: Node) -> bool:
    """Whether two expressions, which are not 0, differ by a constant factor."""
    if symbols(first) != symbols(second) or not symbols(first):
        return False
    ratios = []
    context = arithmetic.context
    with context.workdps(80):
        for point in points(first, second, symbols(first)):
            evaluator = _Evaluator(80, point)
            values = [evaluator.value(node) for node in (first, second)]
            if point.signed and not evaluator.is_real:
                continue
            if any(abs(value) < context.mpf(10) ** -40 for value in values):
                return False
            ratios.append(values[0] / values[1])
        return all(abs(ratio / ratios[0] - 1) < context.mpf(10) ** -40 for ratio in ratios)


def number(node: Node) -> Any:
    """The value of a constant as a real number of 30 digits, or None."""
    if symbols(node):
        return None
    context = arithmetic.context
    with context.workdps(30):
        value = _Evaluator(30).value(node)
    return context.re(value) if context.im(value) == 0 else None


class _Evaluator:
    """Values at one point, and the size of the largest and smallest number on the way, in digits."""

    def __init__(self, digits: int, point: Point = ANYWHERE):
        self.context = arithmetic.context
        self.digits = digits
        self.point = point
        self.size = 0
        self.is_real = True  # so far
        self.in_angle = False

    def value(self, node: Node) -> Any:
        spend(5 + self.digits / 20)
        result = self.raw(node)
        if not self.context.isfinite(result):
            raise UnreadableError("a division by zero")
        self.is_real = self.is_real and not self.context.im(result)
        if result:
            self.size = max(self.size, abs(int(self.context.mag(result))) // 3)
            if self.size > _MOST_DIGITS:
                raise TooLargeError("a number with too many digits")
        return result

    def raw(self, node: Node) -> Any:
        kind = node[0]
        if kind == "number":
            return self.context.mpf(node[1].numerator) / node[1].denominator
        if kind == "symbol":
            return self.symbol(node[1])
        if kind == "add":
            return sum((self.value(part) for part in node[1]), self.context.mpf(0))
        if kind == "multiply":
            result = self.context.mpf(1)
            for part in node[1]:
                result *= self.value(part)
            return result
        if kind == "power":
            return self.power(self.value(node[1]), self.value(node[2]))
        if kind == "degree":
            return self.context.pi / 180 if self.in_angle else self.context.mpf(1)
        if kind == "factorial":
            return self.gamma(self.value(node[1]) + 1)
        if kind == "apply":
            arguments = node[2][1] if node[2][0] == "list" else [node[2]]
            values = [self.context.nstr(self.value(argument), 25) for argument in arguments]
            return self.symbol(f"{node[1]}({values})")
        if kind == "call":
            return self.call(node[1], node[2])
        raise UnreadableError(f"a {kind} in an expression")

    def spend(self, slow: bool = False) -> None:
        """Pay for a function; gamma's series takes the third power of the digits."""
        spend(300 + self.digits**3 / 1500 if slow else 60 + self.digits**2 / 700)

    def symbol(self, name: str) -> Any:
        if name in _CONSTANTS:
            return {"pi": +self.context.pi, "e": +self.context.e, "i": self.context.mpc(0, 1)}[name]
        value = sample(name, self.point.index, name in self.point.signed, self.point.whole)
        return self.context.mpf(value.numerator) / value.denominator

    def power(self, base: Any, exponent: Any) -> Any:
        if not base:
            if self.context.re(exponent) <= 0:
                raise UnreadableError("a division by zero")
            return self.context.mpf(0)
        if self.context.mag(exponent) > 40 or abs(exponent) * max(1, abs(self.context.mag(base))) > 3.4 * _MOST_DIGITS:
            raise TooLargeError("a power with too many digits")
        self.spend()
        return self.context.power(base, exponent)

    def gamma(self, value: Any) -> Any:
        if abs(value) > 1000:
            raise TooLargeError("a factorial with too many digits")
        self.spend(slow=True)
        return self.context.gamma(value)

    def call(self, name: str, arguments: list[Node]) -> Any:
        outside, self.in_angle = self.in_angle, name in _TRIGONOMETRIC
        values = [self.value(argument) for argument in arguments]
        self.in_angle = outside
        first = values[0]
        if name == "abs":
            return abs(first)
        if name == "root":
            degree = values[1]
            if (
                self.context.im(first) == 0
                and self.context.re(first) < 0
                and degree == int(self.context.re(degree))
                and degree % 2 == 1
            ):
                return -self.power(-first, 1 / degree)
            return self.power(first, 1 / degree)
        if name == "binom":
            if any(abs(value) > 1000 for value in values):
                raise TooLargeError("a binomial coefficient with too many digits")
            self.spend(slow=True)
            return self.context.binomial(*values)
        if name in ("ln", "log", "lg"):
            if not first:
                raise UnreadableError("a logarithm of zero")
            self.spend()
            if name == "lg":
                return self.context.log(first) / self.context.log(10)
            if len(values) == 2:
                return self.context.log(first) / self.context.log(values[1])
            # Of `log` the base is unclear, but it is the same one throughout an expression.
            return self.context.log(first) / (1 if name == "ln" else self.symbol("the base of log"))
        if name in ("max", "min"):
            if any(self.context.im(value) for value in values):
                raise UnreadableError("an order of complex numbers")
            return (max if name == "max" else min)(self.context.re(value) for value in values)
        if name in ("lfloor", "lceil"):
            return (self.context.floor if name == "lfloor" else self.context.ceil)(first)
        if name in _FUNCTIONS:
            if abs(first) > 10**6:
                raise TooLargeError("a function of a large number")
            self.spend()
            return methodcaller(_FUNCTIONS[name], first)(self.context)
        raise UnreadableError(f"a function, {name}")


_FUNCTIONS = {name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")}
_FUNCTIONS |= {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
"""The names of mpmath by those of the grammar."""


def signs(node: Node) -> list[Node]:
    r"""The expressions that one with `\pm` stands for: every sign by itself, but for `\mp`, which goes with `\pm`."""
    count, has_opposite = count_signs(node)
    if not count and not has_opposite:
        return [node]
    if count > _MOST_SIGNS:
        raise UnreadableError("many signs")
    choices = [(1,) * max(count, 1), (-1,) * max(count, 1)] if has_opposite else list(product((1, -1), repeat=count))
    return [_with_signs(node, iter(choice), choice[0]) for choice in choices]


def count_signs(node: Any) -> tuple[int, int]:
    r"""How often `\pm` and `\mp` are in a tree."""
    found = {"pm": 0, "mp": 0}
    stack = [node]
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            if part[:1] == ("sign",):
                found[part[1]] += 1
            stack.extend(part)
        elif isinstance(part, list):
            stack.extend(part)
    return found["pm"], found["mp"]


def _with_signs(node: Any, choice: Iterator[int], first: int) -> Any:
    if isinstance(node, tuple) and node[:1] == ("sign",):
        return ("number", Fraction(next(choice) if node[1] == "pm" else -first), False)
    if isinstance(node, tuple | list):
        return type(node)(_with_signs(part, choice, first) for part in node)
    return node
