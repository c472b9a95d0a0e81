"""Tables: what is left out is decided on a few narrow columns, and only what stays is converted."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from entropy_trl import templates
from entropy_trl.data.answers import normal, normal_answer
from entropy_trl.data.dropped import CONFLICT, OVERLAP, REPEAT, TOO_LONG, Dropped
from entropy_trl.data.options import RowOptions
from entropy_trl.data.overlap import Benchmarks
from entropy_trl.data.reading import Reading, hashed, prompt_length


logger = logging.getLogger(__name__)

# Two prompts, or two texts, are the same when these 64 bits are: a chance of 1e-7 for any pair among 2 million.
_HASH = datasets.Value("uint64")
# `datasets` finds the cached result of a function by the function's name: a change of the code has to be in it too.
_CODE_FILES = (
    *sorted(Path(__file__).parent.glob("*.py")),
    Path(templates.__file__),
    *sorted((Path(templates.__file__).parent / "rewards").glob("*.py")),
)
_CODE = Hasher.hash([file.read_bytes() for file in _CODE_FILES])


def prepare_table(
    rows: datasets.Dataset, name: str, reading: Reading, benchmarks: "Benchmarks", options: RowOptions
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
    return {"hash": hashed(map(repr, zip(*batch.values(), strict=True)))}


def _read_batch(batch: Mapping[str, list[Any]], reading: Reading, code: str) -> dict[str, list[Any]]:
    read = [
        reading.row(dict(zip(reading.columns, values, strict=True)))
        for values in zip(*(batch[column] for column in reading.columns), strict=True)
    ]
    names = {"problem": "_problem", "dropped": "_dropped"}
    return {names.get(column, column): [row[column] for row in read] for column in read[0]}


def _column(rows: datasets.Dataset, name: str) -> np.ndarray[Any, Any]:
    column: np.ndarray[Any, Any] = rows.with_format("numpy")[name][:]
    return column


def _find_repeats(rows: datasets.Dataset, reasons: np.ndarray[Any, Any]) -> None:
    """Repeats that differ in white space or in other columns, and prompts with several answers."""
    usable = np.flatnonzero(reasons == "")
    if not len(usable):
        return
    subset = rows.select(usable)
    prompts = hashed(map(normal, subset["_problem"]))
    _, first, prompt = np.unique(prompts, return_index=True, return_inverse=True)
    repeat = first[prompt] != np.arange(len(usable))
    conflicting = np.zeros(len(first), dtype=bool)
    if "solution" in rows.column_names:
        answers = hashed(map(normal_answer, subset["solution"]))
        conflicting[prompt[answers != answers[first][prompt]]] = True
    reasons[usable[repeat]] = REPEAT
    reasons[usable[conflicting[prompt]]] = CONFLICT


def _find_overlaps(
    rows: datasets.Dataset, reasons: np.ndarray[Any, Any], benchmarks: "Benchmarks"
) -> dict[int, list[int]]:
    usable = np.flatnonzero(reasons == "")
    if not benchmarks.problems or not len(usable):
        return {}
    problems = rows.select(usable)["_problem"]
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
