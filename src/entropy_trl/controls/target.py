"""Entropy targets: the controller, and the base class of Clip-Cov and KL-Cov, which follow one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_trl.controls.base import (
    ENTROPY_TARGET,
    SELECTED_TOKENS,
    EntropyControl,
    check_number,
    warn_if_percentage,
)
from entropy_trl.tokens.selection import draw_keys, top_k_mask
from entropy_trl.tokens.types import TokenBatch


#: Entropies below this, in nats, are taken for it: the error is a logarithm.
_LOWEST = 1e-6


@dataclass(frozen=True)
class EntropyTarget:
    """A proportional-integral controller of a signed fraction of tokens. Pure: numbers in, numbers out.

    Once an optimizer step, with its mean entropy `H_t`, the target `H*` and `d(x) = sign(x) * max(|x| - dead_band, 0)`:

        m_t = m_{t-1} + smoothing * (ln H_t - m_{t-1}),                    m_1 = ln H_1
        r_t = r_{t-1} + clip(ln H* - r_{t-1}, -max_rate, max_rate),        r_1 = ln H_1
        e_t = clip(d(r_t - m_t), -max_error, max_error)
        I_{t+1} = clip(I_t + k_i * e_t, -u_max, u_max),                    I_1 = 0
        u_{t+1} = clip(k_p * e_t + I_{t+1}, -u_max, u_max),                u_1 = 0
        fraction_{t+1} = unit * sinh(u_{t+1}),                             u_max = asinh(max_fraction / unit)

    The error is relative: half and twice the entropy count the same. The reference `r` leads the policy from where it
    is to the target at a limited rate, so that the way there leaves no overshoot. `sinh` makes small fractions move
    linearly, through 0, and large ones multiplicatively, since the fraction that a run needs differs by decades.
    Against windup, `I` stays where it is while `u` is at a bound and the error pushes it further.

    A positive fraction drops the tokens with the highest covariance, which lower the entropy; a negative one those with
    the lowest, which raise it. So the entropy follows the target from both sides. The rule is ours.

    Args:
        target (`float`): `H*` in nats; or, with `of_start`, as a share of the entropy of the first step. Positive.
        unit (`float`): Fraction at which the controller goes from linear to multiplicative, in (0, max_fraction].
        of_start (`bool`, *optional*, defaults to `False`): Whether the target is a share of the entropy at the start.
        k_p (`float`, *optional*, defaults to `10.0`): Gain of the error, not negative.
        k_i (`float`, *optional*, defaults to `0.1`): Gain of the sum of errors, not negative.
        smoothing (`float`, *optional*, defaults to `0.2`): Weight of the newest step in the mean entropy, in (0, 1].
        dead_band (`float`, *optional*, defaults to `0.05`): Relative error that counts as none, not negative.
        max_error (`float`, *optional*, defaults to `1.0`): Largest relative error that counts, positive.
        max_rate (`float`, *optional*, defaults to `0.01`): Largest relative change of the reference a step, positive.
        max_fraction (`float`, *optional*, defaults to `0.3`): Bound of the fraction, in (0, 1].

    Raises:
        ValueError: If a value is out of its range.
    """

    target: float
    unit: float
    of_start: bool = False
    k_p: float = 10.0
    k_i: float = 0.1
    smoothing: float = 0.2
    dead_band: float = 0.05
    max_error: float = 1.0
    max_rate: float = 0.01
    max_fraction: float = 0.3

    def __post_init__(self) -> None:
        name = "entropy_target.share" if self.of_start else "entropy_target"
        check_number(name, self.target, 0.0, low_included=False)
        check_number("k_p", self.k_p, 0.0)
        check_number("k_i", self.k_i, 0.0)
        check_number("smoothing", self.smoothing, 0.0, 1.0, low_included=False)
        check_number("dead_band", self.dead_band, 0.0)
        check_number("max_error", self.max_error, 0.0, low_included=False)
        check_number("max_rate", self.max_rate, 0.0, low_included=False)
        check_number("max_fraction", self.max_fraction, 0.0, 1.0, low_included=False)
        if self.unit > self.max_fraction:
            raise ValueError(
                f"`fraction` {self.unit:g} is above `max_fraction` {self.max_fraction:g}, the bound of the fraction "
                "that follows `entropy_target`. Lower `fraction`, or raise `entropy_controller.max_fraction`."
            )

    def initial_state(self) -> dict[str, float]:
        """The state at the first step. Not a number is what is yet to be measured, which no log shows."""
        state = {
            "target": math.nan if self.of_start else self.target,
            "target_reference": math.nan,
            "target_error": math.nan,
            "target_integral": 0.0,
            "actuator": 0.0,
            "saturated": 0.0,
            "smoothed_entropy": math.nan,
        }
        return state | {"initial_entropy": math.nan} if self.of_start else state

    def next_state(self, state: Mapping[str, float], entropy: float) -> dict[str, float]:
        """Return the state after a step.

        Args:
            state (`Mapping[str, float]`): The state in that step.
            entropy (`float`): `H_t`, mean entropy of the step's tokens, nats.

        Returns:
            `dict[str, float]`: `target` and `target_reference` (`exp(r)`; nats), `target_error` (of the smoothed
            entropy from the target, as a share of it; positive is too much entropy), `target_integral` (`I`),
            `actuator` (the signed fraction), `saturated` (1 at a bound), `smoothed_entropy` (`exp(m)`, nats) and, with
            `of_start`, `initial_entropy` (nats).
        """
        entropy = max(entropy, _LOWEST)
        initial = state.get("initial_entropy", math.nan)
        initial = entropy if math.isnan(initial) else initial
        target = self.target * initial if self.of_start else self.target
        smoothed = reference = math.log(entropy)
        if not math.isnan(state["smoothed_entropy"]):
            smoothed, reference = math.log(state["smoothed_entropy"]), math.log(state["target_reference"])
            smoothed += self.smoothing * (math.log(entropy) - smoothed)
            reference += min(max(math.log(target) - reference, -self.max_rate), self.max_rate)
        distance = reference - smoothed
        error = math.copysign(min(max(abs(distance) - self.dead_band, 0.0), self.max_error), distance)

        highest = math.asinh(self.max_fraction / self.unit)
        integral = state["target_integral"]
        wanted = self.k_p * error + integral + self.k_i * error
        if abs(wanted) < highest or wanted * error <= 0:  # else more of the integral could not act: windup
            integral = min(max(integral + self.k_i * error, -highest), highest)
        wanted = min(max(self.k_p * error + integral, -highest), highest)
        following = {
            "target": target,
            "target_reference": math.exp(reference),
            "target_error": math.exp(smoothed) / target - 1,
            "target_integral": integral,
            "actuator": max(min(self.unit * math.sinh(wanted), self.max_fraction), -self.max_fraction),
            "saturated": float(abs(wanted) == highest),
            "smoothed_entropy": math.exp(smoothed),
        }
        return following | {"initial_entropy": initial} if self.of_start else following


def target_of(value: Any, unit: float, controller: Mapping[str, Any] | None, selection: str) -> EntropyTarget | None:
    """Read a controller from the hyper-parameters of a control.

    Args:
        value (`Any`): `entropy_target`: a number of nats, `{"share": 0.5}` of the entropy at the start, or `None`.
        unit (`float`): The control's `fraction`.
        controller (`Mapping[str, Any]`, *optional*): `entropy_controller`: gains and bounds other than the defaults.
        selection (`str`): The control's `selection`, which must be `"covariance"` with a target.

    Returns:
        [`EntropyTarget`]: The controller; `None` without a target.

    Raises:
        ValueError: If a value is out of its range or cannot be read, or gains are given without a target.
    """
    known = ("k_p", "k_i", "smoothing", "dead_band", "max_error", "max_rate", "max_fraction")
    given = {} if controller is None else controller
    if not isinstance(given, Mapping) or not given.keys() <= set(known):
        raise ValueError(
            f"`entropy_controller` must be a mapping with keys among {', '.join(map(repr, known))}, got {controller!r}."
        )
    if value is None:
        if given:
            raise ValueError(
                f"`entropy_controller` {dict(given)!r} is given without `entropy_target`: there is nothing to control. "
                "Give `entropy_target`, or remove `entropy_controller`."
            )
        return None
    if selection != "covariance":
        raise ValueError(
            f"`entropy_target` needs `selection` 'covariance', got {selection!r}: the controller restrains the highest "
            "or the lowest covariances. Leave `selection` out."
        )
    if isinstance(value, Mapping):
        if value.keys() != {"share"}:
            raise ValueError(
                f"`entropy_target` must be a number of nats, {{share: 0.5}} of the entropy at the start, or a schedule "
                f"{{start: 0.5, end: 0.3}} in nats, got {dict(value)!r}."
            )
        return EntropyTarget(value["share"], unit, of_start=True, **given)
    return EntropyTarget(value, unit, **given)


class CovarianceControl(EntropyControl):
    """What Clip-Cov and KL-Cov share: a share of the pool's tokens by covariance, fixed or led by an entropy target."""

    fraction: float
    selection: str
    entropy_target: float | Mapping[str, float] | None
    entropy_controller: Mapping[str, float] | None

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({SELECTED_TOKENS} if self.target is None else {SELECTED_TOKENS, ENTROPY_TARGET})

    @property
    def target(self) -> EntropyTarget | None:
        """The controller that moves the fraction; `None` where it is fixed."""
        return target_of(self.entropy_target, self.fraction, self.entropy_controller, self.selection)

    @property
    def compares_sequences(self) -> bool:
        return self.selection != "random"

    def check_pool_size(self, tokens: int) -> None:
        warn_if_percentage(self.fraction, tokens)

    def initial_state(self) -> dict[str, float]:
        return {} if self.target is None else self.target.initial_state()

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        return dict(state) if self.target is None else self.target.next_state(state, entropy)


def select_signed(covariance: Tensor, eligible: Tensor, fraction: float, pool: TokenBatch) -> Tensor:
    """Mark the share `|fraction|` of the pool's tokens: of the highest covariances, or of the lowest if negative.

    Only covariances of that sign are marked. A share of less than a token, or a part of one, is a token with that
    probability, drawn by the pool's seed; so the mean over the steps is exact.

    Args:
        covariance (`Tensor` of shape (B, T)): From [`token_covariance`].
        eligible (`Tensor` of shape (B, T), bool): Tokens that may be marked.
        fraction (`float`): The signed share of the pool's valid tokens, in [-1, 1].
        pool ([`TokenBatch`]): The pool.

    Returns:
        `Tensor` of shape (B, T), bool: The marked tokens.
    """
    scores = covariance if fraction > 0 else -covariance
    allowed = eligible & (scores > 0)
    tokens, candidates = pool.ranks.sum(torch.stack([pool.mask.count_nonzero(), allowed.count_nonzero()])).tolist()
    zero = torch.zeros(1, dtype=torch.int64)
    part = draw_keys(zero, zero, pool.seed).item() / 2**63
    count = min(math.floor(abs(fraction) * tokens + part), candidates)
    return top_k_mask(scores, allowed, count, pool.row_ids, pool.ranks)
