"""Loading files, folders and hub data sets as splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from entropy_trl.data.exact import csv_names, csv_text, has_long_numbers, json_rows, json_table
from entropy_trl.data.reading import PROBLEM_COLUMNS, SOLUTION_COLUMNS


_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXTS = ("prompt", "source_prompt", *PROBLEM_COLUMNS, *SOLUTION_COLUMNS)
#: What `datasets`, pandas and pyarrow raise over a file that they cannot read.
UNREADABLE = (
    datasets.exceptions.DatasetGenerationError,
    ValueError,
    OverflowError,
    TypeError,
    NotImplementedError,
    RecursionError,
)


def load_splits(source: str, config: str | None, streaming: bool, texts: Sequence[str] = ()) -> Mapping[str, Any]:
    """Load all splits of a file, a folder or a hub data set.

    Args:
        source (`str`): A path or the name of a hub data set. A file is the split `train`.
        config (`str | None`): The configuration of a hub data set that has several.
        streaming (`bool`): Whether rows are read as they are used.
        texts (`Sequence[str]`, *optional*, defaults to `()`): Columns of a CSV file that are text, whatever they look
            like, beside the usual ones.

    Raises:
        FileNotFoundError: `source` is a path, and nothing is there.
        ValueError: The files cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"Data file {source!r} has the format {path.suffix!r}: use one of {', '.join(_BUILDERS)}.")
        if not path.stat().st_size:
            raise ValueError(f"Data file {source!r} is empty.")
        try:
            return _load_file(path, streaming, texts)
        except UNREADABLE as error:
            raise ValueError(f"Data file {source!r} cannot be read as {path.suffix}: {cause(error)}") from error
    if path.is_dir():
        try:
            return datasets.load_dataset(str(path), name=config, streaming=streaming)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"The files of {source!r} cannot be read: {cause(error)}") from error
    if path.suffix in _BUILDERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"Data file {source!r} does not exist (looked for {path.absolute()}).")
    return datasets.load_dataset(source, name=config, streaming=streaming)


def _load_file(path: Path, streaming: bool, texts: Sequence[str]) -> Mapping[str, Any]:
    kind = _BUILDERS[path.suffix]
    options: dict[str, Any] = {"data_files": {"train": str(path)}, "streaming": streaming}
    if kind == "parquet":
        return datasets.load_dataset(kind, **options)
    # `datasets` makes floats of integers beyond 64 bits, or fails. So answers in CSV files are read as text, and a
    # JSON file with such numbers is read here.
    if kind == "csv":
        names = csv_names(path)
        converters = dict.fromkeys([*_TEXTS, *texts], csv_text)
        try:
            return datasets.load_dataset(kind, converters=converters, **options)
        except datasets.exceptions.DatasetGenerationError:
            # Other columns have such numbers, or several types.
            return datasets.load_dataset(kind, converters=dict.fromkeys(names, csv_text), **options)
    try:
        loaded = datasets.load_dataset(kind, **options)
    except UNREADABLE:
        return {"train": _exact(path, streaming)}
    features = loaded["train"].features
    if (features is None or _has_float_answers(features, texts)) and has_long_numbers(path):
        return {"train": _exact(path, streaming)}
    return loaded


def _exact(path: Path, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    if streaming:
        return datasets.IterableDataset.from_generator(json_rows, gen_kwargs={"file": str(path)})
    return json_table(str(path))


def _has_float_answers(features: datasets.Features, texts: Sequence[str]) -> bool:
    """Whether a column that may hold answers has floats, at any depth."""
    columns = {name.partition(".")[0] for name in (*SOLUTION_COLUMNS, "reward_model", *texts)}
    return any("float" in repr(features[name]) for name in columns if name in features)


def cause(error: BaseException) -> str:
    """What a library says of a file that it cannot read."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
