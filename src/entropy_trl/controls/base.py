"""What the trainer asks of a control, and what the covariance controls share."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from entropy_trl.tokens.types import Selection, TokenBatch, TokenEdit


SELECTIONS = ("covariance", "random")

#: What a control can lay claim to. Two controls of a chain must not want the same thing.
SELECTED_TOKENS, CLIP_RANGE, TOKEN_WEIGHTS = "the selected tokens", "the clip range", "the token weights"
ENTROPY_TARGET = "the target of the entropy"

#: A fraction above this, of a pool above that many tokens, was probably meant as a percentage.
SUSPECT_FRACTION, SUSPECT_POOL = 0.05, 10_000


class EntropyControl(ABC):
    """A method that changes some tokens' part in the policy loss: hyper-parameters and pure functions.

    A control is a frozen dataclass. `edit` says what changes in the loss of one micro-batch. What depends on more
    tokens than those, the whole pool's, `select` finds out before (`needs_pool`). What depends on earlier steps is a
    state of named numbers, which `next_state` computes from the state before and the step's entropy; checkpoints keep
    it.
    """

    #: The ratio clip that the method was published with, as (epsilon, epsilon_high).
    published_epsilon: ClassVar[tuple[float, float]] = (0.2, 0.2)
    #: False if the method has no gradient while the policy is still the one that made the rollout.
    acts_on_policy: ClassVar[bool] = True
    #: True if `edit` takes tokens out of the policy loss, which needs a loss in which tokens can be taken out.
    drops_tokens: ClassVar[bool] = False
    #: True if `edit` must know what `select` finds out about the whole pool.
    needs_pool: ClassVar[bool] = False
    #: True if `select` needs the entropies of the pool, hence the current policy's forward pass over all of it.
    scores_entropies: ClassVar[bool] = False
    #: What no other control of a chain may want.
    claims: ClassVar[frozenset[str]] = frozenset()

    @property
    def compares_sequences(self) -> bool:
        """Whether the selection needs a pool of several sequences: within one, the covariance is 0."""
        return SELECTED_TOKENS in self.claims

    def select(self, pool: TokenBatch) -> Selection:
        """Look at the pool: mark tokens, or compute numbers that `edit` needs. Called where `needs_pool` is true."""
        return Selection(torch.zeros_like(pool.mask))

    @abstractmethod
    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        """Say what to change in the loss of a micro-batch whose marked tokens are `selected`, (B, T), bool."""

    def initial_state(self) -> dict[str, float]:
        """The state at the first step. Empty for a control that does not depend on earlier steps."""
        return {}

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        """The state after a step.

        Args:
            state (`Mapping[str, float]`): The state in that step.
            entropy (`float`): Mean entropy of the step's tokens, of all micro-batches and processes, nats.
            progress (`float`): Share of the training's steps done, this one included, in (0, 1].
        """
        return dict(state)

    def check_pool_size(self, tokens: int) -> None:  # noqa: B027 (most controls have nothing to check)
        """Warn where a hyper-parameter does not fit pools of up to `tokens` tokens."""


def check_number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, *, low_included: bool = True
) -> None:
    """Raise ValueError unless `value` is a finite number in `[low, high]`, or in `(low, high]`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and value <= high and (value >= low if low_included else value > low):
        return
    opening = "[" if low_included and math.isfinite(low) else "("
    closing = "]" if math.isfinite(high) else ")"
    raise ValueError(f"`{name}` must be a number in {opening}{low:g}, {high:g}{closing}, got {value!r}.")


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless `fraction` is a number in (0, 1]."""
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(
            f"`fraction` must be a number in (0, 1], got {fraction!r}. It is a fraction of the tokens, not a "
            "percentage: the paper's 0.2% is 2e-3."
        )


def check_selection(selection: str, known: tuple[str, ...] = SELECTIONS) -> None:
    """Raise ValueError unless `selection` is a known way to choose tokens."""
    if selection not in known:
        raise ValueError(f"`selection` must be one of {', '.join(map(repr, known))}, got {selection!r}.")


def warn_if_percentage(fraction: float, tokens: int) -> None:
    """Warn where a percentage was probably meant: a large fraction of a pool of up to `tokens` tokens."""
    if fraction > SUSPECT_FRACTION and tokens > SUSPECT_POOL:
        warnings.warn(
            f"`fraction`={fraction} restrains {fraction:.0%} of a pool of up to {tokens:,} tokens. Fractions are not "
            "percentages: the paper uses 2e-4 and 2e-3 (0.02% and 0.2%). Large fractions make sense only for pools "
            "of a few hundred tokens.",
            UserWarning,
            stacklevel=4,
        )
