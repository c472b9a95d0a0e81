"""Programming problems: the schemas of their data sets, and what each becomes.

| schema        | columns                                                      | tests                              |
|---------------|--------------------------------------------------------------|------------------------------------|
| `tests`       | `tests`, and a problem or prompt                             | this package's form, or as `io`    |
| `mbpp`        | `text` or `prompt`, `test_list`, `test_setup_code`           | asserts                            |
| `check`       | `prompt`, `entry_point`, `test`: HumanEval, LeetCodeDataset  | asserts, in a function `check`     |
| `contests`    | `description`, `public_tests` and others: CodeContests       | standard streams                   |
| `live`        | `question_content`, `public_test_cases` and the private ones | standard streams, or a function    |
| `io`          | `question`, `input_output`: APPS, TACO                       | standard streams, or a function    |
| `pytest`      | `question`, `test`: KodCode                                  | test modules                       |
| `ground_truth`| `prompt`, `reward_model`: Eurus-2-RL-Data                    | as `io`                            |
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_trl.data.cases import UnusableTests, compressed, decoded, input_output, written
from entropy_trl.data.dropped import FILE_TESTS, MALFORMED_TESTS, NO_TESTS, UNKNOWN_TESTS
from entropy_trl.data.structures import field_of
from entropy_trl.rewards.code.cases import KINDS, TestsError, read_tests


Row = Mapping[str, Any]
_STREAMS = "Read the input from standard input, and write the output to standard output."


@dataclass(frozen=True)
class Program:
    """A programming problem.

    Attributes:
        tests (`str`): Its tests, as JSON text in the form that `code_reward` reads.
        asks (`str`): What a prompt has to say beside the problem, which the tests take for granted.
        is_code (`bool`): The problem is the code of a function without its body.
    """

    tests: str
    asks: str
    is_code: bool

    def text(self, problem: str) -> str:
        """What a prompt says of the problem."""
        if self.is_code:
            return f"Complete this function:\n{_fenced(problem)}"
        return f"{problem.rstrip()}\n\n{self.asks}" if self.asks else problem


@dataclass(frozen=True)
class Schema:
    """A kind of data set.

    Attributes:
        problem (`tuple[str, ...]`): Columns of the problem: the first that the data has. Empty: those of mathematics.
        needs (`tuple[str, ...]`): Columns by which it is known.
        tests (`tuple[str, ...]`): Columns of tests, which the column `tests` replaces.
        others (`tuple[str, ...]`): More columns that are read.
        programs (`tuple[str, ...]`): Columns of reference programs, which are no answers.
        read (`Callable`): Makes the tests of a row, and what the prompt has to say beside the problem.
    """

    problem: tuple[str, ...]
    needs: tuple[str, ...]
    tests: tuple[str, ...]
    others: tuple[str, ...]
    programs: tuple[str, ...]
    read: Callable[[Row, int], tuple[dict[str, Any], str]]

    def problem_column(self, columns: Sequence[str]) -> str | None:
        """The column of the problem, None for that of mathematics."""
        return next((column for column in self.problem if column in columns), None)

    def program(self, row: Row, limit: int) -> Program:
        """Read the tests of a row, at most `limit` characters of them.

        Raises:
            UnusableTests: They cannot be used.
        """
        tests, asks = self.read(row, limit)
        _check(tests)
        text = written(tests, limit)
        try:
            read_tests.__wrapped__(text)  # past its cache, which would keep the tests of all rows
        except TestsError as error:
            raise UnusableTests(MALFORMED_TESTS) from error
        is_code = self.read is _check_function and bool(tests["prefix"]) and not _there(row.get("problem_description"))
        return Program(text, asks, is_code)


def schemas_of(columns: Sequence[str]) -> tuple[str, ...]:
    """The names of the schemas that a data set with these columns may have, in the order in which they are tried."""
    return tuple(
        name
        for name, schema in SCHEMAS.items()
        if all(column in columns for column in schema.needs)
        and any(column in columns for column in schema.tests)
        and (not schema.problem or schema.problem_column(columns) is not None)
    )


def schema_of(row: Row, names: Sequence[str]) -> Schema | None:
    """The schema of a row, None for one that has no tests. A column `verifier` says of which kind a row is."""
    if str(row.get("verifier") or "").startswith("math"):
        return None
    for name in names:
        schema = SCHEMAS[name]
        if name == "ground_truth":
            if _is_code(row):
                return schema
        elif any(_there(row.get(column)) for column in schema.tests):
            return schema
    return None


def _there(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


_INPUTS = re.compile(r"\s*\{.*\"(?:inputs|fn_name|assert_case)\"\s*:", re.DOTALL)


def _is_code(row: Row) -> bool:
    """Whether a ground truth is tests. Rows of mathematics have an answer there."""
    truth = field_of(row, "reward_model.ground_truth")
    if isinstance(truth, str):
        return str(row.get("ability") or "").startswith("cod") or _INPUTS.match(truth) is not None
    return isinstance(truth, Mapping) and "inputs" in truth


def _fenced(code: str) -> str:
    lines = code.strip("\n").rstrip()
    return f"```python\n{lines}\n```"


def _asks(tests: Mapping[str, Any], starter: Any) -> str:
    parts = []
    if isinstance(starter, str) and starter.strip():
        parts.append(f"Start from this code:\n{_fenced(starter)}")
    elif tests["kind"] == "function":
        parts.append(f"Write a function `{tests['entry_point']}`.")
    if tests["kind"] == "stdin":
        parts.append(_STREAMS)
    return "\n\n".join(parts)


def _own(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    tests = decoded(row.get("tests"), limit)
    if isinstance(tests, Mapping) and "kind" in tests:
        return dict(tests), ""  # prepared before, and the problem with it
    tests = _io(tests, row.get("starter_code"))
    return tests, _asks(tests, row.get("starter_code"))


def _io(value: Any, starter: Any = None) -> dict[str, Any]:
    if isinstance(value, Mapping) and value.get("assert_case"):
        return {"kind": "asserts", "cases": _texts(value["assert_case"])}
    if isinstance(value, list | tuple) and value and all(isinstance(case, str) for case in value):
        return {"kind": "asserts", "cases": list(value)}
    return input_output([value], starter=starter if isinstance(starter, str) else "")


def _texts(value: Any) -> list[str]:
    """A list of texts, which may be one text or the JSON of the list."""
    if isinstance(value, str):
        value = decoded(value, len(value)) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise UnusableTests(MALFORMED_TESTS)
    return [one for one in value if one.strip()]


def _mbpp(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    setup = [*_texts(row.get("test_imports") or []), *_texts(row.get("test_setup_code") or [])]
    cases = _texts(row.get("test_list"))
    tests = {"kind": "asserts", "setup": "\n".join(setup), "cases": cases}
    # The problem does not name the function. One test does, and leaves the others to be found out.
    return tests, f"Your code has to pass tests such as this one:\n{_fenced(cases[0])}" if cases else ""


def _check_function(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    prompt, test, entry_point = (row.get(name) for name in ("prompt", "test", "entry_point"))
    if not all(isinstance(value, str) for value in (test, entry_point)):
        raise UnusableTests(MALFORMED_TESTS)
    prompt = prompt if isinstance(prompt, str) and _parses(prompt) else ""
    tests = {
        "kind": "asserts",
        "prefix": prompt,
        "setup": test,
        "entry_point": entry_point,
        "cases": ["check(candidate)"],
    }
    return tests, _asks(tests, row.get("starter_code"))


def _pytest(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    tests = {"kind": "pytest", "cases": _texts(row.get("test"))}
    declared = decoded(row.get("test_info"), limit)
    declared = [declared] if isinstance(declared, Mapping) else declared or []
    question = str(row.get("question"))
    lines = [
        one["function_declaration"]
        for one in declared
        if isinstance(one, Mapping)
        and isinstance(one.get("function_declaration"), str)
        and str(one.get("function_name") or one["function_declaration"]) not in question
    ]
    return tests, f"Use this signature:\n{_fenced(chr(10).join(lines))}" if lines else ""


def _contests(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    if row.get("input_file") or row.get("output_file"):
        raise UnusableTests(FILE_TESTS)
    tests = input_output([decoded(row.get(name), limit) for name in SCHEMAS["contests"].tests])
    return tests, _asks(tests, None)


def _live(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    metadata = decoded(row.get("metadata"), limit)
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    starter = row.get("starter_code")
    parts = [compressed(row.get(column), limit) for column in SCHEMAS["live"].tests]
    tests = input_output(parts, function=name, starter=starter if isinstance(starter, str) else "")
    return tests, _asks(tests, starter)


def _question(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    tests = _io(decoded(row.get("input_output"), limit), row.get("starter_code"))
    return tests, _asks(tests, row.get("starter_code"))


def _ground_truth(row: Row, limit: int) -> tuple[dict[str, Any], str]:
    tests = _io(decoded(field_of(row, "reward_model.ground_truth"), limit))
    return tests, _asks(tests, None)


SCHEMAS = {
    "tests": Schema((), (), ("tests",), ("starter_code",), (), _own),
    "mbpp": Schema(("text", "prompt"), (), ("test_list",), ("test_setup_code", "test_imports"), ("code",), _mbpp),
    "check": Schema(
        ("problem_description", "prompt"),
        ("prompt", "entry_point"),
        ("test",),
        ("prompt", "entry_point", "starter_code"),
        ("canonical_solution", "completion"),
        _check_function,
    ),
    "contests": Schema(
        ("description",),
        (),
        ("public_tests", "private_tests", "generated_tests"),
        ("input_file", "output_file"),
        ("solutions",),
        _contests,
    ),
    "live": Schema(
        ("question_content",), (), ("public_test_cases", "private_test_cases"), ("starter_code", "metadata"), (), _live
    ),
    "io": Schema(
        ("question", "problem", "description"), (), ("input_output",), ("starter_code",), ("solutions",), _question
    ),
    "pytest": Schema(("question", "problem"), (), ("test",), ("test_info",), ("solution",), _pytest),
    "ground_truth": Schema((), (), ("reward_model",), ("ability",), (), _ground_truth),
}


def _check(tests: Mapping[str, Any]) -> None:
    """Raises UnusableTests for tests without cases or of an unknown kind, which have reasons of their own."""
    if tests.get("kind") not in KINDS or (tests.get("language") or "python") != "python":
        raise UnusableTests(UNKNOWN_TESTS)
    cases = tests.get("cases")
    if not isinstance(cases, list):
        raise UnusableTests(NO_TESTS if cases is None else MALFORMED_TESTS)
    if not cases:
        raise UnusableTests(NO_TESTS)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
