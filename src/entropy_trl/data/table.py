"""Tables: what is left out is decided on a few narrow columns, and only what stays is converted."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from entropy_trl import templates
from entropy_trl.data.answers import normal, normal_answer, same_answer
from entropy_trl.data.dropped import CONFLICT, FAILING_SOLUTION, OVERLAP, REPEAT, TOO_LONG, Dropped
from entropy_trl.data.options import RowOptions
from entropy_trl.data.overlap import Benchmarks
from entropy_trl.data.reading import Reading, hashed, prompt_length
from entropy_trl.data.solutions import failing_rows


logger = logging.getLogger(__name__)

# Two prompts, or two texts, are the same when these 64 bits are: a chance of 1e-7 for any pair among 2 million.
_HASH = datasets.Value("uint64")
# `datasets` finds the cached result of a function by the function's name: a change of the code has to be in it too.
_CODE_FILES = (
    *sorted(Path(__file__).parent.glob("*.py")),
    Path(templates.__file__),
    *sorted((Path(templates.__file__).parent / "rewards").rglob("*.py")),
)
# Rows that are converted at a time. Those of programming problems may have megabytes of tests.
_BATCH, _CODE_BATCH = 1000, 100
_HELPERS = {"problem": "_problem", "statement": "_statement", "dropped": "_dropped"}
_CODE = Hasher.hash([file.read_bytes() for file in _CODE_FILES])


def prepare_table(
    rows: datasets.Dataset, name: str, reading: Reading, benchmarks: "Benchmarks", options: RowOptions
) -> datasets.Dataset:
    count = len(rows)
    if not count:
        raise ValueError(f"Data set {name!r} has no rows.")
    # Equal rows go first, by their hashes: the Python objects of a thousand rows exist at a time, and the 99 repeats of
    # each row of DAPO-Math-17k are never converted.
    batch_size = _BATCH if set(reading.schemas) <= {"ground_truth"} else _CODE_BATCH
    hashes = rows.select_columns(reading.columns).map(
        _hashes,
        batched=True,
        batch_size=batch_size,
        remove_columns=reading.columns,
        features=datasets.Features({"hash": _HASH}),
        fn_kwargs={"code": _CODE},
        desc="Looking for repeats",
    )
    _, first = np.unique(_column(hashes, "hash"), return_index=True)
    sources = np.sort(first)
    dropped = Dropped(name, count, different=len(sources))
    dropped.repeats = count - len(sources)

    features = datasets.Features({column: rows.features[column] for column in rows.features})
    for column in reading.consumed:
        features.pop(column, None)
    is_bare = reading.bare and isinstance(rows.features.get(reading.prompt), datasets.Value)
    keeps_prompts = reading.template is None and not is_bare and not reading.chat_text
    if not keeps_prompts:
        features["prompt"] = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    elif reading.prompt in rows.features:
        feature = rows.features[reading.prompt]
        features["prompt"] = datasets.Value("string") if isinstance(feature, datasets.Value) else feature
    else:
        features = None  # a field of a structure: `datasets` finds the type
    if features is not None:
        if reading.solution is not None:
            features["solution"] = datasets.Value("string")
        features["answer_format"] = datasets.Value("string")
        if reading.schemas:  # the tests of many rows are more than 32-bit offsets reach
            features |= {"tests": datasets.Value("large_string"), "code_format": datasets.Value("string")}
        helpers = ("_problem", "_statement", "_dropped") if reading.schemas else ("_problem", "_dropped")
        features |= {helper: datasets.Value("string") for helper in helpers}
    rows = (rows if len(sources) == count else rows.select(sources)).map(
        _read_batch,
        batched=True,
        batch_size=_CODE_BATCH if reading.schemas else _BATCH,
        remove_columns=[column for column in reading.consumed if column in rows.column_names],
        features=features,
        fn_kwargs={"reading": reading, "code": _CODE},
        desc="Reading rows",
    )

    reasons = np.array(rows["_dropped"][:], dtype=object)
    _find_repeats(rows, reasons, with_answers=reading.solution is not None)
    hits = _find_overlaps(rows, reasons, benchmarks)
    _find_long_prompts(rows, reasons, options)
    if options.check_solutions and reading.schemas:
        usable = np.flatnonzero(reasons == "")
        reasons[usable[failing_rows(rows.select(usable))]] = FAILING_SOLUTION
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
    rows = rows.remove_columns([column for column in rows.column_names if column in _HELPERS.values()])
    if reading.schemas:
        rows = _without_empty(rows, reading)
    kept = np.flatnonzero(reasons == "")
    return rows if len(kept) == len(rows) else rows.select(kept)


def _hashes(batch: Mapping[str, list[Any]], code: str) -> dict[str, np.ndarray[Any, Any]]:
    return {"hash": hashed(map(repr, zip(*batch.values(), strict=True)))}


def _read_batch(batch: Mapping[str, list[Any]], reading: Reading, code: str) -> dict[str, list[Any]]:
    read = [
        reading.row(dict(zip(reading.columns, values, strict=True)))
        for values in zip(*(batch[column] for column in reading.columns), strict=True)
    ]
    return {_HELPERS.get(column, column): [row[column] for row in read] for column in read[0]}


def _column(rows: datasets.Dataset, name: str) -> np.ndarray[Any, Any]:
    column: np.ndarray[Any, Any] = rows.with_format("numpy")[name][:]
    return column


def _without_empty(rows: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """Without the columns of programming problems if there are none, or of answers if there is nothing else."""
    if not _has_values(rows, "tests"):
        return rows.remove_columns(["tests", "code_format"])
    if "ground_truth" in reading.schemas and reading.solution is not None and not _has_values(rows, "solution"):
        return rows.remove_columns("solution")
    return rows


def _has_values(rows: datasets.Dataset, name: str) -> bool:
    column = rows.data.column(name)
    return bool(column.null_count < len(column))


def _find_repeats(rows: datasets.Dataset, reasons: np.ndarray[Any, Any], with_answers: bool) -> None:
    """Repeats that differ in white space or in other columns, and prompts with several answers."""
    usable = np.flatnonzero(reasons == "")
    if not len(usable):
        return
    subset = rows.select(usable)
    prompts = hashed(map(normal, subset["_problem"]))
    _, first, prompt = np.unique(prompts, return_index=True, return_inverse=True)
    repeat = first[prompt] != np.arange(len(usable))
    conflicting = np.zeros(len(first), dtype=bool)
    if with_answers:
        answers = hashed(normal_answer(answer or "") for answer in subset["solution"])
        for row in map(int, np.flatnonzero(answers != answers[first][prompt])):
            of = prompt[row]
            if not conflicting[of]:
                one, other = subset[row]["solution"], subset[int(first[of])]["solution"]
                conflicting[of] = not (one and other and same_answer(one, other))
    reasons[usable[repeat]] = REPEAT
    reasons[usable[conflicting[prompt]]] = CONFLICT


def _find_overlaps(
    rows: datasets.Dataset, reasons: np.ndarray[Any, Any], benchmarks: "Benchmarks"
) -> dict[int, list[int]]:
    usable = np.flatnonzero(reasons == "")
    if not benchmarks.problems or not len(usable):
        return {}
    problems = rows.select(usable)["_statement" if "_statement" in rows.column_names else "_problem"]
    hits = {int(i): hit for i, problem in zip(usable, problems, strict=True) if (hit := benchmarks.overlaps(problem))}
    reasons[list(hits)] = OVERLAP
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
    reasons[usable[_column(lengths, "length") > options.max_prompt_length]] = TOO_LONG


def _lengths(batch: Mapping[str, list[Any]], tokenizer: Any, kwargs: dict[str, Any], code: str) -> dict[str, list[int]]:
    return {"length": [prompt_length(prompt, tokenizer, kwargs) for prompt in batch["prompt"]]}
