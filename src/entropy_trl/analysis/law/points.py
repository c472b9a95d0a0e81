"""The points of the law: which entropy belongs to which reward, and in which unit."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.law.fit import MAX_ENTROPY, Array, check_entropy
from entropy_trl.analysis.logs.runs import Run, Series


#: Evaluations that a log must have to be preferred to the training reward.
MIN_EVALUATIONS = 5

_EVALUATION = re.compile(r"eval_(?:(.+)_)?runtime")


class Pair(NamedTuple):
    """One evaluation: the step, the policy's entropy in nats, and the mean reward of its completions."""

    step: int
    entropy: float
    accuracy: float


@dataclass(frozen=True)
class Points:
    """The points of a run: entropies in nats a token, and the rewards that belong to them.

    Attributes:
        steps (`npt.NDArray[np.int64]`): Steps of the rewards, increasing.
        entropy (`Array`): Nats a token.
        reward (`Array`): The rewards as logged.
        entropy_metric (`str`): The name under which the entropy was logged.
        reward_metric (`str`): The name under which the reward was logged.
        notes (`tuple[str, ...]`, *optional*, defaults to `()`): What was chosen, converted or left out, a sentence
            each.
    """

    steps: npt.NDArray[np.int64]
    entropy: Array
    reward: Array
    entropy_metric: str
    reward_metric: str
    notes: tuple[str, ...] = ()


def entropy_accuracy_pairs(
    log_history: Iterable[Mapping[str, Any]], benchmark: str | None = None, accuracy: str = "eval_reward"
) -> list[Pair]:
    """The pairs in `trainer.state.log_history`, or in the `log_history` of a checkpoint's `trainer_state.json`.

    TRL logs both at each evaluation, on the completions that it then draws at the training temperature.

    Args:
        log_history (`Iterable[Mapping[str, Any]]`): What was logged.
        benchmark (`str`, *optional*): The name of one evaluation data set, where `eval_dataset` is a dictionary of
            several. TRL logs each under the same names, and only the time it took under its own.
        accuracy (`str`, *optional*, defaults to `"eval_reward"`): The metric to take; `eval_rewards/NAME/mean` where
            there are several reward functions.

    Raises:
        ValueError: No evaluation logged that.
    """
    pairs = [
        Pair(int(log["step"]), float(log["eval_entropy"]), float(log[accuracy]))
        for log in _of_benchmark(log_history, benchmark)
        if log.get("eval_entropy") is not None and log.get(accuracy) is not None
    ]
    if not pairs:
        raise ValueError(
            f"No evaluation{f' on {benchmark!r}' if benchmark else ''} logged eval_entropy and {accuracy}."
        )
    return pairs


def _of_benchmark(log: Iterable[Mapping[str, Any]], benchmark: str | None) -> list[Mapping[str, Any]]:
    """The entries of TRL's evaluations on one of several data sets, or on the only one."""
    mark = "eval_runtime" if benchmark is None else f"eval_{benchmark}_runtime"
    return [entry for entry in log if mark in entry]


def law_points(
    run: Run,
    reward: str | None = None,
    entropy: str | None = None,
    *,
    benchmark: str | None = None,
    pairing: Literal["nearest", "mean"] = "nearest",
    entropy_unit: Literal["nats", "bits"] | None = None,
    tokens_per_sequence: float | str | None = None,
    vocab_size: int | None = None,
    smooth: int = 1,
) -> Points:
    """The points of a run to fit the law to.

    Args:
        run ([`Run`]): The run, from [`read_run`](entropy_trl.analysis.logs.runs.read_run).
        reward (`str`, *optional*): The metric to take as `R`. By default the accuracy of an evaluation
            (`Run.find("accuracy")`) if there are at least 5, otherwise the training reward.
        entropy (`str`, *optional*): The metric to take as `H`. By default that of the same evaluation, if it was
            logged with it, otherwise the training entropy.
        benchmark (`str`, *optional*): The evaluation data set, where TRL evaluated on several.
        pairing (`Literal['nearest', 'mean']`, *optional*, defaults to `"nearest"`): Where the two were logged at
            different steps: the entropy logged `"nearest"` to the step of a reward (the earlier of two as near), or
            the `"mean"` of those from halfway to the reward before up to halfway to the reward after it. A reward with
            no entropy nearer than the widest usual gap between two entries is left out.
        entropy_unit (`Literal['nats', 'bits']`, *optional*): Unit of the log. By default nats, or bits where the
            metric's name says so.
        tokens_per_sequence (`float | str`, *optional*): Where the log has the entropy of whole sequences: their mean
            length in tokens, or the metric that has it, by which the entropy is divided.
        vocab_size (`int`, *optional*): Vocabulary size of the model: no entropy is above its logarithm. By default as
            in the run's settings.
        smooth (`int`, *optional*, defaults to `1`): So many consecutive points are averaged to one. (A moving average
            would make neighbours depend on each other; these do not.)

    Raises:
        ValueError: A metric was not logged, no rewards have an entropy, or entropies are impossible.
    """
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {smooth}.")
    if pairing not in ("nearest", "mean"):
        raise ValueError(f"unknown pairing {pairing!r}; choose from nearest, mean")
    notes: list[str] = []
    run = one_benchmark(run, benchmark)
    reward_name = reward or _default_reward(run, notes)
    entropy_name = entropy or _default_entropy(run, reward_name)
    if entropy_name.startswith("actor/entropy"):  # verl's names; its logs do not have its version
        notes.append("verl up to 0.4.0 logs a wrong entropy with use_dynamic_bsz: do not trust a fit to such a log.")
    rewards, entropies = run.series(reward_name), run.series(entropy_name)
    if tokens_per_sequence is not None:
        entropies = _per_token(run, entropies, tokens_per_sequence)
    if entropy_unit not in (None, "nats", "bits"):
        raise ValueError(f"unknown unit of entropy {entropy_unit!r}; choose from nats, bits")
    if entropy_unit is None and unit_of(entropy_name) != 1:
        entropy_unit = "bits"
        notes.append(f"{entropy_name} is taken to be in bits, as its name says, and was converted to nats.")
    if entropy_unit == "bits":
        entropies = Series(entropies.steps, entropies.values * math.log(2))
    if vocab_size is None and isinstance(run.config.get("vocab_size"), int):
        vocab_size = run.config["vocab_size"]
    try:
        check_entropy(entropies.values, vocab_size=vocab_size)
    except ValueError as error:
        hint = ""
        if entropies.values.max() > min(MAX_ENTROPY, math.log(vocab_size or math.inf)):
            hint = " Say which: --entropy-unit bits, or --tokens-per-sequence (a number, or the metric of the length)."
        raise ValueError(f"Run {run.name!r}, {entropy_name}: {error}{hint}") from error
    kept, h = pair(rewards.steps, entropies, pairing)
    if not kept.any():
        raise ValueError(
            f"Run {run.name!r}: no {entropy_name} was logged near a step of {reward_name} (steps "
            f"{entropies.steps[0]} to {entropies.steps[-1]}, and {rewards.steps[0]} to {rewards.steps[-1]})."
        )
    if not kept.all():
        notes.append(f"{np.count_nonzero(~kept)} of {kept.size} points of {reward_name} have no {entropy_name} near.")
    steps, r = rewards.steps[kept], rewards.values[kept]
    if smooth > 1:
        steps = np.rint(_averaged(steps.astype(np.float64), smooth)).astype(np.int64)
        h, r = _averaged(h, smooth), _averaged(r, smooth)
    return Points(steps, h, r, entropy_name, reward_name, tuple(notes))


def one_benchmark(run: Run, benchmark: str | None) -> Run:
    """The run with the evaluations on one data set only, which TRL logs under the same names as the others.

    Raises:
        ValueError: The data set is not one of the run's, or none is named and the run has several.
    """
    marks = {match[1] for entry in run.log for name in entry if (match := _EVALUATION.fullmatch(name))}
    names = sorted(name for name in marks if name)
    if benchmark is None and len(names) > 1:
        raise ValueError(
            f"Run {run.name!r} evaluated on {', '.join(names)} under the same names: choose one with --benchmark."
        )
    if benchmark is None:
        return run
    if benchmark not in names:
        known = f"it has {', '.join(names)}" if names else "its log has no names of evaluation data sets"
        raise ValueError(f"Run {run.name!r} has no evaluation on {benchmark!r}; {known}.")
    evaluations = {id(entry) for entry in _of_benchmark(run.log, benchmark)}
    others = [e for e in run.log if id(e) in evaluations or not any(_EVALUATION.fullmatch(name) for name in e)]
    return replace(run, log=others)


def is_left_out(entry: Mapping[str, Any], benchmark: str | None) -> bool:
    """Whether an entry of a log is an evaluation on another data set than the one that was chosen."""
    evaluated = benchmark is not None and any(_EVALUATION.fullmatch(name) for name in entry)
    return evaluated and not _of_benchmark([entry], benchmark)


def unit_of(metric: str) -> float:
    """The nats in a unit of an entropy, as far as the name of the metric says: bits, or else nats."""
    return math.log(2) if re.search(r"(?<![a-z])bits?(?![a-z])", metric.lower()) else 1.0


def _default_reward(run: Run, notes: list[str]) -> str:
    evaluated = run.candidates("accuracy")
    trained = run.find("reward")
    few = [name for name in evaluated if len(run.series(name).steps) < MIN_EVALUATIONS]
    enough = [name for name in evaluated if name not in few]
    if enough:
        if len(enough) > 1:
            notes.append(f"Other evaluations in the log, for --reward: {', '.join(enough[1:])}.")
        return enough[0]
    if trained is None:
        if few:
            return few[0]
        logged = ", ".join(run.metrics[:12]) or "nothing"
        raise ValueError(
            f"Run {run.name!r} has no reward or accuracy under a name that is known here: choose one with --reward. It "
            f"logged {logged}."
        )
    why = f"{few[0]} has fewer than {MIN_EVALUATIONS} points" if few else "the log has no evaluation"
    notes.append(f"{trained} is the training reward, since {why}: the law is about validation accuracy.")
    return trained


def _default_entropy(run: Run, reward: str) -> str:
    for name in run.candidates("evaluation_entropy"):
        if reward.startswith(name.removesuffix("entropy")):
            return name
    found = run.find("entropy")
    if found is None:
        logged = ", ".join(run.metrics[:12]) or "nothing"
        raise ValueError(
            f"Run {run.name!r} has no entropy under a name that is known here: choose one with --entropy. It logged "
            f"{logged}."
        )
    return found


def _per_token(run: Run, entropies: Series, tokens: float | str) -> Series:
    if isinstance(tokens, str):
        kept, lengths = pair(entropies.steps, run.series(tokens), "nearest")
        entropies = Series(entropies.steps[kept], entropies.values[kept])
    else:
        lengths = np.full(len(entropies.steps), float(tokens))
    if not len(lengths) or lengths.min() <= 0:
        raise ValueError(f"Run {run.name!r}: tokens a sequence must be positive and logged near the entropies.")
    return Series(entropies.steps, entropies.values / lengths)


def pair(steps: npt.NDArray[np.int64], series: Series, pairing: str) -> tuple[npt.NDArray[np.bool_], Array]:
    """Which of the steps have a value of the series, and those values."""
    reach = max(_gap(steps), _gap(series.steps))
    after = np.searchsorted(series.steps, steps).clip(1, len(series.steps) - 1) if len(series.steps) > 1 else steps * 0
    before = (after - 1).clip(0)
    nearest = np.where(series.steps[after] - steps < steps - series.steps[before], after, before)
    if len(series.steps) > 1:
        nearest = np.where(series.steps[after] == steps, after, nearest)
    kept = np.abs(series.steps[nearest] - steps) <= reach
    if pairing == "nearest":
        return kept, series.values[nearest[kept]]
    between = (steps[1:] + steps[:-1]) / 2
    half = _gap(steps) / 2
    low: Array = np.r_[steps[0] - half, between]
    high: Array = np.r_[between, steps[-1] + half]
    starts = np.searchsorted(series.steps, low, side="right")
    ends = np.searchsorted(series.steps, high, side="right")
    kept = ends > starts
    return kept, np.array([series.values[i:j].mean() for i, j in zip(starts[kept], ends[kept], strict=True)])


def _gap(steps: npt.NDArray[np.int64]) -> float:
    return float(np.median(np.diff(steps))) if len(steps) > 1 else 0.0


def _averaged(values: Array, count: int) -> Array:
    """Means of consecutive values, `count` at a time; the last of fewer, if at least half as many are left."""
    parts = [values[i : i + count] for i in range(0, len(values), count)]
    if len(parts) > 1 and 2 * len(parts[-1]) < count:
        parts.pop()
    return np.array([part.mean() for part in parts])
