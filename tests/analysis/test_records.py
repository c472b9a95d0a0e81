"""Token records: written whole or not at all, and read as they were written, step by step."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entropy_trl.analysis.covariance.records import FOLDER, SCHEMA, StepMetadata, read_records, write_records


METADATA = StepMetadata(
    step=12,
    learning_rate=1e-3,
    tokens=5,
    tokens_recorded=3,
    mean_covariance=0.25,
    mean_entropy=0.5,
    mean_entropy_after=None,
    num_generations=2,
    control="kl_cov",
    loss_type="dapo",
    prompts={3: "one, or two?"},
)
COLUMNS = {
    "row_id": [6, 6, 7],
    "group": [3, 3, 3],
    "position": [0, 1, 0],
    "token_id": [40, 41, 40],
    "token": ["a", "\n", "a"],
    "logp": [-1.0, -2.0, -0.5],
    "old_logp": [-1.0, -2.25, -0.5],
    "entropy": [0.25, 0.5, 0.75],
    "entropy_after": [0.5, float("nan"), 1.0],
    "advantage": [1.0, 1.0, -1.0],
    "covariance": [0.125, -0.5, 2.0],
    "selected": [False, False, True],
    "reward": [1.0, 1.0, 0.0],
    "group_accuracy": [0.5, 0.5, 0.5],
}


def write(path, columns=None, **metadata):
    write_records(path, COLUMNS | (columns or {}), asdict(METADATA) | metadata)


def test_what_is_written_is_read(tmp_path):
    write_records(tmp_path / FOLDER / "step-00000012.parquet", COLUMNS, METADATA)
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["step-00000012.parquet"]
    (record,) = read_records(tmp_path)
    for name, value in asdict(METADATA).items():
        assert getattr(record, name) == value, name
    table = record.table()
    assert list(table) == SCHEMA.names
    for name, values in COLUMNS.items():
        assert table[name].tolist() == pytest.approx(values, nan_ok=True) if name != "token" else values, name
    assert table["token"].tolist() == COLUMNS["token"]
    assert record.sampled


def test_the_file_has_the_schema(tmp_path):
    file = tmp_path / "step-00000012.parquet"
    write(file, {"row_id": np.array([6, 6, 7]), "logp": np.array([-1.0, -2.0, -0.5])})  # int64 and float64
    assert pq.read_schema(file).remove_metadata().equals(SCHEMA)
    assert pq.read_table(file)["entropy_after"].to_pylist() == [0.5, None, 1.0]


@pytest.mark.parametrize("columns", [{"entropy_after": None}, {}])
def test_entropy_after_may_not_be_measured(tmp_path, columns):
    given = {name: values for name, values in COLUMNS.items() if name != "entropy_after"} | columns
    write_records(tmp_path / "step-00000012.parquet", given, METADATA)
    assert read_records(tmp_path)[0].table("entropy_after")["entropy_after"].isna().all()


def test_tokens_may_be_encoded_already(tmp_path):
    encoded = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), ["\n", "a"])
    write(tmp_path / "step-00000012.parquet", {"token": encoded})
    assert read_records(tmp_path)[0].table("token")["token"].tolist() == COLUMNS["token"]


def test_the_files_of_all_processes_are_one_step(tmp_path):
    for rank in (10, 2, 0, 1):
        name = f"step-00000012{f'-rank{rank}' if rank else ''}.parquet"
        write(tmp_path / name, {"group": [rank] * 3, "token": [f"t{rank}"] * 3}, prompts={rank: f"p{rank}"}, tokens=12)
    (record,) = read_records(tmp_path)
    assert record.tokens_recorded == 12 and not record.sampled
    assert record.prompts == {rank: f"p{rank}" for rank in (0, 1, 2, 10)}
    table = record.table("group", "token")
    assert table["group"].tolist() == [rank for rank in (0, 1, 2, 10) for _ in range(3)]
    assert table["token"].tolist() == [f"t{rank}" for rank in (0, 1, 2, 10) for _ in range(3)]


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    write(tmp_path / "step-00000012.parquet")
    assert list(read_records(tmp_path)[0].table("covariance", "group")) == ["covariance", "group"]


def test_sources_and_steps(tmp_path):
    files = [tmp_path / FOLDER / f"step-{step:08d}.parquet" for step in (2, 30, 100_000_000)]
    for file, step in zip(files, (2, 30, 100_000_000), strict=True):
        write(file, step=step)

    def steps(*args):
        return [record.step for record in read_records(*args)]

    assert steps(tmp_path) == steps(str(tmp_path / FOLDER)) == steps(files[::-1]) == [2, 30, 100_000_000]
    assert steps(files[1]) == [30]
    assert steps(tmp_path, [30, 2]) == [2, 30]
    with pytest.raises(ValueError, match=r"No records of step 3, 4: the recorded ones are 2, 30, 100000000\."):
        read_records(tmp_path, [2, 3, 4])


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "step-00000012.parquet"
    write(file)
    before = file.read_bytes()

    def stop_half_way(table, where, **kwargs):
        where.write_bytes(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", stop_half_way)
    with pytest.raises(OSError, match="No space"):
        write(file, {"reward": [0.0, 0.0, 0.0]})
    assert file.read_bytes() == before
    assert [record.files for record in read_records(tmp_path)] == [(file,)]


@pytest.mark.parametrize(
    "columns, metadata, message",
    [
        ({"logps": [0.0] * 3}, {}, r"columns missing: none, unknown: \['logps'\]"),
        ({"logp": [0.0] * 2}, {}, "must be of equal length"),
        ({}, {"lr": 1.0}, r"metadata missing: none, unknown: \['lr'\]"),
    ],
)
def test_wrong_columns_and_fields(tmp_path, columns, metadata, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "step-00000012.parquet", columns, **metadata)
    assert not list(tmp_path.iterdir())


def test_a_missing_column(tmp_path):
    with pytest.raises(ValueError, match=r"columns missing: \['selected'\]"):
        write_records(tmp_path / "a.parquet", {k: v for k, v in COLUMNS.items() if k != "selected"}, METADATA)


def test_what_is_no_record(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no token records"):
        read_records(tmp_path)
    file = tmp_path / "step-00000001.parquet"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="is not a Parquet file of token records"):
        read_records(tmp_path)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(ValueError, match="no 'entropy_trl' metadata"):
        read_records(file)
