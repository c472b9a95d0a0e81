"""Where a completion says its final answer, for each answer format that a prompt template can ask for."""

import re
from collections.abc import Callable


# `\\.` takes escaped braces, which are text. Some models write two backslashes.
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_MARKUP = re.compile(r"\\q?quad|\\text|\\[,;: ()\[\]]|[{}$\s]")
_CONJUNCTION = re.compile(r"[^.:?!\n]*(?:[,;]|and|or)(?:[a-zA-Z]\w{0,4}=)?")
_LONGEST_CONJUNCTION, _MOST_BOXES = 60, 50
_LINE = re.compile(r"\banswer\s*(?:\*+\s*)?[:\uff1a]", re.IGNORECASE)


def final_answer(text: str, answer_format: str = "any") -> str:
    r"""What a completion gives as its final answer, or an empty string where it gives none.

    | `answer_format` | the answer                                                                                |
    |-----------------|-------------------------------------------------------------------------------------------|
    | `"boxed"`       | the content of the last `\boxed{...}` with balanced braces, or of the last boxes in a list |
    | `"answer_line"` | what follows the last `Answer:` on its line; without one, a last line `A: ...` (GSM8K's)  |
    | `"answer_tag"`  | the content of the last `<answer>...</answer>`                                            |
    | `"any"`         | the first of tag, box and line that there is                                              |

    If the line or the tag has a box in it, the answer is the content of the box.

    Raises:
        ValueError: There is no such format.
    """
    if answer_format not in _READERS:
        raise ValueError(f"There is no answer_format {answer_format!r}: use one of {', '.join(_READERS)}.")
    return _READERS[answer_format](text)


def _boxed(text: str) -> str:
    # One pass, so that a completion of a hundred thousand open boxes takes no longer than another of its length.
    opened: list[re.Match[str]] = []
    boxes: list[tuple[int, int, int]] = []  # where each closed box begins, where its content does, where that ends
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            opened.append(match)
        elif token == "}" and opened and (opening := opened.pop()).group() != "{":
            boxes.append((opening.start(), opening.end(), match.start()))
    answers: list[str] = []
    next_start = 0
    for start, content_start, content_end in sorted(boxes, reverse=True):
        if len(answers) == _MOST_BOXES or (answers and not _is_conjunction(text[content_end + 1 : next_start])):
            break
        next_start = start
        content = text[content_start:content_end].strip(" \t\r\n")  # a form feed may be what is left of `\f`
        if content not in answers:
            answers.insert(0, content)
    return ", ".join(answers)


def _is_conjunction(text: str) -> bool:
    r"""Whether the text between two boxes makes them one answer, as in `\boxed{1} apples and \boxed{2} pears`."""
    return len(text) <= _LONGEST_CONJUNCTION and bool(_CONJUNCTION.fullmatch(_MARKUP.sub("", text)))


def _answer_line(text: str) -> str:
    starts = [match.end() for match in _LINE.finditer(text)]
    if starts:
        line = text[starts[-1] :].split("\n", maxsplit=1)[0]
    else:
        last = text.rstrip().rsplit("\n", maxsplit=1)[-1]
        line = last.removeprefix("A:") if last.startswith("A:") else ""
    return _boxed(line) or line.strip(" \t\r*").removesuffix(".")


def _answer_tag(text: str) -> str:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    content = "" if start < 0 else text[start + len("<answer>") : end]
    return _boxed(content) or content.strip()


def _any(text: str) -> str:
    return _answer_tag(text) or _boxed(text) or _answer_line(text)


_READERS: dict[str, Callable[[str], str]] = {
    "boxed": _boxed,
    "answer_line": _answer_line,
    "answer_tag": _answer_tag,
    "any": _any,
}
ANSWER_FORMATS = tuple(_READERS)
"""The values of `answer_format`, by which a prompt template says in which form it asks for the answer."""
