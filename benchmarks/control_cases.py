"""What `controls.py` compares: for each method four settings, of which it tunes one.

The first setting is the published one, or the quickstart's where that is known not to carry over to updates of 224
tokens. A setting is what it overrides in the quickstart's arguments of GRPO. The null of a method, the same number of
tokens drawn at random, is not tuned: it has the setting of that method. `UNTUNED` has what joined after the comparison,
with one setting each.
"""

from dataclasses import dataclass
from typing import Any


Setting = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A method of the comparison.

    Attributes:
        label: its name in tables and figures.
        group: what it is, a key of `GROUPS`.
        settings: the settings to choose from, as many for each tuned method.
        null_of: the method whose null this is.
        compared_with: methods, beside GRPO, that its difference from is of interest: its null, its parts, or the same
            with another setting.
    """

    label: str
    group: str
    settings: tuple[Setting, ...]
    null_of: str | None = None
    compared_with: tuple[str, ...] = ()


GROUPS = {
    "baseline": "TRL's own",
    "covariance": "covariance controls",
    "null": "as many tokens at random",
    "clipping": "flexible clipping",
    "rival": "other controls",
    "chain": "combinations",
}


def _grpo(**overrides: Any) -> Setting:
    return {"entropy_control": None, "epsilon": 0.2} | overrides


def _control(name: str, ratio_clip: float | None = None, /, **kwargs: Any) -> Setting:
    return {"entropy_control": name, "entropy_control_kwargs": kwargs, "epsilon": ratio_clip}


def _clip_cov(fraction: float, **kwargs: Any) -> Setting:
    return _control("clip_cov", 0.2, fraction=fraction, cov_low=1.0, cov_high=5.0, **kwargs)


def _kl_cov(fraction: float, coef: float, **kwargs: Any) -> Setting:
    return _control("kl_cov", fraction=fraction, coef=coef, **kwargs)


# Thresholds that bind on updates this small: the upper one falls from 2 to 0 with the probability, the lower one is 0.9
# where it is to lower entropy and `epsilon_std_lower` elsewhere.
_SHARP = {"upper_slope": -2.0, "upper_base": 2.0, "lower_slope": 0.0, "lower_base": 0.9, "epsilon_std_lower": 0.02}


def _flexible(strategy: str, **kwargs: Any) -> Setting:
    return _control("flexible_clip", strategy=strategy, **kwargs)


def _two_phases(strategy: str) -> tuple[Setting, ...]:
    more: tuple[Setting, ...] = (
        {},
        _SHARP,
        _SHARP | {"second_half_lower": "fade_in"},
        _SHARP | {"epsilon_std_lower": 0.05},
    )
    return tuple(_flexible(strategy, **kwargs) for kwargs in more)


_CLIP_COV_SETTINGS = (0.01, 0.005, 0.02, 0.04)
_KL_COV_SETTINGS = ((0.1, 1.0), (0.02, 1.0), (0.05, 1.0), (0.1, 0.5))

CASES: dict[str, Case] = {
    "grpo": Case("GRPO", "baseline", tuple(_grpo(epsilon=e) for e in (0.2, 0.1, 0.3, 0.4))),
    "clip_higher": Case("clip-higher", "baseline", tuple(_grpo(epsilon_high=e) for e in (0.28, 0.4, 0.7, 1.0))),
    "kl_reference": Case("KL to the reference", "baseline", tuple(_grpo(beta=b) for b in (0.001, 0.01, 0.03, 0.1))),
    "entropy_bonus": Case(
        "entropy bonus", "baseline", tuple(_grpo(entropy_coef=c) for c in (0.005, 0.001, 0.01, 0.03))
    ),
    "adaptive_entropy": Case(
        "adaptive entropy bonus",
        "baseline",
        tuple(
            _grpo(use_adaptive_entropy=True, entropy_target=target, entropy_coef_delta=delta, entropy_coef_max=0.05)
            for target, delta in ((0.3, 1e-4), (0.3, 1e-3), (0.2, 1e-4), (0.4, 1e-3))
        ),
    ),
    "high_entropy_mask": Case(
        "high-entropy mask", "baseline", tuple(_grpo(top_entropy_quantile=q) for q in (0.2, 0.4, 0.6, 0.8))
    ),
    "cispo": Case(
        "CISPO", "baseline", tuple(_grpo(loss_type="cispo", epsilon=None, epsilon_high=e) for e in (5.0, 1.2, 1.5, 2.5))
    ),
    "sapo": Case(
        "SAPO",
        "baseline",
        tuple(
            _grpo(loss_type="sapo", epsilon=None, sapo_temperature_pos=positive, sapo_temperature_neg=negative)
            for positive, negative in ((1.0, 1.05), (1.0, 2.0), (1.0, 4.0), (5.0, 5.25))
        ),
    ),
    "gspo": Case(
        "GSPO",
        "baseline",
        tuple(
            _grpo(loss_type="grpo", importance_sampling_level="sequence", epsilon=e, epsilon_high=e)
            for e in (0.1, 0.02, 0.05, 0.2)
        ),
    ),
    "clip_cov": Case(
        "Clip-Cov", "covariance", tuple(_clip_cov(f) for f in _CLIP_COV_SETTINGS), compared_with=("clip_random",)
    ),
    "kl_cov": Case("KL-Cov", "covariance", tuple(_kl_cov(*s) for s in _KL_COV_SETTINGS), compared_with=("kl_random",)),
    "clip_random": Case(
        "Clip-random",
        "null",
        tuple(_clip_cov(f, selection="random") for f in _CLIP_COV_SETTINGS),
        null_of="clip_cov",
    ),
    "kl_random": Case(
        "KL-random", "null", tuple(_kl_cov(*s, selection="random") for s in _KL_COV_SETTINGS), null_of="kl_cov"
    ),
    "flexible_static": Case(
        "flexible (static)",
        "clipping",
        (
            _flexible("static"),
            *(
                _flexible("static", upper_slope=-2.0, upper_base=2.0, lower_slope=0.0, lower_base=lower)
                for lower in (0.02, 0.05, 0.1)
            ),
        ),
    ),
    "flexible_id": Case(
        "flexible (ID)",
        "clipping",
        _two_phases("increase_then_decrease"),
    ),
    "flexible_did": Case(
        "flexible (DID)",
        "clipping",
        _two_phases("decrease_increase_decrease"),
    ),
    "flexible_od": Case(
        "flexible (OD)",
        "clipping",
        (
            _flexible("oscillatory_decay"),
            *(_flexible("oscillatory_decay", **_SHARP, entropy_floor=floor) for floor in (0.2, 0.3, 0.4)),
        ),
    ),
    "flexible_target": Case(
        "flexible (target)",
        "clipping",
        tuple(_flexible("target", **_SHARP, entropy_target=target) for target in (0.25, 0.2, 0.3, 0.4)),
    ),
    "targeted_clip_higher": Case(
        "targeted clip-higher",
        "rival",
        tuple(
            _control("targeted_clip_higher", epsilon=e, delta=0.25, k_max=2.5, entropy_target=target)
            for e, target in ((0.6, 0.3), (0.2, 0.3), (0.1, 0.3), (0.2, 0.4))
        ),
    ),
    "steer": Case("STEER", "rival", tuple(_control("steer", weight_min=w) for w in (0.8, 0.5, 0.2, 0.05))),
    "ce_gppo": Case(
        "CE-GPPO",
        "rival",
        tuple(
            _control("ce_gppo", beta_low=low, beta_high=high)
            for low, high in ((0.75, 1.0), (0.25, 1.0), (0.1, 1.0), (0.0, 1.0))
        ),
    ),
    "entropic": Case(
        "EntroPIC",
        "rival",
        tuple(
            _control("entropic", 0.2, entropy_target=0.3, k_p=k_p, k_i=0.01, min_probability=p)
            for k_p, p in ((1.0, 0.95), (1.0, 0.8), (1.0, 0.5), (10.0, 0.5))
        ),
    ),
    "qae": Case(
        "QAE",
        "rival",
        tuple(_grpo(advantage_estimator="quantile", advantage_quantile=q) for q in (0.4, 0.2, 0.6, 0.8)),
    ),
}


def _with_qae(setting: Setting) -> Setting:
    return setting | {"advantage_estimator": "quantile", "advantage_quantile": 0.4}


CASES |= {
    "qae_clip_cov": Case(
        "QAE + Clip-Cov",
        "chain",
        tuple(_with_qae(s) for s in CASES["clip_cov"].settings),
        compared_with=("clip_cov", "clip_cov_04", "qae"),
    ),
    "qae_kl_cov": Case(
        "QAE + KL-Cov", "chain", tuple(_with_qae(s) for s in CASES["kl_cov"].settings), compared_with=("kl_cov", "qae")
    ),
    "flexible_kl_cov": Case(
        "flexible (target) + KL-Cov",
        "chain",
        tuple(
            _control(
                "flexible_clip+kl_cov",
                flexible_clip={"strategy": "target", **_SHARP, "entropy_target": target},
                kl_cov={"fraction": fraction, "coef": 1.0},
            )
            for target, fraction in ((0.25, 0.05), (0.25, 0.02), (0.3, 0.05), (0.3, 0.1))
        ),
        compared_with=("kl_cov", "flexible_target"),
    ),
}

#: The methods of the comparison.
TUNED = tuple(CASES)

#: What the comparison left open: Clip-Cov with the fraction that was tuned for QAE + Clip-Cov.
UNTUNED = {
    "clip_cov_04": Case(
        "Clip-Cov, fraction .04",
        "covariance",
        (_clip_cov(0.04),),
        compared_with=("clip_random_04", "clip_cov"),
    ),
    "clip_random_04": Case(
        "Clip-random, fraction .04", "null", (_clip_cov(0.04, selection="random"),), null_of="clip_cov_04"
    ),
}
CASES |= UNTUNED

#: Methods that are trained from other warm starts too.
FOLLOWED_UP = (
    "grpo",
    "kl_reference",
    "adaptive_entropy",
    "clip_cov",
    "clip_cov_04",
    "kl_cov",
    "clip_random",
    "clip_random_04",
    "flexible_target",
    "qae_clip_cov",
)
