r"""Rows of problems with verifiable answers: loading, mapping to the columns that are read, and leaving out bad rows.

The trainer reads a column `prompt`; `math_reward` reads `solution`, and `answer_format`, which says where the prompt
asks for the answer (see `templates.py`). `load_rows` makes them out of the schemas that files and hub data sets have:

| columns found                                       | problem or prompt          | answer                       |
|-----------------------------------------------------|----------------------------|------------------------------|
| `prompt`, `reward_model` (DAPO-Math-17k)            | `prompt`, ready            | `reward_model.ground_truth`  |
| and `source_prompt` (DAPO-Math-17k-Processed)       | `prompt`, a bare problem   | `reward_model.ground_truth`  |
| `prompt`, and `solution`, `answer`, `final_answer`  | `prompt`, ready            | the first of them            |
| or `label`                                          |                            |                              |
| `problem` or `question`, and `answer` or `solution` | that column, bare          | that column                  |
| others                                              | `RowOptions.prompt_column` | `RowOptions.solution_column` |

What is left out is counted by reason, in one log message: rows that repeat a prompt, prompts with conflicting answers,
rows that cannot be used, and what the options ask for. docs/data.md has the rules.
"""

from dataclasses import replace
from itertools import islice
from typing import Unpack

import datasets

from entropy_trl.data.loading import UNREADABLE, cause, load_splits
from entropy_trl.data.options import RowFields, RowOptions
from entropy_trl.data.overlap import Benchmarks
from entropy_trl.data.reading import Reading
from entropy_trl.data.stream import prepare_stream
from entropy_trl.data.table import prepare_table


_SAMPLES = 20  # rows that show what the columns are


def load_rows(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    options: RowOptions | None = None,
    **fields: Unpack[RowFields],
) -> datasets.Dataset | datasets.IterableDataset:
    """Load rows and map them to the columns `prompt`, `solution` and `answer_format`, one row a prompt.

    Args:
        source (`str`): A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder of such files, or the name of a hub
            data set.
        split (`str`, *optional*, defaults to `"train"`): The split to load. A single file is the split `train`.
        config (`str`, *optional*): The configuration of a hub data set that has several.
        streaming (`bool`, *optional*, defaults to `False`): Read the rows as they are used. Of conflicting answers the
            first is then taken, and what comes late in the stream is counted, and may be an error, when it comes.
        options ([`RowOptions`], *optional*): What to make of the rows, and which to leave out.
        **fields (`Unpack[RowFields]`): Single fields of `RowOptions`, which replace those of `options`.

    Returns:
        `datasets.Dataset | datasets.IterableDataset`: The rows, with their other columns unchanged.

    Raises:
        FileNotFoundError: `source` is a path, and nothing is there.
        ValueError: The format, the split, the columns, the options or too many of the rows are not ones that can be
            used; the message names those found.

    Example:

    ```python
    >>> rows = load_rows("train.jsonl", options=RowOptions(prompt_template="r1_zero", language="en"))
    >>> rows = load_rows("train.jsonl", prompt_template="r1_zero", language="en")  # the same
    ```
    """
    options = replace(options or RowOptions(), **fields)
    named = [column for column in (options.prompt_column, options.solution_column) if column]
    loaded = load_splits(source, config, streaming, named)
    if split not in loaded:
        raise ValueError(f"Data set {source!r} has no split {split!r}: it has {', '.join(map(repr, loaded))}.")
    return _prepare(loaded[split], source, options)


def prepare_rows(
    rows: datasets.Dataset | datasets.IterableDataset,
    *,
    name: str,
    options: RowOptions | None = None,
    **fields: Unpack[RowFields],
) -> datasets.Dataset | datasets.IterableDataset:
    """Do what `load_rows` does once the rows are loaded. `name` stands for them in messages."""
    return _prepare(rows, name, replace(options or RowOptions(), **fields))


def _prepare(
    rows: datasets.Dataset | datasets.IterableDataset, name: str, options: RowOptions
) -> datasets.Dataset | datasets.IterableDataset:
    try:
        samples = list(islice(rows, _SAMPLES))
    except UNREADABLE as error:  # a stream is first read here
        raise ValueError(f"Data set {name!r} cannot be read: {cause(error)}") from error
    if not samples:
        raise ValueError(f"Data set {name!r} has no rows.")
    columns = list(rows.column_names or samples[0])
    features = rows.features or {}
    classes = [column for column in columns if isinstance(features.get(column), datasets.ClassLabel)]
    reading = Reading.of(columns, name, options, samples, classes)
    benchmarks = Benchmarks(options.exclude_overlap, options.overlap_threshold)
    if isinstance(rows, datasets.IterableDataset):
        return prepare_stream(rows, columns, name, reading, benchmarks, options)
    return prepare_table(rows, name, reading, benchmarks, options)
