r"""Reward functions for verifiable problems. Each maps completions to one number per completion.

`math_reward` reads the answer where the prompt's template asks for it (`answers.py`). It compares small numbers and
words in this process, and the rest in worker processes with a hard time limit (`pool.py`, `worker.py`). `equality.py`
has the rules. Importing this imports neither torch nor TRL, so that workers start in a second.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from entropy_trl.rewards.answers import ANSWER_FORMATS, final_answer
from entropy_trl.rewards.equality import EQUAL, UNPARSED, compare, verify
from entropy_trl.rewards.pool import CRASH, TIMEOUT, WorkerPool
from entropy_trl.rewards.sources import SourceNames
from entropy_trl.rewards.tokens import restore_escapes


__all__ = ["ANSWER_FORMATS", "MathReward", "accepts_itself", "final_answer", "math_reward"]

_NO_ANSWER = "no answer"
_METRICS = {_NO_ANSWER: "no_answer", UNPARSED: "unparsed", TIMEOUT: "timeouts", CRASH: "crashes"}
_DISTINCT = "distinct_answers"


class MathReward:
    """`math_reward` with worker processes and a time limit of its own.

    Args:
        workers (`int`, *optional*): The number of worker processes; 0 compares in this process, without a time limit.
            By default the environment variable `ENTROPY_TRL_REWARD_WORKERS`, else 4, or fewer where there are fewer
            processors for each process of the machine.
        time_limit (`float`, *optional*): Seconds that one comparison may take before its worker is killed and the
            completion gets 0.0. By default the environment variable `ENTROPY_TRL_REWARD_TIME_LIMIT`, else 5.
    """

    __name__ = "math_reward"  # TRL names its metrics by it

    def __init__(self, workers: int | None = None, time_limit: float | None = None):
        self.workers = int(os.environ.get("ENTROPY_TRL_REWARD_WORKERS", _processors())) if workers is None else workers
        self.time_limit = float(
            os.environ.get("ENTROPY_TRL_REWARD_TIME_LIMIT", 5.0) if time_limit is None else time_limit
        )
        if self.workers < 0 or self.time_limit <= 0:
            raise ValueError(
                f"MathReward needs workers >= 0 and time_limit > 0, not {self.workers}, {self.time_limit}."
            )
        self._pool = WorkerPool(self.workers, self.time_limit)
        self._source_names = SourceNames([*_METRICS.values(), _DISTINCT])

    def __reduce__(self) -> tuple[Any, ...]:
        return MathReward, (self.workers, self.time_limit)  # a copy starts workers of its own

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any],
        answer_format: Sequence[str | None] | str | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """See `math_reward`."""
        if answer_format is None or isinstance(answer_format, str):
            answer_format = [answer_format] * len(completions)
        answers = [
            restore_escapes(final_answer(_text(completion), name or "any"))
            for completion, name in zip(completions, answer_format, strict=True)
        ]
        references = [_reference(reference) for reference in solution]
        outcomes = self._outcomes(list(zip(answers, references, strict=True)))
        rewards = [float(outcome == EQUAL) for outcome in outcomes]
        if log_extra is not None:
            log_extra("final_answer", answers)
        if log_metric is not None and outcomes:
            for outcome, name in _METRICS.items():
                log_metric(f"math_reward/{name}", outcomes.count(outcome) / len(outcomes))
            # TRL averages what it is given, so that one call a completion makes a mean over all processes.
            sources = self._source_names.of(kwargs.get("data_source", kwargs.get("source")) or [])
            for source, reward in zip(sources, rewards, strict=False):
                if source is not None:
                    log_metric(f"math_reward/{source}", reward)
            for count in _distinct_answers(kwargs.get("prompts") or [], answers, outcomes):
                log_metric(f"math_reward/{_DISTINCT}", count)
        return rewards

    def _outcomes(self, pairs: list[tuple[str, str]]) -> list[str]:
        # The completions of a group often agree: each pair is compared once.
        first = compare if self.workers else verify
        known = {pair: first(*pair) if pair[0] else _NO_ANSWER for pair in pairs}
        hard = [pair for pair, outcome in known.items() if outcome is None]
        results = self._pool.compare(hard) if hard else []
        decided = known | dict(zip(hard, results, strict=True))
        return [str(decided[pair]) for pair in pairs]


def _distinct_answers(prompts: Sequence[Any], answers: Sequence[str], outcomes: Sequence[str]) -> Iterator[int]:
    """How many different answers each prompt has. The right ones are one; wrong ones differ where their texts do."""
    for _, group in groupby(zip(prompts, answers, outcomes, strict=False), key=lambda completion: completion[0]):
        given = [(outcome == EQUAL, "" if outcome == EQUAL else "".join(a.split())) for _, a, outcome in group if a]
        yield len(set(given))


_shared: MathReward | None = None


def math_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    answer_format: Sequence[str | None] | str | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""1.0 for each completion whose final answer equals its row's solution, else 0.0.

    The final answer is what `final_answer` finds for the row's `answer_format`, and only that is compared: a right
    number elsewhere in the text earns nothing. Equality is mathematical: `0.5` equals `\frac{1}{2}`; docs/rewards.md
    has the rules. Comparisons run in worker processes, which are shared by all calls and started by the first that
    needs one; one that takes longer than 5 seconds is ended and earns 0.0. `MathReward` sets other limits.

    Args:
        completions (`Sequence[Any]`): (B,) texts, or conversations (lists of messages) whose last message is read.
        solution (`Sequence[Any]`): (B,) reference answers, for instance `"34"` or `"\frac{1}{2}"`. If there is a
            `\boxed{}` in one, its content is the reference.
        answer_format (`Sequence[str | None] | str`, *optional*): (B,) names out of `ANSWER_FORMATS`, one for all, or
            None, which is `"any"`. A column of the data.
        **kwargs (`Any`): What else TRL passes to reward functions: `log_metric` for the shares of completions without
            an answer, unparsed, timed out and crashed, for the different answers a prompt, and for the mean reward by
            `data_source` (or `source`) where there is such a column; `log_extra` for the answers.

    Returns:
        `list[float]`: (B,) rewards, each 1.0 or 0.0. A completion without an answer, or with one that cannot be
        parsed, gets 0.0.
    """
    global _shared
    if _shared is None:
        _shared = MathReward()
    return _shared(completions, solution, answer_format, **kwargs)


def accepts_itself(solution: Any, answer_format: str = "boxed") -> bool:
    r"""Check that a row's solution earns 1.0 when a completion gives it as the answer.

    A row that fails can never be solved. Reasons: no answer, more than 1,000 characters, braces that do not match, or a
    line break where the answer is one line. The check needs no worker process.

    Args:
        solution (`Any`): The reference of a row, as `math_reward` gets it.
        answer_format (`str`, *optional*, defaults to `"boxed"`): One of `ANSWER_FORMATS`: where a completion would
            write the answer.

    Returns:
        `bool`: Whether `math_reward` gives 1.0 to a completion that writes the reference in this format.

    Example:

    ```python
    >>> accepts_itself(r"\frac{1}{2}")
    True
    >>> accepts_itself("first line\nsecond line", "answer_line")
    False
    ```
    """
    if _PLAIN_NUMBER.fullmatch(str(solution)) and answer_format in ANSWER_FORMATS:
        return True
    reference = _reference(solution)
    answer = final_answer(_COMPLETIONS.get(answer_format, _COMPLETIONS["boxed"]).format(reference), answer_format)
    return compare(answer, reference) == EQUAL


#: Data that were escaped twice. Only relations: two backslashes also end a row of a matrix.
_DOUBLED = re.compile(r"\\\\(?=(?:leq?|geq?|neq?|boxed)(?![a-zA-Z]))")
#: Most references are. They need no look, and there are many rows.
_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d{1,15})?", re.ASCII)
#: A completion that gives an answer, by format.
_COMPLETIONS = {"boxed": "\\boxed{{{}}}", "answer_line": "Answer: {}", "answer_tag": "<answer>{}</answer>"}


def _processors() -> int:
    """4 workers, or fewer where the processes of this machine (torchrun says how many) have fewer processors each."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _reference(solution: Any) -> str:
    """The answer of a row; empty, which nothing equals, where it has none."""
    if solution is None or solution != solution:  # NaN, as pandas has it
        return ""
    text = _DOUBLED.sub(r"\\", restore_escapes(str(solution)))
    return final_answer(text, "boxed") or text


def _text(completion: Any) -> str:
    """The text of a completion, which is plain or a conversation."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None  # a tool call has no content
    if isinstance(content, list):  # content in parts: only the parts of text can hold an answer
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    return content or ""
