"""What the trainer asks of a control, and what the covariance controls share."""

import warnings
from typing import ClassVar, Protocol

from torch import Tensor

from entropy_trl.types import Selection, TokenBatch, TokenEdit


SELECTIONS = ("covariance", "random")

#: A fraction above this, of a pool above that many tokens, was probably meant as a percentage.
SUSPECT_FRACTION, SUSPECT_POOL = 0.05, 10_000


class EntropyControl(Protocol):
    """A method that restrains some tokens of the policy loss: hyper-parameters and two pure functions.

    `select` looks at a whole pool and marks tokens; `edit` says what happens to the marked tokens of one micro-batch.
    """

    #: The ratio clip that the method was published with, as (epsilon, epsilon_high).
    published_epsilon: ClassVar[tuple[float, float]]
    #: False if the method has no gradient while the policy is still the one that made the rollout.
    acts_on_policy: ClassVar[bool]
    #: True if `edit` takes tokens out of the policy loss, which needs a loss in which tokens can be taken out.
    drops_tokens: ClassVar[bool]

    @property
    def fraction(self) -> float:
        """Share of the pool's tokens that are restrained, in (0, 1]."""
        ...

    def select(self, pool: TokenBatch) -> Selection:
        """Mark the pool's tokens to restrain."""
        ...

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        """Say what to change in the loss of a micro-batch whose marked tokens are `selected`, (B, T), bool."""
        ...


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless `fraction` is a number in (0, 1]."""
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(
            f"`fraction` must be a number in (0, 1], got {fraction!r}. It is a fraction of the tokens, not a "
            "percentage: the paper's 0.2% is 2e-3."
        )


def check_selection(selection: str) -> None:
    """Raise ValueError unless `selection` is a known way to choose tokens."""
    if selection not in SELECTIONS:
        raise ValueError(f"`selection` must be one of {', '.join(map(repr, SELECTIONS))}, got {selection!r}.")


def warn_if_percentage(fraction: float, tokens: int) -> None:
    """Warn where a percentage was probably meant: a large fraction of a pool of up to `tokens` tokens."""
    if fraction > SUSPECT_FRACTION and tokens > SUSPECT_POOL:
        warnings.warn(
            f"`fraction`={fraction} restrains {fraction:.0%} of a pool of up to {tokens:,} tokens. Fractions are not "
            "percentages: the paper uses 2e-4 and 2e-3 (0.02% and 0.2%). Large fractions make sense only for pools "
            "of a few hundred tokens.",
            UserWarning,
            stacklevel=3,
        )
