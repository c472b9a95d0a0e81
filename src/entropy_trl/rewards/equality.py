r"""Whether an answer equals the reference, exactly.

The text becomes tokens (`tokens.py`) and a tree (`grammar.py`). Trees are compared part by part (`forms.py`), and
expressions by their values (`values.py`). What is not in the grammar, or has several readings, equals nothing but the
same tokens. A policy in training finds what is let through, so a doubt earns nothing.
"""

import re
from fractions import Fraction
from typing import Any

from entropy_trl.rewards import phrases, units
from entropy_trl.rewards.atoms import Node
from entropy_trl.rewards.budget import begin
from entropy_trl.rewards.forms import equal
from entropy_trl.rewards.grammar import parse
from entropy_trl.rewards.tokens import Token, UnreadableError, tokenize, without_braces
from entropy_trl.rewards.values import constants, contains, exact, is_close, is_decimal


EQUAL, DIFFERENT, UNPARSED = "=", "!", "?"
"""The three outcomes of a comparison. An answer that cannot be parsed, or is refused, earns as much as a wrong one."""

LONGEST = 1000
"""Characters of an answer or a reference; a longer text is no final answer, and takes longest to parse."""

_CLOCK = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)(:[0-5]\d)?(am|pm)?")
_INTEGER = re.compile(r"-?[1-9]\d{0,17}", re.ASCII)
_BROKEN_INLINE = re.compile(r"(?<!\$)(?:\$|\\\()\s*\n")  # inline maths does not span lines
_DATE = re.compile(r"\d{4}([-/])\d{1,2}\1\d{1,2}")
_BASED = re.compile(r"([0-9A-F]*[A-F][0-9A-F]*)_(\d\d)")
_MATHS_WORDS = {"and", "or", "pi", "inf", "infinity", "sqrt", "theta"}
_TEXT_SYMBOLS = {",", "-", "'", ".", "(", ")", ":", '"', "!", "?"}
#: What mpmath raises where a function has no value, and Python where a tree is deep.
_FAILURES = (ArithmeticError, ValueError, LookupError, NotImplementedError, RecursionError, MemoryError)
_DEGREES = (("deg", 1),)
_ORDER = {"<", ">", "le", "ge"}  # `n > 2` is not `n > 2` for integers
_SURE = 400  # bits: a power of ten in a percentage


def compare(answer: str, reference: str) -> str | None:
    """`EQUAL`, `DIFFERENT` or `UNPARSED` where small numbers and words tell, None where `verify` has to be asked."""
    try:
        return _compared(answer, reference, quick=True)
    except _FAILURES:
        return UNPARSED
    except TypeError:  # a fault of ours must not end a training: the worker that repeats it crashes
        return None


def verify(answer: str, reference: str) -> str:
    """The same for every answer. What takes more arithmetic than `budget.py` allows is `UNPARSED`."""
    try:
        return _compared(answer, reference, quick=False) or UNPARSED
    except _FAILURES:
        return UNPARSED


def _compared(answer: str, reference: str, quick: bool) -> str | None:
    if not answer or len(answer) > LONGEST or len(reference) > LONGEST:
        return UNPARSED
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):
        return EQUAL if answer == reference else DIFFERENT
    begin()
    try:
        given, wanted = phrases.as_symbol(tokenize(answer)), phrases.as_symbol(tokenize(reference))
    except UnreadableError:
        return UNPARSED
    if not given or not wanted:
        return UNPARSED
    if without_braces(given) == without_braces(wanted):
        return EQUAL
    if _BROKEN_INLINE.search(answer) is None:
        given = phrases.without_introduction(given)
    if wanted_choice := phrases.choice(wanted):
        letters = phrases.choice(given) or phrases.labelled_choice(given)
        return EQUAL if letters == wanted_choice else DIFFERENT
    if answer.count(",") == 1 and sum("." in token.text for token in wanted if token.kind == "number") == 1:
        given = phrases.with_decimal_point(given) or given
    given, wanted = phrases.with_notation(given), phrases.with_notation(wanted)
    domains = [phrases.split_domain(tokens) for tokens in (given, wanted)]
    if domains[0] and (domains[1] or not any(token.text in _ORDER for token in wanted)):
        body, index, domain = domains[0]
        _, other, target = domains[1] or (wanted, index, "Z")
        if domain != target or (other != index and other in body):
            return DIFFERENT
        given = tuple(other if token == index else token for token in body)
        wanted = domains[1][0] if domains[1] else wanted
    return _compared_tokens(given, wanted, quick)


def _compared_tokens(given: tuple[Token, ...], wanted: tuple[Token, ...], quick: bool) -> str | None:
    if given == wanted:
        return EQUAL
    texts = [_words(tokens) for tokens in (given, wanted)]
    if phrases.is_product(wanted) and not any(token.upright for token in given):
        pass
    elif texts[1] is not None:
        if texts[0] == texts[1]:
            return EQUAL
        if len(texts[1]) > 1:
            return DIFFERENT
    elif texts[0] is not None and len(texts[0]) > 1:
        return DIFFERENT
    joined = ["".join(token.text for token in tokens if token.text not in "{}") for tokens in (given, wanted)]
    clocks = [_CLOCK.fullmatch(text.replace(".", "").lower()) for text in joined]
    if clocks[1] and clocks[1][4]:
        times = [clock and (int(clock[1]), *clock.groups()[1:]) for clock in clocks]
        return EQUAL if times[0] == times[1] else DIFFERENT
    if clocks[0] and clocks[0][4]:
        return DIFFERENT
    if clocks[0] and clocks[1]:
        return EQUAL if clocks[0].groups() == clocks[1].groups() else DIFFERENT
    moduli = [phrases.split_modulus(tokens) for tokens in (given, wanted)]
    if moduli[0] or moduli[1]:  # a class of numbers is not one of them
        if not moduli[0] or not moduli[1] or moduli[0][1] != moduli[1][1]:
            return DIFFERENT
        given, wanted = moduli[0][0], moduli[1][0]
    if _DATE.fullmatch(joined[1]):
        return EQUAL if joined[0] == joined[1] else DIFFERENT
    if _BASED.fullmatch(joined[1]):
        return EQUAL if joined[0] == joined[1] else DIFFERENT
    return _by_readings(given, wanted, quick)


def _words(tokens: tuple[Token, ...]) -> str | None:
    """A word, a phrase or a choice such as `(A)`, without case and spaces; None for anything else."""
    if not all(token.kind == "letters" or token.text in _TEXT_SYMBOLS for token in tokens):
        return None
    words = [token.text for token in tokens if token.kind == "letters"]
    if not words or any(word in _MATHS_WORDS for word in words):
        return None
    if len(words) == 1 and len(words[0]) == 1:
        return words[0] if len(tokens) == 1 or [token.text for token in tokens] == ["(", words[0], ")"] else None
    if not any(len(word) > 1 for word in words):
        return None
    text = "".join(words)
    return text.casefold() if len(text) > 2 or text.casefold() == "no" else text


# A quantity may be read with and without a unit at its end.


class _Reading:
    def __init__(self, node: Node, unit: units.Unit = (), is_percentage: bool = False):
        self.node, self.unit, self.is_percentage = node, unit, is_percentage


def _readings(tokens: tuple[Token, ...], is_reference: bool, may_be_lone: bool = False) -> list[_Reading]:
    readings: list[_Reading] = []
    bodies: list[tuple[tuple[Token, ...], units.Unit, bool]] = [(tokens, (), False)]
    if (body := _without_percent(tokens)) is not None:
        bodies.append((body, (), True))
    if (split := units.split_unit(tokens, is_reference, may_be_lone)) is not None:
        bodies.append((*split, False))
    for body, unit, is_percentage in bodies:
        power = 0
        while body and body[-1].kind == "letters" and (word := body[-1].text.lower().rstrip("s")) in units.MULTIPLIERS:
            power, body = power + units.MULTIPLIERS[word], body[:-1]
        try:
            node = parse(body)
        except UnreadableError:
            continue
        if not unit and contains(node, {"degree"}):
            unit = _DEGREES
            if not is_reference:
                readings.append(_Reading(_in_radians(node)))
        readings.append(_Reading(_scaled(node, Fraction(10) ** power) if power else node, unit, is_percentage))
    return readings


def _without_percent(tokens: tuple[Token, ...]) -> tuple[Token, ...] | None:
    if tokens[-1].text == "%" or (tokens[-1].kind == "letters" and tokens[-1].text.lower() in units.PERCENT):
        return tokens[:-1]
    if [token.text for token in tokens[-2:]] == ["per", "cent"]:
        return tokens[:-2]
    return None


def _in_radians(node: Any) -> Any:
    if node == ("degree",):
        return ("multiply", [("symbol", "pi"), ("number", Fraction(1, 180), False)])
    return type(node)(map(_in_radians, node)) if isinstance(node, tuple | list) else node


def _scaled(node: Node, factor: Fraction) -> Node:
    return ("multiply", [("number", factor, False), node])


def _by_readings(given: tuple[Token, ...], wanted: tuple[Token, ...], quick: bool) -> str | None:
    outcomes: list[bool | None] = []
    targets = _readings(wanted, is_reference=True)
    readings = _readings(given, is_reference=False, may_be_lone=any(target.unit for target in targets))
    for target in targets:
        for reading in readings:
            if target.unit and reading.unit and target.unit != reading.unit:
                outcomes.append(False)
                continue
            if reading.unit == _DEGREES and not target.unit and "pi" in constants(target.node):
                continue  # radians are asked for
            try:
                outcomes.append(_same_quantity(target, reading, quick))
            except UnreadableError:
                continue
    if True in outcomes:
        return EQUAL
    if None in outcomes:
        return None
    return DIFFERENT if outcomes else UNPARSED


def _same_quantity(target: _Reading, reading: _Reading, quick: bool) -> bool | None:
    if target.is_percentage == reading.is_percentage:
        return equal(target.node, reading.node, quick)
    value = exact(reading.node, _SURE)
    if value is None or target.unit or reading.unit:
        return False
    # 28 where a percentage is asked for; but 0.5 may be a probability.
    candidates = [value / 100 if reading.is_percentage else value * 100]
    if abs(value) > 1 and (target.is_percentage or value.denominator == 1 or is_decimal(reading.node)):
        candidates.append(value)
    wanted = exact(target.node, _SURE)
    if wanted is None:
        return False
    return any(wanted == one or (is_decimal(target.node) and is_close(one, wanted)) for one in candidates)
