"""The reference in an answer column: what is a result, and why anything else is refused."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from entropy_trl.data.dropped import NO_RESULT, NOT_ACCEPTED
from entropy_trl.rewards import accepts_itself, final_answer
from entropy_trl.rewards.equality import LONGEST


NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_PLACEHOLDERS = {"proof", "notfound", "not found", "none", "null", "nan", "n/a", "unknown", ""}
# Words of a derivation. A text with one of them among four words or more is a worked solution, not a result.
_DERIVATION = re.compile(r"\b(?:we|since|so|thus|hence|therefore|because|answer|let)\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MOST_WORDS = 12


def final_result(answer: Any) -> str:
    r"""The result in an answer: all of it, or what GSM8K has after `####`, or MATH in the last `\boxed{}`."""
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 1:
        answer = answer[0]
    if answer is None or answer != answer or (isinstance(answer, (Sequence, Mapping)) and not isinstance(answer, str)):
        return ""  # NaN is what pandas has for a missing number
    text = str(answer).rsplit("####", maxsplit=1)[-1].strip()
    return final_answer(text) if "\\boxed" in text else text


def refusal(answer: str, answer_format: str) -> str:
    """Why a result cannot be a reference, "" if it can.

    Every row is asked, so that none is trained on that no completion could solve. Plain numbers are decided at once.
    """
    if len(answer) <= LONGEST and NUMBER.fullmatch(answer):
        return ""
    return _refusal(answer, answer_format)


@lru_cache(maxsize=10_000)  # the rows of a data set share many answers
def _refusal(answer: str, answer_format: str) -> str:
    if answer.lower().strip(" .?-_…") in _PLACEHOLDERS:
        return NO_RESULT
    words = len(_WORD.findall(answer))
    if words > _MOST_WORDS or (words >= 4 and _DERIVATION.search(answer)):
        return NO_RESULT
    return "" if accepts_itself(answer, answer_format) else NOT_ACCEPTED


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
