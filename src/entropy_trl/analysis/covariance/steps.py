"""The analyses of the covariance in arXiv 2505.22617, on token records and on exact distributions.

At the level `token` the covariance of a token is Eq. 10 over all tokens of the optimizer step, as the controls use it.
At the level `sequence` it is the paper's measurement for its Fig. 8: the prompt is the state and the whole completion
the action, whose log-probability is divided by its length; the covariance is taken among the completions of each
prompt, and averaged over the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropy_trl.analysis.covariance.records import StepRecords
from entropy_trl.tokens.covariance import TABLE_1_FRACTIONS
from entropy_trl.tokens.selection import selection_count


Level = Literal["token", "sequence"]
Floats = NDArray[np.float64]

#: Mean rewards of a prompt's completions that part its difficulty. The two ends are groups of their own: there all
#: completions have the same reward, and GRPO's advantages are 0.
ACCURACY_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class QuantileRow:
    """Mean covariance of the `count` tokens (completions) with the highest one: a `fraction` of all."""

    fraction: float
    count: int
    covariance: float


@dataclass(frozen=True)
class QuantileTable:
    """Table 1 of arXiv 2505.22617 for one step.

    Args:
        step (`int`): The optimizer step.
        level (`str`): What is ranked, tokens or completions.
        count (`int`): How many were ranked.
        sampled (`bool`): Whether these are a sample of the step's, by whole completions.
        rows (`list` of [`QuantileRow`]): The smallest share first, all last.
    """

    step: int
    level: Level
    count: int
    sampled: bool
    rows: list[QuantileRow]


@dataclass(frozen=True)
class StepCovariance:
    """The covariance in one step.

    Args:
        step (`int`): The optimizer step.
        learning_rate (`float`): The one of its update.
        covariance (`float`): Mean covariance, of the whole step at the level `token`.
        positive (`float`): Share of the recorded tokens (completions) whose covariance is above 0.
        selected (`float`): Share of the recorded tokens that the control restrains.
        selected_covariance (`float`, *optional*): Mean covariance of these; None if there are none.
        entropy (`float`): Mean entropy of the whole step before the update, nats.
        entropy_after (`float`, *optional*): Mean entropy on the same states after the update; None where not measured.
    """

    step: int
    learning_rate: float
    covariance: float
    positive: float
    selected: float
    selected_covariance: float | None
    entropy: float
    entropy_after: float | None


@dataclass(frozen=True)
class DifficultyGroup:
    """Prompts of like accuracy: means over prompts of the prompt's own mean.

    Args:
        accuracy (`str`): The range of the mean reward of a prompt's completions.
        prompts (`int`): Prompts, one counted again in each step that it is recorded in.
        covariance, standard_error (`float`, *optional*): None for too few prompts.
        entropy (`float`, *optional*): Entropy before the update, nats.
        change (`float`, *optional*): Entropy change by the update; None where not measured.
    """

    accuracy: str
    prompts: int
    covariance: float | None
    standard_error: float | None
    entropy: float | None
    change: float | None


@dataclass(frozen=True)
class DistributionCovariance:
    """The covariances whose negative, times the step size, is the entropy change of a tabular softmax policy.

    Args:
        policy_gradient (`Floats` of shape (S,)): `Cov_{a~pi}(log pi, pi * A)` of each state (Theorem 1).
        natural_gradient (`Floats` of shape (S,)): `Cov_{a~pi}(log pi, A)` of each state (Theorem 2).
        mean_policy_gradient, mean_natural_gradient (`float`): Their means under the weights of the states.
    """

    policy_gradient: Floats
    natural_gradient: Floats
    mean_policy_gradient: float
    mean_natural_gradient: float


def distribution_covariance(logits: Floats, advantages: Floats, weight: Floats) -> DistributionCovariance:
    """The exact covariances of Theorems 1 and 2 of arXiv 2505.22617, over all actions instead of the sampled ones.

    For a softmax policy with one logit for each state and action, the logit changes `eta * pi * A` of policy gradient
    and `eta * A` of natural policy gradient change the entropy of a state by `-eta` times these, to first order.

    Args:
        logits (`Floats` of shape (S, V)): Unnormalised log-probabilities of the actions; -inf where one is impossible.
        advantages (`Floats` of shape (S, V)): `A(s, a) = Q(s, a) - V(s)`; ignored at impossible actions.
        weight (`Floats` of shape (S,)): Weights of the states in the means, such as how often the policy is there.

    Raises:
        ValueError: The shapes do not fit.
    """
    logits, weight = np.asarray(logits, np.float64), np.asarray(weight, np.float64)
    advantages = np.asarray(advantages, np.float64)
    if logits.ndim != 2 or advantages.shape != logits.shape or weight.shape != logits.shape[:1]:
        raise ValueError(
            "`logits` and `advantages` must have shape (S, V) and `weight` (S,), got "
            f"{logits.shape}, {advantages.shape} and {weight.shape}."
        )
    shifted = logits - logits.max(axis=1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    pi = np.exp(logps)
    logps, advantages = np.where(pi > 0, logps, 0.0), np.where(pi > 0, advantages, 0.0)

    def covariance(x: Floats) -> Floats:
        centred = x - (pi * x).sum(axis=1, keepdims=True)
        return np.asarray((pi * (logps - (pi * logps).sum(axis=1, keepdims=True)) * centred).sum(axis=1))

    policy, natural = covariance(pi * advantages), covariance(advantages)
    return DistributionCovariance(
        policy, natural, float(np.average(policy, weights=weight)), float(np.average(natural, weights=weight))
    )


def quantile_table(records: Sequence[StepRecords], level: Level = "token") -> list[QuantileTable]:
    """Table 1 of arXiv 2505.22617 for each step: the mean covariance of the top shares of the recorded tokens."""
    tables = []
    for record in records:
        values = _units(record, level)["covariance"].to_numpy(np.float64)
        descending = -np.sort(-values)
        rows = []
        for fraction in (*TABLE_1_FRACTIONS, 1.0):
            count = selection_count(fraction, len(values))
            rows.append(QuantileRow(fraction, count, mean(descending[:count])))
        tables.append(QuantileTable(record.step, level, len(values), record.sampled, rows))
    return tables


def covariance_over_training(records: Sequence[StepRecords], level: Level = "token") -> list[StepCovariance]:
    """The mean covariance, and that of the restrained tokens, in each step."""
    points = []
    for record in records:
        values = _units(record, level)["covariance"].to_numpy(np.float64)
        tokens = record.table("covariance", "selected")
        chosen = tokens["covariance"][tokens["selected"]].to_numpy(np.float64)
        points.append(
            StepCovariance(
                step=record.step,
                learning_rate=record.learning_rate,
                covariance=record.mean_covariance if level == "token" else mean(values),
                positive=mean(values > 0),
                selected=len(chosen) / max(len(tokens), 1),
                selected_covariance=float(chosen.mean()) if len(chosen) else None,
                entropy=record.mean_entropy,
                entropy_after=record.mean_entropy_after,
            )
        )
    return points


def by_difficulty(
    records: Sequence[StepRecords], level: Level = "token", edges: Sequence[float] = ACCURACY_EDGES
) -> list[DifficultyGroup]:
    """The covariance by how often the prompt is solved: the paper finds it larger for easy prompts.

    Args:
        records (`Sequence[StepRecords]`): The steps, taken together.
        level (`str`, *optional*): The level of the covariance.
        edges (`Sequence[float]`, *optional*, defaults to `ACCURACY_EDGES`): Ascending bounds of the mean reward of a
            prompt's completions. The first and the last one are groups of their own.

    Raises:
        ValueError: A prompt's mean reward lies outside the edges.
    """
    frames = []
    for record in records:
        groups = prompt_means(record, level, "group_accuracy")
        if record.mean_entropy_after is None:
            groups["change"] = np.nan
        frames.append(groups)
    prompts = pd.concat(frames, ignore_index=True)
    accuracy = prompts["group_accuracy"].to_numpy(np.float64).round(6)  # float32 means of rewards
    if len(accuracy) and not edges[0] <= accuracy.min() <= accuracy.max() <= edges[-1]:
        raise ValueError(
            f"The mean reward of a prompt's completions goes from {accuracy.min():g} to {accuracy.max():g}, outside of "
            f"the edges {', '.join(f'{edge:g}' for edge in edges)}: give others."
        )
    members = {f"{edges[0]:g}": accuracy == edges[0]}
    for low, high in pairwise(edges):
        last = high == edges[-1]
        inside = (accuracy > low) & ((accuracy < high) if last else (accuracy <= high))
        members[f"({low:g}, {high:g}{')' if last else ']'}"] = inside
    members[f"{edges[-1]:g}"] = accuracy == edges[-1]
    return [_difficulty_group(label, prompts[inside]) for label, inside in members.items()]


def _difficulty_group(label: str, prompts: pd.DataFrame) -> DifficultyGroup:
    covariance = prompts["covariance"].to_numpy(np.float64)
    change = prompts["change"].dropna().to_numpy(np.float64)
    return DifficultyGroup(
        accuracy=label,
        prompts=len(prompts),
        covariance=float(covariance.mean()) if len(covariance) else None,
        standard_error=float(covariance.std(ddof=1) / len(covariance) ** 0.5) if len(covariance) > 1 else None,
        entropy=float(prompts["entropy"].mean()) if len(prompts) else None,
        change=float(change.mean()) if len(change) else None,
    )


def _units(record: StepRecords, level: Level) -> pd.DataFrame:
    """What the covariance is of: the tokens with `covariance`, or the completions with their own one and `group`.

    A completion's covariance is `(l_i - mean l) * (A_i - mean A) * n / (n - 1)`, the means over the `n` recorded
    completions of its prompt and `l` the mean log-probability of a token. The factor makes the mean over a prompt an
    unbiased estimate however many of its completions the step has; a prompt with one is left out.
    """
    if level == "token":
        return record.table("covariance").astype(np.float64)
    if level != "sequence":
        raise ValueError(f"`level` must be 'token' or 'sequence', got {level!r}.")
    tokens = record.table("row_id", "group", "logp", "advantage").astype({"logp": np.float64, "advantage": np.float64})
    completions = tokens.groupby("row_id", as_index=False).mean()
    by_prompt = completions.groupby("group")
    centred = completions[["logp", "advantage"]] - by_prompt[["logp", "advantage"]].transform("mean")
    n = by_prompt["row_id"].transform("size")
    completions["covariance"] = centred["logp"] * centred["advantage"] * n / (n - 1).clip(lower=1)
    return completions[n > 1]


def prompt_means(record: StepRecords, level: Level, *columns: str) -> pd.DataFrame:
    """The prompts of a step: means of `covariance`, `entropy`, `change` (NaN where not measured) and `columns`.

    At both levels the entropies are means over the prompt's tokens.
    """
    tokens = record.table("group", "covariance", "entropy", "entropy_after", *columns).astype(np.float64)
    tokens["change"] = tokens["entropy_after"] - tokens["entropy"]
    means = tokens.groupby("group")[["covariance", "entropy", "change", *columns]].mean()
    if level == "sequence":
        covariance = _units(record, level).groupby("group")["covariance"].mean()
        means = means.drop(columns="covariance").join(covariance, how="inner")
    return means.reset_index()


def mean(values: NDArray[np.generic]) -> float:
    """The mean in float64; NaN of nothing."""
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
