"""Rows of programming problems: the schemas of their data sets, bad rows, prompts, mixtures with mathematics."""

import base64
import datetime
import json
import pickle
import zlib

import datasets
import pytest

from entropy_trl.data import RowOptions, load_rows, prepare_rows
from entropy_trl.data.dropped import BAD as BAD_REASONS
from entropy_trl.data.reading import Reading
from entropy_trl.data.solutions import reference_programs
from entropy_trl.templates import TEMPLATES


def read(*rows, **options):
    return prepare_rows(datasets.Dataset.from_list(list(rows)), name="rows", **options)


def one(row, **options):
    """The tests of one row, what its prompt says, and the row."""
    (loaded,) = read(row, **options)
    return json.loads(loaded["tests"]), loaded["prompt"][-1]["content"], loaded


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


DOUBLE = [{"input": "2\n3", "output": "6", "testtype": "functional"}]
MBPP = {"text": "Double it.", "code": "", "task_id": 7, "test_setup_code": "x = 1", "test_list": ["assert f(1) == 2"]}
HUMANEVAL = {
    "task_id": "T/0",
    "prompt": 'def f(n: int) -> int:\n    """Double n."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
LEETCODE = {
    "task_id": "double",
    "problem_description": "Given n, return 2n.",
    "starter_code": "class Solution:\n    def f(self, n: int) -> int:\n        ",
    "prompt": "from typing import *\n",
    "completion": "class Solution: ...",
    "entry_point": "Solution().f",
    "test": "def check(candidate):\n    assert candidate(n = 2) == 4\n",
    "input_output": [{"input": "n = 2", "output": "4"}],
}
KODCODE = {
    "question": "Double a number.",
    "solution": "def f(n): return 2 * n",
    "test": "from solution import f\n\ndef test_f():\n    assert f(2) == 4\n",
    "test_info": [{"function_name": "f", "function_declaration": "def f(n):", "parameter_list": "(n)"}],
}
APPS = {
    "question": "Double each number.",
    "solutions": '["print(1)"]',
    "input_output": json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["2\n", ["4", "6"]]}),
    "starter_code": "",
}
TACO = APPS | {
    "input_output": json.dumps({"inputs": [[1, [2]], [3, [4]]], "outputs": [[5], [6, 7]], "fn_name": "f"}),
    "starter_code": "def f(a, b):\n\t",
}
CONTESTS = {
    "name": "1_A",
    "description": "Double it.",
    "public_tests": {"input": ["1\n"], "output": ["2\n"]},
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": ["2\n", "3\n"], "output": ["4\n", "6\n"]},
    "solutions": {"language": [3], "solution": ["print(2 * int(input()))"]},
    "input_file": "",
}
LIVE = {
    "question_content": "Multiply.",
    "question_id": "q",
    "starter_code": "class Solution:\n    def product(self, a: int, b: int) -> int:\n        ",
    "public_test_cases": json.dumps(DOUBLE),
    "private_test_cases": packed(json.dumps([{"input": "4\n5", "output": "20", "testtype": "functional"}])),
    "metadata": '{"func_name": "product"}',
}
LIVE_STREAMS = LIVE | {
    "starter_code": "",
    "metadata": "{}",
    "public_test_cases": '[{"input": "2 3", "output": "6", "testtype": "stdin"}]',
    "private_test_cases": '[{"input": "4 5", "output": "20", "testtype": "stdin"}]',
}
EURUS_ASKS = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."


def eurus(problem, truth, ability="code"):
    asks = EURUS_ASKS if ability == "code" else "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
    prompt = [{"role": "system", "content": "Act in steps."}, {"role": "user", "content": problem + asks}]
    reward = {"ground_truth": truth if isinstance(truth, str) else json.dumps(truth), "style": "rule"}
    return {"data_source": "taco", "prompt": prompt, "ability": ability, "reward_model": reward}


STREAMS = "Read the input from standard input, and write the output to standard output."
STARTER = "Start from this code:\n```python\n"


def call(*arguments, **expected):
    return {"args": list(arguments), **expected}


SCHEMAS = {
    "mbpp": (MBPP, {"kind": "asserts", "setup": "x = 1", "cases": ["assert f(1) == 2"]}, "assert f(1) == 2\n```"),
    "mbpp, sanitized": (
        {"prompt": "Double it.", "code": "", "test_imports": ["import math"], "test_list": ["assert f(1) == 2"]},
        {"kind": "asserts", "setup": "import math", "cases": ["assert f(1) == 2"]},
        "Double it.\n\nYour code has to pass tests such as this one:\n```python\nassert f(1) == 2",
    ),
    "humaneval": (
        HUMANEVAL,
        {"kind": "asserts", "prefix": HUMANEVAL["prompt"], "entry_point": "f", "setup": HUMANEVAL["test"]}
        | {"cases": ["check(candidate)"]},
        'Complete this function:\n```python\ndef f(n: int) -> int:\n    """Double n."""\n```',
    ),
    "leetcode": (
        LEETCODE,
        {"kind": "asserts", "prefix": LEETCODE["prompt"], "entry_point": "Solution().f", "setup": LEETCODE["test"]}
        | {"cases": ["check(candidate)"]},
        f"Given n, return 2n.\n\n{STARTER}class Solution:",
    ),
    "kodcode": (KODCODE, {"kind": "pytest", "cases": [KODCODE["test"]]}, "signature:\n```python\ndef f(n):\n```"),
    "apps": (
        APPS,
        {"kind": "stdin", "cases": [{"input": "1\n", "output": "2\n"}, {"input": "2\n3", "output": "4\n6"}]},
        f"Double each number.\n\n{STREAMS}",
    ),
    "taco": (
        TACO,
        {"kind": "function", "entry_point": "f", "cases": [call(1, [2], any_of=[[5], 5]), call(3, [4], output=[6, 7])]},
        f"Double each number.\n\n{STARTER}def f(a, b):\n```",
    ),
    "eurus": (
        eurus("Double it.", {"inputs": [[1]], "outputs": [[2]], "fn_name": "f"}),
        {"kind": "function", "entry_point": "f", "cases": [call(1, any_of=[[2], 2])]},
        "Write a function `f`.",
    ),
    "codecontests": (
        CONTESTS,
        {"kind": "stdin", "cases": [{"input": f"{i}\n", "output": f"{2 * i}\n"} for i in (1, 2, 3)]},
        f"Double it.\n\n{STREAMS}",
    ),
    "livecodebench": (
        LIVE,
        {"kind": "function", "entry_point": "product", "cases": [call(2, 3, output=6), call(4, 5, output=20)]},
        f"Multiply.\n\n{STARTER}class Solution:",
    ),
    "livecodebench, streams": (
        LIVE_STREAMS,
        {"kind": "stdin", "cases": [{"input": "2 3", "output": "6"}, {"input": "4 5", "output": "20"}]},
        f"Multiply.\n\n{STREAMS}",
    ),
    "tests of other data sets": (
        {"problem": "Double it.", "tests": [{"input": "1", "output": "2", "type": "stdin_stdout"}]},
        {"kind": "stdin", "cases": [{"input": "1", "output": "2"}]},
        f"Double it.\n\n{STREAMS}",
    ),
}


@pytest.mark.parametrize(("row", "expected", "said"), SCHEMAS.values(), ids=SCHEMAS)
def test_schemas(row, expected, said):
    tests, text, loaded = one(row, prompt_template="code")
    assert {key: tests.get(key) for key in expected} == expected
    assert said in text
    assert EURUS_ASKS not in text
    assert loaded["code_format"] == "fenced"
    assert loaded["answer_format"] is None
    others = ("task_id", "entry_point", "code", "canonical_solution", "data_source", "question_id", "test_info")
    for column in {*others, "solutions"} & set(row):  # for other rewards, and for finding the row again
        assert loaded[column] == row[column]
    assert "solution" not in loaded or row is KODCODE  # its reference program, which is no answer


def test_ready_prompts_stay():
    truth = {"inputs": ["1"], "outputs": ["2"]}
    row = eurus("Double it.", truth)
    (loaded,) = read(row)
    assert (loaded["prompt"], loaded["code_format"]) == (row["prompt"], "fenced")
    tests = json.dumps({"kind": "asserts", "cases": ["assert f(1) == 2"]})
    ready = {"prompt": "Define f, and nothing else.", "tests": tests}
    (loaded,) = read(ready)
    assert (loaded["prompt"], loaded["tests"], loaded["code_format"]) == (ready["prompt"], tests, "whole")
    (loaded,) = read(ready | {"code_format": "fenced"})
    assert loaded["code_format"] == "fenced"
    with pytest.raises(ValueError, match="have a code_format that is none of fenced, whole"):
        read(ready | {"code_format": "box"})


def test_prepared_rows_can_be_prepared_again():
    rows = read(MBPP)
    assert prepare_rows(rows, name="again")[:] == rows[:]
    assert prepare_rows(rows, name="again", prompt_template="code")[:] == rows[:]


def with_tests(tests):
    return APPS | {"input_output": tests if isinstance(tests, str) else json.dumps(tests)}


class Opens:
    def __reduce__(self):
        return open, ("/nothing",)


BAD = {
    "none": (with_tests(""), "have no tests"),
    "empty": (with_tests({"inputs": [], "outputs": []}), "have no tests"),
    "empty asserts": (MBPP | {"test_list": []}, "have no tests"),
    "lengths": (with_tests({"inputs": ["1", "2"], "outputs": ["1"]}), "more inputs than outputs"),
    "no outputs": (with_tests({"inputs": ["1"]}), "more inputs than outputs"),
    "JSON": (with_tests('{"inputs": ["1"], "outputs"'), "no valid JSON"),
    "deep JSON": (with_tests("[" * 100_000), "no valid JSON"),
    "a broken ground truth": (eurus("?", '{"inputs": ["1"], "out'), "no valid JSON"),
    "other keys": (with_tests({"given": ["1"]}), "unknown kind"),
    "a number": (with_tests("5"), "unknown kind"),
    "another kind": ({"problem": "?", "tests": '{"kind": "judge", "cases": [1]}'}, "unknown kind"),
    "another language": ({"problem": "?", "tests": '{"kind": "stdin", "cases": [1], "language": "cpp"}'}, "unknown"),
    "another test type": (
        LIVE | {"public_test_cases": '[{"input": "", "output": "", "testtype": "x"}]'},
        "unknown kind",
    ),
    "a structure on a stream": (with_tests({"inputs": [{"a": 1}], "outputs": ["1"]}), "a wrong type"),
    "a case without output": (LIVE | {"public_test_cases": '[{"input": "1"}]'}, "missing"),
    "no function": (LIVE | {"metadata": "{}", "starter_code": ""}, "missing"),
    "code": (MBPP | {"test_list": ["assert f(1) =="]}, "code that does not parse"),
    "a large text": (with_tests({"inputs": ["1" * 2**20], "outputs": ["1"]}), "larger than max_tests_size"),
    "a large structure": (
        CONTESTS | {"private_tests": {"input": ["1" * 2**20], "output": ["1"]}},
        "larger than max_tests_size",
    ),
    "a bomb": (LIVE | {"private_test_cases": packed(json.dumps(["0" * 2**22]))}, "larger than max_tests_size"),
    "a pickled call": (LIVE | {"private_test_cases": packed(Opens())}, "pickled objects"),
    "a pickled object": (LIVE | {"private_test_cases": packed(datetime.date(2024, 1, 1))}, "pickled objects"),
    "a pickled list": (LIVE | {"private_test_cases": packed([1, "2"])}, "pickled objects"),
    "cut off": (LIVE | {"private_test_cases": LIVE["private_test_cases"][:40]}, "no valid JSON"),
    "no base 64": (LIVE | {"private_test_cases": "?!"}, "no valid JSON"),
    "files": (CONTESTS | {"input_file": "input.txt"}, "read or write files"),
    "no problem": (MBPP | {"text": " "}, "have no prompt"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(row, reason):
    dropped = Reading.of(list(row), "rows", RowOptions(max_tests_size=1), [row]).row(row)["dropped"]
    assert reason in dropped
    assert dropped in BAD_REASONS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file(tmp_path, caplog, streaming):
    rows = [MBPP | {"text": f"Add {i}."} for i in range(3)] + [MBPP | {"text": "Add 1.", "task_id": 8}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, MBPP | {"test_list": []}]))
    loaded = list(load_rows(str(file), streaming=streaming, max_bad_rows=0.25))
    assert [row["task_id"] for row in loaded] == [7] * 3
    assert [json.loads(row["tests"])["cases"] for row in loaded] == [["assert f(1) == 2"]] * 3
    assert "kept 3 of 5 rows" in caplog.text
    assert "1 have no tests (row 4)" in caplog.text


def test_overlap_looks_at_problems_alone(tmp_path, caplog):
    words = "Write a function that returns the sum of all even numbers below a given limit, and zero if there are none."
    (tmp_path / "test.jsonl").write_text(json.dumps(MBPP | {"text": words}) + "\n")
    row = APPS | {"question": words.lower()}  # the same words, but its prompt asks for something else
    loaded = read(row, APPS, exclude_overlap=[str(tmp_path / "test.jsonl")])
    assert len(loaded) == 1
    assert "1 overlap an evaluation problem (row 0)" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_mathematics_and_of_programs_mix(tmp_path, streaming):
    """One data set has both, and one template serves both."""
    truth = {"inputs": ["1"], "outputs": ["2"]}
    file = tmp_path / "rows.jsonl"
    maths = {"role": "user", "content": "1 + 1?"}
    rows = [eurus("Double it.", truth), eurus("", "2", "math") | {"prompt": [maths]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program, problem = load_rows(str(file), streaming=streaming, prompt_template="r1_zero")
    assert program["prompt"] == TEMPLATES["r1_zero_code"].messages(f"Double it.\n\n{STREAMS}")
    assert problem["prompt"] == TEMPLATES["r1_zero"].messages("1 + 1?")
    assert (program["solution"], program["answer_format"], program["code_format"]) == (None, None, "fenced")
    assert (problem["solution"], problem["answer_format"], problem["code_format"]) == ("2", "boxed", None)
    assert json.loads(program["tests"])["cases"] == [{"input": "1", "output": "2"}]
    assert problem["tests"] is None


def test_tables_of_several_schemas_mix():
    maths = {"question": "1 + 1?", "answer": "2"}
    columns = dict.fromkeys([*maths, *MBPP, *KODCODE])
    rows = [columns | row for row in (maths, MBPP, KODCODE)]
    loaded = read(*rows)
    assert [row["tests"] is None for row in loaded] == [True, False, False]
    lines = [row["prompt"][0]["content"].split("\n")[0] for row in loaded]
    assert lines == ["1 + 1?", "Double it.", "Double a number."]
    says = [row | {"verifier": verifier} for row, verifier in zip(rows, ("math", "code", "math"), strict=True)]
    with pytest.raises(ValueError, match=r"1 have no answer \(row 2\)"):
        read(*says)


def test_data_sets_of_mathematics_get_no_columns_of_tests():
    row = {"prompt": [{"role": "user", "content": "1?"}], "reward_model": {"ground_truth": "1"}, "ability": "MATH"}
    assert "tests" not in read(row).column_names


def test_rows_whose_reference_programs_fail(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    wrong, right = "def f(x):\n    return 5", "def f(x):\n    return 2 * x"
    rows = [MBPP | {"text": f"{code}?", "code": code} for code in (right, wrong, "", "def f(:")]
    assert [row["code"] for row in read(*rows, check_solutions=True)] == [right, ""]
    assert "2 have a reference program that fails the tests (rows 1, 3)" in caplog.text
    # The results are kept: a sandbox that would fail is not asked.
    monkeypatch.setattr("entropy_trl.data.solutions.CodeReward", lambda: None)
    assert len(read(*rows, check_solutions=True)) == 2
    with pytest.raises(ValueError, match="check_solutions is for tables"):
        prepare_rows(datasets.Dataset.from_list([MBPP]).to_iterable_dataset(), name="rows", check_solutions=True)


@pytest.mark.parametrize(
    ("row", "programs"),
    [
        (HUMANEVAL, [HUMANEVAL["canonical_solution"]]),
        (APPS | {"solutions": json.dumps(["a", "b", "c", "d"])}, ["a", "b", "c"]),
        (APPS | {"solutions": "[1, 2"}, ["[1, 2"]),
        (CONTESTS | {"solutions": {"language": [2, 3], "solution": ["c++", "python"]}}, ["python"]),
        (CONTESTS | {"solutions": [{"language": "PYTHON3", "solution": "python"}]}, ["python"]),
        (LIVE, []),
    ],
)
def test_reference_programs(row, programs):
    assert reference_programs(row) == programs
