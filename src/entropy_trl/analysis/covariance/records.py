"""Token records: one row a token of chosen optimizer steps, as Parquet files in `RUN/_token_records/`.

`step-00000012.parquet` holds what the first process recorded of step 12, `step-00000012-rank1.parquet` beside it what
the second did. [`read_records`] reads what describes the steps; their columns are read when an analysis asks for them,
so that no more than the needed columns of one step are in memory.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


#: The folder of a run that holds its records: prompts and completions, so that a push to the Hub leaves out its name.
FOLDER = "_token_records"

#: One row a token. Log-probabilities and entropies are in nats; the covariance is in nats times advantage.
SCHEMA = pa.schema(
    [
        ("row_id", pa.int32()),  # completion, unique in the step
        ("group", pa.int32()),  # prompt, unique in the step
        ("position", pa.int32()),  # in the completion, from 0
        ("token_id", pa.int32()),
        ("token", pa.dictionary(pa.int32(), pa.string())),  # the token decoded alone
        ("logp", pa.float32()),  # by the policy of the loss's forward pass
        ("old_logp", pa.float32()),  # by the policy that the rollout was scored with
        ("entropy", pa.float32()),  # of the next-token distribution before the update
        ("entropy_after", pa.float32()),  # in the same state after the update; null where it was not measured
        ("advantage", pa.float32()),
        ("covariance", pa.float32()),  # Eq. 10 of arXiv 2505.22617 over all tokens of the optimizer step
        ("selected", pa.bool_()),  # restrained by the control
        ("reward", pa.float32()),  # of the completion
        ("group_accuracy", pa.float32()),  # mean reward of the prompt's completions
    ]
)

_METADATA_KEY = b"entropy_trl"


@dataclass(frozen=True)
class StepMetadata:
    """What describes a recorded optimizer step.

    Args:
        step (`int`): The optimizer step.
        learning_rate (`float`): The one of this step's update.
        tokens (`int`): Tokens that the loss counts in the whole step, on all processes.
        tokens_recorded (`int`): How many of them have a row, on all processes; fewer than `tokens` where whole
            completions were sampled.
        mean_covariance (`float`): Mean of Eq. 10 over the whole step.
        mean_entropy (`float`): Mean entropy over the whole step, nats.
        mean_entropy_after (`float`, *optional*): The same states after the update; None where not measured.
        num_generations (`int`): Completions a prompt.
        control (`str`, *optional*): Name of the entropy control, None if off.
        loss_type (`str`): TRL's name of the loss.
        prompts (`dict`): The prompt's text by `group`.
    """

    step: int
    learning_rate: float
    tokens: int
    tokens_recorded: int
    mean_covariance: float
    mean_entropy: float
    mean_entropy_after: float | None
    num_generations: int
    control: str | None
    loss_type: str
    prompts: dict[int, str]


@dataclass(frozen=True)
class StepRecords(StepMetadata):
    """The records of one optimizer step: its metadata, and the tokens of all processes when [`table`] is called.

    Args:
        files (`tuple` of `Path`): One a process.
    """

    files: tuple[Path, ...]

    def table(self, *columns: str) -> pd.DataFrame:
        """The tokens of the step, one row each, with the named columns (all if none are named)."""
        tables = [pq.ParquetFile(file).read(columns=list(columns) or None) for file in self.files]
        # Each process has its own dictionary of tokens.
        frame: pd.DataFrame = pa.concat_tables(tables).unify_dictionaries().to_pandas()
        return frame

    @property
    def sampled(self) -> bool:
        """Whether only some of the step's completions were recorded."""
        return self.tokens_recorded < self.tokens


def write_records(path: str | Path, columns: Mapping[str, Any], metadata: StepMetadata | Mapping[str, Any]) -> None:
    """Writes one file of records. It appears whole or not at all.

    Args:
        path (`str` or `Path`): The file; its folder is made if need be.
        columns (`Mapping[str, Any]`): All of [`SCHEMA`], of equal length. `entropy_after` may be missing or None; NaN
            in it counts as not measured. `token` may be strings or a `pyarrow.DictionaryArray`.
        metadata ([`StepMetadata`] or mapping): All of its fields.

    Raises:
        ValueError: A column or a field is missing or unknown, or the columns' lengths differ.
    """
    path = Path(path)
    fixed = asdict(metadata) if isinstance(metadata, StepMetadata) else dict(metadata)
    _check_names("metadata", fixed, {field.name for field in fields(StepMetadata)})
    given = {"entropy_after": None, **columns}
    _check_names("columns", given, set(SCHEMA.names))
    rows = len(given["row_id"])
    arrays = [_array(given[field.name], field, rows) for field in SCHEMA]
    lengths = {name: len(array) for name, array in zip(SCHEMA.names, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns of {path.name} must be of equal length, got {lengths}.")
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({_METADATA_KEY: json.dumps(fixed).encode()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    pq.write_table(table, part, compression="zstd", write_page_checksum=True)
    os.replace(part, path)


def _check_names(what: str, given: Iterable[str], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing or unknown:
        raise ValueError(f"Token records: {what} missing: {missing or 'none'}, unknown: {unknown or 'none'}.")


def _array(values: Any, field: pa.Field, rows: int) -> pa.Array:
    if field.name == "token":
        if isinstance(values, pa.DictionaryArray):
            return values.cast(field.type)
        return pa.array(values, pa.string()).dictionary_encode()
    if values is None:
        return pa.nulls(rows, field.type)
    return pa.array(np.asarray(values).astype(field.type.to_pandas_dtype()), from_pandas=field.name == "entropy_after")


def read_records(
    source: str | Path | Sequence[str | Path],
    steps: Iterable[int] | None = None,
    unread: list[str] | None = None,
) -> list[StepRecords]:
    """The recorded steps, in order. Checks that each file is whole; its tokens are kept when they are asked for.

    Args:
        source (`str`, `Path` or sequence of them): A run's output folder, a folder of records, or files of records.
        steps (`Iterable[int]`, *optional*): The steps to keep. Defaults to all.
        unread (`list` of `str`, *optional*): Gets a sentence on each damaged file and on the steps without a counted
            token, such as those whose completions were all truncated. Both are left out, and the rest is read. Without
            it the first damaged file is an error.

    Raises:
        FileNotFoundError: There are no records.
        ValueError: A file holds no token records, or a step was not recorded.
    """
    files = [file for path in ([source] if isinstance(source, str | Path) else source) for file in _files(Path(path))]
    by_step: dict[int, list[tuple[Path, dict[str, Any], int]]] = {}
    damage: list[str] = []
    for file in files:
        try:
            metadata, rows = _read_metadata(file)
        except ValueError as error:
            if unread is None:
                raise
            damage.append(str(error))
            continue
        by_step.setdefault(metadata["step"], []).append((file, metadata, rows))
    empty = sorted(step for step, parts in by_step.items() if not any(rows for _, _, rows in parts))
    if unread is not None and empty:
        by_step = {step: parts for step, parts in by_step.items() if step not in empty}
        damage.append(f"Step {', '.join(map(str, empty))} has no counted token and is left out.")
    if not by_step:
        raise ValueError(f"There is no record to analyse. {' '.join(damage)}")
    if unread is not None:
        unread += damage
    wanted = sorted(by_step) if steps is None else sorted(set(steps))
    unrecorded = [step for step in wanted if step not in by_step]
    if unrecorded:
        raise ValueError(
            f"No records of step {', '.join(map(str, unrecorded))}: the recorded ones are "
            f"{', '.join(map(str, sorted(by_step)))}."
        )
    return [_merge(by_step[step]) for step in wanted]


def _files(path: Path) -> list[Path]:
    path = path.expanduser()
    if path.is_file():
        return [path]
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    files = sorted(folder.glob("step-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{str(path)!r} has no token records ({FOLDER}/step-*.parquet): give the output folder of a run that "
            "recorded some."
        )
    return files


def _read_metadata(file: Path) -> tuple[dict[str, Any], int]:
    """What describes a file, and its number of rows. The tokens are read once too: damage is told before any work."""
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is not a regular file.")
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            stored = (parquet.metadata.metadata or {}).get(_METADATA_KEY)
            rows = parquet.metadata.num_rows
            columns = set(parquet.schema_arrow.names)
            if stored is not None:
                parquet.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a Parquet file of token records: {error}") from error
    if stored is None:
        raise ValueError(f"{str(file)!r} is not a file of token records: its schema has no 'entropy_trl' metadata.")
    missing = sorted(set(SCHEMA.names) - columns)
    if missing:
        raise ValueError(f"{str(file)!r} has no column {', '.join(missing)}: its tokens cannot be analysed.")
    try:
        metadata = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} has metadata that are not valid JSON: {error}.") from error
    _check_metadata(file, metadata)
    return metadata, rows


_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "learning_rate": (int, float),
    "tokens": (int,),
    "tokens_recorded": (int,),
    "mean_covariance": (int, float),
    "mean_entropy": (int, float),
    "mean_entropy_after": (int, float, type(None)),
    "num_generations": (int,),
    "control": (str, type(None)),
    "loss_type": (str,),
    "prompts": (dict,),
}


_NAMES = {int: "an integer of 64 bits", float: "a number", str: "a text", dict: "a map"}


def _check_metadata(file: Path, metadata: Any) -> None:
    """Refuse metadata of other names or types: the file may come from anywhere."""
    if not isinstance(metadata, dict) or set(metadata) != set(_KINDS):
        raise ValueError(
            f"{str(file)!r} has other metadata than token records: {', '.join(sorted(_KINDS))} are needed."
        )
    for name, kinds in _KINDS.items():
        value = metadata[name]
        # An integer beyond 64 bits fits into no column and no figure.
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
            raise ValueError(
                f"{str(file)!r} has the {name} {str(value)[:40]!r} in its metadata, which is not {_NAMES[kinds[0]]}."
            )
    for group, text in metadata["prompts"].items():
        if not isinstance(text, str) or not group.isdecimal():
            raise ValueError(f"{str(file)!r} has a prompt of group {group[:40]!r} in its metadata that is not text.")


def _merge(parts: list[tuple[Path, dict[str, Any], int]]) -> StepRecords:
    """The records of one step from the files of its processes, the first process first."""
    parts = sorted(parts, key=lambda part: (len(part[0].name), part[0].name))
    prompts = {int(group): text for _, metadata, _ in parts for group, text in metadata["prompts"].items()}
    recorded = sum(rows for _, _, rows in parts)
    files = tuple(file for file, _, _ in parts)
    return StepRecords(**parts[0][1] | {"prompts": prompts, "tokens_recorded": recorded}, files=files)
