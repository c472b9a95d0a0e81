"""Reading one row: where its parts are, and what becomes of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from entropy_trl.data.answers import number_text, read_answer, refusal
from entropy_trl.data.cases import UnusableTests
from entropy_trl.data.dropped import (
    BAD_CODE_FORMAT,
    BAD_FORMAT,
    MIXED_PROMPT,
    NO_ANSWER,
    NO_PROBLEM,
    NO_PROMPT,
    NO_TESTS,
    OTHER_LANGUAGE,
)
from entropy_trl.data.options import DEFAULT_CODE_TEMPLATE, DEFAULT_TEMPLATE, RowOptions
from entropy_trl.data.programs import SCHEMAS, Schema, schema_of, schemas_of
from entropy_trl.data.structures import chat, field_of, parsed
from entropy_trl.templates import (
    ANSWER_FORMATS,
    CODE_FORMATS,
    PromptTemplate,
    bare_problem,
    bare_program_problem,
    for_mathematics,
    for_programs,
    get_template,
    recognise,
)


PROBLEM_COLUMNS = ("problem", "question")
SOLUTION_COLUMNS = (
    *("answer", "final_answer", "expected_answer", "ground_truth", "gold_answer", "reference_answer", "gt_answer"),
    *("label", "solution"),
)
"""The usual columns of the answer, in the order in which they are tried. Evaluation tries the same."""

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Reading:
    """Where the parts of a row are, and what to make of them. A value, by which `datasets` finds a cached result."""

    prompt: str
    solution: str | None
    fallback: str | None  # the column of the answer where `reward_model` has none
    bare: bool  # a text in `prompt` is a problem, not a ready prompt
    chat_text: bool  # a text in `prompt` is the JSON of a chat, or other rows' prompts become chats
    no_booleans: bool  # the column of the answer may be a class, as in preference data
    has_format: bool
    template: PromptTemplate | None
    language: str | None
    schemas: tuple[str, ...] = ()  # of programming problems that rows may have
    code_columns: tuple[str, ...] = ()  # those that these schemas read
    mathematics: bool = True  # rows without tests are problems of mathematics
    prompt_named: bool = False  # `prompt_column` is given
    most_tests: int = 0  # characters of the tests of a row

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
        schemas = schemas_of(columns)
        if not _may_have_ground_truth(samples):
            schemas = tuple(schema for schema in schemas if schema != "ground_truth")
        prompt = options.prompt_column
        if prompt is None:
            usual = ("prompt", *PROBLEM_COLUMNS)
            own = [SCHEMAS[schema].problem_column(columns) for schema in schemas]
            prompt = next((column for column in (*usual, *own) if column in columns), None)
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
            programs = {column for schema in schemas for column in SCHEMAS[schema].programs}
            usable = [c for c in candidates if c in columns and c not in classes and c not in programs]
            if "label" in usable and _is_class(_first(samples, "label")):
                usable.remove("label")
            if "reward_model" in columns and _may_have_ground_truth(samples):
                usable.insert(0, "reward_model.ground_truth")
            solution, fallback = [*usable, None, None][:2]
        if solution != "reward_model.ground_truth":
            fallback = None
        mathematics = solution is not None or not schemas
        if not mathematics and options.prompt_column is None:
            prompt = SCHEMAS[schemas[0]].problem_column(columns) or prompt
        prompt_sample = next(
            (v for row in samples if prompt_text(v := number_text(field_of(row, prompt))).strip()), None
        )
        return cls(
            prompt=prompt,
            solution=solution,
            fallback=fallback,
            bare=prompt != "prompt" or "source_prompt" in columns,
            chat_text=any(SCHEMAS[schema].problem for schema in schemas)
            or (isinstance(prompt_sample, str) and chat(prompt_sample) is not None),
            no_booleans=options.solution_column is None and "label" in (solution, fallback),
            has_format="answer_format" in columns,
            template=None if options.prompt_template is None else get_template(options.prompt_template),
            language=options.language,
            schemas=schemas,
            code_columns=_code_columns(schemas, columns),
            mathematics=mathematics,
            prompt_named=options.prompt_column is not None,
            most_tests=options.max_tests_size * 2**20,
        )

    def without(self, schema: str) -> "Reading":
        """The same, where no row has this schema."""
        schemas = tuple(name for name in self.schemas if name != schema)
        return replace(self, schemas=schemas, code_columns=_code_columns(schemas, self.code_columns))

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        parts = [self.prompt, self.solution, self.fallback, "answer_format" if self.has_format else None]
        parts += self.code_columns
        return list(dict.fromkeys(part.partition(".")[0] for part in parts if part is not None))

    @property
    def consumed(self) -> list[str]:
        """The columns that others replace."""
        names = [self.prompt, self.solution]
        for schema in self.schemas:
            if schema != "ground_truth":
                names += SCHEMAS[schema].tests
                names.append(None if self.prompt_named else SCHEMAS[schema].problem_column(self.code_columns))
        kept = ("prompt", "solution", "tests", None)
        return list(dict.fromkeys(column for column in names if column and column not in kept))

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The new columns of a row, its problem, and why it is left out ("" if it is not)."""
        read: dict[str, Any] = {"prompt": None, "answer_format": None, "problem": "", "dropped": ""}
        if self.solution is not None:
            read["solution"] = None
        if self.schemas:
            read |= {"tests": None, "code_format": None, "statement": ""}
            schema = schema_of(row, self.schemas)
            if schema is not None:
                return self._program_row(row, schema, read)
            if not self.mathematics:
                return read | {"dropped": NO_TESTS}
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
            template = for_mathematics(self.template or DEFAULT_TEMPLATE)
            read |= {"prompt": template.messages(problem), "answer_format": template.answer_format, "problem": problem}
        if self.solution is not None:
            solution, missing = self._answer(row)
            if missing:
                return read | {"dropped": missing}
            if refused := refusal(solution, read["answer_format"]):
                return read | {"dropped": refused}
            read["solution"] = solution
        if self.schemas:
            read["statement"] = read["problem"]
        if self._is_other_language(read["problem"]):
            read["dropped"] = OTHER_LANGUAGE
        return read

    def _is_other_language(self, problem: str) -> bool:
        return self.language is not None and self.language != ("zh" if HAN.search(problem) else "en")

    def _program_row(self, row: Mapping[str, Any], schema: Schema, read: dict[str, Any]) -> dict[str, Any]:
        """The same for a programming problem."""
        column = (None if self.prompt_named else schema.problem_column(list(row))) or self.prompt
        prompt = number_text(field_of(row, column))
        messages = chat(prompt) if isinstance(prompt, str) else None
        is_problem = isinstance(prompt, str) and (bool(schema.problem) or self.bare)
        is_ready_text = isinstance(prompt, str) and not is_problem and self.template is None
        if is_ready_text and (messages is None) == self.chat_text:
            return read | {"dropped": MIXED_PROMPT if str(prompt).strip() else NO_PROMPT}
        prompt = prompt if messages is None or is_problem else messages
        text = prompt_text(prompt)
        if not text.strip():
            return read | {"dropped": NO_PROMPT}
        try:
            program = schema.program(row, self.most_tests)
        except UnusableTests as unusable:
            return read | {"dropped": str(unusable)}
        read["tests"] = program.tests
        if is_problem:
            problem, code_format = text, "whole"
        else:
            found, code_format = bare_program_problem(prompt)
            if found is None and self.template is not None:
                return read | {"dropped": NO_PROBLEM}
            problem = text if found is None else found
        read["statement"] = problem
        if self.template is None and not is_problem:
            given = row.get("code_format")
            if given is not None and given not in CODE_FORMATS:
                return read | {"dropped": BAD_CODE_FORMAT}
            read |= {"prompt": prompt, "problem": problem, "code_format": given or code_format}
        else:
            template = for_programs(self.template or DEFAULT_CODE_TEMPLATE)
            problem = program.text(problem)
            read |= {"prompt": template.messages(problem), "problem": problem}
            read["code_format"] = template.code_format or "whole"
        if self._is_other_language(read["statement"]):
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


def _code_columns(schemas: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that the schemas read."""
    read = ["verifier", "code_format"] if schemas else []
    for schema in map(SCHEMAS.__getitem__, schemas):
        read += [*schema.tests, *schema.others, *filter(None, [schema.problem_column(columns)])]
    return tuple(dict.fromkeys(column for column in read if column in columns))


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
