"""Rows of problems with verifiable answers: loading, mapping to the columns that the trainer reads, de-duplication.

The trainer reads a column `prompt`, and a reward function such as `math_reward` a column `solution`. `load_rows` makes
them out of the schemas that files and hub data sets come in:

| columns found                              | `prompt`                             | `solution`                     |
|--------------------------------------------|--------------------------------------|--------------------------------|
| `prompt`, `reward_model` (DAPO-Math-17k)   | as it is                             | `reward_model["ground_truth"]` |
| `prompt`, and `solution` or `answer`       | as it is                             | that column                    |
| `problem` or `question`, and `answer` or `solution` | one user message made by the template | that column           |
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets


logger = logging.getLogger(__name__)

PROMPT_TEMPLATE = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."
"""How a bare problem becomes a prompt. The answer is asked for in the form that `math_reward` reads."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_PROBLEM_COLUMNS = ("problem", "question")
_SOLUTION_COLUMNS = ("answer", "solution")


def load_rows(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    prompt_template: str = PROMPT_TEMPLATE,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads rows and maps them to the columns `prompt` and `solution`, one row a prompt.

    Args:
        source: A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder of such files, or the name of a hub data set.
        split: The split to load. A single file is the split `train`.
        config: The configuration of a hub data set that has several.
        streaming: Read the rows as they are used. They are then not de-duplicated.
        prompt_template: Text in which `{problem}` stands for the problem, for files whose rows are bare problems.

    Returns:
        The rows, with their other columns unchanged.

    Raises:
        FileNotFoundError: `source` is a path, and nothing is there.
        ValueError: The format, the split or the columns are not ones that can be used; the message names those found.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"Data file {source!r} has the format {path.suffix!r}: use one of {', '.join(_BUILDERS)}.")
        try:
            loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files={"train": str(path)}, streaming=streaming)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"Data file {source!r} cannot be read as {path.suffix}: {error.__cause__}") from error
    elif path.is_dir():
        loaded = datasets.load_dataset(str(path), name=config, streaming=streaming)
    elif path.suffix in _BUILDERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"Data file {source!r} does not exist (looked for {path.absolute()}).")
    else:
        loaded = datasets.load_dataset(source, name=config, streaming=streaming)
    if split not in loaded:
        raise ValueError(f"Data set {source!r} has no split {split!r}: it has {', '.join(map(repr, loaded))}.")
    return prepare_rows(loaded[split], name=source, prompt_template=prompt_template)


def prepare_rows(
    rows: datasets.Dataset | datasets.IterableDataset, *, name: str, prompt_template: str = PROMPT_TEMPLATE
) -> datasets.Dataset | datasets.IterableDataset:
    """Maps loaded rows to the columns `prompt` and `solution` and drops those that repeat a prompt; see `load_rows`."""
    if "{problem}" not in prompt_template:
        raise ValueError(f"prompt_template {prompt_template!r} has no '{{problem}}' to put the problem in.")
    if isinstance(rows, datasets.IterableDataset) and rows.column_names is None:
        columns = list(next(iter(rows)))
    else:
        columns = list(rows.column_names)
    problem_column = next((column for column in _PROBLEM_COLUMNS if column in columns), None)
    if "prompt" in columns:
        problem_column = None
    elif problem_column is None:
        raise ValueError(
            f"Data set {name!r} has no column 'prompt', 'problem' or 'question': its columns are "
            f"{', '.join(map(repr, columns))}. Rename the one that holds the problem."
        )
    # A row of a worked example has its reasoning in `solution` and its result in `answer`, so `answer` goes first,
    # except beside `prompt`, where TRL's convention is that `solution` is the result.
    candidates = reversed(_SOLUTION_COLUMNS) if "prompt" in columns else _SOLUTION_COLUMNS
    solution_column = next((column for column in candidates if column in columns), None)
    if "reward_model" in columns:
        solution_column = None

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        if problem_column is not None:
            content = prompt_template.replace("{problem}", row[problem_column])
            converted["prompt"] = [{"role": "user", "content": content}]
        if "reward_model" in columns:
            converted["solution"] = str(row["reward_model"]["ground_truth"])
        elif solution_column is not None:
            converted["solution"] = _result(str(row[solution_column]))
        return converted

    consumed = [column for column in (problem_column, solution_column) if column not in (None, "solution")]
    rows = rows.map(convert, remove_columns=consumed)
    if isinstance(rows, datasets.IterableDataset):
        logger.warning("Data set %r is streamed: rows that repeat a prompt are kept.", name)
        return rows
    return _without_repeats(rows, name)


def _result(answer: str) -> str:
    """The result at the end of a GSM8K answer, whose reasoning and result are separated by `####`."""
    return answer.rsplit("####", maxsplit=1)[-1].strip()


def _without_repeats(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    """The first row of each prompt. Says how many rows were dropped, and how many of these had another solution."""
    has_solution = "solution" in rows.column_names
    prompts = (json.dumps(prompt, sort_keys=True) for prompt in rows["prompt"])
    solutions = rows["solution"] if has_solution else [None] * len(rows)
    first: dict[str, Any] = {}
    kept: list[int] = []
    conflicting = 0
    for index, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        if prompt not in first:
            first[prompt] = solution
            kept.append(index)
        elif first[prompt] != solution:
            conflicting += 1
    if len(kept) == len(rows):
        return rows
    logger.warning(
        "Data set %r: dropped %d of %d rows, whose prompt repeats that of an earlier row (%d of them with another "
        "solution); %d rows remain.",
        name,
        len(rows) - len(kept),
        len(rows),
        conflicting,
        len(kept),
    )
    return rows.select(kept)
