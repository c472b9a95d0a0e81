"""The verdict on entropy: its sign on series of every kind, its words, and how sure it is."""

import numpy as np
import pytest

from entropy_trl.analysis.logs.runs import Series
from entropy_trl.analysis.verdict import COLLAPSE, CONFIDENCE, SIGNS, verdict


def series(values, every=10):
    values = np.asarray(values, dtype=np.float64)
    return Series(np.arange(1, len(values) + 1) * every, values)


def noisy(values, noise, seed=0):
    return np.asarray(values) * np.exp(noise * np.random.default_rng(seed).normal(size=len(values)))


def fall(to, points=60, rate=8.0):
    return to + (1 - to) * np.exp(-rate * np.linspace(0, 1, points))


FLAT = np.full(60, 0.8)
DOWN_AND_UP = np.concatenate([np.linspace(1.0, 0.1, 30), np.linspace(0.1, 0.9, 30)])

CASES = {
    "flat": (FLAT, "healthy", "Entropy is steady."),
    "flat, a tenth of noise": (noisy(FLAT, 0.1), "healthy", "Entropy is steady."),
    "flat, a half of noise": (noisy(FLAT, 0.5, 3), "healthy", "Entropy is steady."),
    "one low point at the end": (np.append(FLAT, 0.1), "healthy", "Entropy has fallen, and most of it is left."),
    "falling": (np.linspace(1.0, 0.3, 60), "collapsing", "Entropy is collapsing."),
    "falling with noise": (noisy(np.linspace(1.0, 0.25, 60), 0.1), "collapsing", "Entropy is collapsing."),
    "falling, above the bound": (np.linspace(1.0, 0.7, 60), "healthy", "Entropy is falling, and most of it is left."),
    "fallen": (fall(0.04), "collapsed", "Entropy has collapsed."),
    "fallen with noise": (noisy(fall(0.04), 0.2), "collapsed", "Entropy has collapsed."),
    "fallen to zero": (np.maximum(np.linspace(1.0, -1.0, 60), 0.0), "collapsed", "Entropy has collapsed."),
    "most of it fallen, level": (fall(0.15, 100, 20), "collapsed", "Entropy has collapsed."),
    "fallen to two fifths, level": (fall(0.4, 100, 20), "healthy", "Entropy holds at a lower level."),
    "recovered": (DOWN_AND_UP, "healthy", "Entropy fell and has recovered."),
    "rising": (np.linspace(0.5, 1.5, 60), "surging", "Entropy is surging."),
    "rising with noise": (noisy(np.linspace(0.5, 1.5, 60), 0.15), "surging", "Entropy is surging."),
    "risen a little": (np.linspace(1.0, 1.25, 60), "healthy", "Entropy has risen within bounds."),
    "five points": ([1.0, 0.8, 0.6, 0.5, 0.4], "collapsing", "Entropy is collapsing."),
    "four points": ([1.0, 0.6, 0.2, 0.05], "unknown", "Too short for a verdict."),
    "one point": ([1.0], "unknown", "Too short for a verdict."),
    "no points": ([], "unknown", "Too short for a verdict."),
    "never any": (np.zeros(30), "unknown", "Entropy cannot be judged."),
    "infinite points left out": ([np.inf, 1.0, 1.0, 1.0, 1.0, 1.0], "healthy", "Entropy is steady."),
}


@pytest.mark.parametrize("case", CASES)
def test_sign_and_sentence(case):
    values, sign, sentence = CASES[case]
    found = verdict([series(values)], {})
    assert (found.sign, found.sentence) == (sign, sentence)
    assert found.sign in SIGNS and found.confidence in CONFIDENCE
    assert (found.confidence == "none") == (sign == "unknown")
    assert all(text.endswith(".") for text in (found.sentence, found.why, found.advice))
    assert "`entropy`" in found.why
    alarms = {"collapsed": "collapse", "collapsing": "collapse", "surging": "surge"}
    assert found.alarm == alarms.get(sign)


def test_flat_runs_with_noise_raise_no_alarm():
    """At most 5% of 200 seeds, at noise that is common for small rollouts."""
    for noise in (0.1, 0.3):
        for points in (10, 30, 100):
            alarms = [verdict([series(noisy(np.ones(points), noise, seed))], {}).alarm for seed in range(200)]
            assert sum(alarm is not None for alarm in alarms) <= 10, (noise, points)


def test_why_has_the_metric_and_the_step():
    values = np.where(np.arange(60) < 30, 1.0, 0.05)
    found = verdict([series(values)], {}, metric="eval_entropy")
    assert found.why == (
        "It is 0.05 nats a token, 5% of the 1 that the run started with: completions of a prompt are nearly all the "
        "same. `eval_entropy` has been at 50% or less since step 310."
    )
    found = verdict([series(DOWN_AND_UP)], {})
    assert "was lowest near step 310, at 0.109" in found.why
    found = verdict([series(np.linspace(1.0, 0.7, 61))], {})
    reached = 610 + 10 * 0.2 / 0.005  # at the rate of its end
    assert 0.75 * reached < int(found.advice.split("near step ")[1].split(":")[0].replace(",", "")) < 1.25 * reached


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "The settings are not stored"),
        ({"learning_rate": 1e-6}, "No entropy control is on"),
        ({"entropy_control": "kl_cov"}, "KL-Cov restrains too little"),
    ],
)
def test_advice_fits_the_settings(settings, words):
    assert words in verdict([series(fall(0.04))], settings).advice


@pytest.mark.parametrize(
    ("runs", "sign", "sentence", "confidence"),
    [
        ([fall(0.04)], "collapsed", "Entropy has collapsed.", "moderate"),
        ([fall(0.04)] * 3, "collapsed", "Entropy has collapsed.", "high"),
        ([fall(0.04)] * 2 + [FLAT], "collapsed", "Entropy has collapsed in 2 of 3 runs.", "low"),
        ([fall(0.04), FLAT], "collapsed", "Entropy has collapsed in 1 of 2 runs.", "low"),
        ([FLAT, FLAT, [1.0]], "healthy", "Entropy is steady.", "moderate"),
        ([FLAT[:6]] * 3, "healthy", "Entropy is steady.", "low"),
        ([noisy(FLAT, 0.8, seed) for seed in range(3)], "healthy", "Entropy is steady.", "low"),
    ],
)
def test_a_group_of_seeds(runs, sign, sentence, confidence):
    found = verdict([series(values) for values in runs], {})
    assert (found.sign, found.sentence, found.confidence) == (sign, sentence, confidence)
    if len(runs) > 1:
        assert "runs agree" in found.grounds


def test_bounds_can_be_chosen():
    values = series(np.linspace(1.0, 0.45, 10))
    assert verdict([values], {}).sign == "collapsing"
    assert verdict([values], {}, collapse=0.3).sign == "healthy"
    assert verdict([series(np.linspace(1.0, 1.4, 10))], {}, surge=1.2).sign == "surging"
    assert COLLAPSE == 0.5


def test_words_do_not_depend_on_the_caller():
    """The callback, the quickstart and the report import one function."""
    import entropy_trl.analysis.verdict as module
    from entropy_trl.monitor import entropy_law

    assert entropy_law.verdict is module.verdict
