"""Reading one row: where its parts are, and what becomes of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from entropy_trl.data.answers import final_result, refusal
from entropy_trl.data.dropped import BAD_FORMAT, NO_ANSWER, NO_PROBLEM, NO_PROMPT, OTHER_LANGUAGE
from entropy_trl.data.options import DEFAULT_TEMPLATE, RowOptions
from entropy_trl.templates import ANSWER_FORMATS, PromptTemplate, bare_problem, get_template, recognise


_PROBLEM_COLUMNS = ("problem", "question")
SOLUTION_COLUMNS = ("answer", "final_answer", "label", "solution")
"""The usual columns of the answer, in the order in which they are tried. Evaluation tries the same."""

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


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
            if refused := refusal(solution, read["answer_format"]):
                return read | {"dropped": refused}
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
