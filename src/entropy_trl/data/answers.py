"""The reference in an answer column: what is a result, and why anything else is refused."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from numbers import Number as AnyNumber
from typing import Any

from entropy_trl.data.dropped import INEXACT, NO_ANSWER, NO_RESULT, NOT_ACCEPTED, NOT_TEXT, STRUCTURE
from entropy_trl.data.structures import Number, parsed
from entropy_trl.rewards import accepts_itself, final_answer
from entropy_trl.rewards.equality import LONGEST


NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_PLACEHOLDERS = {
    *("", "none", "null", "nan", "na", "n/a", "unknown", "error", "missing", "placeholder", "tbd", "todo", "omitted"),
    *("notfound", "not found", "answer not found", "no answer", "no answer found", "not available", "not given"),
    *("not provided", "proof", "proof omitted", "prove", "to prove", "to be proved", "to be proven", "qed", "q e d"),
    *("see proof", "see solution", "see the solution", "see above", "see below"),
    *("证明", "证明略", "略", "见解析", "无答案", "未知"),
}
# What may stand around a placeholder.
_AROUND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\b|[\s{}()$_.?!…:\uff1a。-]+")
_INVISIBLE = "\0\ufeff\u200b \t\r\n"
_EXACT = 2**53  # integers up to it are exact as floats
_SURE_DIGITS = 15  # decimal digits that a float keeps of any number
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_MOST_WORDS, _MOST_HAN = 12, 30
# Words of a derivation. A text with one of them among four words or more is a worked solution, not a result.
_DERIVATION = re.compile(
    r"\b(?:we|since|so|thus|hence|therefore|because|answer|let|step|implies|obtain|substitut\w+|solving|simplif\w+"
    r"|finally|follows|yields)\b|(?-i:[a-z0-9$})]\.\s+[A-Z])",
    re.IGNORECASE,
)
_HAN_DERIVATION = re.compile(r"所以|因此|因为|由于|可得|综上|答案|解[:\uff1a]")
# Signs of a derivation of any length: `2 + 2 = 4, so 4`, GSM8K's `<<2+2=4>>`, the head of a solution.
_SIGNS = re.compile(
    r"\\begin\{proof\}|=.*\b(?:so|thus|hence|therefore)\b|\b(?:because|since)\b.*=|\\therefore|\\because|[∴∵]|<<.*=.*>>|</?think>"
    r"|^\W*(?:solution|proof|step\s*\d+)\W",
    re.IGNORECASE | re.DOTALL,
)
_DELIMITERS = re.compile(r"\\[\[\]()]|\$")
_ANSWER_LINE = re.compile(r"\**(?:final\s+)?answer\s*\**\s*[:\uff1a]", re.IGNORECASE)


def final_result(answer: Any) -> str:
    r"""The result in an answer: all of it, or what GSM8K has after `####`, or MATH in the last `\boxed{}`.

    A list of one value is that value, and so is the JSON of one. Other lists and structures have no result.
    """
    return read_answer(answer)[0]


def read_answer(answer: Any) -> tuple[str, str]:
    """Return the result in an answer, and why there is none, which is "" where there is one."""
    answer = _value(answer)
    if answer is None or answer != answer:  # NaN is what pandas has for a missing number
        return "", NO_ANSWER
    if isinstance(answer, list | tuple | Mapping):
        return "", STRUCTURE if answer else NO_ANSWER
    if isinstance(answer, float):
        return _float(answer)
    if not isinstance(answer, str | AnyNumber):
        return "", NOT_TEXT  # the date 2024-01-05 would be read as 2018
    if isinstance(answer, Decimal):
        return _decimal(answer)
    text = str(answer).rsplit("####", maxsplit=1)[-1].strip(_INVISIBLE).strip()
    if "\\boxed" in text or "\\fbox" in text or "</answer>" in text:
        text = final_answer(text)
    elif _ANSWER_LINE.match(text):
        text = final_answer(text, "answer_line")
    return text, "" if text else NO_ANSWER


def _value(answer: Any) -> Any:
    """The value in lists of one value, in the JSON of one, and in bytes of text."""
    for _ in range(_MOST_WORDS):  # deeper nesting is a structure
        if isinstance(answer, bytes):
            answer = answer.decode("utf-8", errors="replace")
        if isinstance(answer, str):
            value = parsed(answer)
            if isinstance(value, list) and len(value) > 1 and all(isinstance(one, Number) for one in value):
                return answer  # `[0, 1]` is an interval
            if value is answer:
                return answer
            answer = value
        elif isinstance(answer, list | tuple) and len(answer) == 1:
            answer = answer[0]
        else:
            break
    return answer


def _float(value: float) -> tuple[str, str]:
    """The text of a number in a column of floats, where an integer beside a missing value has become one."""
    if math.isinf(value):
        return "", NO_RESULT
    if value.is_integer() and abs(value) < _EXACT:
        return str(int(value)), ""  # `5.0` would be a decimal, which allows rounding
    digits = repr(value).partition("e")[0].replace(".", "").lstrip("-0").rstrip("0")
    if abs(value) >= _EXACT and len(digits) > _SURE_DIGITS:
        return "", INEXACT
    return repr(value), ""


def _decimal(value: Decimal) -> tuple[str, str]:
    """The text of a number in a column of decimals, which has as many decimals for each row."""
    if not value.is_finite():
        return "", NO_RESULT
    return (str(int(value)) if value == value.to_integral_value() else f"{value:f}".rstrip("0")), ""


def number_text(value: Any) -> Any:
    """Return a number as a text, "" for a missing one; anything else as it is."""
    return value if isinstance(value, bool) or not isinstance(value, AnyNumber) else read_answer(value)[0]


def refusal(answer: str, answer_format: str) -> str:
    """Return why a result cannot be a reference, "" if it can.

    Every row is asked, so that none is trained on that no completion could solve. Plain numbers are decided at once.
    """
    if len(answer) <= LONGEST and NUMBER.fullmatch(answer):
        return ""
    return _refusal(answer, answer_format)


@lru_cache(maxsize=10_000)  # the rows of a data set share many answers
def _refusal(answer: str, answer_format: str) -> str:
    if _AROUND.sub(" ", answer.lower()).strip() in _PLACEHOLDERS or _is_worked(answer):
        return NO_RESULT
    return "" if accepts_itself(answer, answer_format) else NOT_ACCEPTED


def _is_worked(answer: str) -> bool:
    """Whether a text is a worked solution, as far as its words and lines tell."""
    words, han = len(_WORD.findall(answer)), len(_HAN.findall(answer))
    if words > _MOST_WORDS or han > _MOST_HAN or _SIGNS.search(answer):
        return True
    if (words >= 4 and _DERIVATION.search(answer)) or (han >= 4 and _HAN_DERIVATION.search(answer)):
        return True
    lines = [line for line in answer.split("\n") if _DELIMITERS.sub("", line).strip()]
    return len(lines) > 1 and "\\begin" not in answer and (words >= 4 or answer.count("=") > 1)


def normal(text: str) -> str:
    """A text with each run of white space as one blank: what makes two prompts, or two answers, the same."""
    return " ".join(text.split())


def normal_answer(text: str) -> str:
    """Write a plain number without zeros that do not count, so that `025` and `25` are one answer."""
    text = normal(text)
    if not NUMBER.fullmatch(text.removesuffix(".")):
        return text
    whole, _, decimals = text.removesuffix(".").removeprefix("-").partition(".")
    decimals = decimals.rstrip("0")
    number = (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
    return f"-{number}" if text.startswith("-") and number != "0" else number
