"""One reward for rows of mathematics and rows of programs in one data set."""

from collections.abc import Callable, Sequence
from typing import Any


_MATHEMATICS, _PROGRAMS = "math", "code"
_VERIFIERS = {
    **dict.fromkeys(("math", "mathematics", "math_reward"), _MATHEMATICS),
    **dict.fromkeys(("code", "program", "code_reward"), _PROGRAMS),
}


class VerifiableReward:
    """`verifiable_reward` with rewards of its own, such as `CodeReward(partial=True)`.

    Args:
        mathematics (`Callable`): The reward of rows without tests, such as `math_reward`.
        programs (`Callable`): The reward of rows with tests, such as `code_reward`.
    """

    __name__ = "verifiable_reward"  # TRL names its metrics by it

    def __init__(self, mathematics: Callable[..., list[float]], programs: Callable[..., list[float]]):
        self.mathematics, self.programs = mathematics, programs

    def __call__(
        self,
        completions: Sequence[Any],
        tests: Sequence[str | None] | None = None,
        solution: Sequence[Any] | None = None,
        verifier: Sequence[str | None] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """See `verifiable_reward`."""
        count = len(completions)
        nothing = [None] * count
        given = zip(range(count), verifier or nothing, tests or nothing, solution or nothing, strict=True)
        kinds = [_kind(*row) for row in given]
        rewards = [0.0] * count
        for kind, function, name, column in (
            (_MATHEMATICS, self.mathematics, "solution", solution),
            (_PROGRAMS, self.programs, "tests", tests),
        ):
            if column is None:
                continue
            rows = [row for row in range(count) if kinds[row] == kind]
            logs: dict[str, Any] = {} if log_metric is None else {"log_metric": log_metric}
            if log_extra is not None:
                logs["log_extra"] = _scattered(log_extra, rows, count)
            # Without rows too: a column of a table of completions has to be there for each batch.
            results = function(
                completions=[completions[row] for row in rows],
                **{name: [column[row] for row in rows]},
                **{key: _part(value, rows, count) for key, value in kwargs.items()},
                **logs,
            )
            for row, reward in zip(rows, results, strict=True):
                rewards[row] = reward
                if log_metric is not None:
                    log_metric(f"verifiable_reward/{kind}", reward)
        return rewards


def _kind(row: int, verifier: Any, tests: Any, solution: Any) -> str:
    if verifier and verifier not in _VERIFIERS:
        raise ValueError(
            f"Row {row} of the batch has the verifier {verifier!r}: verifiable_reward cannot tell its reward. Use one "
            f"of {', '.join(_VERIFIERS)}, or null."
        )
    kind = _VERIFIERS[verifier] if verifier else _PROGRAMS if tests else _MATHEMATICS
    if not tests if kind == _PROGRAMS else solution is None:
        needed = "tests" if kind == _PROGRAMS else "tests and no solution"
        raise ValueError(
            f"Row {row} of the batch has no {needed}: verifiable_reward cannot judge it. Read the data with load_rows, "
            "which leaves such rows out."
        )
    return kind


def _part(value: Any, rows: Sequence[int], count: int) -> Any:
    """The rows' part of a column; anything else as it is."""
    is_column = isinstance(value, list | tuple) and len(value) == count
    return [value[row] for row in rows] if is_column else value


def _scattered(
    log_extra: Callable[[str, list[Any]], None], rows: Sequence[int], count: int
) -> Callable[[str, list[Any]], None]:
    def log(column: str, values: list[Any]) -> None:
        full: list[Any] = [None] * count
        for row, value in zip(rows, values, strict=True):
            full[row] = value
        log_extra(column, full)

    return log
