"""[`entropy_alarm`]: what to say, and to advise, when entropy collapses or surges."""

from collections.abc import Mapping
from typing import Any


#: Entropy at this share of that at the start is a collapse: by then most of it is spent, and the reward with it.
COLLAPSE = 0.5
#: Entropy at this multiple of that at the start is a surge.
SURGE = 1.5

#: For each control: what keeps more entropy, and what keeps less.
_ADVICE = {
    "clip_cov": (
        "Clip-Cov restrains too little: look at `entropy_control/selected_fraction`. Where it is below `fraction`, "
        "lower `cov_low`; otherwise raise `fraction`",
        "Clip-Cov restrains too much: lower `fraction`, or set `epsilon=0.2`, since its published ratio clip is wide",
    ),
    "kl_cov": (
        "KL-Cov restrains too little: raise `fraction` or `coef`. Where `selected_at_rounding` is near 1 in most "
        "steps, make more updates a rollout",
        "KL-Cov restrains too much: lower `fraction` or `coef`, or set `epsilon=0.2`, since it has no ratio clip",
    ),
    "targeted_clip_higher": (
        "Targeted clip-higher does not hold its target: raise `entropy_target`, or `k_max` where `k` is at it",
        "Targeted clip-higher lets go of too much: lower `entropy_target`, `k_max` or `epsilon`",
    ),
    "steer": (
        "STEER weighs too evenly: lower `weight_min`",
        "STEER does not restrain what raises entropy: set a smaller `epsilon_high`",
    ),
    "ce_gppo": (
        "CE-GPPO keeps too much gradient of unlikely wrong tokens: lower `beta_low`, or raise `beta_high`",
        "CE-GPPO keeps too much gradient of unlikely right tokens: lower `beta_high`, or raise `beta_low`",
    ),
    "entropic": (
        "EntroPIC does not hold its target: raise `entropy_target`, `k_p` or `k_i`, or lower `min_probability`",
        "EntroPIC overshoots: lower `entropy_target`, `k_p` or `k_i`",
    ),
    "flexible_clip": (
        "Flexible clipping holds too little: raise `upper_base`, or `entropy_target` with `strategy=target`",
        "Flexible clipping lets go of too much: lower `upper_base`, or `entropy_target` with `strategy=target`",
    ),
}
_NO_CONTROL = (
    "No entropy control is on: try `entropy_control=clip_cov` or `kl_cov`",
    "No entropy control is on: set a smaller `epsilon` and `epsilon_high`, or a `beta` above 0",
)
_OWN_CONTROL = (
    "The control `{}` restrains too little: strengthen it",
    "The control `{}` raises entropy, or does not hold it: weaken it, or set a smaller `epsilon`",
)


def entropy_alarm(
    start: float,
    now: float,
    settings: Mapping[str, Any],
    *,
    collapse: float = COLLAPSE,
    surge: float = SURGE,
) -> tuple[str, str, str] | None:
    """Say whether entropy has collapsed or surged, and advise what fits the control that is running.

    Args:
        start (`float`): Entropy at the start, positive, in nats a token.
        now (`float`): Entropy now.
        settings (`Mapping[str, Any]`): The configuration of the run, as its `to_dict` gives it.
        collapse (`float`, *optional*, defaults to `0.5`): Share of the start at or below which it is a collapse.
        surge (`float`, *optional*, defaults to `1.5`): Multiple of the start at or above which it is a surge.

    Returns:
        `tuple[str, str, str] | None`: The kind (`"collapse"` or `"surge"`), what has happened, and the advice, as
        sentences; None if neither is true.

    Example:

    ```python
    >>> kind, finding, advice = entropy_alarm(1.0, 0.4, {"entropy_control": "kl_cov"})
    >>> finding
    'Entropy is collapsing. It is 0.4 nats a token, 40% of the 1 that the run started with.'
    ```
    """
    size = f"It is {now:.3g} nats a token, {now / start:.0%} of the {start:.3g} that the run started with"
    if now <= collapse * start:
        if now <= 0.1 * start:
            finding = f"Entropy has collapsed. {size}: completions of a prompt are nearly all the same."
        else:
            finding = f"Entropy is collapsing. {size}."
        last = "A lower learning rate keeps more too. What is gone seldom comes back: go back to an earlier checkpoint."
        return "collapse", finding, f"{_advice(settings, 0)}. {last}"
    if now >= surge * start:
        bonus = settings.get("entropy_coef") or settings.get("use_adaptive_entropy")
        parts = ["Lower the entropy bonus (`entropy_coef`, `entropy_target`) first"] if bonus else []
        parts.append(_advice(settings, 1))
        last = (
            "Lower the learning rate, and read some completions: a surge can end in random text. A reward that is "
            "noise surges entropy too."
        )
        return "surge", f"Entropy is surging. {size}.", f"{'. '.join(parts)}. {last}"
    return None


def _advice(settings: Mapping[str, Any], direction: int) -> str:
    control = settings.get("entropy_control")
    if not control:
        return _NO_CONTROL[direction]
    names = [name.strip() for name in str(control).split("+")]
    return ". ".join(_ADVICE.get(name, _OWN_CONTROL)[direction].format(name) for name in names)
