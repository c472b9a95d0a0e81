r"""Rewards for programs: `code_reward` runs the program of a completion against the tests of its row.

Programs run in sandboxes (`sandbox.py`), one for each, and so do tests that need a program's objects. `judge.py` gives
the verdict in this process, which sees data alone. `inside/` has what runs in the sandboxes.

A row's `tests` is one JSON text. `kind` and `cases` are required:

| key           | meaning                                                                               |
|---------------|---------------------------------------------------------------------------------------|
| `kind`        | `"asserts"`, `"stdin"`, `"function"` or `"pytest"`                                    |
| `cases`       | a list whose items the table below has                                                |
| `prefix`      | code before the program and, in another sandbox, before the tests: imports, helpers   |
| `setup`       | code before the tests only                                                            |
| `entry_point` | what is called, such as `f` or `Solution().f`; asserts and test modules: `candidate`  |
| `language`    | `"python"`, which is the default                                                      |
| `time_limit`  | seconds for one case                                                                  |
| `tolerance`   | allowed difference of floats in `stdin` and `function`, by default 1e-6               |

| `kind`     | a case                                                                            |
|------------|-----------------------------------------------------------------------------------|
| `asserts`  | a text of Python with asserts                                                     |
| `stdin`    | `{"input": "...", "output": "..."}`                                               |
| `function` | `{"args": [...], "kwargs": {...}, "output": ...}`, or a list `any_of` of outputs  |
| `pytest`   | the text of a test module                                                         |

A program that does not compile alone is appended to the prefix, as HumanEval's completions are.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from entropy_trl.rewards.code.cases import Tests, TestsError, read_tests
from entropy_trl.rewards.code.extract import CODE_FORMATS, final_program
from entropy_trl.rewards.code.judge import (
    COMPILE,
    CRASH,
    NO_PROGRAM,
    PASSED,
    SANDBOX,
    TIMEOUT,
    WRONG,
    Limits,
    Outcome,
    judge,
)
from entropy_trl.rewards.code.sandbox import SandboxError, check_sandbox, sandbox_status
from entropy_trl.rewards.code.session import end_sandboxes
from entropy_trl.rewards.common import completion_text, processors
from entropy_trl.rewards.sources import SourceNames


__all__ = [
    "CODE_FORMATS",
    "CodeReward",
    "SandboxError",
    "Tests",
    "TestsError",
    "code_reward",
    "final_program",
    "read_tests",
    "sandbox_status",
]

logger = logging.getLogger(__name__)

_METRICS = {
    NO_PROGRAM: "no_program",
    COMPILE: "compile_errors",
    WRONG: "wrong_answers",
    TIMEOUT: "timeouts",
    CRASH: "crashes",
    SANDBOX: "sandbox_failures",
}
_SECONDS = "seconds"
_MEGABYTE = 2**20
_LEAST_MEMORY = 128


class CodeReward:
    """`code_reward` with limits of its own.

    Args:
        workers (`int`, *optional*): How many programs run at once. By default the environment variable
            `ENTROPY_TRL_SANDBOX_WORKERS`, else the processors for each process of the machine, at most 16.
        time_limit (`float`, *optional*): Seconds of wall time that one program may take with all of its tests. By
            default the environment variable `ENTROPY_TRL_SANDBOX_TIME_LIMIT`, else 10.
        memory_limit (`int`, *optional*): Megabytes of memory of one program. By default the environment variable
            `ENTROPY_TRL_SANDBOX_MEMORY_LIMIT`, else 1024.
        partial (`bool`, *optional*, defaults to `False`): Whether the reward is the share of the tests that pass. By
            default it is 1.0 if all pass, else 0.0.

    Raises:
        ValueError: A limit is out of its range.
    """

    __name__ = "code_reward"  # TRL names its metrics by it

    def __init__(
        self,
        workers: int | None = None,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        partial: bool = False,
    ):
        self.workers = int(_setting("WORKERS", workers, min(16, processors())))
        self.time_limit = float(_setting("TIME_LIMIT", time_limit, 10.0))
        self.memory_limit = int(_setting("MEMORY_LIMIT", memory_limit, 1024))
        self.partial = partial
        if self.workers < 1 or not 0 < self.time_limit < math.inf or self.memory_limit < _LEAST_MEMORY:
            raise ValueError(
                f"CodeReward needs workers >= 1, a finite time_limit > 0 and memory_limit >= {_LEAST_MEMORY} (MB; "
                f"Python itself takes some), not {self.workers}, {self.time_limit}, {self.memory_limit}."
            )
        self._source_names = SourceNames([*_METRICS.values(), _SECONDS])
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._free = threading.BoundedSemaphore(self.workers)  # of all calls together

    def __reduce__(self) -> tuple[Any, ...]:
        return CodeReward, (self.workers, self.time_limit, self.memory_limit, self.partial)

    def __call__(
        self,
        completions: Sequence[Any],
        tests: Sequence[str | None],
        code_format: Sequence[str | None] | str | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """See `code_reward`."""
        begun = time.monotonic()
        if code_format is None or isinstance(code_format, str):
            code_format = [code_format] * len(completions)
        programs = [
            final_program(completion_text(completion), name or "fenced")
            for completion, name in zip(completions, code_format, strict=True)
        ]
        outcomes = self._outcomes(list(zip(programs, _checked(tests), strict=True)))
        rewards = [
            outcome.passed / outcome.total if self.partial else float(outcome.kind == PASSED) for outcome in outcomes
        ]
        kinds = [outcome.kind for outcome in outcomes]
        if log_extra is not None:
            log_extra("code_outcome", kinds)
        if log_metric is not None and outcomes:
            for kind, name in _METRICS.items():
                log_metric(f"code_reward/{name}", kinds.count(kind) / len(kinds))
            log_metric(f"code_reward/{_SECONDS}", time.monotonic() - begun)
            sources = self._source_names.of(kwargs.get("data_source", kwargs.get("source")) or [])
            for source, reward in zip(sources, rewards, strict=False):
                if source is not None:
                    log_metric(f"code_reward/{source}", reward)
        return rewards

    def _outcomes(self, pairs: list[tuple[str, str]]) -> list[Outcome]:
        # The programs of a group are often equal: each runs once.
        known = {pair: Outcome(NO_PROGRAM) for pair in pairs}
        runs = [pair for pair in known if pair[0].strip()]
        if not runs:
            return [known[pair] for pair in pairs]
        url = os.environ.get("ENTROPY_TRL_SANDBOX_URL", "")
        if not url:
            check_sandbox()
        if self._process != os.getpid():  # forked: the semaphore may be held by a thread that is not here
            self._begin()
        limits = Limits(self.time_limit, self.memory_limit * _MEGABYTE, self.partial, url)
        results = _parallel(lambda pair: judge(pair[0], read_tests(pair[1]), limits), runs, self.workers, self._free)
        known |= dict(zip(runs, results, strict=True))
        failed = sum(result.kind == SANDBOX for result in results)
        if failed:
            if failed == len(results):
                raise SandboxError(
                    f"None of {failed} programs got a sandbox, three times each ({results[0].reason}): their rewards "
                    "would all be 0. `entropy-trl env` says whether the sandbox works."
                )
            logger.warning("code_reward: %d of %d programs got no sandbox and 0.0.", failed, len(results))
        return [known[pair] for pair in pairs]


def _setting(name: str, given: float | None, default: float) -> float:
    return float(os.environ.get(f"ENTROPY_TRL_SANDBOX_{name}", default)) if given is None else given


def _checked(tests: Sequence[str | None]) -> Iterator[str]:
    for index, text in enumerate(tests):
        if not isinstance(text, str):
            raise TestsError(
                f"Row {index} of the batch has no tests ({text!r}): code_reward cannot judge it. Route rows of "
                "mathematics to math_reward, or leave the row out."
            )
        try:
            read_tests(text)
        except TestsError as error:
            raise TestsError(f"Row {index} of the batch: {error}") from None
        yield text


def _parallel(
    function: Callable[[Any], Outcome], items: Sequence[Any], workers: int, free: threading.BoundedSemaphore
) -> list[Outcome]:
    """The results in the order of the items. Threads wait for sandboxes; an error or Ctrl-C here ends all of them."""
    results: dict[int, Outcome] = {}
    errors: list[BaseException] = []
    waiting = iter(range(len(items)))
    lock = threading.Lock()
    stopped = threading.Event()
    # Not `is_alive()`: in Python 3.11 a `join()` that Ctrl-C interrupts marks a running thread as ended.
    running: set[int] = set()
    ended = threading.Semaphore(0)

    def work() -> None:
        running.add(threading.get_ident())
        try:
            while not stopped.is_set():
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                with free:
                    results[index] = function(items[index])
        except BaseException as error:  # it is raised again where the caller is
            errors.append(error)
            stopped.set()
        finally:
            running.discard(threading.get_ident())
            ended.release()

    threads = [threading.Thread(target=work, name="code_reward") for _ in range(min(workers, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            while not ended.acquire(timeout=0.5):
                pass  # another thread may get the signal of Ctrl-C, which then does not wake this one
    finally:
        stopped.set()
        while running:
            for thread_id in list(running):
                end_sandboxes(thread_id)
            time.sleep(0.05)
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]


_shared: CodeReward | None = None
_sharing = threading.Lock()


def code_reward(
    completions: Sequence[Any],
    tests: Sequence[str | None],
    code_format: Sequence[str | None] | str | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 for each completion whose program passes all tests of its row, else 0.0.

    Each program runs in a sandbox of its own, without network and with limits on time and memory. `CodeReward` sets
    other limits, or gives the share of the tests. docs/code.md says what a program may do, and what isolates it.

    Args:
        completions (`Sequence[Any]`): (B,) texts, or conversations (lists of messages) whose last message is read.
        tests (`Sequence[str]`): (B,) the tests of each row, as JSON text in the form of docs/code.md.
        code_format (`Sequence[str | None] | str`, *optional*): (B,) names out of `CODE_FORMATS`, one for all, or
            None, which is `"fenced"`: the program is the last fenced block in Python.
        **kwargs (`Any`): What else TRL passes to reward functions: `log_metric` for the shares of completions by
            outcome, for the seconds, and for the mean reward by `data_source` (or `source`); `log_extra` for the
            outcome of each.

    Returns:
        `list[float]`: (B,) rewards, each 1.0 or 0.0.

    Raises:
        SandboxError: There is no sandbox here. Programs never run without one.
        TestsError: A row has no tests, or tests that cannot be read.

    Example:

    ```python
    >>> tests = '{"kind": "asserts", "cases": ["assert double(2) == 4"]}'
    >>> code_reward(["```python\\ndef double(x):\\n    return 2 * x\\n```"], [tests])
    [1.0]
    ```
    """
    global _shared
    with _sharing:
        if _shared is None:
            _shared = CodeReward()
    return _shared(completions, tests, code_format, **kwargs)
