"""The (entropy, accuracy) pairs of a training, from what TRL logs when it evaluates."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """One evaluation: the step, the policy's entropy in nats, and the mean reward of its completions."""

    step: int
    entropy: float
    accuracy: float


def entropy_accuracy_pairs(
    log_history: Iterable[Mapping[str, Any]], benchmark: str | None = None, accuracy: str = "eval_reward"
) -> list[Pair]:
    """The pairs in `trainer.state.log_history`, or in the `log_history` of a checkpoint's `trainer_state.json`.

    TRL logs both at each evaluation, on the completions that it then draws at the training temperature.

    Args:
        log_history: What was logged.
        benchmark: The name of one evaluation data set, where `eval_dataset` is a dictionary of several. TRL logs each
            under the same names, and only the time it took under its own.
        accuracy: The metric to take; `eval_rewards/NAME/mean` where there are several reward functions.

    Raises:
        ValueError: No evaluation logged that.
    """
    mark = "eval_runtime" if benchmark is None else f"eval_{benchmark}_runtime"
    pairs = [
        Pair(int(log["step"]), float(log["eval_entropy"]), float(log[accuracy]))
        for log in log_history
        if mark in log and log.get("eval_entropy") is not None and log.get(accuracy) is not None
    ]
    if not pairs:
        raise ValueError(
            f"No evaluation{f' on {benchmark!r}' if benchmark else ''} logged eval_entropy and {accuracy}."
        )
    return pairs
