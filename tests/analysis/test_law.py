"""The law: fits against statsmodels and plain formulas, coverage of the intervals, units, pairing, and the command."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from entropy_trl.analysis.law import (
    FORMS,
    METHODS,
    LawFit,
    check_entropy,
    compare_forms,
    cross_validated_rmse,
    entropy_spent,
    fit_law,
    predict_early,
)
from entropy_trl.analysis.law import fit as fit_module
from entropy_trl.analysis.law.points import entropy_accuracy_pairs, law_points
from entropy_trl.analysis.law.sizes import fit_sizes, over_seeds
from entropy_trl.analysis.logs.runs import Run, read_runs
from entropy_trl.cli import main


#: (a, b) read off the curves of arXiv 2505.22617 for Qwen2.5 on mathematics, and the parameters without embeddings.
PAPER = {
    0.36e9: (0.044, 0.195),
    1.31e9: (0.098, 0.354),
    2.77e9: (0.177, 0.481),
    6.53e9: (0.209, 0.594),
    31.0e9: (0.239, 0.693),
}
#: Three GRPO runs of the quickstart's short recipe: entropy and avg@16 on 256 held-out prompts, every 96 updates.
QUICKSTART = Path(__file__).parent / "law_data" / "quickstart_grpo.csv"
A, B = PAPER[6.53e9]


def training(n=100, high=1.0, low=0.1, rate=6.0):
    """Entropies that fall fast at first and then slowly, as in training."""
    return low + (high - low) * np.exp(-rate * np.linspace(0, 1, n))


def noise(generator, n, correlation=0.0, draws=1):
    """Normal noise of variance 1, autoregressive of order 1."""
    shocks = generator.standard_normal((draws, n))
    values = np.empty_like(shocks)
    values[:, 0] = shocks[:, 0]
    for i in range(1, n):
        values[:, i] = correlation * values[:, i - 1] + math.sqrt(1 - correlation**2) * shocks[:, i]
    return values


def law_data(n=100, correlation=0.0, scale=0.02, seed=0, h=None):
    h = training(n) if h is None else h
    return h, B - A * np.exp(h) + scale * noise(np.random.default_rng(seed), len(h), correlation)[0]


# The fit


@pytest.mark.parametrize(("a", "b"), PAPER.values())
@pytest.mark.parametrize("robust", [False, True])
def test_recovers_the_papers_coefficients(a, b, robust):
    h = training(30)
    fit = fit_law(h, b - a * np.exp(h), robust=robust)
    np.testing.assert_allclose([fit.a, fit.b, fit.ceiling], [a, b, b - a], rtol=1e-9)
    assert fit.r2 == pytest.approx(1)
    assert fit.predict([0.0, 0.5]) == pytest.approx([b - a, b - a * math.exp(0.5)])


@pytest.mark.parametrize("form", FORMS)
def test_least_squares_is_numpys(form):
    h, r = law_data()
    fit = fit_law(h, r, form)
    slope, intercept = np.polyfit(FORMS[form](h), r, 1)
    np.testing.assert_allclose([fit.a, fit.b], [-slope, intercept], rtol=1e-8)
    residuals = r - intercept - slope * FORMS[form](h)
    assert fit.rmse == pytest.approx(np.sqrt((residuals**2).mean()))
    assert fit.r2 == pytest.approx(1 - (residuals**2).sum() / ((r - r.mean()) ** 2).sum())
    at_zero = {"exp": intercept + slope, "linear": intercept, "log": math.inf}[form]
    assert fit.ceiling == pytest.approx(at_zero)


def test_the_fit_needs_neither_scipy_nor_statsmodels():
    script = (
        "import sys\nfor name in ('scipy', 'statsmodels', 'torch', 'pandas'): sys.modules[name] = None\n"
        "from entropy_trl.analysis import fit_law, compare_forms, predict_early, entropy_spent, read_runs\n"
        "fit = fit_law([1.0, 0.5, 0.4, 0.2], [0.1, 0.3, 0.35, 0.4])\nprint(fit.ceiling, fit.r2)\n"
        "try: fit.inference()\nexcept ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'entropy-trl[analysis]'" in done.stdout


def test_robust_fit_is_statsmodels_and_withstands_outliers():
    statsmodels = pytest.importorskip("statsmodels.api")
    h, r = law_data()
    r[[10, 40, 70]] += 0.5
    fit = fit_law(h, r, robust=True)
    design = np.column_stack([-np.exp(h), np.ones_like(h)])
    model = statsmodels.RLM(r, design, M=statsmodels.robust.norms.HuberT()).fit()
    np.testing.assert_allclose([fit.a, fit.b], model.params, rtol=1e-6)
    assert abs(fit.ceiling - (B - A)) < 0.5 * abs(fit_law(h, r).ceiling - (B - A))
    errors = [fit.inference("ols").a.standard_error, fit.inference("ols").b.standard_error]
    np.testing.assert_allclose(errors, model.bse, rtol=0.1)


# Its uncertainty


def test_standard_errors_are_statsmodels():
    statsmodels = pytest.importorskip("statsmodels.api")
    h, r = law_data(80, correlation=0.5)
    design = np.column_stack([-np.exp(h), np.ones_like(h)])
    fit = fit_law(h, r)
    plain = statsmodels.OLS(r, design).fit()
    ols = fit.inference("ols", 0.9)
    for estimate, (low, high), error in zip(ols[:2], plain.conf_int(0.1), plain.bse, strict=True):
        np.testing.assert_allclose(estimate[1:], [error, low, high], rtol=1e-7)
    ceiling = plain.t_test([[-1, 1]])
    np.testing.assert_allclose(ols.ceiling[:2], [ceiling.effect.item(), ceiling.sd.item()], rtol=1e-7)
    lags = math.ceil(1.3 * math.sqrt(80)) - 1
    hac = statsmodels.OLS(r, design).fit(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": True})
    np.testing.assert_allclose([e.standard_error for e in fit.inference("hac")[:2]], hac.bse, rtol=1e-7)


@pytest.mark.parametrize("form, n", [("exp", 25), ("linear", 25), ("exp", 400)])
def test_ar1_errors_are_those_of_the_plain_formula(form, n):
    """`P S P'` with the whole matrix `S`, and the variance that makes the residuals' sum of squares expected."""
    h, r = law_data(n, correlation=0.6, seed=3)
    fit = fit_law(h, r, form)
    inference = fit.inference("ar1")
    x = np.column_stack([-FORMS[form](h), np.ones_like(h)])
    p = np.linalg.inv(x.T @ x) @ x.T
    e = fit.residuals
    raw = (e[1:] * e[:-1]).sum() / (e**2).sum()
    correlation = min(max(raw + (2 + 4 * raw) / n, 0), (n - 3) / (n + 3))
    assert 0 < correlation < (n - 3) / (n + 3)
    assert inference.autocorrelation == pytest.approx(correlation)
    assert inference.effective_points == pytest.approx(n * (1 - correlation) / (1 + correlation))
    s = np.array([[correlation ** abs(i - j) for j in range(n)] for i in range(n)])
    m = np.eye(n) - x @ p
    covariance = p @ s @ p.T * (e @ e) / np.trace(m @ s @ m.T)
    np.testing.assert_allclose(
        [inference.a.standard_error, inference.b.standard_error], np.sqrt(np.diag(covariance)), rtol=1e-8
    )
    c = np.array([-1.0, 1.0]) if form == "exp" else np.array([0.0, 1.0])
    assert inference.ceiling.standard_error == pytest.approx(math.sqrt(c @ covariance @ c))


def test_ar1_errors_of_a_million_points():
    """The covariance of all pairs of points would take hours. Noise without autocorrelation has the usual errors."""
    h = training(1_000_000)
    r = B - A * np.exp(h) + np.random.default_rng(0).normal(0, 0.02, len(h))
    fit = fit_law(h, r)
    for ar1, independent in zip(fit.inference("ar1")[:3], fit.inference("ols")[:3], strict=True):
        assert ar1.standard_error == pytest.approx(independent.standard_error, rel=0.01)


def test_bootstrap_in_parts_is_the_same(monkeypatch):
    fit = fit_law(*law_data(50, correlation=0.5))
    whole = fit.inference("bootstrap")
    monkeypatch.setattr(fit_module, "_DRAWN_AT_ONCE", 700)
    np.testing.assert_allclose(fit.inference("bootstrap")[:3], whole[:3], rtol=1e-12)


def coverage(method, n, correlation, draws=1000):
    """The share of draws whose 95% intervals contain a, b and the ceiling."""
    h = training(n)
    curve = B - A * np.exp(h)
    hits = np.zeros(3)
    for i, e in enumerate(noise(np.random.default_rng(n), n, correlation, draws)):
        inference = fit_law(h, curve + 0.02 * e).inference(method, seed=i)
        truth = (A, B, B - A)
        hits += [estimate.low < value < estimate.high for estimate, value in zip(inference[:3], truth, strict=True)]
    return hits / draws


@pytest.mark.parametrize("n", [12, 30, 100])
def test_intervals_cover_with_independent_noise(n):
    """Nominal 0.95; the standard error over 1,000 draws is 0.007."""
    assert np.all(np.abs(coverage("ols", n, 0.0) - 0.95) < 0.022)
    assert np.all((coverage("ar1", n, 0.0) > 0.93) & (coverage("ar1", n, 0.0) < 0.985))


@pytest.mark.parametrize(
    ("n", "correlation", "least"), [(100, 0.5, 0.92), (100, 0.8, 0.91), (30, 0.5, 0.90), (12, 0.5, 0.86)]
)
def test_intervals_with_autocorrelated_noise(n, correlation, least):
    """The default comes near the nominal rate, where the others fall far short of it."""
    ar1 = coverage("ar1", n, correlation)
    assert np.all((ar1 > least) & (ar1 < 0.98))
    for method in ("ols", "hac", "bootstrap"):
        assert np.all(coverage(method, n, correlation, 300) < ar1)
    assert coverage("ols", n, correlation, 300).mean() < 0.87


def test_bootstrap_covers_independent_noise_and_is_reproducible():
    assert np.all(coverage("bootstrap", 100, 0.0) > 0.91)
    fit = fit_law(*law_data())
    assert fit.inference("bootstrap", seed=1) == fit.inference("bootstrap", seed=1)
    assert fit.inference("bootstrap", seed=1) != fit.inference("bootstrap", seed=2)


def test_intervals_widen_with_the_confidence():
    fit = fit_law(*law_data())
    for method in METHODS:
        narrow, wide = (fit.inference(method, confidence).ceiling for confidence in (0.5, 0.99))
        assert wide.low < narrow.low < fit.ceiling < narrow.high < wide.high
    with pytest.raises(ValueError, match="unknown method 'bayes'; choose from ar1, hac"):
        fit.inference("bayes")
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        fit.inference(confidence=95)


def test_diagnostics_see_what_is_wrong():
    good = fit_law(*law_data()).diagnostics()
    assert 1.5 < good.durbin_watson < 2.5
    assert good.breusch_pagan > 0.05
    assert good.jarque_bera > 0.05
    assert fit_law(*law_data(correlation=0.8)).diagnostics().durbin_watson < 1
    h, r = law_data()
    growing = B - A * np.exp(h) + (r - B + A * np.exp(h)) * 5 * h
    assert fit_law(h, growing).diagnostics().breusch_pagan < 0.01
    r[50] += 0.5
    assert fit_law(h, r).diagnostics().jarque_bera < 1e-6


# Comparisons and predictions


def test_forms_are_told_apart_only_where_they_differ():
    wide = training(60, high=2.5, low=0.05)
    generator = np.random.default_rng(1)
    e = 0.01 * noise(generator, 60)[0]
    assert set(compare_forms(wide, B - A / 5 * np.exp(wide) + e).verdict.values()) == {"better"}
    assert compare_forms(wide, B - A * wide + e).verdict["linear"] == "worse"
    assert compare_forms(wide, B - A * np.log(wide) + e).verdict["log"] == "worse"
    narrow = training(60, high=0.5, low=0.3)
    verdict = compare_forms(narrow, B - A * np.exp(narrow) + e).verdict
    assert verdict == {"linear": "not distinguishable", "log": "not distinguishable"}


@pytest.mark.parametrize(
    "h, r",
    [
        (np.repeat([1.0, 0.5], 10), np.repeat([0.1, 0.3], 10)),  # any curve passes through two points
        (np.repeat([2.0, 0.013], 30), np.repeat([100.3, 1e-3], 30)),
        (np.linspace(1, 0.1, 20), np.full(20, 0.1)),
    ],
)
def test_forms_without_an_error_are_not_told_apart_by_rounding(h, r):
    comparison = compare_forms(h, r)
    assert set(comparison.verdict.values()) == {"not distinguishable"}
    assert all(score.aic == 0 for score in comparison.scores.values())
    assert math.isnan(fit_law(h, r).diagnostics().jarque_bera)


def test_an_exact_law_is_better():
    h = training(20, high=2.5)
    assert set(compare_forms(h, B - A * np.exp(h)).verdict.values()) == {"better"}
    assert compare_forms(h, B - A * h).verdict["linear"] == "worse"


def test_aic_counts_effective_points():
    h, r = law_data(correlation=0.8, h=training(100, high=2.5))
    score = compare_forms(h, r).scores["linear"]
    fits = [fit_law(h, r, form) for form in ("exp", "linear")]
    squares = [(fit.residuals**2).sum() for fit in fits]
    effective = fits[0].inference().effective_points
    assert effective < 40
    assert score.aic == pytest.approx(effective * math.log(squares[1] / squares[0]))


def test_cross_validation_leaves_out_blocks():
    h, r = law_data(20)
    errors = []
    for start in range(0, 20, 4):
        left = np.arange(start, start + 4)
        rest = [i for i in range(20) if i not in left]
        slope, intercept = np.polyfit(np.exp(h[rest]), r[rest], 1)
        errors += list(r[left] - intercept - slope * np.exp(h[left]))
    assert cross_validated_rmse(h, r) == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert math.isnan(cross_validated_rmse(h[:5], r[:5]))


def test_log_is_left_out_at_entropy_zero():
    h, r = law_data(10)
    h[-1] = 0
    assert set(compare_forms(h, r).scores) == {"exp", "linear"}
    with pytest.raises(ValueError, match="the form 'log' has no value"):
        fit_law(h, r, "log")


def test_early_prediction():
    """36 of 236 steps, as in the paper."""
    h, r = law_data(236, scale=0.01)
    early = predict_early(h, r, np.arange(1, 237), 0.15)
    assert (early.fit.points, early.last_step) == (36, 36)
    slope, intercept = np.polyfit(np.exp(h[:36]), r[:36], 1)
    predicted = intercept + slope * np.exp(h[36:])
    np.testing.assert_allclose(early.predicted, predicted)
    assert early.rmse == pytest.approx(np.sqrt(((predicted - r[36:]) ** 2).mean()))
    assert early.last_error == pytest.approx(predicted[-1] - r[-1])
    assert early.unchanged_rmse == pytest.approx(np.sqrt(((r[35] - r[36:]) ** 2).mean()))
    assert early.rmse < 0.015 < early.unchanged_rmse


def test_early_prediction_goes_by_steps():
    h, r = law_data(10)
    steps = [0, 1, 2, 3, 4, 100, 200, 300, 400, 500]
    assert predict_early(h, r, steps, 0.1).fit.points == 5
    with pytest.raises(ValueError, match=r"first 10% of the training has 1 of 10 points: 3 are the least"):
        predict_early(h, r, fraction=0.1)
    with pytest.raises(ValueError, match="between 0 and 1, got 15"):
        predict_early(h, r, fraction=15)


def test_the_early_part_ends_at_the_step_that_the_fraction_names():
    """0.29 times 100 is 28.999999999999996 as a product of floats."""
    h, r = law_data(101)
    assert predict_early(h, r, fraction=0.29).last_step == 29


def test_entropy_spent():
    """By hand: entropy 1 to 0 and reward 0 to 0.5 over 24 steps."""
    steps, h, r = [0, 2, 8, 24], [1.0, 0.27, 0.06, 0.0], [0.0, 0.38, 0.465, 0.5]
    first, second = entropy_spent(h, r, steps)
    assert (first.step, first.entropy, first.reward) == (2, pytest.approx(0.73), pytest.approx(0.76))
    assert (second.step, second.entropy, second.reward) == (8, pytest.approx(0.94), pytest.approx(0.93))
    (middle,) = entropy_spent(h, r, steps, at=[5 / 24])
    assert middle.entropy == pytest.approx(1 - (0.27 + 0.06) / 2)
    with pytest.raises(ValueError, match=r"entropy did not fall \(0 at the start, 1 at the end\)"):
        entropy_spent(h[::-1], r)
    with pytest.raises(ValueError, match="reward did not rise"):
        entropy_spent(h, r[::-1])


# Seeds and sizes


def test_over_seeds():
    fits = [LawFit(a, b, np.zeros(1), np.zeros(1)) for a, b in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))]
    mean = over_seeds(fits)
    # standard deviation 0.1, Student's 97.5% quantile with 2 degrees of freedom 4.3027
    np.testing.assert_allclose(
        mean.a, [0.2, 0.1 / 3**0.5, 0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5], 1e-4
    )
    assert mean.ceiling.value == pytest.approx(0.4)
    assert math.isnan(over_seeds(fits[:1]).a.low)


def test_sizes_of_the_paper():
    """Fitted to the four smaller models, 32B is predicted 0.05 too high, outside of the interval."""
    params = list(PAPER)
    a, b = zip(*PAPER.values(), strict=True)
    sizes = fit_sizes(params[:4], a[:4], b[:4])
    assert (sizes.a.r2, sizes.b.r2) == (pytest.approx(0.963, abs=1e-3), pytest.approx(0.996, abs=1e-3))
    predicted = sizes.predict(params[4])
    assert predicted.a.value == pytest.approx(0.306, abs=1e-3)  # 0.239
    assert predicted.b.value == pytest.approx(0.810, abs=1e-3)  # 0.693
    assert predicted.ceiling.value == pytest.approx(0.504, abs=1e-3)  # 0.454
    assert predicted.ceiling.value == pytest.approx(predicted.b.value - predicted.a.value)
    assert predicted.a.low < 0.239 < predicted.a.high
    assert not predicted.b.low < 0.693 < predicted.b.high
    # all five: the line that the paper draws
    assert fit_sizes(params, a, b).a.r2 > 0.9


def test_prediction_interval_of_a_size_is_statsmodels():
    statsmodels = pytest.importorskip("statsmodels.api")
    params = np.array(list(PAPER))
    a, b = map(np.array, zip(*PAPER.values(), strict=True))
    model = statsmodels.OLS(b[:4], statsmodels.add_constant(np.log(params[:4]))).fit()
    frame = model.get_prediction([[1, math.log(params[4])]]).summary_frame(0.1)
    predicted = fit_sizes(params[:4], a[:4], b[:4]).predict(params[4], 0.9).b
    np.testing.assert_allclose([predicted.low, predicted.high], frame[["obs_ci_lower", "obs_ci_upper"]].to_numpy()[0])


def test_sizes_that_cannot_be_fitted():
    two = fit_sizes([1e9, 7e9], [0.1, 0.2], [0.4, 0.6]).predict(32e9)
    assert two.a.value == pytest.approx(0.1 + 0.1 * math.log(32) / math.log(7))
    assert math.isnan(two.a.low)
    with pytest.raises(ValueError, match="1 model size has no trend"):
        fit_sizes([1e9], [0.1], [0.2])
    with pytest.raises(ValueError, match="must be positive, got -1"):
        fit_sizes([1e9, -1], [0.1, 0.2], [0.2, 0.3])
    with pytest.raises(ValueError, match="lists of one length"):
        fit_sizes([1e9, 2e9], [0.1], [0.2, 0.3])


# Input that cannot be fitted


@pytest.mark.parametrize(
    ("h", "r", "message"),
    [
        ([1.0, 0.5], [0.1, 0.2], "2 points are too few"),
        ([], [], "0 points are too few"),
        ([0.5] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], r"entropy is constant \(0.5 nats at all 5 points\)"),
        ([0.5, math.nan, 0.3], [0.1, 0.2, 0.3], "1 of 3 entropies are NaN"),
        ([0.5, 0.4, 0.3], [0.1, math.inf, 0.3], "1 of 3 rewards are NaN, infinite or beyond"),
        ([0.5, 0.4, -0.3], [0.1, 0.2, 0.3], r"An entropy is negative \(-0.3\)"),
        ([800.0, 500.0, 300.0], [0.1, 0.2, 0.3], "800 nats a token is more than a vocabulary allows"),
        ([0.5, 0.4, 0.3], [0.1, 0.2], r"got the shapes \(3,\) and \(2,\)"),
        ([[0.5, 0.4, 0.3]], [[0.1, 0.2, 0.3]], "must be lists of one length"),
    ],
)
def test_degenerate_input(h, r, message):
    with pytest.raises(ValueError, match=message):
        fit_law(h, r)


def test_constant_reward():
    fit = fit_law([0.5, 0.4, 0.3, 0.2], [0.5] * 4)
    assert (fit.a, fit.b) == (0, 0.5)
    assert math.isnan(fit.r2)
    assert fit.inference().ceiling == (0.5, 0, 0.5, 0.5)


def test_entropy_is_bounded_by_the_vocabulary():
    assert check_entropy([math.log(64)], vocab_size=64).tolist() == [math.log(64)]
    with pytest.raises(ValueError, match=r"ln\(64\) = 4.159"):
        check_entropy([4.5], vocab_size=64)
    with pytest.raises(ValueError, match="more than a vocabulary allows"):
        fit_law(*law_data()).predict(1000.0)  # exp would overflow
    with pytest.raises(ValueError, match="unknown form 'cubic'"):
        fit_law([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], "cubic")


# Points of a run


def run_of(entropy, reward, every=1, **names):
    """A run that logs its entropy at each step and its accuracy at each `every`-th."""
    log = [{"step": i, "entropy": float(h)} for i, h in enumerate(entropy)]
    log += [{"step": i, "eval_reward": float(r)} for i, r in enumerate(reward) if i % every == 0]
    return Run("run", log=log, **names)


def test_points_of_an_evaluation_have_its_own_entropy():
    log = [{"step": i, "entropy": 0.9, "eval_entropy": 0.5 - i / 20, "eval_reward": i / 10} for i in range(6)]
    points = law_points(Run("run", log=log))
    assert (points.entropy_metric, points.reward_metric) == ("eval_entropy", "eval_reward")
    np.testing.assert_allclose(points.entropy, [0.5 - i / 20 for i in range(6)])
    assert law_points(Run("run", log=log), entropy="entropy").entropy.tolist() == [0.9] * 6


def test_pairing_by_steps():
    h = np.linspace(1, 0.1, 41)
    run = run_of(h, np.linspace(0, 0.5, 41), every=8)
    np.testing.assert_allclose(law_points(run).entropy, h[::8])
    mean = law_points(run, pairing="mean").entropy
    assert mean[1] == pytest.approx(h[5:13].mean())  # (4, 12]
    assert mean[0] == pytest.approx(h[:5].mean())
    # steps that never coincide: the nearest, and the earlier of two as near
    log = [{"step": s, "entropy": s / 100} for s in (10, 20, 30)]
    log += [{"step": s, "eval_reward": 0.5} for s in (0, 14, 15, 16, 200)]
    points = law_points(Run("run", log=log))
    assert (points.steps.tolist(), points.entropy.tolist()) == ([0, 14, 15, 16], [0.1, 0.1, 0.1, 0.2])
    assert points.notes == ("1 of 5 points of eval_reward have no entropy near.",)
    with pytest.raises(ValueError, match="no entropy was logged near a step of eval_reward"):
        law_points(Run("run", log=[*log[:3], {"step": 900, "eval_reward": 0.5}]), reward="eval_reward")


def test_training_reward_is_the_fallback():
    log = [{"step": i, "entropy": 0.5, "reward": 0.1} for i in range(8)]
    assert "the log has no evaluation" in law_points(Run("run", log=log)).notes[0]
    log += [{"step": 7, "eval_reward": 0.3}]
    points = law_points(Run("run", log=log))
    assert points.reward_metric == "reward"
    assert "eval_reward has fewer than 5 points" in points.notes[0]
    assert law_points(Run("run", log=log), reward="eval_reward").reward.tolist() == [0.3]


def test_metrics_that_are_not_there():
    run = Run("run", log=[{"step": 0, "loss": 0.1}])
    with pytest.raises(ValueError, match=r"no reward or accuracy .* choose one with --reward. It logged loss"):
        law_points(run)
    with pytest.raises(ValueError, match="no entropy under a name that is known here"):
        law_points(run, reward="loss")


def test_units():
    h = training(10)
    bits = run_of(h / math.log(2), training(10))
    np.testing.assert_allclose(law_points(bits, entropy_unit="bits").entropy, h)
    named = Run("run", log=[{"step": i, "entropy_bits": x / math.log(2), "reward": 0.1} for i, x in enumerate(h)])
    points = law_points(named, entropy="entropy_bits")
    np.testing.assert_allclose(points.entropy, h)
    assert any("in bits, as its name says" in note for note in points.notes)
    np.testing.assert_allclose(law_points(named, entropy="entropy_bits", entropy_unit="nats").entropy, h / math.log(2))
    whole = Run("run", log=[{"step": i, "entropy": 200.0 * x, "length": 200, "reward": 0} for i, x in enumerate(h)])
    with pytest.raises(ValueError, match=r"Run 'run', entropy: .* --tokens-per-sequence"):
        law_points(whole)
    np.testing.assert_allclose(law_points(whole, tokens_per_sequence=200).entropy, h)
    np.testing.assert_allclose(law_points(whole, tokens_per_sequence="length").entropy, h)
    with pytest.raises(ValueError, match=r"ln\(2\) = 0.6931"):
        law_points(run_of(h, h, config={"vocab_size": 2}))
    with pytest.raises(ValueError, match="unknown unit of entropy 'nits'"):
        law_points(bits, entropy_unit="nits")


def test_smoothing_averages_separate_points():
    h = np.arange(1.0, 8.0) / 10
    points = law_points(run_of(h, h), smooth=3)
    np.testing.assert_allclose(points.entropy, [0.2, 0.5])  # the seventh is too few for a point
    assert points.steps.tolist() == [1, 4]
    assert len(law_points(run_of(h, h), smooth=2).steps) == 4
    with pytest.raises(ValueError, match="smooth must be at least 1"):
        law_points(run_of(h, h), smooth=0)


def test_several_evaluation_data_sets():
    """TRL logs them under the same names, one after the other."""
    log = [
        {"step": s, "eval_entropy": 0.5 - s / 100, "eval_reward": r + s / 100, f"eval_{name}_runtime": 1.0}
        for s in range(6)
        for name, r in (("math", 0.1), ("aime", 0.0))
    ]
    run = Run("run", log=log)
    with pytest.raises(ValueError, match="evaluated on aime, math under the same names: choose one with --benchmark"):
        law_points(run)
    np.testing.assert_allclose(law_points(run, benchmark="math").reward, [0.1 + s / 100 for s in range(6)])
    pairs = entropy_accuracy_pairs(log, "math")
    assert [pair.accuracy for pair in pairs] == law_points(run, benchmark="math").reward.tolist()
    with pytest.raises(ValueError, match="no evaluation on 'amc'; it has aime, math"):
        law_points(run, benchmark="amc")


# Runs of the embedded task


def test_quickstart_runs():
    """The law explains most of the variance, and is not told apart from a straight line over so small a range."""
    runs = read_runs([str(QUICKSTART)])
    assert [run.seed for run in runs] == [0, 1, 2]
    for run in runs:
        points = law_points(run)
        fit = fit_law(points.entropy, points.reward)
        assert fit.r2 > 0.96
        assert 0.30 < fit.a < 0.40
        assert 0.46 < fit.ceiling < 0.54
        assert compare_forms(points.entropy, points.reward).verdict["linear"] != "better"
        early = predict_early(points.entropy, points.reward, points.steps, 0.36)
        assert early.fit.points == 4
        assert early.rmse < 0.05
        assert early.rmse < early.unchanged_rmse


# The command


def run_command(capsys, *arguments):
    code = main(["law", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_command_on_seeds(capsys, tmp_path):
    code, out, err = run_command(
        capsys, QUICKSTART, "--fit-fraction", 0.36, "--json", tmp_path / "law.json", "--figure", tmp_path / "law.svg"
    )
    assert (code, err) == (0, "")
    assert "R: held_out/avg@16   H: held_out/entropy, nats a token" in out
    assert "grpo: mean of 3" in out
    assert "4 to step 288" in out
    result = json.loads((tmp_path / "law.json").read_text())
    run = result["runs"][0]
    points = law_points(read_runs([str(QUICKSTART)])[0])
    fit = fit_law(points.entropy, points.reward)
    assert run["a"] == pytest.approx(fit.inference().a._asdict())
    assert f"{fit.a:.3f} [{run['a']['low']:.3f}, {run['a']['high']:.3f}]" in out
    assert run["exp_is"] == compare_forms(points.entropy, points.reward).verdict
    mean = np.mean([one["ceiling"]["value"] for one in result["runs"]])
    assert result["groups"]["grpo"]["ceiling"]["value"] == pytest.approx(mean)
    assert (tmp_path / "law.svg").read_text().startswith("<?xml")


def test_command_on_sizes(capsys, tmp_path):
    """The paper's coefficients: the four smaller models predict the largest."""
    h = training(40)
    for i, (a, b) in enumerate(PAPER.values()):
        rows = "".join(f"{s},{x},{b - a * math.exp(x)}\n" for s, x in enumerate(h))
        (tmp_path / f"m{i}.csv").write_text("step,actor/entropy,val-core/math/acc/mean@8\n" + rows)
    sizes = [f"m{i}={n / 1e9:g}B" for i, n in enumerate(PAPER)]
    runs = [tmp_path / f"m{i}.csv" for i in range(4)]
    code, out, _ = run_command(
        capsys, *runs, "--sizes", *sizes[:4], "--extrapolate", "31.0B", "--json", tmp_path / "law.json"
    )
    assert code == 0
    assert "at 3.1e+10 parameters" in out
    result = json.loads((tmp_path / "law.json").read_text())
    assert result["extrapolated"]["a"]["value"] == pytest.approx(0.3055, abs=1e-4)
    assert result["extrapolated"]["ceiling"]["value"] == pytest.approx(0.5042, abs=1e-4)
    assert result["groups"]["m0"]["a"]["low"] is None  # one seed


def test_command_warns_where_the_law_does_not_hold(capsys, tmp_path):
    h = training(40)
    rows = "".join(f"{s},{x},{0.1 + 0.2 * x}\n" for s, x in enumerate(h))
    (tmp_path / "up.csv").write_text("step,entropy,reward\n" + rows)
    code, out, _ = run_command(capsys, tmp_path / "up.csv", "--robust", "--intervals", "hac")
    assert code == 0
    assert "a is not positive" in out
    assert "The reward did not rise" in out
    assert "is the training reward, since the log has no evaluation" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "There is no file or folder 'missing'"),
        ([QUICKSTART, "--reward", "acc"], "did not log 'acc'; it has held_out/"),
        ([QUICKSTART, "--fit-fraction", "15"], "--fit-fraction must be between 0 and 1, got 15"),
        ([QUICKSTART, "--figure", "law.gif"], "--figure must end in .png, .svg, .pdf"),
        ([QUICKSTART, "--json", "no/such/law.json"], "There is no folder 'no/such'"),
        ([QUICKSTART, "--sizes", "7B"], "--sizes takes NAME=PARAMS"),
        ([QUICKSTART, "--sizes", "grpo=big"], "'big' is not a number of parameters"),
        ([QUICKSTART, "--sizes", "7b=7B"], "no group of runs '7b'; there are grpo"),
        ([QUICKSTART, "--sizes", "grpo=7B"], "1 model size has no trend"),
        ([QUICKSTART, "--extrapolate", "7B"], "--extrapolate needs --sizes"),
        ([QUICKSTART, "--vocab-size", "2"], "more than a vocabulary allows (ln(2) = 0.6931)"),
        ([QUICKSTART, "--benchmark", "amc"], "no evaluation on 'amc'"),
        ([QUICKSTART, "--smooth", "5"], "2 points are too few"),
        ([QUICKSTART, "--confidence", "95"], "confidence must be between 0 and 1"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, out, err = run_command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("entropy-trl law: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", [r"$\bad{x}$", "_under", "\x1b]0;owned\x07\x9b5m \u202eevil"])
def test_hostile_names_are_printed_and_drawn_as_text(capsys, tmp_path, name):
    log = tmp_path / "x.csv"
    rows = [f'"{name}",{i},{0.8 - 0.03 * i},{0.1 + 0.02 * i + 0.001 * (i % 3)}' for i in range(20)]
    log.write_text("\n".join(["run_name,step,entropy,reward", *rows]) + "\n")
    assert main(["law", str(log), "--figure", str(tmp_path / "law.svg")]) == 0
    assert not set("\x1b\x07\x9b\u202e") & set(capsys.readouterr().out)
    assert (tmp_path / "law.svg").stat().st_size > 1000
    assert main(["law", str(tmp_path / name)]) == 2
    assert not set("\x1b\x07\x9b\u202e") & set(capsys.readouterr().err)


def test_files_are_replaced_whole_and_devices_are_written_to(tmp_path, monkeypatch, capsys):
    old = tmp_path / "law.json"
    old.write_text("old")
    (tmp_path / "link.json").symlink_to(old)
    main(["law", str(QUICKSTART), "--json", str(tmp_path / "link.json")])
    assert (tmp_path / "link.json").is_symlink() and json.loads(old.read_text())["runs"]
    assert main(["law", str(QUICKSTART), "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    old.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        main(["law", str(QUICKSTART), "--json", str(old)])
    assert old.read_text() == "old"


@pytest.mark.parametrize("name", ["actor/entropy", "actor/entropy_loss", "entropy"])
def test_a_log_of_verl_comes_with_a_warning(name):
    log = [{"step": i, name: 1 - i / 10, "reward": i / 10} for i in range(8)]
    notes = " ".join(law_points(Run("run", log=log)).notes)
    assert ("use_dynamic_bsz" in notes) == name.startswith("actor/")
