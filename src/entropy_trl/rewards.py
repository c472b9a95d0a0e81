"""Reward functions for verifiable problems. Each maps completions to one number per completion."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify


_BOXED = re.compile(r"\\f?boxed\s*\{")
_ANSWER = re.compile(r"answer\s*:", re.IGNORECASE)

# math-verify warns once a process that its time limits are off, which the docstring below says.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: not record.getMessage().startswith("Timeout is disabled"))


def math_reward(completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for each completion whose final answer equals its row's solution, else 0.0.

    The final answer is what `final_answer` finds, and only that is compared: a right number elsewhere in the text earns
    nothing. Equality is mathematical, by math-verify: `0.5` equals `\\frac{1}{2}`.

    math-verify's own time limits work by signals, which fail outside the main thread. They are off here, so that this
    function works in any thread, and an expression built to be slow takes as long as it takes.

    Args:
        completions: (B,) texts, or conversations (lists of messages) whose last message is read.
        solution: (B,) reference answers, for instance `"34"` or `"\\frac{1}{2}"`.
        **kwargs: The other columns that TRL passes to every reward function; unused.

    Returns:
        (B,) rewards, each 1.0 or 0.0. A completion without an answer, or with one that cannot be parsed, gets 0.0.
    """
    return [
        float(_equal(final_answer(_text(completion)), str(reference)))
        for completion, reference in zip(completions, solution, strict=True)
    ]


def final_answer(text: str) -> str:
    """The content of the last `\\boxed{...}` with balanced braces, else the rest of the last line with `Answer:`.

    Returns an empty string where there is neither.
    """
    for match in reversed(list(_BOXED.finditer(text))):
        content = _balanced(text, match.end())
        if content is not None:
            return content.strip()
    matches = list(_ANSWER.finditer(text))
    if not matches:
        return ""
    line = text[matches[-1].end() :].split("\n", maxsplit=1)[0]
    return line.strip(" \t\r*").removesuffix(".")


def _balanced(text: str, start: int) -> str | None:
    """What lies between `start`, just after an opening brace, and its closing brace; None if it is never closed."""
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace is text
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def _text(completion: Any) -> str:
    """The text of a completion, which is plain or a conversation."""
    content = completion if isinstance(completion, str) else completion[-1]["content"]
    if isinstance(content, list):  # content in parts: only the parts of text can hold an answer
        content = "".join(part.get("text", "") for part in content)
    return content or ""


def _equal(answer: str, reference: str) -> bool:
    """Whether math-verify takes `answer` for equal to `reference`."""
    if not answer.strip():
        return False
    # In a box, math-verify reads the whole text as one expression, where in prose it would look for any number.
    parsed_answer = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    parsed_reference = parse(rf"\boxed{{{reference}}}", parsing_timeout=None)
    return verify(parsed_reference, parsed_answer, timeout_seconds=None)
