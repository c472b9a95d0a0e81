"""Loading rows: formats, schemas, templates, what is left out and why, and errors that say what was found."""

import datetime
import importlib.util
import json
import logging
import os
from collections import Counter
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from trl.trainer.utils import repeat_iterable_dataset

from entropy_trl.cli import train_main
from entropy_trl.cli.train_arguments import ROW_OPTIONS, CovGRPOScriptArguments
from entropy_trl.data import RowOptions, load_rows, prepare_rows
from entropy_trl.data.dropped import NO_ANSWER, Dropped
from entropy_trl.data.options import RowFields
from entropy_trl.data.stream import Digests
from entropy_trl.rewards import MathReward
from entropy_trl.smoke import byte_tokenizer, dapo_math_sample
from entropy_trl.templates import TEMPLATES


ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke" / "dapo_math.yaml"
SAMPLE = ROOT / "src" / "entropy_trl" / "sample_data" / "dapo_math_sample.jsonl"
UPSTREAM = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "1 + 1?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "0"},
}
full_data = pytest.mark.skipif("ENTROPY_TRL_DATA" not in os.environ, reason="ENTROPY_TRL_DATA is not set")


def upstream(problem, answer="2", template=TEMPLATES["dapo"]):
    return UPSTREAM | {"prompt": template.messages(problem), "reward_model": {"ground_truth": answer, "style": "rule"}}


def read_json_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def problems(rows):
    return [prompt[-1]["content"] for prompt in rows["prompt"]]


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        rows = datasets.Dataset.from_list(rows)
        {".jsonl": rows.to_json, ".parquet": rows.to_parquet, ".csv": rows.to_csv}[path.suffix](path)
        return str(path)

    return write_rows


# Schemas


def test_upstream_schema_of_dapo_math(write):
    rows = load_rows(write([upstream("1 + 1?")]))
    assert rows[0]["prompt"] == TEMPLATES["dapo"].messages("1 + 1?")
    assert (rows[0]["solution"], rows[0]["answer_format"]) == ("2", "answer_line")
    assert rows[0]["ability"] == "MATH"  # other columns stay, for reward functions that use them


def test_processed_schema_of_dapo_math(write):
    """open-r1/DAPO-Math-17k-Processed: the wording is taken off into `source_prompt`, so `prompt` is a bare problem."""
    row = upstream("1 + 1?") | {"prompt": "1 + 1?", "solution": "2", "source_prompt": upstream("1 + 1?")["prompt"]}
    source = write([row])
    for template in ("qwen_boxed", "dapo"):
        arguments = {} if template == "qwen_boxed" else {"prompt_template": template}  # the default, and another
        (row,) = load_rows(source, **arguments)
        assert row["prompt"] == TEMPLATES[template].messages("1 + 1?")
        assert (row["solution"], row["answer_format"]) == ("2", TEMPLATES[template].answer_format)
    (row,) = load_rows(source, prompt_column="source_prompt")
    assert (row["prompt"], row["answer_format"]) == (TEMPLATES["dapo"].messages("1 + 1?"), "answer_line")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("problem", ["problem", "question"])
def test_plain_files(write, suffix, problem):
    source = write([{problem: "What is {1}?", "answer": "1"}, {problem: "Two?", "answer": "2"}], "rows" + suffix)
    rows = load_rows(source, prompt_template="Solve: {problem} Use \\boxed{}.")
    assert rows["prompt"][0] == [{"role": "user", "content": "Solve: What is {1}? Use \\boxed{}."}]
    assert rows["solution"][:] == ["1", "2"]
    assert set(rows.column_names) == {"prompt", "solution", "answer_format"}
    assert rows["answer_format"][:] == ["any", "any"]


def test_result_goes_before_worked_solution(write):
    """MATH has the reasoning in `solution` and the result in `answer`; GSM8K has both in `answer`."""
    assert load_rows(write([{"problem": "?", "solution": "Since ...", "answer": "4"}]))["solution"][:] == ["4"]
    assert load_rows(write([{"question": "?", "answer": "2 + 2 = 4\n#### 4"}], "b.jsonl"))["solution"][:] == ["4"]
    assert load_rows(write([{"prompt": "?", "solution": "4", "answer": "no"}], "c.jsonl"))["solution"][:] == ["4"]
    worked = "We get $\\frac{2}{4}$, so it is \\boxed{\\frac{1}{2}}."
    assert load_rows(write([{"question": "?", "solution": worked}], "d.jsonl"))["solution"][:] == ["\\frac{1}{2}"]


def test_ground_truth_goes_before_other_columns(write):
    rows = load_rows(write([{**UPSTREAM, "answer": "A worked answer."}]))
    assert (rows["solution"][0], rows["answer"][0]) == ("2", "A worked answer.")


def test_columns_by_name(write):
    source = write([{"text": "1 + 1?", "info": {"results": [2], "question": "2 + 2?"}, "prompt": "no", "answer": 4}])
    (row,) = load_rows(source, prompt_column="text", solution_column="info.results", prompt_template="raw")
    assert (row["prompt"][0]["content"], row["solution"]) == ("1 + 1?", "2")
    (row,) = load_rows(source, prompt_column="info.question")
    assert row["prompt"] == TEMPLATES["qwen_boxed"].messages("2 + 2?")
    assert row["solution"] == "4"
    with pytest.raises(ValueError, match="no column 'label', which solution_column names: its columns are 'text', "):
        load_rows(source, solution_column="label")


@pytest.mark.parametrize("problem", ["prompt", "problem"])
@pytest.mark.parametrize("answer", ["label", "final_answer"])
def test_other_columns_of_the_answer(write, problem, answer):
    assert load_rows(write([{problem: "1 + 1?", answer: "2"}]))["solution"][:] == ["2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_zeros_make_no_conflict(write, streaming):
    rows = [{"problem": "1?", "answer": text} for text in ("025", "25", "25.0", "25.")]
    assert [row["solution"] for row in load_rows(write(rows), streaming=streaming)] == ["025"]


def test_prompt_without_solution_is_for_rewards_that_need_none(write):
    assert load_rows(write([{"prompt": "Hello"}])).column_names == ["prompt", "answer_format"]


def test_folder_and_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"problem": split, "answer": "1"}) + "\n")
    rows = load_rows(str(tmp_path), split="test", prompt_template="{problem}")
    assert rows["prompt"][0][0]["content"] == "test"
    with pytest.raises(ValueError, match="no split 'validation': it has 'train', 'test'"):
        load_rows(str(tmp_path), split="validation")


# Templates


def test_ready_prompts_stay_and_their_format_is_recognised(write):
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [upstream("1 + 1?"), UPSTREAM | {"prompt": other}, upstream("3 + 3?", template=TEMPLATES["qwen_boxed"])]
    loaded = load_rows(write(rows))
    assert loaded["prompt"][:] == [row["prompt"] for row in rows]
    assert loaded["answer_format"][:] == ["answer_line", "any", "boxed"]
    (row,) = load_rows(write([{"prompt": "1 + 1?", "answer": "2"}], "text.jsonl"))
    assert (row["prompt"], row["answer_format"]) == ("1 + 1?", "any")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_replaces_a_known_wording(name):
    template = TEMPLATES[name]
    rows = load_rows(str(SAMPLE), prompt_template=name)
    assert len(rows) == 64
    for row, before in zip(rows, dapo_math_sample(), strict=True):
        problem = TEMPLATES["dapo"].problem_in(before["prompt"])
        assert row["prompt"] == template.messages(problem)
        assert row["answer_format"] == template.answer_format


def test_a_template_does_not_replace_an_unknown_wording(write):
    unknown = UPSTREAM | {"prompt": [{"role": "user", "content": "1 + 1? Put it in \\boxed{}."}]}
    source = write([upstream(f"{i} + 1?") for i in range(3)] + [unknown])
    with pytest.raises(ValueError, match=r"1 of 4 different rows .* unknown wording, .*prompt_template.* \(row 3\)"):
        load_rows(source, prompt_template="r1_zero")
    assert len(load_rows(source, prompt_template="r1_zero", max_bad_rows=0.25)) == 3


def test_rows_can_say_their_answer_format(write):
    formats = ["answer_tag", None]
    rows = [{"prompt": f"{i}? Use tags.", "answer": "1", "answer_format": formats[i]} for i in range(2)]
    assert load_rows(write(rows))["answer_format"][:] == ["answer_tag", "any"]
    assert load_rows(write(rows), prompt_template="dapo")["answer_format"][:] == ["answer_line"] * 2
    rows[0]["answer_format"] = "tag"
    with pytest.raises(ValueError, match=r"answer_format that is none of boxed, .* \(row 0\)"):
        load_rows(write(rows, "b.jsonl"))


def test_prepared_rows_can_be_prepared_again(write, tmp_path):
    rows = load_rows(write([{"problem": "1 + 1?", "answer": "2"}]), prompt_template="r1_zero")
    rows.to_json(tmp_path / "again.jsonl")
    assert load_rows(str(tmp_path / "again.jsonl"))[:] == rows[:]


# What is left out


def test_repeats_and_conflicts_are_dropped_and_counted(write, caplog):
    rows = [
        upstream("1 + 1?"),
        upstream("2 + 2?", "4"),
        upstream("1 + 1?"),
        upstream("1  + 1?\n") | {"ability": "OTHER"},  # only white space and other columns differ
        upstream("3 + 3?", "6"),
        upstream("3 + 3?", "33"),
        upstream("3 + 3?", "6"),
    ]
    loaded = load_rows(write(rows))
    assert problems(loaded) == problems({"prompt": [rows[0]["prompt"], rows[1]["prompt"]]})
    assert loaded["solution"][:] == ["2", "4"]
    assert [record.getMessage().splitlines() for record in caplog.records] == [
        [
            f"Data set '{write(rows)}': kept 2 of 7 rows. Of the others",
            "  3 repeat an earlier row's prompt and answer (row 3)",
            "  2 have a prompt that has another answer in another row (rows 4, 5)",
        ]
    ]


def test_nothing_is_said_where_nothing_is_dropped(write, caplog):
    with caplog.at_level(logging.WARNING, logger="entropy_trl.data"):
        load_rows(write([UPSTREAM]))
    assert caplog.text == ""


NO_RESULT = "have an answer that is no result"
NOT_ACCEPTED = "have an answer that math_reward cannot read"
BAD = [
    ({"problem": None}, "have no prompt"),
    ({"problem": " \n"}, "have no prompt"),
    ({"answer": None}, "have no answer"),
    ({"answer": " "}, "have no answer"),
    ({"answer": "see above ####"}, "have no answer"),
    ({"answer": "proof"}, NO_RESULT),
    ({"answer": "NotFound"}, NO_RESULT),
    ({"answer": "We add both numbers, so it is 4."}, NO_RESULT),
    ({"answer": "?"}, NO_RESULT),
    ({"answer": "}{ \\frac"}, NOT_ACCEPTED),
    ({"answer": "\\frac{1}{2"}, NOT_ACCEPTED),
    ({"answer": "\\,"}, NOT_ACCEPTED),
    ({"answer": "x + " * 250 + "x"}, NOT_ACCEPTED),  # longer than what the reward compares
    ({"answer": "7" * 1001}, NOT_ACCEPTED),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_rows_are_named_and_too_many_are_an_error(write, caplog, change, reason):
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(20)]
    rows[7] |= change
    with pytest.raises(ValueError, match=rf"1 of 20 different rows cannot .* max_bad_rows .*{reason}.* \(row 7\)"):
        load_rows(write(rows))
    assert caplog.text == ""
    loaded = load_rows(write(rows), max_bad_rows=0.05)
    assert loaded["solution"][:] == [row["answer"] for i, row in enumerate(rows) if i != 7]
    assert f"1 {reason}" in caplog.text


@pytest.mark.parametrize(("fraction", "different", "allowed"), [(0.29, 100, 29), (0.07, 100, 7), (1e-3, 3000, 3)])
def test_the_allowed_number_of_bad_rows_is_exact(fraction, different, allowed):
    dropped = Dropped("rows", count=different, different=different)
    dropped.add(NO_ANSWER, range(allowed))
    dropped.check(fraction)
    dropped.add(NO_ANSWER, range(allowed + 1))
    with pytest.raises(ValueError, match=rf"{allowed + 1} of {different} different rows"):
        dropped.check(fraction)


def test_bad_chats(write):
    chats = [[], [{"role": "user", "content": ""}], [{"role": "user", "content": None}], None]
    rows = [UPSTREAM] + [UPSTREAM | {"prompt": chat} for chat in chats]
    rows.append(UPSTREAM | {"prompt": [{"role": "user", "content": "2 + 2?"}], "reward_model": None})
    assert len(load_rows(write(rows), max_bad_rows=1.0)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "34",
        "-3",
        "0.5",
        "\\frac{1}{2}",
        "x^2 + 1",
        "(1, 2)",
        "\\text{yes}",
        "1,000",
        "$7$",
        "34.",
        "0.\\overline{3}",
        "10:30 a.m.",
    ],
)
def test_answers_that_are_maths(write, answer):
    assert load_rows(write([{"problem": "?", "answer": answer}]))["solution"][:] == [answer]


def test_a_reference_is_read_where_the_prompt_asks_for_the_answer(write):
    """`Answer: ...` is one line, so no completion could give two. A box takes them."""
    rows = [upstream("1 + 1?"), upstream("A matrix?", "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}")]
    with pytest.raises(ValueError, match=rf"1 of 2 different rows .* {NOT_ACCEPTED}.* \(row 1\)"):
        load_rows(write(rows))
    assert len(load_rows(write(rows), prompt_template="qwen_boxed")) == 2


def test_every_reference_that_is_kept_earns_1(write):
    answers = ["9^{9^{9^{9}}}", "\\text{no solution}", "x \\equiv 2 \\pmod 5", "\\frac{12}{5}", "x>3", "\\emptyset"]
    rows = load_rows(write([{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]))
    assert rows["solution"][:] == answers
    completions = [f"So it is \\boxed{{{answer}}}." for answer in answers]
    assert MathReward(workers=0)(completions, rows["solution"], rows["answer_format"]) == [1.0] * len(answers)


def test_no_row_left(write):
    with pytest.raises(ValueError, match=r"(?s)No row is left\. .* 1 are in another language \(row 0\)"):
        load_rows(write([UPSTREAM]), language="zh")
    with pytest.raises(ValueError, match="has no rows"):
        prepare_rows(datasets.Dataset.from_list([UPSTREAM]).select([]), name="empty")


def test_language(write, caplog):
    source = write([upstream("1 + 1?"), upstream("求 $1 + 2$ 的值。", "3"), upstream("Où est π?", "4")])
    assert load_rows(source, language="en")["solution"][:] == ["2", "4"]
    assert load_rows(source, language="zh")["solution"][:] == ["3"]
    assert "1 are in another language (row 1)" in caplog.text


def test_overlap_with_evaluation_problems(write, caplog, tmp_path):
    words = [f"word{i}" for i in range(33)]  # 21 13-grams
    text = " ".join(words)
    training = {
        "the same but for form": f"**{text.upper()}**!",
        "exactly 30%": " ".join([*words[:18], "and", "others"]),  # 6 of 21 is below, see the next
        "7 of 21": " ".join([*words[:19], "and", "others"]),
        "short and the same": "What is $1+1$?",
        "short and different": "What is $1 + 2$?",
    }
    source = write([upstream(problem) for problem in training.values()])
    first = write([{"problem": text, "answer": "1"}, {"problem": "Unrelated?", "answer": "2"}], "first.jsonl")
    second = write([upstream("what is 1 + 1")], "second.jsonl")
    report = tmp_path / "reports" / "dropped.jsonl"
    rows = load_rows(source, exclude_overlap=[first, second], dropped_rows_file=str(report))
    kept = [TEMPLATES["dapo"].problem_in(prompt) for prompt in rows["prompt"]]
    assert kept == [training["exactly 30%"], training["short and different"]]
    assert "3 overlap an evaluation problem (rows 0, 2, 3)" in caplog.text
    assert f"{first}: 1 of 2 problems, by 2 rows" in caplog.text
    assert f"{second}: 1 of 1 problems, by 1 rows" in caplog.text
    assert read_json_lines(report) == [
        {"row": row, "reason": "overlap an evaluation problem", "overlaps": [hit]}
        for row, hit in ((0, f"{first}:0"), (2, f"{first}:0"), (3, f"{second}:0"))
    ]
    strict = load_rows(source, exclude_overlap=[first, second], overlap_threshold=6 / 21)
    assert len(strict) == 1
    with pytest.raises(FileNotFoundError, match=r"no/such.jsonl"):
        load_rows(source, exclude_overlap=["no/such.jsonl"])


def test_long_prompts(write, caplog):
    tokenizer = byte_tokenizer()  # a token a byte
    source = write([{"problem": "1 + 1?", "answer": "2"}, {"problem": "1 + 1" + " + 0" * 50, "answer": "2"}])
    short = len(tokenizer.apply_chat_template(TEMPLATES["raw"].messages("1 + 1?"), tokenize=False))
    short += len("[assistant]\n")  # what asks for the completion counts too, as in TRL
    arguments = {"tokenizer": tokenizer, "prompt_template": "raw", "max_bad_rows": 1.0}
    assert len(load_rows(source, max_prompt_length=short, **arguments)) == 1
    assert "1 have a prompt longer than max_prompt_length (row 1)" in caplog.text
    with pytest.raises(ValueError, match=r"No row is left"):
        load_rows(source, max_prompt_length=short - 1, **arguments)
    texts = write([{"prompt": "12345"}, {"prompt": "123456"}], "texts.jsonl")
    rows = load_rows(texts, max_prompt_length=5, tokenizer=tokenizer, max_bad_rows=0.5)
    assert rows["prompt"][:] == ["12345"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"language": "de"}, "language 'de' is not one of 'en', 'zh'"),
        ({"overlap_threshold": 0}, "overlap_threshold must be above 0"),
        ({"max_bad_rows": 5}, "max_bad_rows is a fraction from 0 to 1, got 5"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1"),
        ({"max_prompt_length": 9}, "max_prompt_length needs a tokenizer"),
        ({"exclude_overlap": "eval.jsonl"}, "exclude_overlap is a list of files"),
        ({"prompt_template": "Solve it."}, r"has no '\{problem\}'"),
    ],
)
def test_mistaken_options(options, expected):
    with pytest.raises(ValueError, match=expected):
        load_rows(str(SAMPLE), **options)


def test_options_as_a_value_and_by_keyword(write):
    source = write([upstream("1 + 1?"), upstream("求 $1 + 2$ 的值。", "3")])
    options = RowOptions(language="zh", prompt_template="raw")
    assert load_rows(source, options=options)["solution"][:] == ["3"]
    (row,) = load_rows(source, options=options, language="en")
    assert row["prompt"] == TEMPLATES["raw"].messages("1 + 1?")
    with pytest.raises(TypeError, match="max_bad_row"):
        load_rows(source, max_bad_row=0.1)


def test_rows_in_bounded_memory(tmp_path):
    """128,000 rows, of which 64 differ, take less memory than their 78 MB of text would: measured by the benchmark."""
    spec = importlib.util.spec_from_file_location("benchmark_data", ROOT / "benchmarks" / "data.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    steps = benchmark.main(["--repeat", "2000", "--format", "jsonl", "--output", str(tmp_path / "data.json")])
    assert json.loads((tmp_path / "data.json").read_text()) == steps
    assert [(step["step"], step["rows"]) for step in steps] == [
        ("datasets", 128_000),
        ("entropy_trl", 64),
        ("cached", 64),
    ]
    for step in steps[1:]:
        assert step["anonymous"] - step["imports"] < 50e6


# Streams


def test_streaming(write, caplog):
    rows = [upstream("1 + 1?"), upstream("1 + 1?"), upstream("没有", "1"), upstream("3 + 3?", "")]
    rows += [upstream("x" * 99, "1"), upstream("4 + 4?", "8"), upstream("5 + 5?", "10")]
    evaluation = write([{"problem": "4 + 4", "answer": "8"}], "eval.jsonl")
    options = {"language": "en", "exclude_overlap": [evaluation], "prompt_template": "qwen_boxed"}
    options |= {"max_prompt_length": 150, "tokenizer": byte_tokenizer(), "max_bad_rows": 0.5}
    source = write(rows)
    loaded = load_rows(source, streaming=True, **options)
    for _ in range(2):  # as often as it is read
        kept = [(row["solution"], row["answer_format"], row["ability"]) for row in loaded]
        assert kept == [("2", "boxed", "MATH"), ("10", "boxed", "MATH")]
    *told, summary = [record.getMessage() for record in caplog.records]
    reasons = ["are in another language", "have no answer", "have a prompt longer than max_prompt_length", "overlap"]
    assert len(told) == 4
    for line, row, reason in zip(told, range(2, 6), reasons, strict=True):
        assert f"row {row} is dropped: rows that {reason}" in line
    assert summary.splitlines() == [
        f"Data set '{source}': kept 2 of 7 rows. Of the others",
        "  1 repeat an earlier row's prompt and answer",
        "  1 have no answer (row 3)",
        "  1 have a prompt longer than max_prompt_length (row 4)",
        "  1 are in another language (row 2)",
        "  1 overlap an evaluation problem (row 5)",
        f"    {evaluation}: 1 of 1 problems, by 1 rows",
    ]


def test_a_streams_repeats_and_conflicts(write, caplog, tmp_path):
    rows = [
        upstream("1 + 1?"),
        upstream("2 + 2?", "4"),
        upstream("1 + 1?"),
        upstream("1  + 1?\n") | {"ability": "OTHER"},  # only white space and other columns differ
        upstream("3 + 3?", ""),
        upstream("3 + 3?", "6"),
        upstream("3 + 3?", "33"),
        upstream("3 + 3?", "33"),
        upstream("3 + 3?", "6"),
    ]
    report = tmp_path / "dropped.jsonl"
    loaded = load_rows(write(rows), streaming=True, max_bad_rows=0.2, dropped_rows_file=str(report))
    for _ in range(2):
        assert [row["solution"] for row in loaded] == ["2", "4", "6"]
    assert "kept 3 of 9 rows" in caplog.text
    assert "4 repeat an earlier row's prompt and answer (row 3)" in caplog.text
    conflict = "have a prompt that has another answer in an earlier row, which is taken"
    assert f"1 {conflict} (row 6)" in caplog.text
    assert caplog.text.count(conflict) == 2  # once where it is found, and once in the sum
    reasons = {line["row"]: line["reason"] for line in read_json_lines(report)}
    assert reasons == {3: "repeat an earlier row's prompt and answer", 4: "have no answer", 6: conflict}


@pytest.fixture
def folder(tmp_path):
    """Three files with 40 problems, each of them in every file."""
    for i in range(3):
        rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
        datasets.Dataset.from_list(rows[i:] + rows[:i]).to_json(tmp_path / f"{i}.jsonl")
    return str(tmp_path)


def solutions(rows):
    return [int(row["solution"]) for row in rows]


def test_a_stream_shuffled_epoch_by_epoch(folder):
    loaded = load_rows(folder, streaming=True).shuffle(seed=3, buffer_size=16)
    orders = []
    for epoch in range(3):
        loaded.set_epoch(epoch)
        orders.append(solutions(loaded))
        assert solutions(loaded) == orders[-1]
        assert sorted(orders[-1]) == list(range(1, 41))
    assert orders[0] != orders[1] != orders[2]
    two = zip(loaded, loaded, strict=True)  # two passes at a time
    assert all(a["solution"] == b["solution"] for a, b in two)


@pytest.mark.parametrize("taken", [0, 1, 17, 40])
def test_a_stream_resumes(folder, taken):
    whole = solutions(load_rows(folder, streaming=True))
    loaded = load_rows(folder, streaming=True)
    rows = iter(loaded)
    before = [int(next(rows)["solution"]) for _ in range(taken)]
    state = loaded.state_dict()
    resumed = load_rows(folder, streaming=True)
    resumed.load_state_dict(state)
    assert before + solutions(resumed) == whole


def test_a_stream_of_several_files_is_read_by_several_processes(folder):
    """The processes' parts together are the stream: the same repeats are left out on all of them."""
    loaded = load_rows(folder, streaming=True)
    whole = solutions(loaded)
    assert sorted(whole) == list(range(1, 41))
    nodes = [solutions(split_dataset_by_node(loaded, rank, 3)) for rank in range(3)]
    assert [nodes[i % 3][i // 3] for i in range(40)] == whole
    workers = torch.utils.data.DataLoader(loaded, batch_size=None, num_workers=2)
    assert solutions(workers) == whole
    # As TRL and accelerate split it: a process's completions of one prompt follow each other.
    repeated = repeat_iterable_dataset(loaded, mini_repeat_count=4, batch_size=4, repeat_count=2)
    loader = torch.utils.data.DataLoader(repeated, batch_size=8, collate_fn=list)
    options = {"num_processes": 2, "put_on_device": False, "dispatch_batches": False}
    parts = [prepare_data_loader(loader, process_index=rank, **options) for rank in range(2)]
    for i, (first, second) in enumerate(zip(*parts, strict=True)):
        prompts = whole[4 * (i // 2) : 4 * (i // 2) + 4]
        assert solutions(first) + solutions(second) == [prompt for prompt in prompts for _ in range(4)]
    assert i == 19


def generated(number, bad=lambda n: False):
    rows = lambda: ({"problem": f"{n} + 1?", "answer": "" if bad(n) else str(n + 1)} for n in range(number))  # noqa: E731
    return datasets.IterableDataset.from_generator(rows)


def test_a_streams_bad_rows():
    with pytest.raises(ValueError, match=r"11 of 1000 different rows .* max_bad_rows \(0.01 .*answer \(rows 0, 1, 2, "):
        prepare_rows(generated(5000, lambda n: n < 11), name="at the start")
    with pytest.raises(ValueError, match=r"1 of 20 different rows cannot .* 1 have no answer \(row 7\)"):
        prepare_rows(generated(20, lambda n: n == 7), name="short")
    loaded = prepare_rows(generated(5000, lambda n: n >= 1500), name="later")
    rows = iter(loaded)
    assert [int(next(rows)["solution"]) for _ in range(1500)] == list(range(1, 1501))
    with pytest.raises(ValueError, match=r"16 of 1516 different rows cannot .* 16 have no answer \(rows 1500, 1501, "):
        next(rows)
    assert len(list(prepare_rows(generated(5000, lambda n: n % 100 == 99), name="few"))) == 4950
    # Rows that repeat do not make bad ones fewer.
    with pytest.raises(ValueError, match=r"1 of 20 different rows cannot"):
        prepare_rows(generated(20, lambda n: n == 7).repeat(10), name="repeated")


def test_a_stream_of_nothing(write):
    with pytest.raises(ValueError, match="'none' has no rows"):
        prepare_rows(generated(0), name="none")
    with pytest.raises(ValueError, match=r"(?s)No row is left\. .* 5 are in another language \(rows 0, 1, 2, 3, 4\)"):
        prepare_rows(generated(5), name="english", language="zh")
    with pytest.raises(ValueError, match=r"No row is left"):  # beyond what is read before training
        list(prepare_rows(generated(1001), name="english", language="zh"))


def test_streamed_rows_without_some_of_the_columns():
    rows = [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer_format": "boxed"}, {"answer": "3"}]
    rows.append({"prompt": "4?", "answer": "4", "more": 1})
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert solutions(prepare_rows(stream, name="gaps", max_bad_rows=0.5)) == [1, 4]


def test_digests_are_a_map_in_few_bytes():
    generator, digests, expected = np.random.default_rng(0), Digests(), {}
    keys = generator.integers(2**64, size=20_000, dtype=np.uint64).tolist()
    for value, key in enumerate([0, 1024, 2048, *keys, *keys[:50]]):
        assert digests.put(key, value) == expected.get(key)
        expected.setdefault(key, value)
    taken = sum(part.itemsize * len(part) for part in (digests._keys, digests._values))
    assert taken <= 48 * len(expected)


def test_streamed_rows_that_do_not_know_their_columns():
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"problem": "?", "answer": "1"}]))
    assert rows.column_names is None
    (row,) = prepare_rows(rows, name="generated", prompt_template="{problem}")
    assert row == {"prompt": [{"role": "user", "content": "?"}], "solution": "1", "answer_format": "any"}


# Files that cannot be read


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("b.json", "[]"), ("c.csv", ""), ("d.csv", "problem,answer\n")]
)
def test_file_without_rows(tmp_path, name, text, streaming):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}' (is empty|has no rows|cannot be read)"):
        load_rows(str(tmp_path / name), streaming=streaming)


def test_missing_numbers(write):
    """pandas has NaN for a number that is not there."""
    rows = write([{"problem": "1?", "answer": 1.0}, {"problem": "2?", "answer": float("nan")}], "rows.parquet")
    with pytest.raises(ValueError, match=r"1 have no answer \(row 1\)"):
        load_rows(rows)


def test_missing_column_names_those_present(write):
    with pytest.raises(
        ValueError, match="no column 'prompt', 'problem' or 'question': its columns are 'text', 'label'"
    ):
        load_rows(write([{"text": "?", "label": "1"}]))


# References that are not text, prompts that are structures written as text, numbers beyond 64 bits

BIG = 12345678901234567890123
CHAT = json.dumps(TEMPLATES["raw"].messages("1 + 1?"))
NOT_ONE = "have an answer that is a list of several values or a structure"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (["5"], "5"),
        ([["5"]], "5"),
        ('["5"]', "5"),
        ("['5']", "5"),
        ("[5]", "5"),
        ('"5"', "5"),
        (f"[{BIG}]", str(BIG)),
        ("[0, 1]", "[0, 1]"),  # an interval
        ("{1, 2}", "{1, 2}"),
        ("[f'(x), 1]", "[f'(x), 1]"),
        (5.0, "5"),
        (0.5, "0.5"),
        (True, "True"),
        ("5\0", "5"),
        ("Answer: 5", "5"),
        ("So <answer>5</answer>", "5"),
        ("We add, so \\fbox{5}.", "5"),
        ("Add both.\n#### 5", "5"),
        ("no real solution exists", "no real solution exists"),
        ("all odd integers n", "all odd integers n"),
        ("$$\n5\n$$", "$$\n5\n$$"),
        (["5", "6"], NOT_ONE),
        ({"value": "5"}, NOT_ONE),
        ('["5", "6"]', NOT_ONE),
        ('{"answer": "5"}', NOT_ONE),
        ("{'a': ['b']}", NOT_ONE),
        ("[" * 900 + "]" * 900, NOT_ONE),
        ([], "have no answer"),
        ("[null]", "have no answer"),
        ("{}", "have no answer"),
        ("2 + 2 = 4, so 4", NO_RESULT),
        ("Step 1: add. Step 2: it is 4", NO_RESULT),
        ("设 x=1 所以答案为 3", NO_RESULT),
        ("2+2=4\n4*3=12", NO_RESULT),
        ("<<2+2=4>>", NO_RESULT),
        ("\\text{Proof.}", NO_RESULT),
        ("(none)", NO_RESULT),
        ("answer_not_found", NO_RESULT),
        ("To be proved", NO_RESULT),
        ("See the solution.", NO_RESULT),
        ("Q.E.D.", NO_RESULT),
        ("证明略。", NO_RESULT),
        ("\\begin{proof}x\\end{proof}", NO_RESULT),
        ("None of the above", "None of the above"),
        ("-p", "-p"),
        ("(n, a)", "(n, a)"),
        ("Adding both gives 4. Then we double it.", NO_RESULT),
        ("<think>Easy.</think> 5", NO_RESULT),
        ("\\therefore x = 5", NO_RESULT),
    ],
)
def test_what_an_answer_says(write, caplog, answer, expected):
    source = write([{"problem": "?", "answer": answer}])
    if expected.startswith("have "):
        with pytest.raises(ValueError, match=rf"1 of 1 different rows .* {expected}.* \(row 0\)"):
            load_rows(source)
    else:
        assert load_rows(source)["solution"][:] == [expected]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", f'{{"problem": "1", "answer": {BIG}}}\n{{"problem": "2", "answer": 5}}\n', [str(BIG), "5"]),
        ("b.json", f'[{{"problem": "1", "answer": {BIG}}}, {{"problem": "2", "answer": -{BIG}}}]', [BIG, -BIG]),
        ("c.csv", f"problem,answer\n1,{BIG}\n2,025\n3,0.10\n4,\n5,NA\n", [BIG, "025", "0.10"]),
        (
            "d.jsonl",
            '{"problem": "1", "answer": 9007199254740993}\n{"problem": "2", "answer": 0.5}\n',
            [2**53 + 1, "0.5"],
        ),
        ("e.jsonl", f'{{"problem": "1", "answer": [{BIG}]}}\n{{"problem": "2", "answer": [3]}}\n', [BIG, 3]),
        ("f.jsonl", f'{{"prompt": "1", "reward_model": {{"ground_truth": {BIG}}}}}\n', [BIG]),
        ("g.jsonl", f'{{"problem": "1", "answer": {BIG}}}\n{{"problem": "2", "answer": "x"}}\n', [BIG, "x"]),
        ("h.jsonl", f'{{"problem": "1\u2028", "answer": {BIG}}}\n\n{{"problem": "\\ud800", "answer": 1}}\n', [BIG, 1]),
        ("i.json", f'\ufeff[{{"problem": "1", "id": {BIG}, "answer": "2"}}]', ["2"]),
        ("j.jsonl", f'{{"problem": "1", "answer": {"9" * 5000}}}\n{{"problem": "2", "answer": 5}}\n', ["5"]),
    ],
)
def test_numbers_are_read_as_they_are_written(tmp_path, name, text, expected, streaming):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = load_rows(str(tmp_path / name), streaming=streaming, max_bad_rows=1.0)
    assert [row["solution"] for row in rows] == list(map(str, expected))


LINES = [f'{{"problem": "{i}", "answer": {i}}}\n' for i in range(1200)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.jsonl": f'{{"problem": "1", "answer": {BIG}}}\n{{"problem": "2", "answer": 5}}\n'}, [BIG, 5]),
        ({"a.jsonl": LINES[5], "b.jsonl": f'{{"problem": "1", "answer": {BIG}}}\n'}, [5, BIG]),
        ({"train.jsonl": "".join(LINES) + f'{{"problem": "?", "answer": {BIG}}}\n'}, [*range(1200), BIG]),
        ({"train.json": f'[{{"problem": {BIG}, "answer": 2}}, {{"problem": 7, "answer": 0.1}}]'}, [2, 0.1]),
        ({"train.csv": f"problem,answer,id\n1,{BIG},{BIG}\n2,025,x\n"}, [BIG, "025"]),
        (
            {
                "README.md": "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: d/*}\n---",
                "d/rows.jsonl": f'{{"problem": "1", "answer": {BIG}}}\n',
            },
            [BIG],
        ),
    ],
)
def test_numbers_of_a_folder_are_read_as_they_are_written(tmp_path, files, expected, streaming):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = load_rows(str(tmp_path), streaming=streaming)
    assert [row["solution"] for row in rows] == list(map(str, expected))


def test_files_of_several_types_in_a_folder(tmp_path):
    for name, answer in (("a", 5), ("b", "x")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": name, "answer": answer}) + "\n")
    assert load_rows(str(tmp_path))["solution"][:] == ["5", "x"]
    with pytest.raises(ValueError, match="cannot be read: Failed to parse string: 'x'"):
        load_rows(str(tmp_path), streaming=True)


def test_a_damaged_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "1", "answer": {BIG}}}\n')
    (tmp_path / "b.jsonl").write_text('{"problem": "1", "ans')
    with pytest.raises(ValueError, match=rf"{tmp_path.name}' cannot be read: line 1 .*b.jsonl"):
        load_rows(str(tmp_path))


def test_a_stream_that_cannot_be_read_on_says_after_which_row():
    def generate():
        yield from ({"problem": str(i), "answer": "1"} for i in range(30))
        raise TypeError("a value of another type")

    with pytest.raises(ValueError, match=r"'rows' cannot be read after row \d+: .*a value of another type"):
        prepare_rows(datasets.IterableDataset.from_generator(generate), name="rows")


def test_integers_that_have_lost_digits_are_refused(write):
    rows = [{"problem": "1", "answer": float(BIG)}, {"problem": "2", "answer": 5.0}, {"problem": "3", "answer": 1e20}]
    with pytest.raises(ValueError, match=r"1 have an integer answer that is stored as a float, .* \(row 0\)"):
        load_rows(write(rows, "rows.parquet"))
    assert load_rows(write(rows, "rows.parquet"), max_bad_rows=0.5)["solution"][:] == ["5", "1e+20"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Decimal("25.00"), "25"),
        (Decimal("25.50"), "25.5"),
        (Decimal(BIG), str(BIG)),
        (datetime.date(2024, 1, 5), None),
        (datetime.datetime(2024, 1, 5), None),
        (datetime.time(3, 4), None),
        (datetime.timedelta(1), None),
    ],
)
def test_typed_columns_of_the_answer(tmp_path, answer, expected, streaming):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": ["?"], "answer": [answer]}), path)
    if expected is not None:
        assert [row["solution"] for row in load_rows(str(path), streaming=streaming)] == [expected]
        return
    with pytest.raises(ValueError, match="1 have an answer that is no text and no number"):
        load_rows(str(path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["problem", "prompt"])
@pytest.mark.parametrize(("values", "expected"), [([12, 13], ["12", "13"]), ([12.0, 0.5], ["12", "0.5"])])
def test_a_number_is_a_prompt(write, column, values, expected, streaming):
    source = write([{column: value, "answer": "1"} for value in values], "rows.parquet")
    rows = load_rows(source, streaming=streaming, prompt_template="{problem}" if column == "problem" else None)
    assert [row["prompt"] if column == "prompt" else row["prompt"][-1]["content"] for row in rows] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "problem,answer\n1,2,3\n4,5\n", "first row has 3 values for 2 columns"),
        ("b.csv", "problem,answer,answer\n1,2,3\n", "column 'answer' is there twice"),
        ("c.jsonl", '{"problem": "1", "answer": "2", "answer": "3"}\n', "twice"),
        ("d.jsonl", '{"problem": "1", "answer": ' + "[" * 3000 + "]" * 3000 + "}\n", "line 1 is nested too deeply"),
        ("e.jsonl", '{"problem": "1", "answer": "2"}\n{"problem": "3", "ans', "(line 2|row 1)"),
        ("f.json", '[{"problem": "1", "answer": "2"}', "position|the list"),
        ("g.jsonl", "5\n6\n", "no JSON object|changed from object to number"),
        ("h.csv", 'problem,answer\n"1,2\n', "EOF inside string|Error tokenizing"),
        ("i.parquet", "problem", "Parquet"),
    ],
)
def test_damaged_files_are_told_in_a_line(tmp_path, name, text, reason, streaming):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read.*({reason})"):
        load_rows(str(tmp_path / name), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("text", [CHAT, str(json.loads(CHAT)), CHAT[1:-1]])
def test_a_prompt_that_is_the_text_of_a_chat(write, name, text, streaming):
    rows = list(load_rows(write([{"prompt": text, "answer": "2"}], name), streaming=streaming))
    assert [row["prompt"] for row in rows] == [json.loads(CHAT)]


def test_prompts_of_two_kinds(write, caplog):
    rows = [
        {"prompt": CHAT, "answer": "2"},
        {"prompt": "3?", "answer": "3"},
        {"prompt": '[{"role": "user"}]', "answer": "4"},
    ]
    assert load_rows(write(rows), max_bad_rows=1.0)["prompt"][:] == [json.loads(CHAT)]
    assert "1 have a prompt of another kind than the first row has" in caplog.text
    assert "1 have no prompt (row 2)" in caplog.text
    assert load_rows(write(rows[1::-1]), max_bad_rows=1.0)["prompt"][:] == ["3?"]
    assert problems(load_rows(write(rows[:2]), prompt_template="raw")) == ["1 + 1?", "3?"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_beside_a_reward_model_without_one(tmp_path, streaming):
    models = [None, {"ground_truth": "4"}, {"ground_truth": " "}, {"ground_truth": None}, {"style": "rule"}]
    lines = [{"prompt": f"{i}?", "reward_model": model, "answer": str(i + 5)} for i, model in enumerate(models)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert solutions(load_rows(str(tmp_path / "a.jsonl"), streaming=streaming)) == [5, 4, 7, 8, 9]
    named = [{"prompt": "1?", "reward_model": "org/model", "answer": "5"}]
    (tmp_path / "b.jsonl").write_text(json.dumps(named[0]))
    assert solutions(load_rows(str(tmp_path / "b.jsonl"), streaming=streaming)) == [5]
    (tmp_path / "c.csv").write_text(
        'prompt,reward_model\n1?,"{""ground_truth"": ""5""}"\n2?,"{\'ground_truth\': \'6\'}"\n'
    )
    assert solutions(load_rows(str(tmp_path / "c.csv"), streaming=streaming)) == [5, 6]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_label_that_is_a_class_is_no_answer(write, name, streaming):
    rows = [{"prompt": "1?", "label": True}, {"prompt": "2?", "label": False}]
    assert all("solution" not in row for row in load_rows(write(rows, name), streaming=streaming))
    rows = [row | {"final_answer": "3", "prompt": row["prompt"]} for row in rows]
    loaded = load_rows(write(rows, "b" + name), streaming=streaming, solution_column="final_answer")
    assert solutions(loaded) == [3, 3]


def test_the_number_of_a_class_is_no_answer():
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"prompt": ["1?", "2?"], "label": [0, 1]}, features=features)
    assert prepare_rows(rows, name="classes").column_names == ["prompt", "label", "answer_format"]
    assert solutions(prepare_rows(rows.add_column("solution", ["5", "6"]), name="classes")) == [5, 6]


@pytest.mark.parametrize("column", ["problem", "prompt"])
def test_bytes_are_text(tmp_path, column):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({column: [b"1 + 1?"], "answer": [b"2"]}).to_parquet(path)
    (row,) = load_rows(str(path), prompt_template="raw")
    assert (row["prompt"], row["solution"]) == (TEMPLATES["raw"].messages("1 + 1?"), "2")
    (row,) = load_rows(str(path))
    assert row["prompt"] == ("1 + 1?" if column == "prompt" else TEMPLATES["qwen_boxed"].messages("1 + 1?"))


# The command line


def test_script_arguments_are_the_options():
    assert RowFields.__annotations__ == RowOptions.__annotations__
    assert set(RowOptions.__annotations__) - set(ROW_OPTIONS) == {"tokenizer", "chat_template_kwargs"}
    for name in ROW_OPTIONS:
        assert (getattr(CovGRPOScriptArguments, name) or None) == (getattr(RowOptions, name) or None)


def test_options_on_the_command_line(tmp_path, write, caplog):
    rows = [upstream(f"{i} + 1?", str(i + 1)) for i in range(8)]
    source = write([*rows, rows[0], upstream("没有", "1"), upstream("What is 7 times 8?", "56"), upstream("1" * 600)])
    evaluation = write([{"problem": "what is 7 times 8", "answer": "56"}], "eval.jsonl")
    report = tmp_path / "dropped.jsonl"
    arguments = ["--dataset_name", source, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    arguments += ["--prompt_template", "r1_zero", "--language", "en", "--exclude_overlap", evaluation]
    arguments += ["--max_prompt_length", "1000", "--max_bad_rows", "0.1", "--dropped_rows_file", str(report)]
    assert train_main(["--config", str(SMOKE), "--max_steps", "1", *arguments]) == 0
    assert "kept 8 of 12 rows" in caplog.text
    reasons = {line["row"]: line["reason"] for line in read_json_lines(report)}
    assert reasons == {
        9: "are in another language",
        10: "overlap an evaluation problem",
        11: "have a prompt longer than max_prompt_length",
    }


@pytest.mark.parametrize("dynamic", ["false", "true"])
def test_training_on_a_stream(tmp_path, write, caplog, monkeypatch, dynamic):
    rows = read_json_lines(SAMPLE)[:6]
    seen = []

    def reward(completions, prompts, **kwargs):
        seen.append([prompt[0]["content"] for prompt in prompts])
        return [float(i % 2) for i, _ in enumerate(completions)]

    monkeypatch.setattr("entropy_trl.rewards.math_reward", reward)
    arguments = ["--dataset_name", write(rows * 3), "--dataset_streaming", "true", "--dynamic_sampling", dynamic]
    arguments += ["--max_steps", "8", "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    arguments += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--steps_per_generation", "2"]
    assert train_main(["--config", str(SMOKE), "--gradient_accumulation_steps", "1", *arguments]) == 0
    assert caplog.text.count("kept 6 of 18 rows") == 1
    assert [len(batch) for batch in seen] == [8] * 4  # of which three are an epoch
    assert len({prompt for batch in seen[:3] for prompt in batch}) == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dataset_name", str(SAMPLE), "--prompt_template", "r1"], "is not one of the templates r1_zero, qwen_boxed"),
        (["--dataset_name", str(SAMPLE), "--language", "german"], "invalid choice: 'german'"),
        (["--dataset_name", str(SAMPLE), "--max_bad_rows", "2"], "max_bad_rows is a fraction from 0 to 1, got 2.0"),
        (["--dataset_name", str(SAMPLE), "--prompt_column", "problm"], "no column 'problm', which prompt_column names"),
        (["--dataset_name", str(SAMPLE), "--exclude_overlap", "no.jsonl"], "Data file 'no.jsonl' does not exist"),
        (["--dataset_name", str(SAMPLE), "--max_prompt_length", "9"], "64 of 64 different rows cannot be used"),
        (["--dataset_name", str(SAMPLE), "--steps_per_generation", "512"], "no step would run"),
        (["--max_prompt_length", "9"], "max_prompt_length is for --dataset_name"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, expected):
    assert train_main(["--config", str(SMOKE), *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("train.py: error: ") and expected in last


# Real rows


def test_shipped_sample():
    rows = dapo_math_sample()
    assert len(rows) == 64
    contents = [prompt[0]["content"] for prompt in rows["prompt"]]
    assert all(content.isascii() and len(content) < 500 and "Answer: $Answer" in content for content in contents)
    assert sum(len(solution) == 1 for solution in rows["solution"]) == 40
    assert set(rows["answer_format"]) == {"answer_line"}


@pytest.fixture(scope="module")
def shared_data():
    return Path(os.environ["ENTROPY_TRL_DATA"])


@full_data
def test_whole_dapo_math(caplog, shared_data):
    rows = load_rows(str(shared_data / "dapo_math_17k" / "train.jsonl"))
    assert len(rows) == 17_188 - 12  # the different prompts among 17,917, without those with two answers
    assert all(solution.lstrip("-").isdigit() for solution in rows["solution"])
    assert set(rows["answer_format"]) == {"answer_line"}
    assert "kept 17176 of 17917 rows" in caplog.text
    assert "717 repeat an earlier row's prompt and answer" in caplog.text
    assert "24 have a prompt that has another answer in another row" in caplog.text


@full_data
def test_whole_dapo_math_streamed(caplog, shared_data):
    """As the hub has it, with repeats of every row: one row a prompt, of two answers the first."""
    path = shared_data / "dapo_math_17k" / "train.jsonl"
    rows = datasets.load_dataset("json", data_files={"train": str(path)}, streaming=True)["train"].repeat(3)
    rows = list(prepare_rows(rows, name="streamed"))
    assert len(rows) == 17_188
    first = {}
    for row in read_json_lines(path):
        first.setdefault(" ".join(row["prompt"][0]["content"].split()), row["reward_model"]["ground_truth"])
    assert [row["solution"] for row in rows] == list(first.values())
    table = load_rows(str(path))
    shared = {row["prompt"][0]["content"] for row in rows} & {prompt[0]["content"] for prompt in table["prompt"]}
    assert len(shared) == len(table) == 17_176
    assert f"kept 17188 of {3 * 17917} rows" in caplog.text
    assert f"{3 * 17917 - 17188 - 12} repeat an earlier row's prompt and answer" in caplog.text
    assert "12 have a prompt that has another answer in an earlier row, which is taken (rows 179, " in caplog.text


@full_data
def test_languages_of_dapo_math(shared_data):
    path = str(shared_data / "dapo_math_17k" / "train.jsonl")
    kept = {language: load_rows(path, language=language) for language in ("en", "zh")}
    assert {language: len(rows) for language, rows in kept.items()} == {"en": 13_976, "zh": 3_200}
    english = " ".join(problems(kept["en"]))
    assert not any("\u4e00" <= character <= "\u9fff" for character in english)


@full_data
@pytest.mark.parametrize(
    ("threshold", "found", "rows_left_out"),
    [  # counted before without this code, with 321 for Omni-MATH at 0.5: one is overlapped by a prompt with two answers
        (0.3, {"amc23": 24, "math500": 25, "olympiadbench": 60, "omni_math_rule": 366}, 579),
        (0.5, {"amc23": 22, "math500": 18, "olympiadbench": 49, "omni_math_rule": 320}, 497),
    ],
)
def test_overlap_of_dapo_math_with_benchmarks(tmp_path, shared_data, threshold, found, rows_left_out):
    names = ["aime24", "aime25", "amc23", "gsm8k", "math500", "minerva_math", "olympiadbench", "omni_math_rule"]
    files = {str(shared_data / name / "test.jsonl"): name for name in names}
    report = tmp_path / "dropped.jsonl"
    rows = load_rows(
        str(shared_data / "dapo_math_17k" / "train.jsonl"),
        exclude_overlap=list(files),
        overlap_threshold=threshold,
        dropped_rows_file=str(report),
    )
    assert len(rows) == 17_176 - rows_left_out
    hits = set()
    for line in read_json_lines(report):
        hits |= {tuple(hit.rsplit(":", 1)) for hit in line.get("overlaps", [])}
    assert Counter(files[file] for file, _ in hits) == found
    if threshold == 0.3:  # the very problems of the file, which was made without this code
        ids = {name: [row["id"] for row in read_json_lines(file)] for file, name in files.items()}
        listed = read_json_lines(shared_data / "dapo_math_17k" / "overlap_with_eval.jsonl")
        listed = {(row["eval"].split("/")[0], row["eval_id"]) for row in listed}
        ours = {(files[file], ids[files[file]][int(row)]) for file, row in hits}
        assert ours == {(name, problem) for name, problem in listed if name in names}
