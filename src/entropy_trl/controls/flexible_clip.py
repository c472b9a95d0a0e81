"""Flexible entropy control by dynamic clipping (arXiv 2602.09782)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from entropy_trl.controls.base import CLIP_RANGE, ENTROPY_TARGET, EntropyControl, check_number
from entropy_trl.tokens.types import TokenBatch, TokenEdit


STRATEGIES = (
    "increase_then_decrease",
    "decrease_increase_decrease",
    "oscillatory_decay",
    "target",
    "static",
)
SECOND_HALVES = ("fade_out", "fade_in")
MODES = ("lower", "raise")


class Threshold(NamedTuple):
    """How far the ratio may go, as a function of the current probability: `epsilon(p) = slope * p + base`."""

    slope: float
    base: float

    def mixed(self, weight: float, epsilon: float) -> "Threshold":
        """`weight` times this one and `1 - weight` times the constant `epsilon`."""
        return Threshold(weight * self.slope, weight * self.base + (1 - weight) * epsilon)


def ratio_bounds(old_probabilities: Tensor, upper: Threshold, lower: Threshold) -> tuple[Tensor, Tensor]:
    """The ratios `r` between which `1 - lower(p) <= r <= 1 + upper(p)` holds for the current probability `p = r p_old`.

    The threshold is one of the *current* probability, hence of the ratio itself; solved for it,
    `r <= (1 + base) / (1 - slope * p_old)` above and `r >= (1 - base) / (1 + slope * p_old)` below.

    Args:
        old_probabilities (`Tensor`): `p_old`, in [0, 1].
        upper, lower ([`Threshold`]): The thresholds, with `upper.slope < 1` and `lower.slope > -1`.

    Returns:
        `tuple[Tensor, Tensor]`: The lower and the upper bound, shaped as `old_probabilities`.
    """
    return (
        (1 - lower.base) / (1 + lower.slope * old_probabilities),
        (1 + upper.base) / (1 - upper.slope * old_probabilities),
    )


@dataclass(frozen=True)
class FlexibleClip(EntropyControl):
    """Raise or lower entropy by how far a token's probability may move (arXiv 2602.09782).

    PPO's clip, `min(r A, clip(r, 1 - lower, 1 + upper) A)`, with thresholds that depend on the token's current
    probability `p` and on the training's progress:

        dynamic upper: upper_slope * p + upper_base      dynamic lower: lower_slope * p + lower_base

    The dynamic upper threshold lets unlikely tokens with a positive advantage grow, which raises entropy, and keeps
    likely ones from growing, which would lower it. The dynamic lower threshold lets unlikely tokens with a negative
    advantage shrink further, and likely ones less, which lowers entropy. A threshold that is not dynamic is
    `epsilon_std` (below `epsilon_std_lower`, if that is given). With `k` of `T` steps done, `s` the
    `phase_split`, `l = 1 - k / (s T)` in the first phase and `l = -(k - s T) / ((1 - s) T)` in the second (both are
    the published `1 - 2k/T` at `s = 0.5`), as (upper; lower):

    - `"increase_then_decrease"`: `l * dynamic + (1 - l) * epsilon_std; epsilon_std`, then `epsilon_std; second`.
    - `"decrease_increase_decrease"`: `l * epsilon_std + (1 - l) * dynamic; epsilon_std`, then `dynamic; second`.
    - `"oscillatory_decay"`: "raise" (`dynamic; epsilon_std`) from where the entropy is at most
      `tau_low = entropy_floor * H_init`, "lower" (`epsilon_std; dynamic`) from where it is above
      `tau_low + (H_init - tau_low) * (1 - k/T)`; between the two, what it was.
    - `"target"` (ours): the same two modes, "raise" from `entropy_target - entropy_band` down, "lower" from
      `entropy_target + entropy_band` up.
    - `"static"`: both thresholds dynamic throughout.

    `second`, the lower threshold of the second phase, is `(1 + l) * dynamic - l * epsilon_std` as the authors print
    it: the dynamic one at the start of the phase, `epsilon_std` at its end (`"fade_out"`). `"fade_in"` is the reverse.

    The entropy is that of all tokens of the step before, of all its micro-batches and processes; it and the mode are
    in checkpoints. `H_init` is the first step's. A clipped token has neither loss nor gradient: its advantage is 0,
    which gives the gradient of the clipped surrogate. Nothing is clipped while the policy is the one that made the
    rollout, so that the control needs several updates a rollout.

    Published: the schedules and the closed form of the upper bound (the authors' page). Of lower trust, from
    secondary sources: the slopes and bases. Ours: the lower bound's closed form, phases other than halves, the mode in
    which the oscillation starts, and that an entropy decides about the next step, not about its own.

    Args:
        strategy (`str`, *optional*, defaults to `"increase_then_decrease"`): See above.
        upper_slope (`float`, *optional*, defaults to `-0.25`): Slope of the dynamic upper threshold; below 1.
        upper_base (`float`, *optional*, defaults to `0.5`): The dynamic upper threshold at `p = 0`.
        lower_slope (`float`, *optional*, defaults to `-0.13`): Slope of the dynamic lower threshold; above -1.
        lower_base (`float`, *optional*, defaults to `0.3`): The dynamic lower threshold at `p = 0`.
        epsilon_std (`float`, *optional*, defaults to `0.2`): A threshold that is not dynamic.
        epsilon_std_lower (`float`, *optional*): The lower one; defaults to `epsilon_std`. Ours: the paper has one for
            both. A small one keeps unlikely tokens from vanishing, which holds entropy up.
        phase_split (`float`, *optional*, defaults to `0.5`): Share of the training in the first phase, in (0, 1).
        second_half_lower (`str`, *optional*, defaults to `"fade_out"`): `"fade_out"` or `"fade_in"`, see above.
        entropy_floor (`float`, *optional*, defaults to `0.2`): `tau_low / H_init`, in [0, 1).
        initial_mode (`str`, *optional*, defaults to `"lower"`): The mode until an entropy asks for another, `"lower"`
            or `"raise"`.
        entropy_target (`float`, *optional*): The entropy that the strategy `"target"` holds, and needs; nats.
        entropy_band (`float`, *optional*, defaults to `0.02`): Half the width of the band around the target, nats.

    Raises:
        ValueError: If a value is out of its range, or the target does not fit the strategy.
    """

    strategy: str = "increase_then_decrease"
    upper_slope: float = -0.25
    upper_base: float = 0.5
    lower_slope: float = -0.13
    lower_base: float = 0.3
    epsilon_std: float = 0.2
    epsilon_std_lower: float | None = None
    phase_split: float = 0.5
    second_half_lower: str = "fade_out"
    entropy_floor: float = 0.2
    initial_mode: str = "lower"
    entropy_target: float | None = None
    entropy_band: float = 0.02

    published_epsilon: ClassVar[tuple[float, float]] = (math.inf, math.inf)
    acts_on_policy: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = True

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        steers = self.strategy in ("oscillatory_decay", "target")
        return frozenset({CLIP_RANGE, ENTROPY_TARGET} if steers else {CLIP_RANGE})

    def __post_init__(self) -> None:
        for name, known in (
            ("strategy", STRATEGIES),
            ("second_half_lower", SECOND_HALVES),
            ("initial_mode", MODES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")
        check_number("upper_base", self.upper_base, 0)
        check_number("upper_slope", self.upper_slope)
        check_number("lower_base", self.lower_base, 0, 1)
        check_number("lower_slope", self.lower_slope)
        check_number("epsilon_std", self.epsilon_std, 0)
        if self.epsilon_std_lower is not None or self.epsilon_std > 1:
            check_number("epsilon_std_lower", self._lower_std, 0, 1)
        if not -self.upper_base <= self.upper_slope < 1:
            raise ValueError(
                f"`upper_slope` must be in [-upper_base, 1) = [{-self.upper_base:g}, 1), got {self.upper_slope!r}: "
                "below, the threshold of a likely token would be negative; above, likely tokens would have no bound."
            )
        if not (self.lower_slope > -1 and 0 <= self.lower_base + self.lower_slope <= 1):
            raise ValueError(
                f"`lower_slope` must be above -1 and in [-lower_base, 1 - lower_base] = [{-self.lower_base:g}, "
                f"{1 - self.lower_base:g}], got {self.lower_slope!r}: elsewhere the threshold of a likely token would "
                "be negative, or allow a ratio below 0."
            )
        check_number("phase_split", self.phase_split, 0, math.nextafter(1, 0), low_included=False)
        check_number("entropy_floor", self.entropy_floor, 0, math.nextafter(1, 0))
        check_number("entropy_band", self.entropy_band, 0)
        if (self.strategy == "target") != (self.entropy_target is not None):
            raise ValueError(
                f"`entropy_target` ({self.entropy_target!r}) and `strategy` ({self.strategy!r}) do not fit: the "
                'strategy "target" needs one, in nats, and the others have none.'
            )
        if self.entropy_target is not None:
            check_number("entropy_target", self.entropy_target, 0, low_included=False)

    def initial_state(self) -> dict[str, float]:
        raising = float(self.initial_mode == "raise")
        if self.strategy == "oscillatory_decay":
            # Not a number until it is measured, which no log shows.
            return {"raising": raising, "initial_entropy": math.nan}
        return {"raising": raising} if self.strategy == "target" else {}

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        if self.strategy == "oscillatory_decay":
            initial = state["initial_entropy"]
            if math.isnan(initial):  # the step that says what the entropies to come are measured by
                return {"raising": state["raising"], "initial_entropy": entropy}
            low = self.entropy_floor * initial
            high = low + (initial - low) * (1 - progress)
            return {"raising": _hysteresis(state["raising"], entropy, low, high), "initial_entropy": initial}
        if self.entropy_target is not None:
            low, high = self.entropy_target - self.entropy_band, self.entropy_target + self.entropy_band
            return {"raising": _hysteresis(state["raising"], entropy, low, high)}
        return dict(state)

    @property
    def _lower_std(self) -> float:
        return self.epsilon_std if self.epsilon_std_lower is None else self.epsilon_std_lower

    def thresholds(self, progress: float, state: Mapping[str, float]) -> tuple[Threshold, Threshold]:
        """The upper and the lower threshold at a step.

        Args:
            progress (`float`): `k/T`, the share of the training's steps that are done.
            state (`Mapping[str, float]`): The state at this step.
        """
        dynamic_upper = Threshold(self.upper_slope, self.upper_base)
        dynamic_lower = Threshold(self.lower_slope, self.lower_base)
        standard, lower_standard = Threshold(0.0, self.epsilon_std), Threshold(0.0, self._lower_std)
        if self.strategy == "static":
            return dynamic_upper, dynamic_lower
        if self.strategy in ("oscillatory_decay", "target"):
            return (dynamic_upper, lower_standard) if state["raising"] else (standard, dynamic_lower)

        decreasing_first = self.strategy == "decrease_increase_decrease"
        if progress <= self.phase_split:
            done = progress / self.phase_split  # 1 - lambda
            return dynamic_upper.mixed(done if decreasing_first else 1 - done, self.epsilon_std), lower_standard
        done = (progress - self.phase_split) / (1 - self.phase_split)  # -lambda
        second = dynamic_lower.mixed(1 - done if self.second_half_lower == "fade_out" else done, self._lower_std)
        return (dynamic_upper if decreasing_first else standard), second

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        upper, lower = self.thresholds(batch.progress, batch.state)
        # A log-probability may come out above 0 by rounding.
        lowest, highest = ratio_bounds(batch.old_logps.exp().clamp(max=1.0), upper, lower)
        ratio = batch.log_ratio.detach().exp()
        clipped_high = batch.mask & (batch.advantages > 0) & (ratio > highest)
        clipped_low = batch.mask & (batch.advantages < 0) & (ratio < lowest)
        clipped = clipped_high | clipped_low
        tokens = batch.mask.sum()
        metrics = {
            "clipped_high": (clipped_high.sum(), tokens),
            "clipped_low": (clipped_low.sum(), tokens),
            "ratio_bound_high": (highest.where(batch.mask, 0.0).sum(dtype=torch.float64), tokens),
            "ratio_bound_low": (lowest.where(batch.mask, 0.0).sum(dtype=torch.float64), tokens),
        }
        return TokenEdit(advantages=batch.advantages.masked_fill(clipped, 0.0), metrics=metrics)


def _hysteresis(raising: float, entropy: float, low: float, high: float) -> float:
    """1 from where the entropy is at most `low`, 0 from where it is above `high`; between them, as before."""
    if entropy <= low:
        return 1.0
    return 0.0 if entropy > high else raising
