"""Reading one row: where its parts are, and what becomes of them."""

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from entropy_trl.data.dropped import BAD_ANSWER, BAD_FORMAT, NO_ANSWER, NO_PROBLEM, NO_PROMPT, OTHER_LANGUAGE
from entropy_trl.data.options import DEFAULT_TEMPLATE, RowOptions
from entropy_trl.templates import ANSWER_FORMATS, PromptTemplate, bare_problem, get_template, recognise


_PROBLEM_COLUMNS = ("problem", "question")
SOLUTION_COLUMNS = ("answer", "final_answer", "label", "solution")
"""The usual columns of the answer, in the order in which they are tried. Evaluation tries the same."""

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# Results that math-verify does not read: `34.`, `0.\overline{3}`, `10:30 a.m.`.
_LITERAL = re.compile(
    r"-?\d+\.|-?\d*\.\d*\\overline\s*(?:\{\d+\}|\d)|\d{1,2}:\d{2}(?::\d{2})?\s*(?:[ap]\.?\s?m\.?)?", re.IGNORECASE
)
_PLACEHOLDERS = {"proof", "notfound", "not found", "none", "null", "nan", "n/a", "unknown"}
# Words of a derivation. A text with one of them among four words or more is a worked solution, not a result.
_DERIVATION = re.compile(r"\b(?:we|since|so|thus|hence|therefore|because|answer|let)\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MOST_WORDS = 12


@dataclass(frozen=True)
class Reading:
    """Where the parts of a row are, and what to make of them. A value, by which `datasets` finds a cached result."""

    prompt: str
    solution: str | None
    bare: bool  # a text in `prompt` is a problem, not a ready prompt
    has_format: bool
    template: PromptTemplate | None
    language: str | None

    @classmethod
    def of(cls, columns: Sequence[str], name: str, options: RowOptions) -> "Reading":
        for option in ("prompt_column", "solution_column"):
            column = getattr(options, option)
            if column is not None and column not in columns and column.partition(".")[0] not in columns:
                raise ValueError(
                    f"Data set {name!r} has no column {column!r}, which {option} names: its columns are "
                    f"{', '.join(map(repr, columns))}."
                )
        prompt = options.prompt_column
        if prompt is None:
            prompt = next((column for column in ("prompt", *_PROBLEM_COLUMNS) if column in columns), None)
        if prompt is None:
            raise ValueError(
                f"Data set {name!r} has no column 'prompt', 'problem' or 'question': its columns are "
                f"{', '.join(map(repr, columns))}. Name the one that holds the problem with prompt_column."
            )
        # A row of a worked example has its reasoning in `solution` and its result in `answer`, so `answer` goes first,
        # except beside `prompt`, where TRL's convention is that `solution` is the result.
        solution = options.solution_column
        if solution is None and "reward_model" in columns:
            solution = "reward_model.ground_truth"
        if solution is None:
            candidates = ("solution", *SOLUTION_COLUMNS) if prompt == "prompt" else SOLUTION_COLUMNS
            solution = next((column for column in candidates if column in columns), None)
        return cls(
            prompt=prompt,
            solution=solution,
            bare=prompt != "prompt" or "source_prompt" in columns,
            has_format="answer_format" in columns,
            template=None if options.prompt_template is None else get_template(options.prompt_template),
            language=options.language,
        )

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        parts = [self.prompt, self.solution, "answer_format" if self.has_format else None]
        return list(dict.fromkeys(part.partition(".")[0] for part in parts if part is not None))

    @property
    def consumed(self) -> list[str]:
        """The columns that others replace."""
        return [column for column in (self.prompt, self.solution) if column and column not in ("prompt", "solution")]

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The new columns of a row, its problem, and why it is left out ("" if it is not)."""
        read: dict[str, Any] = {"prompt": None, "answer_format": None, "problem": "", "dropped": ""}
        if self.solution is not None:
            read["solution"] = None
        prompt = _get(row, self.prompt)
        text = prompt_text(prompt)
        if not text.strip():
            return read | {"dropped": NO_PROMPT}
        known = recognise(prompt)
        is_problem = isinstance(prompt, str) and self.bare
        if self.template is None and not is_problem:
            answer_format = row.get("answer_format") if self.has_format else None
            if answer_format is None:
                answer_format = "any" if known is None else known[0].answer_format
            elif answer_format not in ANSWER_FORMATS:
                return read | {"dropped": BAD_FORMAT}
            read |= {"prompt": prompt, "answer_format": answer_format, "problem": text if known is None else known[1]}
        else:
            problem = prompt if is_problem and known is None else bare_problem(prompt)
            if problem is None:
                return read | {"dropped": NO_PROBLEM}
            template = self.template or DEFAULT_TEMPLATE
            read |= {"prompt": template.messages(problem), "answer_format": template.answer_format, "problem": problem}
        if self.solution is not None:
            solution = final_result(_get(row, self.solution))
            if not solution:
                return read | {"dropped": NO_ANSWER}
            if not _is_maths(solution):
                return read | {"dropped": BAD_ANSWER}
            read["solution"] = solution
        if self.language is not None and self.language != ("zh" if HAN.search(read["problem"]) else "en"):
            read["dropped"] = OTHER_LANGUAGE
        return read


def _get(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field of a structure in it."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def prompt_text(prompt: Any) -> str:
    """The text of a prompt; empty where there is nothing to answer."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(message, Mapping) for message in prompt):
        return ""
    contents = [message.get("content") for message in prompt]
    texts = [str(content or "") for content in contents]
    return "\n\n".join(texts) if texts[-1].strip() else ""


def final_result(answer: Any) -> str:
    r"""The result in an answer: all of it, or what GSM8K has after `####`, or MATH in the last `\boxed{}`."""
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 1:
        answer = answer[0]
    if answer is None or answer != answer or (isinstance(answer, (Sequence, Mapping)) and not isinstance(answer, str)):
        return ""  # NaN is what pandas has for a missing number
    text = str(answer).rsplit("####", maxsplit=1)[-1].strip()
    if "\\boxed" in text:
        from entropy_trl.rewards import final_answer

        text = final_answer(text)
    return text


def _is_maths(answer: str) -> bool:
    """Check that an answer is a result which `math_reward` can accept: no placeholder, and no worked solution."""
    if _NUMBER.fullmatch(answer):
        return True
    if answer.lower().strip(" .") in _PLACEHOLDERS:
        return False
    words = len(_WORD.findall(answer))
    if words > _MOST_WORDS or (words >= 4 and _DERIVATION.search(answer)):
        return False
    from math_verify import parse

    from entropy_trl.rewards import final_answer
    from entropy_trl.rewards.equality import EQUAL, LONGEST, compare

    if len(answer) > LONGEST:  # `math_reward` compares no such text
        return False

    # math-verify's time limit works by signals, which only the main thread gets.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    box = rf"\boxed{{{answer}}}"
    if not all(isinstance(parsed, str) for parsed in parse(box, parsing_timeout=limit)):
        return True
    # Clock times and repeating decimals: `math_reward` gives 1.0 to an answer that repeats them.
    return bool(_LITERAL.fullmatch(answer)) and compare(final_answer(box, "boxed"), answer) == EQUAL


def normal(text: str) -> str:
    """A text with each run of white space as one blank: what makes two prompts, or two answers, the same."""
    return " ".join(text.split())


def normal_answer(text: str) -> str:
    """Write a plain number without zeros that do not count, so that `025` and `25` are one answer."""
    text = normal(text)
    if not _NUMBER.fullmatch(text.removesuffix(".")):
        return text
    whole, _, decimals = text.removeprefix("-").partition(".")
    decimals = decimals.rstrip("0")
    number = (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
    return f"-{number}" if text.startswith("-") and number != "0" else number


def digest(text: str) -> int:
    return xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def hashed(texts: Iterable[str]) -> np.ndarray[Any, Any]:
    return np.array([digest(text) for text in texts], dtype=np.uint64)


def prompt_length(prompt: Any, tokenizer: Any, kwargs: Mapping[str, Any]) -> int:
    """The tokens of a prompt, made of it as TRL makes them."""
    if isinstance(prompt, str):
        return len(tokenizer(text=prompt)["input_ids"])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs)
    return len(ids["input_ids"])
