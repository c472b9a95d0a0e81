"""The law of arXiv 2505.22617 (Eq. 6): validation reward against policy entropy, `R = -a exp(H) + b`.

`H` is the mean entropy of the policy's next-token distribution in nats a token, `R` the mean reward or accuracy as a
fraction. The law is linear in `(a, b)` given `exp(H)`, so it is fitted by least squares there. When the entropy is used
up, `H = 0`, it predicts the ceiling `R = -a + b`.

[`fit_law`] needs numpy only and takes some 25 microseconds, so that a training loop may call it. Intervals and
diagnostics are computed when they are asked for, with SciPy and statsmodels (`pip install 'entropy-trl[analysis]'`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt


Array = npt.NDArray[np.float64]
Form = Literal["exp", "linear", "log"]
Method = Literal["ar1", "hac", "ols", "bootstrap"]

#: `R = -a f(H) + b`: the law, and the two curves that it is compared with.
FORMS: dict[Form, Callable[[Array], Array]] = {"exp": np.exp, "linear": np.asarray, "log": np.log}
METHODS: tuple[Method, ...] = ("ar1", "hac", "ols", "bootstrap")

#: No policy has more nats a token than the logarithm of its vocabulary: this is that of 440,000 tokens, and the largest
#: vocabularies in use have 260,000.
MAX_ENTROPY = 13.0
MIN_POINTS = 3
#: The squares of larger rewards overflow.
MAX_REWARD = 1e150
#: Residuals below this share of the terms that they are a difference of are rounding errors.
_ROUNDING = 1e-12

BOOTSTRAP_DRAWS = 999
#: Points of draws that are in memory together, 16 bytes each.
_DRAWN_AT_ONCE = 1 << 22


class Estimate(NamedTuple):
    """A value, its standard error, and its confidence interval; NaN where the data leave no degree of freedom."""

    value: float
    standard_error: float
    low: float
    high: float


class Inference(NamedTuple):
    """Estimates of `a`, `b` and the ceiling `-a + b`, with what they were made by."""

    a: Estimate
    b: Estimate
    ceiling: Estimate
    method: Method
    confidence: float
    autocorrelation: float
    effective_points: float


class Diagnostics(NamedTuple):
    """What the residuals, in the order of training, say about the assumptions.

    Attributes:
        autocorrelation (`float`): Between consecutive residuals, corrected for its bias; the independent-noise
            interval is too short where it is far above 0.
        durbin_watson (`float`): About 2 without autocorrelation, towards 0 with.
        breusch_pagan (`float`): P-value; small where the noise changes with the entropy.
        jarque_bera (`float`): P-value; small where the noise is not normal (outliers: try the robust fit).
    """

    autocorrelation: float
    durbin_watson: float
    breusch_pagan: float
    jarque_bera: float


@dataclass(frozen=True)
class LawFit:
    """A fit of `R = -a f(H) + b`; from [`fit_law`].

    Attributes:
        a (`float`): The slope, in the reward's unit; positive where reward rises as entropy falls.
        b (`float`): The intercept, in the reward's unit.
        entropy (`Array`): `H` of the points, nats, in the order of training.
        reward (`Array`): `R` of the points.
        form (`Form`, *optional*, defaults to `"exp"`): `"exp"` (the law), `"linear"` or `"log"`: what `f` is.
        robust (`bool`, *optional*, defaults to `False`): Fitted by Huber's M-estimator instead of least squares.
    """

    a: float
    b: float
    entropy: Array
    reward: Array
    form: Form = "exp"
    robust: bool = False

    def predict(self, entropy: npt.ArrayLike) -> Array:
        """`R` at entropies in nats.

        Raises:
            ValueError: An entropy that no policy can have.
        """
        return self.b - self.a * FORMS[self.form](check_entropy(entropy, self.form))

    @property
    def points(self) -> int:
        """The number of points."""
        return len(self.entropy)

    @property
    def ceiling(self) -> float:
        """`R` at `H = 0`: `-a + b` for the law, `b` for `"linear"`; infinite, with the sign of `a`, for `"log"`."""
        if self.form == "log":
            return math.copysign(math.inf, self.a) if self.a else self.b
        return self.b - self.a if self.form == "exp" else self.b

    @cached_property
    def residuals(self) -> Array:
        """`R` minus its prediction, in the order of training."""
        return self.reward - self.predict(self.entropy)

    @property
    def exact(self) -> bool:
        """Whether the curve passes through every point, up to rounding: then its residuals say nothing."""
        largest = float(np.abs(FORMS[self.form](self.entropy)).max())
        scale = max(float(np.abs(self.reward).max()), abs(self.a) * largest, abs(self.b))
        return float(np.abs(self.residuals).max()) <= _ROUNDING * scale

    @property
    def r2(self) -> float:
        """The share of the reward's variance that the fit explains; NaN if the reward is constant."""
        if np.ptp(self.reward) == 0:  # its mean can differ from it by rounding
            return math.nan
        total = float(((self.reward - self.reward.mean()) ** 2).sum())
        return 1 - float((self.residuals**2).sum()) / total if total > 0 else math.nan

    @property
    def rmse(self) -> float:
        """Root of the mean squared residual, in the reward's unit."""
        return float(np.sqrt((self.residuals**2).mean()))

    @property
    def effective_points(self) -> float:
        """As many independent points say as much about a mean as these, whose noise is autocorrelated."""
        return _Noise.of(self).effective_points

    def inference(self, method: Method = "ar1", confidence: float = 0.95, seed: int = 0) -> Inference:
        """Standard errors and intervals of `a`, `b` and the ceiling.

        Consecutive points of a training run are not independent, and `exp(H)` moves most in the first few of them. On
        data made from the law in this shape (docs/law.md), `"ar1"` is the only one of the methods whose 95% intervals
        cover in about 95% of the draws with independent as well as with autocorrelated noise, which is why it is the
        default.

        Args:
            method (`Method`, *optional*, defaults to `"ar1"`): `"ar1"`: the covariance of the estimates if the noise
                is autoregressive of order 1, with the autocorrelation `r` of the residuals (corrected for its bias,
                `(2 + 4 r) / n`), and Student's quantile with `n (1 - r) / (1 + r) - 2` degrees of freedom, 2 at least.
                `"hac"`: Newey and West's, with lags up to `1.3 sqrt(n)` (Lazarus et al., 2018). `"ols"`: independent
                noise of one variance. `"bootstrap"`: moving-block bootstrap of the residuals, 999 draws, basic
                interval; blocks of `(6 r^2 n / (1 - r^2)^2)^(1/3)` points, the optimum for autocorrelation `r`
                (Politis and White, 2004).
            confidence (`float`, *optional*, defaults to `0.95`): Confidence of the intervals.
            seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

        Raises:
            ValueError: An unknown method, or a confidence outside of (0, 1).
            ImportError: SciPy or statsmodels is missing.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence:g}")
        ceiling = {"exp": (-1.0, 1.0), "linear": (0.0, 1.0), "log": (math.nan, math.nan)}[self.form]
        combinations = np.array([(1.0, 0.0), (0.0, 1.0), ceiling])
        values = combinations @ [self.a, self.b]
        noise = _Noise.of(self)
        low, high, errors = noise.intervals(combinations, method, confidence, seed)
        a, b, top = (
            Estimate(*map(float, row)) for row in zip(values, errors, values + low, values + high, strict=True)
        )
        return Inference(a, b, top, method, confidence, noise.autocorrelation, noise.effective_points)

    def diagnostics(self) -> Diagnostics:
        """Tests of the residuals.

        Raises:
            ImportError: The package statsmodels is missing.
        """
        stattools, diagnostic = _needs("statsmodels.stats.stattools"), _needs("statsmodels.stats.diagnostic")
        noise = _Noise.of(self)
        if self.exact:  # nothing to test
            return Diagnostics(0.0, math.nan, math.nan, math.nan)
        return Diagnostics(
            autocorrelation=noise.autocorrelation,
            durbin_watson=float(stattools.durbin_watson(self.residuals)),
            breusch_pagan=float(diagnostic.het_breuschpagan(self.residuals, noise.design)[1]),
            jarque_bera=float(stattools.jarque_bera(self.residuals)[1]),
        )


def check_entropy(entropy: npt.ArrayLike, form: Form = "exp", vocab_size: int | None = None) -> Array:
    """Entropies as an array, if a policy can have them.

    Raises:
        ValueError: NaN, infinite or negative values, or more nats than a vocabulary allows: then the unit is wrong.
    """
    values = np.asarray(entropy, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} entropies are NaN or infinite.")
    if values.size and values.min() < 0:
        raise ValueError(
            f"An entropy is negative ({values.min():.4g}): that is a loss, a differential entropy or an estimate from "
            "log-probabilities, not the entropy of the next-token distribution."
        )
    most = MAX_ENTROPY if vocab_size is None else math.log(vocab_size) * (1 + 1e-6)
    if values.size and values.max() > most:
        limit = f"ln({vocab_size:,}) = {most:.4g}" if vocab_size else f"{most:g}, the logarithm of 440,000 tokens"
        raise ValueError(
            f"An entropy of {values.max():.4g} nats a token is more than a vocabulary allows ({limit}): is it in bits, "
            "or the sum over a sequence?"
        )
    if form == "log" and values.size and values.min() == 0:
        raise ValueError("An entropy is 0, where the form 'log' has no value.")
    return values


def fit_law(entropy: npt.ArrayLike, reward: npt.ArrayLike, form: Form = "exp", robust: bool = False) -> LawFit:
    """Fit `R = -a exp(H) + b` (arXiv 2505.22617, Eq. 6), or one of the curves that it is compared with.

    Args:
        entropy (`npt.ArrayLike`): `H` of each point, nats a token, in the order of training.
        reward (`npt.ArrayLike`): `R` of each point, such as the accuracy on a validation set as a fraction.
        form (`Form`, *optional*, defaults to `"exp"`): `"exp"` (the law), `"linear"` (`R = -a H + b`) or `"log"`
            (`R = -a ln(H) + b`).
        robust (`bool`, *optional*, defaults to `False`): Huber's M-estimator instead of least squares, for logs with
            outliers; needs statsmodels.

    Raises:
        ValueError: Fewer than 3 points, constant entropy, or entropies or rewards that cannot be.
        ImportError: The package statsmodels is missing, with `robust`.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose from {', '.join(FORMS)}")
    h, r = check_entropy(entropy, form), np.asarray(reward, dtype=np.float64)
    if h.ndim != 1 or h.shape != r.shape:
        raise ValueError(f"entropy and reward must be lists of one length, got the shapes {h.shape} and {r.shape}.")
    bad = ~(np.abs(r) < MAX_REWARD)
    if bad.any():
        raise ValueError(
            f"{np.count_nonzero(bad)} of {r.size} rewards are NaN, infinite or beyond {MAX_REWARD:g}: no curve fits "
            "them."
        )
    if len(h) < MIN_POINTS:
        raise ValueError(f"{len(h)} points are too few to fit two coefficients: {MIN_POINTS} are the least.")
    x = FORMS[form](h)
    centred = x - x.mean()
    spread = float(centred @ centred)
    if np.ptp(h) <= 1e-6 * max(1.0, float(h.max())):
        raise ValueError(f"The entropy is constant ({h[0]:.6g} nats at all {len(h)} points): it explains nothing.")
    slope = float(centred @ (r - r.mean())) / spread
    fit = LawFit(-slope, float(r.mean() - slope * x.mean()), h, r, form, robust)
    # Points that lie on the curve have no scale for Huber's estimator to divide by.
    if not robust or np.abs(fit.residuals).max() <= 1e-12 * max(1.0, float(np.abs(r).max())):
        return fit
    models = _needs("statsmodels.api")
    a, b = models.RLM(r, np.column_stack([-x, np.ones_like(x)]), M=models.robust.norms.HuberT()).fit().params
    return replace(fit, a=float(a), b=float(b))


@dataclass(frozen=True)
class _Noise:
    """The residuals of a fit, and what follows from them for linear combinations of `(a, b)`.

    For a robust fit the residuals are Huber's pseudo-residuals, `s psi(r / s) / mean(psi')`, whose least-squares
    estimate has the same distribution to first order; so one set of formulas serves both.

    Attributes:
        design (`Array`): `(-f(H), 1)`, of shape (n, 2).
        residuals (`Array`): Residuals, of shape (n,).
        autocorrelation (`float`): That of consecutive residuals, corrected for its bias; 0 at least, and at most what
            leaves 3 effective points.
    """

    design: Array
    residuals: Array
    autocorrelation: float

    @classmethod
    def of(cls, fit: LawFit) -> "_Noise":
        x = FORMS[fit.form](fit.entropy)
        residuals = fit.residuals
        if fit.robust:
            robust = _needs("statsmodels.api").robust
            scale, norm = float(robust.mad(residuals, center=0)), robust.norms.HuberT()
            if scale > 0:
                residuals = scale * norm.psi(residuals / scale) / norm.psi_deriv(residuals / scale).mean()
        n, power = len(x), float((residuals**2).sum())
        raw = float(residuals[1:] @ residuals[:-1]) / power if power > 0 else 0.0
        # Around a fitted trend the autocorrelation comes out too small by (2 + 4 r) / n (Kendall, 1954, for a trend).
        # The limit keeps 3 effective points: with fewer, a handful of smooth residuals would give intervals that say
        # nothing at all.
        correlation = float(np.clip(raw + (2 + 4 * raw) / n, 0.0, (n - 3) / (n + 3))) if power > 0 else 0.0
        return cls(np.column_stack([-x, np.ones(n)]), residuals, correlation)

    @property
    def effective_points(self) -> float:
        """As many independent points say as much about a mean: `n (1 - r) / (1 + r)`."""
        return len(self.residuals) * (1 - self.autocorrelation) / (1 + self.autocorrelation)

    @cached_property
    def projection(self) -> Array:
        """`(X'X)^-1 X'`: what a residual adds to `(a, b)`, of shape (2, n)."""
        return np.asarray(np.linalg.solve(self.design.T @ self.design, self.design.T))

    def intervals(
        self, combinations: Array, method: Method, confidence: float, seed: int
    ) -> tuple[Array, Array, Array]:
        """Lower and upper ends of the intervals, relative to the values, and the standard errors."""
        n = len(self.residuals)
        if method == "bootstrap":
            draws = self.bootstrap(seed) @ combinations.T
            tail = (1 - confidence) / 2
            upper, lower = np.quantile(draws, [1 - tail, tail], axis=0)
            return -upper, -lower, draws.std(axis=0, ddof=1)
        degrees = max(self.effective_points - 2, 2.0) if method == "ar1" else n - 2
        covariance = {"ar1": self.ar1, "ols": self.independent, "hac": self.newey_west}[method]()
        errors = np.sqrt(np.einsum("ki,ij,kj->k", combinations, covariance, combinations))
        half = quantile(degrees, confidence) * errors
        return -half, half, errors

    def independent(self) -> Array:
        n = len(self.residuals)
        return np.asarray((self.residuals**2).sum() / (n - 2) * self.projection @ self.projection.T)

    def ar1(self) -> Array:
        """`P S P'` with `S_st = sigma^2 r^|s - t|`; `sigma^2` is that of which the residuals' squares are expected."""
        n, influence = len(self.residuals), self.projection
        lfilter = _needs("scipy.signal").lfilter

        def smoothed(rows: Array) -> Array:
            """Each row times `r^|s - t|`, by one recursion in each direction: `y_t = x_t + r y_(t-1)`."""
            recursion = [1.0], [1.0, -self.autocorrelation]
            return np.asarray(lfilter(*recursion, rows) + lfilter(*recursion, rows[:, ::-1])[:, ::-1] - rows)

        trace = n - float((influence * smoothed(self.design.T)).sum())
        variance = float((self.residuals**2).sum()) / max(trace, 1e-9)
        return variance * influence @ smoothed(influence).T

    def newey_west(self) -> Array:
        n = len(self.residuals)
        lags = min(math.ceil(1.3 * math.sqrt(n)), n - 1) - 1
        # The residuals are orthogonal to the design, so that a regression of them has them as its residuals.
        model = _needs("statsmodels.api").OLS(self.residuals, self.design)
        fitted = model.fit(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": True})
        return np.asarray(fitted.cov_params())

    @property
    def block_length(self) -> int:
        n, r = len(self.residuals), self.autocorrelation
        return int(np.clip(math.ceil((6 * r**2 * n / (1 - r**2) ** 2) ** (1 / 3)), 1, max(n // 3, 1)))

    def bootstrap(self, seed: int) -> Array:
        """Errors of `(a, b)` in the draws, of shape (draws, 2). The entropies stay as they are."""
        n, length = len(self.residuals), self.block_length
        generator = np.random.default_rng(seed)
        starts = generator.integers(0, n - length + 1, (BOOTSTRAP_DRAWS, -(-n // length)))
        centred = (self.residuals - self.residuals.mean()) * math.sqrt(n / (n - 2))
        errors = []
        for part in np.array_split(starts, min(-(-BOOTSTRAP_DRAWS * n // _DRAWN_AT_ONCE), BOOTSTRAP_DRAWS)):
            drawn = (part[:, :, None] + np.arange(length)).reshape(len(part), -1)[:, :n]
            errors.append(centred[drawn] @ self.projection.T)
        return np.concatenate(errors)


def quantile(degrees: float, confidence: float) -> float:
    """What bounds Student's t with so many degrees of freedom at this confidence, on both sides."""
    return float(_needs("scipy.special").stdtrit(degrees, (1 + confidence) / 2))


def _needs(module: str) -> Any:
    """A module of SciPy or statsmodels, which are optional."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed for intervals, diagnostics and robust fits: pip install 'entropy-trl[analysis]'"
        ) from error
