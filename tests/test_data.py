"""Loading rows: formats, schemas, de-duplication, and errors that say what was found."""

import json
import logging
import os
from pathlib import Path

import datasets
import pytest

from entropy_trl.data import load_rows, prepare_rows
from entropy_trl.smoke import dapo_math_sample


UPSTREAM = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "1 + 1?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "0"},
}
full_data = pytest.mark.skipif("ENTROPY_TRL_DATA" not in os.environ, reason="ENTROPY_TRL_DATA is not set")


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        rows = datasets.Dataset.from_list(rows)
        {".jsonl": rows.to_json, ".parquet": rows.to_parquet, ".csv": rows.to_csv}[path.suffix](path)
        return str(path)

    return write_rows


def test_upstream_schema_of_dapo_math(write):
    rows = load_rows(write([UPSTREAM]))
    assert rows[0]["prompt"] == UPSTREAM["prompt"]
    assert rows[0]["solution"] == "2"
    assert rows[0]["ability"] == "MATH"  # other columns stay, for reward functions that use them


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("problem", ["problem", "question"])
def test_plain_files(write, suffix, problem):
    source = write([{problem: "What is {1}?", "answer": "1"}, {problem: "Two?", "answer": "2"}], "rows" + suffix)
    rows = load_rows(source, prompt_template="Solve: {problem} Use \\boxed{}.")
    assert rows["prompt"][0] == [{"role": "user", "content": "Solve: What is {1}? Use \\boxed{}."}]
    assert rows["solution"][:] == ["1", "2"]
    assert set(rows.column_names) == {"prompt", "solution"}


def test_result_goes_before_worked_solution(write):
    """MATH has the reasoning in `solution` and the result in `answer`; GSM8K has both in `answer`."""
    assert load_rows(write([{"problem": "?", "solution": "Since ...", "answer": "4"}]))["solution"][:] == ["4"]
    assert load_rows(write([{"question": "?", "answer": "2 + 2 = 4\n#### 4"}], "b.jsonl"))["solution"][:] == ["4"]
    assert load_rows(write([{"prompt": "?", "solution": "4", "answer": "no"}], "c.jsonl"))["solution"][:] == ["4"]


def test_ground_truth_goes_before_other_columns(write):
    rows = load_rows(write([{**UPSTREAM, "answer": "A worked answer."}]))
    assert (rows["solution"][0], rows["answer"][0]) == ("2", "A worked answer.")


def test_prompt_without_solution_is_for_rewards_that_need_none(write):
    assert load_rows(write([{"prompt": "Hello"}])).column_names == ["prompt"]


def test_folder_and_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"problem": split, "answer": "1"}) + "\n")
    rows = load_rows(str(tmp_path), split="test", prompt_template="{problem}")
    assert rows["prompt"][0][0]["content"] == "test"
    with pytest.raises(ValueError, match="no split 'validation': it has 'train', 'test'"):
        load_rows(str(tmp_path), split="validation")


def test_repeated_prompts_are_dropped_and_counted(write, caplog):
    other = {**UPSTREAM, "prompt": [{"role": "user", "content": "2 + 2?"}]}
    conflicting = {**UPSTREAM, "reward_model": {"ground_truth": "3", "style": "rule"}}
    with caplog.at_level(logging.WARNING, logger="entropy_trl.data"):
        rows = load_rows(write([UPSTREAM, other, UPSTREAM, conflicting]))
    assert [prompt[0]["content"] for prompt in rows["prompt"]] == ["1 + 1?", "2 + 2?"]
    assert rows["solution"][0] == "2"  # the first row of a prompt stays
    assert "dropped 2 of 4 rows" in caplog.text
    assert "(1 of them with another solution); 2 rows remain" in caplog.text


def test_nothing_is_said_where_nothing_is_dropped(write, caplog):
    with caplog.at_level(logging.WARNING, logger="entropy_trl.data"):
        load_rows(write([UPSTREAM]))
    assert caplog.text == ""


def test_streaming(write, caplog):
    rows = load_rows(write([UPSTREAM, UPSTREAM]), streaming=True)
    assert [row["solution"] for row in rows] == ["2", "2"]
    assert "is streamed" in caplog.text


def test_streamed_rows_that_do_not_know_their_columns():
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"problem": "?", "answer": "1"}]))
    assert rows.column_names is None
    (row,) = prepare_rows(rows, name="generated", prompt_template="{problem}")
    assert row == {"prompt": [{"role": "user", "content": "?"}], "solution": "1"}


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"'no/rows.jsonl' does not exist"):
        load_rows("no/rows.jsonl")


def test_unknown_format(tmp_path):
    (tmp_path / "rows.txt").write_text("?")
    with pytest.raises(ValueError, match=r"format '.txt': use one of .jsonl, .json, .parquet, .csv"):
        load_rows(str(tmp_path / "rows.txt"))


def test_broken_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "?"\n{{')
    with pytest.raises(ValueError, match=r"rows.jsonl' cannot be read as .jsonl"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_missing_column_names_those_present(write):
    with pytest.raises(
        ValueError, match="no column 'prompt', 'problem' or 'question': its columns are 'text', 'label'"
    ):
        load_rows(write([{"text": "?", "label": "1"}]))


def test_template_without_a_place_for_the_problem(write):
    with pytest.raises(ValueError, match=r"has no '\{problem\}'"):
        load_rows(write([{"problem": "?", "answer": "1"}]), prompt_template="Solve it.")


def test_shipped_sample():
    rows = dapo_math_sample()
    assert len(rows) == 64
    contents = [prompt[0]["content"] for prompt in rows["prompt"]]
    assert all(content.isascii() and len(content) < 500 and "Answer: $Answer" in content for content in contents)
    assert sum(len(solution) == 1 for solution in rows["solution"]) == 40


@full_data
def test_whole_dapo_math(caplog):
    path = Path(os.environ["ENTROPY_TRL_DATA"]) / "dapo_math_17k" / "train.jsonl"
    rows = load_rows(str(path))
    assert len(rows) == 17290  # the distinct texts among 17,917
    assert all(solution.lstrip("-").isdigit() for solution in rows["solution"])
    assert "dropped 627 of 17917 rows" in caplog.text
