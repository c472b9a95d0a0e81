r"""Whether an answer equals the reference: by hand for plain numbers and words, by math-verify for the rest.

math-verify is made for evaluation, and reads as much as it can: it drops what it does not know (`2 \text{ or so}` is
2), adds up numbers that stand side by side (`2 \quad 3` is 5) and multiplies the letters of a word (`on` is `no`). A
policy in training finds what is let through. So plain numbers and words are compared here, and an answer that can be
read in more than one way is refused before math-verify sees it.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any


EQUAL, DIFFERENT, UNPARSED = "=", "!", "?"
"""The three outcomes of a comparison. An answer that cannot be parsed, or is refused, earns as much as a wrong one."""

LONGEST = 1000
"""Characters of an answer or a reference; a longer text is no final answer, and takes longest to parse."""

# Other ways to write the same thing.
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\uff0d", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2009\u200a\u202f\u3000\t", " ")
    | dict.fromkeys("\u200b\ufeff\u20ac\u00a3\u00a5\u20b9", None)  # without width; currencies
    | dict.fromkeys("\n\r", "  ")
    | {"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u03c0": r"\pi ", "\u221e": r"\infty "}
    | {"\u00b0": r"^\circ", "\u00b2": "^2", "\u00b3": "^3", "\u222a": r"\cup ", "\u2264": r"\le ", "\u2265": r"\ge "}
    | {"\uff0c": ",", "\uff08": "(", "\uff09": ")", "\u3002": "."}
)
_DROPPED = re.compile(r"\\?\$|\\(?:left|right)(?![a-zA-Z])|(?<!\\)\\[()\[\]]|\*\*|\\displaystyle(?![a-z])|\\!\s*")
_STYLE = re.compile(r"\\(?:text(?:bf|it|rm|normal)|math(?:rm|bf|it|sf)|mbox)(?=\s*\{)")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\b\s*\}?|\\degree\b)")
_DIGIT_GROUP = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\ |~)(?=\d{3}(?!\d))")
_WRAPPED = re.compile(r"\\text\s*\{([^{}]*)\}|\{([^{}]*)\}")
_PERCENT = re.compile(
    r"\s*(?:\\?%|\b(?:percent|percentage|pct)|\\text\s*\{\s*(?:\\?%|percent|pct)\s*\})\Z", re.IGNORECASE
)
_UNIT = re.compile(r"(?:\s|\\[,;: ]|~)*\\text\s*\{([^{}\d\\]*)\}(?:\^\{?\d\}?)?\Z")
_BARE_UNIT = re.compile(
    r"(?:\s*(?<![a-zA-Z])(?:[ckm]m|[km]g|in|ft|yd|mi|lbs?|oz|ml|hrs?|mph)|((?: [a-zA-Z]{2,})+))(?:\^\{?\d\}?)?\Z"
)
_NO_UNIT = re.compile(
    r"\b(?:and|or|nor|not|no|to|than|plus|minus|times|pi|inf|infinity|sin|cos|tan|log|mod"
    r"|dozens?|half|halves|thirds?|quarters?|tenths?|hundredths?|thousandths?|squared|cubed|factorial|over|divided)\b",
    re.IGNORECASE,
)
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_POWER_WORDS = re.compile(rf"(?:\s*\b(?:{'|'.join(_POWERS)})s?\b)+", re.IGNORECASE)

# Plain numbers. Digits and exponents are bounded, so that none takes long.
_DECIMAL = r"[+-]?\s*(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?: \d{3})+|\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
_POWER_OF_TEN = r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|(\d))|[eE]([+-]?\d{1,3})"
_SCIENTIFIC = re.compile(rf"({_DECIMAL})(?:{_POWER_OF_TEN})?")
_INTEGER = r"(?:\{\s*(\d{1,60})\s*\}|(\d))"
_FRACTION = re.compile(
    r"([+-]?)\s*(?:(?:(\d{1,60}) )?(\d{1,60})\s*/\s*(\d{1,60})"
    rf"|(\d{{1,60}})?\s*\\[dtc]?frac\s*{_INTEGER}\s*{_INTEGER})"
)
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{?(?:\\text\s*\{)?(\w+)\}{0,2}")
_ABSOLUTE, _RELATIVE = Fraction(1, 10**6), Fraction(1, 10**4)

# What an answer may not have in it.
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_MATHS_WORDS = {"and", "exp", "gcd", "inf", "infinity", "lcm", "log", "max", "min", "mod", "sqrt", "text"} | {
    *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "pi"),
    *("pmatrix", "bmatrix", "vmatrix", "matrix", "array", "cases"),
}
_TEXT = re.compile(r"\\text\s*\{((?:(?!\s*(?:and|or|,)\s*\})[^{}])*)\}")
_SPACE = r"(?:\\[,;: ]|\\q?quad(?![a-z])|~|\s)"
_SIDE_BY_SIDE = re.compile(
    rf"\d{_SPACE}+\d|\d{_SPACE}*\(\s*-?[\d.]+\s*\)|\d\s*\){_SPACE}*\(?\s*\d|\d{_SPACE}*\\[dtc]?frac\s*\{{?\s*\d"
)
_ELLIPSIS = re.compile(r"\\[lcd]?dots(?![a-z])|\.\.\.|\u2026")
# math-verify takes a set for a tuple, so that of the roots of an inequality {1, 2} would be its solution (1, 2).
_SET, _TUPLE = re.compile(r"\\\{[^()\[\]]*\\\}"), re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_SEVERAL = re.compile(r"[,;<>!]|\b(?:and|or)\b|\\(?:[lg]eq?|in|neq?)(?![a-z])")


def compare(answer: str, reference: str) -> str | None:
    """`EQUAL`, `DIFFERENT` or `UNPARSED` where no parser is needed to know, None where `verify` has to be asked."""
    if not answer or len(answer) > LONGEST or len(reference) > LONGEST:
        return UNPARSED
    (answer, answer_percent), (reference, reference_percent) = _clean(answer), _clean(reference)
    if not answer or not reference:
        return UNPARSED
    if (_squeezed(answer), answer_percent) == (_squeezed(reference), reference_percent):
        return EQUAL
    value, target = _number(answer), _number(reference)
    if value is not None and target is not None:
        if answer_percent == reference_percent:
            candidates = [value]
        else:
            candidates = [value / 100 if answer_percent else value * 100]
            if abs(value) > 1 and _SCIENTIFIC.fullmatch(answer) and _SCIENTIFIC.fullmatch(reference):
                candidates.append(value)  # 28 where a percentage is asked for; but 0.5 may be a probability
        return EQUAL if any(_same_number(candidate, target) for candidate in candidates) else DIFFERENT
    if word := _word(reference):
        return EQUAL if _word(answer) == word else DIFFERENT
    based, target_based = _BASE.fullmatch(answer), _BASE.fullmatch(reference)
    if based and target_based:
        return EQUAL if based.groups() == target_based.groups() else DIFFERENT
    if answer_percent != reference_percent:
        return DIFFERENT
    if any(
        _SET.fullmatch(one) and _TUPLE.fullmatch(other) for one, other in ((answer, reference), (reference, answer))
    ):
        return DIFFERENT
    return UNPARSED if _is_refused(answer, reference) else None


def verify(answer: str, reference: str) -> str:
    """The same by math-verify, which has no time limit here: some expressions take hours, and gigabytes."""
    from math_verify import verify as is_equal

    answer, reference = _clean(answer)[0], _clean(reference)[0]
    try:
        target, sides = _parse(reference), [_parse(side) for side in _sides(answer, reference)]
        if not all(sides):
            return UNPARSED
        equal = all(
            is_equal(target, side, timeout_seconds=None) and not _is_rounded_away(target[0], side[0]) for side in sides
        )
    except Exception:  # recursion, memory, or what math-verify does not catch
        return UNPARSED
    return EQUAL if equal else DIFFERENT


@lru_cache(maxsize=256)
def _clean(text: str) -> tuple[str, bool]:
    """A text without what has no meaning (delimiters, styles, a unit at the end), and whether it was a percentage."""
    text = re.sub(" {3,}", "  ", text.translate(_CHARACTERS)).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _STYLE.sub(r"\\text", _DROPPED.sub("", text)).strip(" *").rstrip(" .,;:*")
    while wrapped := _WRAPPED.fullmatch(text):
        text = (wrapped[1] or wrapped[2] or "").strip().rstrip(" .,;:")
    text = _DIGIT_GROUP.sub("", _DEGREES.sub("", text))
    if percent := _PERCENT.search(text):
        return text[: percent.start()], True
    unit = _UNIT.search(text)
    if unit is None or not unit.start():
        unit = _BARE_UNIT.search(text)
        if unit is not None and _number(text[: unit.start()]) is None:
            unit = None
    if unit is not None and not _NO_UNIT.search(unit[1] or ""):
        text = text[: unit.start()]
        if powers := _POWER_WORDS.match(unit[1] or ""):
            text += rf"\times 10^{{{sum(_POWERS[word.rstrip('s')] for word in powers[0].lower().split())}}}"
    return text.rstrip(" .,;:"), False


def _squeezed(text: str) -> str:
    """A text without the spaces that separate nothing."""
    return re.sub(r"(?<![0-9a-zA-Z])\s+|\s+(?![0-9a-zA-Z])", "", text)


def _number(text: str) -> Fraction | None:
    """The value of an integer, decimal, fraction or mixed number, or of one in scientific notation; else None."""
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa, *exponents = match.groups()
        exponent = next((int(group) for group in exponents if group), 0)
        return Fraction(re.sub(r"[,\s]", "", mantissa)) * Fraction(10) ** exponent
    if match := _FRACTION.fullmatch(text):
        sign, *groups = match.groups()
        whole, numerator, denominator = (int(g) for g in _three(groups))
        if denominator and (not whole or numerator < denominator):
            return (-1 if sign == "-" else 1) * (whole + Fraction(numerator, denominator))
    return None


def _three(groups: list[str | None]) -> tuple[str, str, str]:
    """Whole, numerator and denominator from the groups of either spelling of a fraction."""
    whole, numerator, denominator = groups[:3]
    if numerator is None:
        whole, numerator, denominator = groups[3], groups[4] or groups[5], groups[6] or groups[7]
    return whole or "0", numerator or "0", denominator or "0"


def _same_number(value: Fraction, target: Fraction) -> bool:
    """Exactly for integers, rounded for decimals and fractions."""
    exact = 1 in (value.denominator, target.denominator)
    return value == target if exact else _is_close(value, target)


def _is_close(value: Fraction, target: Fraction) -> bool:
    """Equal to six decimals, as for math-verify; small numbers to four digits, else 1e-7 would be 0."""
    difference = abs(value - target)
    return difference < _ABSOLUTE and difference <= _RELATIVE * abs(target)


def _word(text: str) -> str | None:
    """A word or phrase without case and spaces, a choice such as `(A)` with its case; None for anything else."""
    match = re.fullmatch(r"\(?\s*(?:\\text\s*\{)?([A-Z]|[a-zA-Z][a-zA-Z' -]*[a-zA-Z])\}?\s*\)?", text)
    if match is None:
        return None
    return match[1] if len(match[1]) == 1 else match[1].replace(" ", "").casefold()


def _is_refused(answer: str, reference: str) -> bool:
    """Whether an answer holds what math-verify would drop, or read in one of several ways."""
    if answer.replace(r"\{", "").count("{") != answer.replace(r"\}", "").count("}"):
        return True
    if any(text.strip() not in reference for text in _TEXT.findall(answer)):
        return True
    if set(_WORD.findall(answer)) - _MATHS_WORDS - set(_WORD.findall(reference)):
        return True
    return any(pattern.search(answer) and not pattern.search(reference) for pattern in (_SIDE_BY_SIDE, _ELLIPSIS))


def _sides(answer: str, reference: str) -> list[str]:
    """The expressions that must all equal the reference: those of a chain `x = 4/2 = 2`, if the reference is none."""
    if "=" in reference or "=" not in answer or _SEVERAL.search(answer):
        return [answer]
    name, *sides = answer.split("=")
    return sides if re.search("[a-zA-Z]", name) else [name, *sides]


@lru_cache(maxsize=32)  # the completions of a group have one reference
def _parse(text: str) -> list[Any]:
    from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
    from math_verify import LatexExtractionConfig, parse

    if _SCIENTIFIC.fullmatch(text):
        text = re.sub("[eE](.*)", r"\\times 10^{\1}", text)
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that their time limits are off
        logging.getLogger(name).setLevel(logging.ERROR)
    # In a box, math-verify reads the whole text as one expression, where in prose it would look for any number. Units
    # have been taken off: it would take a variable `t` at the end for one.
    config = LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="last"),
    )
    parsed: list[Any] = parse(rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return parsed


def _is_rounded_away(target: Any, value: Any) -> bool:
    """Whether two numbers are equal only because math-verify rounds them to six decimals."""
    try:
        numbers = [Fraction(str(number.evalf(20))) for number in (value, target)]
    except Exception:  # not numbers
        return False
    return not _is_close(*numbers)
