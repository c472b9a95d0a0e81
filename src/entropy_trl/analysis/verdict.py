"""[`verdict`]: whether entropy is healthy, why, what to do, and how sure that is.

The report, the quickstart and [`EntropyLawCallback`] all say what this module says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.logs.runs import Series


#: Entropy at this share of that at the start is a collapse: by then most of it is spent, and the reward with it.
COLLAPSE = 0.5
#: Entropy at this multiple of that at the start is a surge.
SURGE = 1.5

#: The signs, the worst first. `unknown` stands for runs that are too short, or have no entropy to start from.
SIGNS = ("collapsed", "collapsing", "surging", "healthy", "unknown")
#: How sure a verdict is.
CONFIDENCE = ("high", "moderate", "low", "none")

#: Points that a verdict needs: a single step can be off by as much.
MIN_POINTS = 5
#: The share of the points that stand for "the start" and "now".
ENDS = 0.05

#: At this share of the start nothing is left to fall, whatever the curve does.
_NOTHING_LEFT = 0.1
#: At this share, entropy that no longer falls has collapsed. Above it, it holds at a lower level.
_MOST_GONE = 0.25
#: Points that a plateau needs to be told from a fall.
_PLATEAU_POINTS = 20
#: A change is real from so many standard errors on.
_REAL = 2.5
#: Entropy falls if the end of the run is lower than shortly before by this share.
_FALL = 0.05
#: Points from which the noise is measured: the cost does not grow with the run.
_NOISE_POINTS = 200

Array = npt.NDArray[np.float64]

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
_UNKNOWN_CONTROL = (
    "The settings are not stored with the run. If it has no entropy control, try `entropy_control=clip_cov` or "
    "`kl_cov`; otherwise strengthen the control",
    "The settings are not stored with the run. Set a smaller `epsilon` and `epsilon_high`, or weaken what raises "
    "entropy",
)
_OWN_CONTROL = (
    "The control `{}` restrains too little: strengthen it",
    "The control `{}` raises entropy, or does not hold it: weaken it, or set a smaller `epsilon`",
)


@dataclass(frozen=True)
class Verdict:
    """What can be said of the entropy of a group of runs.

    Attributes:
        sign (`str`): One of [`SIGNS`].
        sentence (`str`): The finding.
        why (`str`): The values, the metric and the step that it rests on, as sentences.
        advice (`str`): What to do, as sentences.
        confidence (`str`): One of [`CONFIDENCE`].
        grounds (`str`): What the confidence rests on: runs, points and noise.
    """

    sign: str
    sentence: str
    why: str
    advice: str
    confidence: str
    grounds: str

    @property
    def alarm(self) -> str | None:
        """What to warn of: `"collapse"`, `"surge"`, or None."""
        return {"collapsed": "collapse", "collapsing": "collapse", "surging": "surge"}.get(self.sign)

    def to_dict(self) -> dict[str, str]:
        """The verdict for a JSON file."""
        return asdict(self)


class _Measured(NamedTuple):
    """One run: its sign, and what that rests on."""

    sign: str
    form: str  # the sentence, as a key of `_SENTENCES`
    points: int
    start: float
    now: float
    noise: float  # relative, of one point
    margin: float  # standard errors between the value now and the nearest bound
    step: int | None  # since when it is so, or when it was lowest
    low: float
    reach: int | None  # the step at which a fall reaches the bound of a collapse


_SENTENCES = {
    "collapsed": "Entropy has collapsed",
    "collapsing": "Entropy is collapsing",
    "surging": "Entropy is surging",
    "steady": "Entropy is steady",
    "fallen": "Entropy has fallen, and most of it is left",
    "falling": "Entropy is falling, and most of it is left",
    "risen": "Entropy has risen within bounds",
    "settled": "Entropy holds at a lower level",
    "recovered": "Entropy fell and has recovered",
}


def verdict(
    runs: Sequence[Series],
    settings: Mapping[str, Any],
    *,
    metric: str = "entropy",
    collapse: float = COLLAPSE,
    surge: float = SURGE,
) -> Verdict:
    """Judge the entropy of runs that differ in their seed only, and advise what fits their control.

    The values at the start and now are means over the first and the last 5% of the points. A change counts if it is
    larger than 2.5 times its standard error, which is estimated from second differences of `ln H`.

    - `collapsed`: at a tenth of the start or below, or at a quarter and no longer falling.
    - `collapsing`: at `collapse` times the start or below, and still falling.
    - `surging`: at `surge` times the start or above.
    - `healthy`: everything else, a level between a quarter and `collapse` that holds among it.
    - `unknown`: fewer than 5 points, or no entropy at the start.

    The sign of a group is that of most of its runs; of equally many the worse one counts.

    Args:
        runs (`Sequence[Series]`): The entropy of each run, in nats a token.
        settings (`Mapping[str, Any]`): The configuration of the runs, as a configuration's `to_dict` gives it.
        metric (`str`, *optional*, defaults to `"entropy"`): The name of the metric, for the words.
        collapse (`float`, *optional*, defaults to `0.5`): Share of the start at or below which it is a collapse.
        surge (`float`, *optional*, defaults to `1.5`): Multiple of the start at or above which it is a surge.

    Returns:
        [`Verdict`]: The sign, the finding, why, what to do, and how sure it is.

    Example:

    ```python
    >>> falling = Series(np.arange(1, 9), np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4]))
    >>> verdict([falling], {"entropy_control": "kl_cov"}).sign
    'collapsing'
    ```
    """
    measured = [_measure(series, collapse, surge) for series in runs]
    known = [one for one in measured if one is not None]
    if not known:
        points = max((len(series.steps) for series in runs), default=0)
        if points >= MIN_POINTS:
            why = f"`{metric}` is 0 or negative at the start: nothing can fall from there."
            return Verdict("unknown", "Entropy cannot be judged.", why, "Check the metric.", "none", _counted(points))
        why = f"`{metric}` has {_counted(points)}, and a verdict needs {MIN_POINTS}: a single step can be off by much."
        advice = "Let the run go on, or log more often with a lower `logging_steps`."
        return Verdict("unknown", "Too short for a verdict.", why, advice, "none", _counted(points))
    signs = [one.sign for one in known]
    sign = max(SIGNS, key=lambda name: (signs.count(name), -SIGNS.index(name)))
    agreeing = [one for one in known if one.sign == sign]
    forms = [one.form for one in agreeing]
    form = max(dict.fromkeys(forms), key=forms.count)
    share = f" in {len(agreeing)} of {len(known)} runs" if len(agreeing) < len(known) else ""
    return Verdict(
        sign,
        f"{_SENTENCES[form]}{share}.",
        _why(form, agreeing, metric, collapse, surge),
        _what_to_do(form, agreeing, settings, collapse),
        *_sureness(agreeing, len(known)),
    )


def _measure(series: Series, collapse: float, surge: float) -> _Measured | None:
    """Judge one run; None if it is too short, or starts without entropy."""
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    points = len(values)
    count = max(round(ENDS * points), 1)
    if points < MIN_POINTS or (start := float(values[:count].mean())) <= 0:
        return None
    now = max(float(values[-count:].mean()), 1e-9 * start)
    noise = _noise(values, start)
    error = max(noise * math.sqrt(2 / count), 1e-9)
    ratio = now / start
    real = abs(math.log(ratio)) >= _REAL * error
    change, gap = _late_change(steps, values, start)
    # Each half of the last third has a sixth of the points; a median's error is a quarter above a mean's.
    falls = change < -max(_FALL, 1.25 * _REAL * noise * math.sqrt(12 / points))
    margin = min(abs(math.log(ratio / bound)) for bound in (collapse, surge)) / error
    low_step, low = _lowest(steps, values)

    def told(sign: str, form: str, step: int | None = None, reach: int | None = None) -> _Measured:
        return _Measured(sign, form, points, start, now, noise, margin, step, low, reach)

    if ratio <= collapse and real:
        holds = points >= _PLATEAU_POINTS and not falls
        since = _since(steps, values <= collapse * start)
        if ratio <= _NOTHING_LEFT or (holds and ratio <= _MOST_GONE):
            return told("collapsed", "collapsed", since)
        return told("healthy", "settled", since) if holds else told("collapsing", "collapsing", since)
    if ratio >= surge and real:
        return told("surging", "surging", _since(steps, values >= surge * start))
    # The lowest of many means is low by chance: it has to be lower by twice as many errors.
    back = math.log(max(now / max(low, 1e-9 * start), 1)) >= 2 * _REAL * max(noise * math.sqrt(1 / 3 + 1 / count), 0.01)
    if low <= collapse * start and back:
        return told("healthy", "recovered", low_step)
    if falls and ratio < 1 and real and points >= _PLATEAU_POINTS:
        ahead = gap * math.log(ratio / collapse) / -change
        span = int(steps[-1] - steps[0])
        return told("healthy", "falling", reach=int(steps[-1]) + math.ceil(ahead) if ahead <= 3 * span else None)
    if not real or abs(ratio - 1) < 0.1:
        return told("healthy", "steady")
    return told("healthy", "fallen" if ratio < 1 else "risen")


def _noise(values: Array, start: float) -> float:
    """The relative noise of one point: second differences of `ln H` do not see a trend, and their median no jump."""
    parts = [values] if len(values) <= 2 * _NOISE_POINTS else [values[:_NOISE_POINTS], values[-_NOISE_POINTS:]]
    differences = np.concatenate([np.diff(np.log(np.maximum(part, 1e-6 * start)), 2) for part in parts])
    return float(1.4826 * np.median(np.abs(differences)) / math.sqrt(6))


def _late_change(steps: npt.NDArray[np.int64], values: Array, start: float) -> tuple[float, float]:
    """The change of `ln H` between the medians of the halves of the last third, and the steps between them."""
    half = max(len(values) // 6, 1)
    before, after = (max(float(np.median(values[part])), 1e-9 * start) for part in _halves(half))
    gap = float(np.mean(steps[-half:]) - np.mean(steps[-2 * half : -half]))
    return math.log(after / before), gap


def _halves(half: int) -> tuple[slice, slice]:
    return slice(-2 * half, -half), slice(-half, None)


def _lowest(steps: npt.NDArray[np.int64], values: Array) -> tuple[int, float]:
    """Where the mean of three points was lowest: one point can be off by much."""
    means = (values[:-2] + values[1:-1] + values[2:]) / 3
    at = int(means.argmin())
    return int(steps[at + 1]), float(means[at])


def _since(steps: npt.NDArray[np.int64], holds: npt.NDArray[np.bool_]) -> int | None:
    """The step from which a condition holds to the end, a single point apart; None if not at the end."""
    broken = np.flatnonzero(~holds[1:] & ~holds[:-1])
    first = int(broken[-1]) + 2 if len(broken) else 0
    while first < len(holds) and not holds[first]:
        first += 1
    return int(steps[first]) if first < len(holds) else None


def _why(form: str, runs: Sequence[_Measured], metric: str, collapse: float, surge: float) -> str:
    start, now = (float(np.mean([getattr(one, name) for one in runs])) for name in ("start", "now"))
    steps = [one.step for one in runs if one.step is not None]
    mean = f", a mean over {len(runs)} runs" if len(runs) > 1 else ""
    text = f"It is {now:.3g} nats a token{mean}, {now / start:.0%} of the {start:.3g} that the run started with"
    text += ": completions of a prompt are nearly all the same." if now <= _NOTHING_LEFT * start else "."
    when = "" if not steps else f"step {max(steps):,}" + (" at the latest" if min(steps) < max(steps) else "")
    if form in ("collapsed", "collapsing", "settled") and when:
        text += f" `{metric}` has been at {collapse:.0%} or less since {when}."
    elif form == "surging" and when:
        text += f" `{metric}` has been at {surge:.0%} or more since {when}."
    elif form == "recovered":
        low = float(np.mean([one.low for one in runs]))
        text += f" `{metric}` was lowest near step {max(steps):,}, at {low:.3g}."
    else:
        text += f" The metric is `{metric}`."
    return text


def _what_to_do(form: str, runs: Sequence[_Measured], settings: Mapping[str, Any], collapse: float) -> str:
    if form in ("collapsed", "collapsing"):
        last = "A lower learning rate keeps more too. What is gone seldom comes back: go back to an earlier checkpoint."
        return f"{_advice(settings, 0)}. {last}"
    if form == "surging":
        bonus = settings.get("entropy_coef") or settings.get("use_adaptive_entropy")
        parts = ["Lower the entropy bonus (`entropy_coef`, `entropy_target`) first"] if bonus else []
        parts.append(_advice(settings, 1))
        last = (
            "Lower the learning rate, and read some completions: a surge can end in random text. A reward that is "
            "noise surges entropy too."
        )
        return f"{'. '.join(parts)}. {last}"
    reached = [one.reach for one in runs if one.reach is not None]
    if form == "falling" and reached:
        return (
            f"Nothing has to change yet. At the rate of the last third, entropy reaches {collapse:.0%} of its start "
            f"near step {min(reached):,}: look again then."
        )
    if form == "settled":
        return "Nothing has to change while the reward rises."
    if form == "recovered":
        return "Nothing has to change. Look at the reward at that step: what lowered entropy can come back."
    return "Nothing has to change."


def _sureness(runs: Sequence[_Measured], known: int) -> tuple[str, str]:
    """The confidence, and its grounds."""
    points = min(one.points for one in runs)
    margin = min(one.margin for one in runs)
    noise = max(one.noise for one in runs)
    agree = len(runs) == known
    if agree and known >= 3 and points >= _PLATEAU_POINTS and margin >= 3:
        confidence = "high"
    else:
        confidence = "moderate" if agree and points >= 2 * MIN_POINTS and margin >= _REAL else "low"
    seeds = "one run, and another seed may differ" if known == 1 else f"{len(runs)} of {known} runs agree"
    close = "" if margin >= _REAL else ", and a bound is within the noise"
    return confidence, f"{seeds}; {_counted(points)}{' a run' if known > 1 else ''}; noise {noise:.1%} a point{close}"


def _counted(points: int) -> str:
    return f"{points:,} point{'' if points == 1 else 's'}"


def _advice(settings: Mapping[str, Any], direction: int) -> str:
    if not settings:
        return _UNKNOWN_CONTROL[direction]
    control = settings.get("entropy_control")
    if not control:
        return _NO_CONTROL[direction]
    names = [name.strip() for name in str(control).split("+")]
    return ". ".join(_ADVICE.get(name, _OWN_CONTROL)[direction].format(name) for name in names)
