"""Reading one row: where its parts are, and what becomes of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from entropy_trl.data.answers import number_text, read_answer, refusal
from entropy_trl.data.dropped import BAD_FORMAT, MIXED_PROMPT, NO_ANSWER, NO_PROBLEM, NO_PROMPT, OTHER_LANGUAGE
from entropy_trl.data.options import DEFAULT_TEMPLATE, RowOptions
from entropy_trl.data.structures import chat, field_of, parsed
from entropy_trl.templates import ANSWER_FORMATS, PromptTemplate, bare_problem, get_template, recognise


PROBLEM_COLUMNS = ("problem", "question")
SOLUTION_COLUMNS = ("answer", "final_answer", "label", "solution")
"""The usual columns of the answer, in the order in which they are tried. Evaluation tries the same."""

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Reading:
    """Where the parts of a row are, and what to make of them. A value, by which `datasets` finds a cached result."""

    prompt: str
    solution: str | None
    fallback: str | None  # the column of the answer where `reward_model` has none
    bare: bool  # a text in `prompt` is a problem, not a ready prompt
    chat_text: bool  # a text in `prompt` is the JSON of a chat
    no_booleans: bool  # the column of the answer may be a class, as in preference data
    has_format: bool
    template: PromptTemplate | None
    language: str | None

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        name: str,
        options: RowOptions,
        samples: Sequence[Mapping[str, Any]] = (),
        classes: Sequence[str] = (),
    ) -> "Reading":
        """Find the parts by the names of the columns and, where they are not enough, in the first rows.

        Columns in `classes` have numbers that stand for the name of a class, and no answers.
        """
        for option in ("prompt_column", "solution_column"):
            column = getattr(options, option)
            if column is not None and column not in columns and column.partition(".")[0] not in columns:
                raise ValueError(
                    f"Data set {name!r} has no column {column!r}, which {option} names: its columns are "
                    f"{', '.join(map(repr, columns))}."
                )
        prompt = options.prompt_column
        if prompt is None:
            prompt = next((column for column in ("prompt", *PROBLEM_COLUMNS) if column in columns), None)
        if prompt is None:
            raise ValueError(
                f"Data set {name!r} has no column 'prompt', 'problem' or 'question': its columns are "
                f"{', '.join(map(repr, columns))}. Name the one that holds the problem with prompt_column."
            )
        # A row of a worked example has its reasoning in `solution` and its result in `answer`, so `answer` goes first,
        # except beside `prompt`, where TRL's convention is that `solution` is the result.
        solution, fallback = options.solution_column, None
        if solution is None:
            candidates = ("solution", *SOLUTION_COLUMNS) if prompt == "prompt" else SOLUTION_COLUMNS
            usable = [c for c in candidates if c in columns and c not in classes]
            if "label" in usable and _is_class(_first(samples, "label")):
                usable.remove("label")
            if "reward_model" in columns and _may_have_ground_truth(samples):
                usable.insert(0, "reward_model.ground_truth")
            solution, fallback = [*usable, None, None][:2]
        if solution != "reward_model.ground_truth":
            fallback = None
        prompt_sample = next(
            (v for row in samples if prompt_text(v := number_text(field_of(row, prompt))).strip()), None
        )
        return cls(
            prompt=prompt,
            solution=solution,
            fallback=fallback,
            bare=prompt != "prompt" or "source_prompt" in columns,
            chat_text=isinstance(prompt_sample, str) and chat(prompt_sample) is not None,
            no_booleans=options.solution_column is None and "label" in (solution, fallback),
            has_format="answer_format" in columns,
            template=None if options.prompt_template is None else get_template(options.prompt_template),
            language=options.language,
        )

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        parts = [self.prompt, self.solution, self.fallback, "answer_format" if self.has_format else None]
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
        prompt = number_text(field_of(row, self.prompt))
        if isinstance(prompt, bytes):
            prompt = prompt.decode("utf-8", errors="replace")
        messages = chat(prompt) if isinstance(prompt, str) else None
        if isinstance(prompt, str) and self.template is None and not self.bare and (messages is None) == self.chat_text:
            return read | {"dropped": MIXED_PROMPT if prompt.strip() else NO_PROMPT}
        prompt = prompt if messages is None else messages
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
            problem = text if is_problem and known is None else bare_problem(prompt)
            if problem is None:
                return read | {"dropped": NO_PROBLEM}
            template = self.template or DEFAULT_TEMPLATE
            read |= {"prompt": template.messages(problem), "answer_format": template.answer_format, "problem": problem}
        if self.solution is not None:
            solution, missing = self._answer(row)
            if missing:
                return read | {"dropped": missing}
            if refused := refusal(solution, read["answer_format"]):
                return read | {"dropped": refused}
            read["solution"] = solution
        if self.language is not None and self.language != ("zh" if HAN.search(read["problem"]) else "en"):
            read["dropped"] = OTHER_LANGUAGE
        return read

    def _answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The answer of a row, and why there is none."""
        solution, missing = "", NO_ANSWER
        for column in (self.solution, self.fallback):
            value = None if column is None else field_of(row, column)
            if missing == NO_ANSWER and not (self.no_booleans and column == "label" and isinstance(value, bool)):
                solution, missing = read_answer(value)
        return solution, missing


def _first(samples: Sequence[Mapping[str, Any]], column: str) -> Any:
    return next((row[column] for row in samples if row.get(column) is not None), None)


def _is_class(value: Any) -> bool:
    """Whether a value says which class a row is of, as `label` does in preference data, and is no answer."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _may_have_ground_truth(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `reward_model` is a structure with the answer, and not the name of a model."""
    values = [value for row in samples if (value := row.get("reward_model")) is not None]
    read = [parsed(value) if isinstance(value, str) else value for value in values]
    return not read or any(isinstance(value, Mapping) and "ground_truth" in value for value in read)


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
