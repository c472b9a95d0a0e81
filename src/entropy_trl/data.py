r"""Rows of problems with verifiable answers: loading, mapping to the columns that are read, and leaving out bad rows.

The trainer reads a column `prompt`; `math_reward` reads `solution`, and `answer_format`, which says where the prompt
asks for the answer (see `templates.py`). `load_rows` makes them out of the schemas that files and hub data sets have:

| columns found                                       | problem or prompt          | answer                       |
|-----------------------------------------------------|----------------------------|------------------------------|
| `prompt`, `reward_model` (DAPO-Math-17k)            | `prompt`, ready            | `reward_model.ground_truth`  |
| and `source_prompt` (DAPO-Math-17k-Processed)       | `prompt`, a bare problem   | `reward_model.ground_truth`  |
| `prompt`, and `solution` or `answer`                | `prompt`, ready            | that column                  |
| `problem` or `question`, and `answer` or `solution` | that column, bare          | that column                  |
| others                                              | `RowOptions.prompt_column` | `RowOptions.solution_column` |

What is left out is counted by reason, in one log message: rows that repeat a prompt, prompts with conflicting answers,
rows that cannot be used, and what the options ask for. docs/data.md has the rules.
"""

import json
import logging
import re
import threading
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from xxhash import xxh3_64_intdigest

from entropy_trl import templates
from entropy_trl.templates import ANSWER_FORMATS, TEMPLATES, PromptTemplate, bare_problem, get_template, recognise


logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = TEMPLATES["qwen_boxed"]
"""How a bare problem becomes a prompt where nothing else is asked for."""

Language = Literal["en", "zh"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_PROBLEM_COLUMNS = ("problem", "question")
_SOLUTION_COLUMNS = ("answer", "solution")

# Two prompts, or two texts, are the same when these 64 bits are: a chance of 1e-7 for any pair among 2 million.
_HASH = datasets.Value("uint64")
# `datasets` finds the cached result of a function by the function's name: a change of the code has to be in it too.
_CODE_FILES = (Path(__file__), Path(templates.__file__), Path(__file__).parent / "rewards" / "answers.py")
_CODE = Hasher.hash([*(file.read_bytes() for file in _CODE_FILES), version("math-verify")])

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# A word of an n-gram: letters and digits without case or punctuation, so that `$n$` and `n` are one; a Han character.
_WORD = re.compile(rf"[a-z0-9]+|{_HAN.pattern}")
_NGRAM = 13
_NAMED_ROWS = 5
# A stream is judged by so many different rows, or by all it has: those at its start before anything is trained.
_FIRST_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    r"""What to make of rows, and which to leave out.

    Attributes:
        prompt_template: A name of `templates.TEMPLATES`, or a text with `{problem}`. None: ready prompts stay as they
            are, and bare problems get `DEFAULT_TEMPLATE`.
        prompt_column: The column of the problem or prompt; a dot leads into a structure. None: see the module.
        solution_column: The column of the answer; likewise.
        language: Keep the problems in English ("en": those without a Han character) or Chinese ("zh": the others).
        exclude_overlap: Files of evaluation problems: rows that overlap one of them are left out.
        overlap_threshold: The share of an evaluation problem's 13-grams that a row must have to overlap it. The same
            words and digits overlap at any length.
        max_prompt_length: The largest number of tokens of a prompt. Needs a tokenizer.
        tokenizer: What counts them, with its chat template, as TRL does.
        chat_template_kwargs: What TRL passes to the chat template, if anything.
        max_bad_rows: The largest fraction of different rows that cannot be used: more of them are an error.
        dropped_rows_file: A file to write, one JSON line for each row left out that is not a mere repeat.
    """

    prompt_template: str | None = None
    prompt_column: str | None = None
    solution_column: str | None = None
    language: Language | None = None
    exclude_overlap: Sequence[str] = ()
    overlap_threshold: float = 0.3
    max_prompt_length: int | None = None
    tokenizer: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_bad_rows: float = 0.01
    dropped_rows_file: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_template is not None:
            get_template(self.prompt_template)
        if self.language not in (None, *get_args(Language)):
            raise ValueError(f"language {self.language!r} is not one of 'en', 'zh'.")
        if isinstance(self.exclude_overlap, str):
            raise ValueError(f"exclude_overlap is a list of files, got the text {self.exclude_overlap!r}.")
        if not 0 < self.overlap_threshold <= 1:
            raise ValueError(f"overlap_threshold must be above 0 and at most 1, got {self.overlap_threshold}.")
        if not 0 <= self.max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows is a fraction from 0 to 1, got {self.max_bad_rows}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}.")
        if self.max_prompt_length is not None and self.tokenizer is None:
            raise ValueError("max_prompt_length needs a tokenizer that counts the tokens.")


def load_rows(
    source: str, *, split: str = "train", config: str | None = None, streaming: bool = False, **options: Any
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads rows and maps them to the columns `prompt`, `solution` and `answer_format`, one row a prompt.

    Args:
        source: A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder of such files, or the name of a hub data set.
        split: The split to load. A single file is the split `train`.
        config: The configuration of a hub data set that has several.
        streaming: Read the rows as they are used. Of conflicting answers the first is then taken, and what comes late
            in the stream is counted, and may be an error, when it comes.
        **options: The fields of `RowOptions`.

    Returns:
        The rows, with their other columns unchanged.

    Raises:
        FileNotFoundError: `source` is a path, and nothing is there.
        ValueError: The format, the split, the columns, the options or too many of the rows are not ones that can be
            used; the message names those found.
    """
    row_options = RowOptions(**options)
    loaded = load_splits(source, config, streaming)
    if split not in loaded:
        raise ValueError(f"Data set {source!r} has no split {split!r}: it has {', '.join(map(repr, loaded))}.")
    return _prepare(loaded[split], source, row_options)


def prepare_rows(
    rows: datasets.Dataset | datasets.IterableDataset, *, name: str, **options: Any
) -> datasets.Dataset | datasets.IterableDataset:
    """What `load_rows` does with rows once they are loaded. `name` stands for them in messages."""
    return _prepare(rows, name, RowOptions(**options))


def load_splits(source: str, config: str | None, streaming: bool) -> Mapping[str, Any]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"Data file {source!r} has the format {path.suffix!r}: use one of {', '.join(_BUILDERS)}.")
        if not path.stat().st_size:
            raise ValueError(f"Data file {source!r} is empty.")
        try:
            return datasets.load_dataset(_BUILDERS[path.suffix], data_files={"train": str(path)}, streaming=streaming)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(f"Data file {source!r} cannot be read as {path.suffix}: {cause}") from error
    if path.is_dir():
        return datasets.load_dataset(str(path), name=config, streaming=streaming)
    if path.suffix in _BUILDERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"Data file {source!r} does not exist (looked for {path.absolute()}).")
    return datasets.load_dataset(source, name=config, streaming=streaming)


def _prepare(
    rows: datasets.Dataset | datasets.IterableDataset, name: str, options: RowOptions
) -> datasets.Dataset | datasets.IterableDataset:
    if isinstance(rows, datasets.IterableDataset) and rows.column_names is None:
        columns = list(next(iter(rows), {}))
        if not columns:
            raise ValueError(f"Data set {name!r} has no rows.")
    else:
        columns = list(rows.column_names)
    reading = _Reading.of(columns, name, options)
    benchmarks = _Benchmarks(options.exclude_overlap, options.overlap_threshold)
    if isinstance(rows, datasets.IterableDataset):
        return _prepare_stream(rows, columns, name, reading, benchmarks, options)
    return _prepare_table(rows, name, reading, benchmarks, options)


# Reading one row


@dataclass(frozen=True)
class _Reading:
    """Where the parts of a row are, and what to make of them. A value, by which `datasets` finds a cached result."""

    prompt: str
    solution: str | None
    bare: bool  # a text in `prompt` is a problem, not a ready prompt
    has_format: bool
    template: PromptTemplate | None
    language: str | None

    @classmethod
    def of(cls, columns: Sequence[str], name: str, options: RowOptions) -> "_Reading":
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
            candidates = reversed(_SOLUTION_COLUMNS) if prompt == "prompt" else _SOLUTION_COLUMNS
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
        text = _text(prompt)
        if not text.strip():
            return read | {"dropped": _NO_PROMPT}
        known = recognise(prompt)
        is_problem = isinstance(prompt, str) and self.bare
        if self.template is None and not is_problem:
            answer_format = row.get("answer_format") if self.has_format else None
            if answer_format is None:
                answer_format = "any" if known is None else known[0].answer_format
            elif answer_format not in ANSWER_FORMATS:
                return read | {"dropped": _BAD_FORMAT}
            read |= {"prompt": prompt, "answer_format": answer_format, "problem": text if known is None else known[1]}
        else:
            problem = prompt if is_problem and known is None else bare_problem(prompt)
            if problem is None:
                return read | {"dropped": _NO_PROBLEM}
            template = self.template or DEFAULT_TEMPLATE
            read |= {"prompt": template.messages(problem), "answer_format": template.answer_format, "problem": problem}
        if self.solution is not None:
            solution = final_result(_get(row, self.solution))
            if not solution:
                return read | {"dropped": _NO_ANSWER}
            if not _is_maths(solution):
                return read | {"dropped": _BAD_ANSWER}
            read["solution"] = solution
        if self.language is not None and self.language != ("zh" if _HAN.search(read["problem"]) else "en"):
            read["dropped"] = _OTHER_LANGUAGE
        return read


_NO_PROMPT = "have no prompt"
_NO_ANSWER = "have no answer"
_BAD_ANSWER = "have an answer that math-verify cannot read"
_BAD_FORMAT = f"have an answer_format that is none of {', '.join(ANSWER_FORMATS)}"
_NO_PROBLEM = "have a prompt with instructions of an unknown wording, which prompt_template cannot replace"
_TOO_LONG = "have a prompt longer than max_prompt_length"
_BAD = (_NO_PROMPT, _NO_ANSWER, _BAD_ANSWER, _BAD_FORMAT, _NO_PROBLEM, _TOO_LONG)
_OTHER_LANGUAGE = "are in another language"
_OVERLAP = "overlap an evaluation problem"
_REPEAT = "repeat an earlier row's prompt and answer"
_CONFLICT = "have a prompt that has another answer in another row"
_LATER_CONFLICT = "have a prompt that has another answer in an earlier row, which is taken"


def _get(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field of a structure in it."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(prompt: Any) -> str:
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
    """Whether math-verify reads an answer as an expression, and not only as a text to be repeated letter by letter."""
    if _NUMBER.fullmatch(answer):
        return True
    from math_verify import parse

    from entropy_trl.rewards.equality import LONGEST

    if len(answer) > LONGEST:  # `math_reward` compares no such text
        return False

    # math-verify's time limit works by signals, which only the main thread gets.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    return not all(isinstance(parsed, str) for parsed in parse(rf"\boxed{{{answer}}}", parsing_timeout=limit))


def _normal(text: str) -> str:
    """A text with each run of white space as one blank: what makes two prompts, or two answers, the same."""
    return " ".join(text.split())


def _digest(text: str) -> int:
    return xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def _hashed(texts: Iterable[str]) -> np.ndarray[Any, Any]:
    return np.array([_digest(text) for text in texts], dtype=np.uint64)


# Tables: what is left out is decided on a few narrow columns, and only what stays is converted


def _prepare_table(
    rows: datasets.Dataset, name: str, reading: _Reading, benchmarks: "_Benchmarks", options: RowOptions
) -> datasets.Dataset:
    count = len(rows)
    if not count:
        raise ValueError(f"Data set {name!r} has no rows.")
    # Equal rows go first, by their hashes: the Python objects of a thousand rows exist at a time, and the 99 repeats of
    # each row of DAPO-Math-17k are never converted.
    hashes = rows.select_columns(reading.columns).map(
        _hashes,
        batched=True,
        remove_columns=reading.columns,
        features=datasets.Features({"hash": _HASH}),
        fn_kwargs={"code": _CODE},
        desc="Looking for repeats",
    )
    _, first = np.unique(_column(hashes, "hash"), return_index=True)
    sources = np.sort(first)
    dropped = _Dropped(name, count, different=len(sources))
    dropped.repeats = count - len(sources)

    features = datasets.Features({column: rows.features[column] for column in rows.features})
    for column in reading.consumed:
        features.pop(column, None)
    keeps_prompts = reading.template is None and not (reading.bare and _is_text(rows.features.get(reading.prompt)))
    if not keeps_prompts:
        features["prompt"] = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    elif reading.prompt in rows.features:
        features["prompt"] = rows.features[reading.prompt]
    else:
        features = None  # a field of a structure: `datasets` finds the type
    if features is not None:
        if reading.solution is not None:
            features["solution"] = datasets.Value("string")
        features["answer_format"] = datasets.Value("string")
        features |= {helper: datasets.Value("string") for helper in ("_problem", "_dropped")}
    rows = (rows if len(sources) == count else rows.select(sources)).map(
        _read_batch,
        batched=True,
        remove_columns=[column for column in reading.consumed if column in rows.column_names],
        features=features,
        fn_kwargs={"reading": reading, "code": _CODE},
        desc="Reading rows",
    )

    reasons = np.array(rows["_dropped"][:], dtype=object)
    _find_repeats(rows, reasons)
    hits = _find_overlaps(rows, reasons, benchmarks)
    _find_long_prompts(rows, reasons, options)
    for reason in dict.fromkeys(reasons):
        if reason:
            dropped.add(reason, sources[reasons == reason])
    dropped.overlaps = benchmarks.summary(hits.values())
    if options.dropped_rows_file is not None:
        dropped.write(options.dropped_rows_file, {int(sources[i]): benchmarks.names(hit) for i, hit in hits.items()})
    dropped.check(options.max_bad_rows)
    dropped.check_rest()
    if dropped.total:
        logger.warning("%s", dropped)
    rows = rows.remove_columns(["_problem", "_dropped"])
    kept = np.flatnonzero(reasons == "")
    return rows if len(kept) == len(rows) else rows.select(kept)


def _hashes(batch: Mapping[str, list[Any]], code: str) -> dict[str, np.ndarray[Any, Any]]:
    return {"hash": _hashed(map(repr, zip(*batch.values(), strict=True)))}


def _read_batch(batch: Mapping[str, list[Any]], reading: _Reading, code: str) -> dict[str, list[Any]]:
    read = [
        reading.row(dict(zip(reading.columns, values, strict=True)))
        for values in zip(*(batch[column] for column in reading.columns), strict=True)
    ]
    names = {"problem": "_problem", "dropped": "_dropped"}
    return {names.get(column, column): [row[column] for row in read] for column in read[0]}


def _column(rows: datasets.Dataset, name: str) -> np.ndarray[Any, Any]:
    column: np.ndarray[Any, Any] = rows.with_format("numpy")[name][:]
    return column


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _find_repeats(rows: datasets.Dataset, reasons: np.ndarray[Any, Any]) -> None:
    """Repeats that differ in white space or in other columns, and prompts with several answers."""
    usable = np.flatnonzero(reasons == "")
    if not len(usable):
        return
    subset = rows.select(usable)
    prompts = _hashed(map(_normal, subset["_problem"]))
    _, first, prompt = np.unique(prompts, return_index=True, return_inverse=True)
    repeat = first[prompt] != np.arange(len(usable))
    conflicting = np.zeros(len(first), dtype=bool)
    if "solution" in rows.column_names:
        answers = _hashed(map(_normal, subset["solution"]))
        conflicting[prompt[answers != answers[first][prompt]]] = True
    reasons[usable[repeat]] = _REPEAT
    reasons[usable[conflicting[prompt]]] = _CONFLICT


def _find_overlaps(
    rows: datasets.Dataset, reasons: np.ndarray[Any, Any], benchmarks: "_Benchmarks"
) -> dict[int, list[int]]:
    usable = np.flatnonzero(reasons == "")
    if not benchmarks.problems or not len(usable):
        return {}
    problems = rows.select(usable)["_problem"]
    hits = {int(i): hit for i, problem in zip(usable, problems, strict=True) if (hit := benchmarks.overlaps(problem))}
    reasons[list(hits)] = _OVERLAP
    return hits


def _find_long_prompts(rows: datasets.Dataset, reasons: np.ndarray[Any, Any], options: RowOptions) -> None:
    usable = np.flatnonzero(reasons == "")
    if options.max_prompt_length is None or not len(usable):
        return
    lengths = (
        rows.select(usable)
        .select_columns(["prompt"])
        .map(
            _lengths,
            batched=True,
            remove_columns=["prompt"],
            features=datasets.Features({"length": datasets.Value("int64")}),
            fn_kwargs={"tokenizer": options.tokenizer, "kwargs": dict(options.chat_template_kwargs), "code": _CODE},
            desc="Measuring prompts",
        )
    )
    reasons[usable[_column(lengths, "length") > options.max_prompt_length]] = _TOO_LONG


def _lengths(batch: Mapping[str, list[Any]], tokenizer: Any, kwargs: dict[str, Any], code: str) -> dict[str, list[int]]:
    return {"length": [_length(prompt, tokenizer, kwargs) for prompt in batch["prompt"]]}


def _length(prompt: Any, tokenizer: Any, kwargs: Mapping[str, Any]) -> int:
    """The tokens of a prompt, made of it as TRL makes them."""
    if isinstance(prompt, str):
        return len(tokenizer(text=prompt)["input_ids"])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs)
    return len(ids["input_ids"])


# Streams: the same in one pass, for which some of the digests of what has been read is kept


def _prepare_stream(
    rows: datasets.IterableDataset,
    columns: list[str],
    name: str,
    reading: _Reading,
    benchmarks: "_Benchmarks",
    options: RowOptions,
) -> datasets.IterableDataset:
    stream = _Stream(rows, columns, name, reading, benchmarks, options)
    for _ in stream(_FIRST_ROWS):  # a wrong column or template is told before training
        pass
    return datasets.IterableDataset.from_generator(stream)


class _Stream:
    """Generates the rows of a stream that can be used. Each pass begins at the start, and knows of no other.

    A generator is one shard, whatever its source has. So each process that takes a part of the stream reads all of it
    and finds the same repeats, and a pass that is resumed skips the rows that have been used.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        columns: Sequence[str],
        name: str,
        reading: _Reading,
        benchmarks: "_Benchmarks",
        options: RowOptions,
    ):
        self._rows, self._name, self._reading, self._benchmarks = rows, name, reading, benchmarks
        self._others = [column for column in columns if column not in reading.consumed]
        self._options = options
        self._told = -1  # the last row that is reported on, by whichever pass
        self._summed_up = False
        if options.dropped_rows_file is not None:
            _write_lines(options.dropped_rows_file, [])

    def __call__(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows to train on, out of all or the first `limit` that there are."""
        dropped, digests, hits = _Dropped(self._name), _Digests(), []
        for index, row in enumerate(islice(self._source(), limit)):
            dropped.count += 1
            text = repr([row.get(column) for column in self._reading.columns])
            if digests.put(_digest(text), 0) is not None:
                dropped.repeats += 1
                continue
            dropped.different += 1
            read = self._reading.row(row)
            reason, problem = read.pop("dropped"), read.pop("problem")
            reason = reason or self._repeat(digests, problem, read.get("solution", ""))
            hit = [] if reason else self._benchmarks.overlaps(problem)
            reason = reason or (_OVERLAP if hit else "") or self._too_long(read["prompt"])
            if reason == _OVERLAP:
                hits.append(hit)
            if reason:
                self._drop(dropped, reason, index, hit)
            if dropped.different >= _FIRST_ROWS:
                dropped.check(self._options.max_bad_rows)
            if not reason:
                yield {column: row.get(column) for column in self._others} | read
        if limit is None or dropped.count < limit:
            dropped.overlaps = self._benchmarks.summary(hits)
            dropped.check(self._options.max_bad_rows)
            dropped.check_rest()
            if dropped.total and not self._summed_up:
                logger.warning("%s", dropped)
            self._summed_up = True

    def _source(self) -> Iterator[dict[str, Any]]:
        # `iter` reads all shards, where iterating in a worker process of a data loader would read that worker's only.
        for batch in self._rows.iter(batch_size=_FIRST_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def _repeat(self, digests: "_Digests", problem: str, answer: str) -> str:
        """Why a row with this problem and answer is left out after those before it, if it is."""
        answer_digest = _digest(_normal(answer))
        before = digests.put(_digest("problem:" + _normal(problem)), answer_digest)
        return "" if before is None else _REPEAT if before == answer_digest else _LATER_CONFLICT

    def _too_long(self, prompt: Any) -> str:
        limit = self._options.max_prompt_length
        if limit is None or _length(prompt, self._options.tokenizer, self._options.chat_template_kwargs) <= limit:
            return ""
        return _TOO_LONG

    def _drop(self, dropped: "_Dropped", reason: str, row: int, hit: Sequence[int]) -> None:
        dropped.add_one(reason, row)
        if row <= self._told:
            return  # by an earlier pass
        self._told = row
        if reason != _REPEAT and dropped.numbers[reason] <= _NAMED_ROWS:
            logger.warning("Data set %r: row %d is dropped: rows that %s.", self._name, row, reason)
        if self._options.dropped_rows_file is not None:
            line = _dropped_line(row, reason, self._benchmarks.names(hit))
            _write_lines(self._options.dropped_rows_file, [line], mode="a")


class _Digests:
    """A map of digests to digests, of 64 bits each: 16 bytes a slot, with a third to two thirds of the slots in use."""

    def __init__(self) -> None:
        self._used = 0
        self._make(1024)

    def _make(self, slots: int) -> None:
        self._keys, self._values = (array("Q", bytes(8 * slots)) for _ in range(2))

    def put(self, key: int, value: int) -> int | None:
        """Sets what is not there yet. Returns what was there, None if nothing."""
        key = key or 1  # 0 is an empty slot
        slot = self._slot(key)
        if self._keys[slot]:
            return self._values[slot]
        self._keys[slot], self._values[slot] = key, value
        self._used += 1
        if 3 * self._used > 2 * len(self._keys):
            keys, values = self._keys, self._values
            self._make(2 * len(keys))
            for key, value in zip(keys, values, strict=True):
                if key:
                    slot = self._slot(key)
                    self._keys[slot], self._values[slot] = key, value
        return None

    def _slot(self, key: int) -> int:
        last = len(self._keys) - 1
        slot = key & last
        while self._keys[slot] and self._keys[slot] != key:
            slot = (slot + 1) & last
        return slot


# Overlap with evaluation problems


class _Benchmarks:
    """The n-grams of evaluation problems, and which of the problems a training problem overlaps."""

    def __init__(self, files: Sequence[str], threshold: float):
        self.threshold = threshold
        self.problems: list[tuple[str, int]] = []  # the file and the row of each
        self._sizes: list[int] = []
        self._having: dict[str, list[int]] = defaultdict(list)
        self._same: dict[str, list[int]] = defaultdict(list)
        for file in dict.fromkeys(files):
            loaded = load_splits(file, None, streaming=False)
            rows = loaded["test" if "test" in loaded else next(iter(loaded))]
            column = _Reading.of(rows.column_names, file, RowOptions()).prompt
            for row, prompt in enumerate(rows[column]):
                known = recognise(prompt) if prompt else None
                self._add(file, row, _text(prompt) if known is None else known[1])

    def _add(self, file: str, row: int, problem: str) -> None:
        index = len(self.problems)
        self.problems.append((file, row))
        words = _WORD.findall(problem.lower())
        ngrams = _ngrams(words)
        self._sizes.append(len(ngrams))
        for ngram in ngrams:
            self._having[ngram].append(index)
        if words:
            self._same["".join(words)].append(index)

    def overlaps(self, problem: str) -> list[int]:
        """The evaluation problems that a training problem overlaps, as indices of `problems`."""
        if not self.problems:
            return []
        words = _WORD.findall(problem.lower())
        shared = Counter(index for ngram in _ngrams(words) for index in self._having.get(ngram, ()))
        found = {index for index, number in shared.items() if number >= self.threshold * self._sizes[index]}
        return sorted(found.union(self._same.get("".join(words), ())))

    def names(self, hit: Iterable[int]) -> list[str]:
        return [f"{file}:{row}" for file, row in (self.problems[index] for index in hit)]

    def summary(self, hits: Iterable[Sequence[int]]) -> list[str]:
        """A line for each file: how many of its problems are overlapped, and by how many training rows."""
        hits = list(hits)
        totals = Counter(file for file, _ in self.problems)
        found = Counter(file for file, _ in {self.problems[index] for hit in hits for index in hit})
        rows = Counter(file for hit in hits for file in {self.problems[index][0] for index in hit})
        return [f"{file}: {found[file]} of {totals[file]} problems, by {rows[file]} rows" for file in totals]


def _ngrams(words: Sequence[str]) -> set[str]:
    return {" ".join(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)}


# What was left out


class _Dropped:
    """The rows left out of a data set, by reason."""

    def __init__(self, name: str, count: int = 0, different: int = 0):
        self.name, self.count, self.different = name, count, different
        self.repeats = 0  # equal rows, which are not listed: DAPO-Math-17k has 1.8 million
        self.rows: dict[str, list[int]] = {}  # of a stream only those that are named
        self.numbers: Counter[str] = Counter()
        self.overlaps: list[str] = []

    def add(self, reason: str, rows: Iterable[int]) -> None:
        self.rows[reason] = [int(row) for row in rows]
        self.numbers[reason] = len(self.rows[reason])

    def add_one(self, reason: str, row: int) -> None:
        self.numbers[reason] += 1
        if self.numbers[reason] <= _NAMED_ROWS:
            self.rows.setdefault(reason, []).append(row)

    @property
    def total(self) -> int:
        return self.repeats + self.numbers.total()

    def _line(self, reason: str) -> str:
        rows, number = self.rows.get(reason, []), self.numbers[reason]
        named = ", ".join(map(str, rows[:_NAMED_ROWS])) + (", ..." if number > _NAMED_ROWS else "")
        number += self.repeats if reason == _REPEAT else 0
        return f"{number} {reason}" + (f" ({'rows' if len(rows) > 1 else 'row'} {named})" if rows else "")

    def __str__(self) -> str:
        order = [_REPEAT, _CONFLICT, _LATER_CONFLICT, *_BAD, _OTHER_LANGUAGE, _OVERLAP]
        given = [reason for reason in order if reason in self.rows or (reason == _REPEAT and self.repeats)]
        lines = [f"Data set {self.name!r}: kept {self.count - self.total} of {self.count} rows. Of the others"]
        for reason in given:
            lines.append(f"  {self._line(reason)}")
            lines += [f"    {line}" for line in self.overlaps if reason == _OVERLAP]
        return "\n".join(lines)

    def check(self, max_bad_rows: float) -> None:
        """Raises ValueError if too many rows cannot be used."""
        bad = [reason for reason in _BAD if reason in self.rows]
        number = sum(self.numbers[reason] for reason in bad)
        if number > max_bad_rows * self.different:
            raise ValueError(
                f"Data set {self.name!r}: {number} of {self.different} different rows cannot be used, more than "
                f"max_bad_rows ({max_bad_rows:g} of them) allows: {'; '.join(map(self._line, bad))}."
            )

    def check_rest(self) -> None:
        """Raises ValueError if no row is left."""
        if self.total == self.count:
            raise ValueError(f"No row is left. {self}." if self.count else f"Data set {self.name!r} has no rows.")

    def write(self, file: str, overlaps: Mapping[int, Sequence[str]]) -> None:
        lines = [
            _dropped_line(row, reason, overlaps.get(row, ())) for reason, rows in self.rows.items() for row in rows
        ]
        _write_lines(file, sorted(lines, key=lambda line: int(line["row"])))


def _dropped_line(row: int, reason: str, overlaps: Sequence[str]) -> dict[str, Any]:
    return {"row": row, "reason": reason} | ({"overlaps": list(overlaps)} if overlaps else {})


def _write_lines(file: str, lines: Iterable[Mapping[str, Any]], mode: Literal["w", "a"] = "w") -> None:
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)
