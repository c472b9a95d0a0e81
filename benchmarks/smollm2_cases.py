"""What `smollm2.py` compares: for each method three settings, of which it tunes one.

A setting is what it overrides in the method's file in `configs/smollm2-135m`; the first one is that file as it is. The
null of a method, as many tokens drawn at random, has the setting of that method.
"""

from dataclasses import dataclass
from typing import Any


Setting = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A method of the comparison.

    Attributes:
        label: its name in tables.
        config: its file in `configs/smollm2-135m`.
        settings: the settings to choose from.
        seeds: how many of `SEEDS` it is trained with.
        null_of: the method whose null this is.
    """

    label: str
    config: str
    settings: tuple[Setting, ...]
    seeds: int
    null_of: str | None = None


def _kwargs(**kwargs: Any) -> Setting:
    return {"entropy_control_kwargs": kwargs}


# At the warm start 1 to 2% of an update's tokens have a covariance above 1: a larger fraction needs a lower band.
_CLIP_COV = tuple(
    {"fraction": fraction, "cov_low": low, "cov_high": 5.0} for fraction, low in ((0.01, 1.0), (0.02, 0.5), (0.04, 0.2))
)
_KL_COV = tuple({"fraction": fraction, "coef": 1.0} for fraction in (0.1, 0.05, 0.02))

#: GRPO's learning rates. The one with the best avg@16 on the problems for tuning is everyone's.
RATES = (1e-5, 3e-5, 5e-6)
TUNING_SEED = 100
SEEDS = (10, 11, 12)

#: In the order in which they are run.
CASES: dict[str, Case] = {
    "grpo": Case("GRPO", "grpo", ({},), 3),
    "kl_cov": Case("KL-Cov", "kl_cov", tuple(_kwargs(**kwargs) for kwargs in _KL_COV), 3),
    "clip_cov": Case("Clip-Cov", "clip_cov", tuple(_kwargs(**kwargs) for kwargs in _CLIP_COV), 3),
    "clip_higher": Case("clip-higher", "clip_higher", tuple({"epsilon_high": e} for e in (0.28, 0.4, 0.7)), 3),
    "kl_reference": Case("KL to the reference", "kl_reference", tuple({"beta": b} for b in (0.03, 0.01, 0.1)), 2),
    "flexible_clip": Case(
        "flexible clipping (target)",
        "flexible_clip",
        tuple(
            _kwargs(
                strategy="target",
                entropy_target=target,
                upper_slope=-2.0,
                upper_base=2.0,
                lower_slope=0.0,
                lower_base=0.9,
                epsilon_std=0.2,
                epsilon_std_lower=0.02,
            )
            for target in (0.25, 0.2, 0.3)
        ),
        2,
    ),
    "kl_random": Case(
        "KL-random", "kl_cov", tuple(_kwargs(**kwargs, selection="random") for kwargs in _KL_COV), 2, "kl_cov"
    ),
    "clip_random": Case(
        "Clip-random", "clip_cov", tuple(_kwargs(**kwargs, selection="random") for kwargs in _CLIP_COV), 2, "clip_cov"
    ),
}
