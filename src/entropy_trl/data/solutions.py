"""Whether the reference programs of rows pass their own tests, in the sandbox, each pair once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from entropy_trl.data.cases import UnusableTests, decoded
from entropy_trl.data.programs import SCHEMAS
from entropy_trl.rewards.code import CodeReward
from entropy_trl.rewards.code.judge import SANDBOX, TIMEOUT


_MOST_TRIED = 3  # programs of a row: some sources have a hundred, and a few of them are wrong
_AT_ONCE = 64  # rows that are checked before their results are kept
_FENCE = "`" * 12  # longer than any that a program may have in its comments
_COLUMNS = tuple(dict.fromkeys(column for schema in SCHEMAS.values() for column in schema.programs))
_PYTHON = (3, "PYTHON3")  # of CodeContests, which has other languages too


def failing_rows(rows: datasets.Dataset) -> list[int]:
    """The rows whose reference programs all fail their tests."""
    columns = [column for column in ("tests", *_COLUMNS) if column in rows.column_names]
    rows = rows.select_columns(columns)
    check, failing = SolutionCheck(), []
    for start in range(0, len(rows), _AT_ONCE):
        batch = [rows[i] for i in range(start, min(start + _AT_ONCE, len(rows)))]
        given = [(reference_programs(row) if row["tests"] else [], row["tests"]) for row in batch]
        failing += [start + i for i, failed in enumerate(check.failing(given)) if failed]
    return failing


def reference_programs(row: Mapping[str, Any]) -> list[str]:
    """The first reference programs of a row, out of the columns that may have them."""
    for column in _COLUMNS:
        programs = list(_programs(row.get(column)))
        if programs:
            return programs[:_MOST_TRIED]
    return []


def _programs(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = decoded(value, len(value))
        except UnusableTests:  # no list, but a program that begins with one
            value = [value]
    if isinstance(value, Mapping):  # CodeContests: lists of languages and of programs
        pairs = zip(value.get("language") or (), value.get("solution") or (), strict=False)
        value = [program for language, program in pairs if language in _PYTHON]
    for one in [value] if isinstance(value, str) else value or ():
        if isinstance(one, Mapping):
            one = one.get("solution") if one.get("language") in _PYTHON else None
        if isinstance(one, str) and one.strip():
            yield one


class SolutionCheck:
    """Runs reference programs against their tests, and keeps the results in a file of the cache of `datasets`."""

    def __init__(self) -> None:
        self._file = Path(datasets.config.HF_DATASETS_CACHE) / "entropy_trl" / "checked_solutions.txt"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._known = {line[:-2]: line.endswith("1") for line in lines}
        self._reward = CodeReward()

    def failing(self, rows: Sequence[tuple[Sequence[str], str]]) -> list[bool]:
        """Whether none of a row's programs passes its tests. A row without programs cannot fail."""
        passed = [not programs for programs, _ in rows]
        for turn in range(_MOST_TRIED):
            left = [i for i, (programs, _) in enumerate(rows) if not passed[i] and len(programs) > turn]
            pairs = [(rows[i][0][turn], rows[i][1]) for i in left]
            for i, result in zip(left, self._results(pairs), strict=True):
                passed[i] = result
        return [not one for one in passed]

    def _results(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        digests = [hashlib.sha256(repr(pair).encode(errors="surrogatepass")).hexdigest() for pair in pairs]
        new = [i for i, digest in enumerate(digests) if digest not in self._known]
        if new:
            completions = [f"{_FENCE}python\n{pairs[i][0]}\n{_FENCE}" for i in new]
            outcomes: dict[str, list[Any]] = {}
            rewards = self._reward(completions, [pairs[i][1] for i in new], log_extra=outcomes.__setitem__)
            self._known |= {digests[i]: reward == 1.0 for i, reward in zip(new, rewards, strict=True)}
            # A program that was too slow may have run on a busy machine: the next run tries it again.
            kept = [i for i, kind in zip(new, outcomes["code_outcome"], strict=True) if kind not in (TIMEOUT, SANDBOX)]
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as opened:
                opened.write("".join(f"{digests[i]} {int(self._known[digests[i]])}\n" for i in kept))
        return [self._known[digest] for digest in digests]
