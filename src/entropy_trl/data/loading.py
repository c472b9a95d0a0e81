"""Loading files, folders and hub data sets as splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json

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
            return _load_set(str(path), config, streaming, texts)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"The files of {source!r} cannot be read: {cause(error)}") from error
    if path.suffix in _BUILDERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"Data file {source!r} does not exist (looked for {path.absolute()}).")
    return _load_set(source, config, streaming, texts)


def _load_set(source: str, config: str | None, streaming: bool, texts: Sequence[str]) -> Mapping[str, Any]:
    """Load a folder or a hub data set. Its CSV and JSON files are read as [`_load_file`] reads a single one."""
    builder = datasets.load_dataset_builder(source, name=config)
    options: dict[str, Any] = {"name": config, "streaming": streaming}
    if isinstance(builder, Csv):
        options["converters"] = dict.fromkeys([*_TEXTS, *texts], csv_text)
        try:
            return datasets.load_dataset(source, **options)
        except datasets.exceptions.DatasetGenerationError:
            names = {name for files in _files(builder).values() for file in files for name in csv_names(Path(file))}
            return datasets.load_dataset(source, **options | {"converters": dict.fromkeys(sorted(names), csv_text)})
    if not isinstance(builder, Json) or builder.config.field is not None:
        return datasets.load_dataset(source, **options)
    remote = any("://" in str(file) for files in builder.config.data_files.values() for file in files)
    try:
        loaded = datasets.load_dataset(source, **options)
    except UNREADABLE:
        if streaming and remote:
            raise
        loaded = None
    if streaming and remote:  # a stream does not download its files
        return loaded
    # A stream knows the columns of its first rows only.
    if loaded is not None and not streaming and not any(_has_floats(rows.features, texts) for rows in loaded.values()):
        return loaded
    splits = _files(builder)
    if loaded is not None and not any(has_long_numbers(Path(file)) for files in splits.values() for file in files):
        return loaded
    try:
        return {split: _exact(files, streaming) for split, files in splits.items()}
    except UNREADABLE as error:
        raise ValueError(f"Data set {source!r} cannot be read: {error}") from error


def _files(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """Return the files of each split on this machine: those of a hub data set are in the cache."""
    manager = datasets.DownloadManager()
    paths: dict[str, Any] = manager.download_and_extract(dict(builder.config.data_files))
    return {str(split): [str(file) for file in manager.iter_files(files)] for split, files in paths.items()}


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
        return {"train": _exact([str(path)], streaming)}
    # A stream knows the columns of its first rows only.
    if (streaming or _has_floats(loaded["train"].features, texts)) and has_long_numbers(path):
        return {"train": _exact([str(path)], streaming)}
    return loaded


def _exact(files: list[str], streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    if streaming:
        return datasets.IterableDataset.from_generator(json_rows, gen_kwargs={"files": files})
    return json_table(files)


def _has_floats(features: datasets.Features, texts: Sequence[str]) -> bool:
    """Whether a column that may hold problems or answers has floats, at any depth."""
    columns = {name.partition(".")[0] for name in (*_TEXTS, "reward_model", *texts)}
    return any("float" in repr(features[name]) for name in columns if name in features)


def cause(error: BaseException) -> str:
    """What a library says of a file that it cannot read."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
