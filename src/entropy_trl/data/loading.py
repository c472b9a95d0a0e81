"""Loading files, folders and hub data sets as splits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets


_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


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
