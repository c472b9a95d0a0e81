"""The coefficients of the law over seeds and over model sizes (arXiv 2505.22617, section 2.4).

The paper finds `a` and `b` linear in the logarithm of the number of parameters without embeddings, for models of one
family that are trained on the same data. So may be what a larger model would reach, from fits to smaller ones.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.law.fit import Array, Estimate, LawFit, quantile


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


class Coefficients(NamedTuple):
    """`a`, `b` and the ceiling `-a + b`."""

    a: Estimate
    b: Estimate
    ceiling: Estimate


def over_seeds(fits: Sequence[LawFit], confidence: float = 0.95) -> Coefficients:
    """The means of the coefficients over runs that differ in the seed, with Student intervals.

    Seeds are independent, so that this interval needs no assumption on the noise within a run. With one seed there is
    none (NaN).

    Raises:
        ValueError: There are no fits.
        ImportError: SciPy is missing.
    """
    if not fits:
        raise ValueError("There are no fits to average.")
    columns = ([fit.a for fit in fits], [fit.b for fit in fits], [fit.ceiling for fit in fits])
    return Coefficients(*(_mean(np.array(column), confidence) for column in columns))


def _mean(values: Array, confidence: float) -> Estimate:
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, math.nan)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = quantile(n - 1, confidence) * error
    return Estimate(mean, error, mean - half, mean + half)


@dataclass(frozen=True)
class LogLine:
    """A coefficient as a line in the logarithm of the model's size, `intercept + slope ln(N)`, by least squares."""

    slope: float
    intercept: float
    log_params: Array
    values: Array

    @property
    def r2(self) -> float:
        """The share of the variance over the sizes that the line explains."""
        residuals = self.values - self.intercept - self.slope * self.log_params
        total = float(((self.values - self.values.mean()) ** 2).sum())
        return 1 - float((residuals**2).sum()) / total if total > 0 else math.nan

    def predict(self, params: float, confidence: float = 0.95) -> Estimate:
        """The coefficient of a model of another size.

        Args:
            params (`float`): The model's number of parameters, counted as for the fit.
            confidence (`float`, *optional*, defaults to `0.95`): Confidence of the prediction interval, which allows
                for the scatter of single models about the line. It is NaN with two sizes, which lie on any line.
        """
        x = math.log(params)
        value = self.intercept + self.slope * x
        n = len(self.values)
        if n < 3:
            return Estimate(value, math.nan, math.nan, math.nan)
        residuals = self.values - self.intercept - self.slope * self.log_params
        centre = self.log_params.mean()
        spread = float(((self.log_params - centre) ** 2).sum())
        error = math.sqrt(float((residuals**2).sum()) / (n - 2) * (1 + 1 / n + (x - centre) ** 2 / spread))
        half = quantile(n - 2, confidence) * error
        return Estimate(value, error, value - half, value + half)


@dataclass(frozen=True)
class SizeLaw:
    """The coefficients of the law by model size; from [`fit_sizes`].

    Attributes:
        a ([`LogLine`]): The line of `a`.
        b ([`LogLine`]): The line of `b`.
        ceiling ([`LogLine`]): The line of `-a + b`.
    """

    a: LogLine
    b: LogLine
    ceiling: LogLine

    def predict(self, params: float, confidence: float = 0.95) -> Coefficients:
        """The coefficients of a model of another size, with prediction intervals.

        Raises:
            ValueError: The number of parameters is not positive.
        """
        if params <= 0:
            raise ValueError(f"The number of parameters must be positive, got {params:g}.")
        return Coefficients(*(line.predict(params, confidence) for line in (self.a, self.b, self.ceiling)))


def fit_sizes(params: npt.ArrayLike, a: npt.ArrayLike, b: npt.ArrayLike) -> SizeLaw:
    """Fit `a` and `b` as lines in the logarithm of the number of parameters.

    Args:
        params (`npt.ArrayLike`): Parameters of each model; the paper counts those outside of the embeddings.
        a (`npt.ArrayLike`): `a` of each model, in the reward's unit.
        b (`npt.ArrayLike`): `b` of each model, in the reward's unit.

    Raises:
        ValueError: Fewer than two sizes, or a number of parameters that is not positive.
    """
    n, values_a, values_b = (np.asarray(values, dtype=np.float64) for values in (params, a, b))
    if not n.shape == values_a.shape == values_b.shape or n.ndim != 1:
        shapes = f"{n.shape}, {values_a.shape} and {values_b.shape}"
        raise ValueError(f"params, a and b must be lists of one length, got the shapes {shapes}.")
    if n.size and n.min() <= 0:
        raise ValueError(f"The number of parameters must be positive, got {n.min():g}.")
    if len(np.unique(n)) < 2:
        raise ValueError(f"{len(np.unique(n))} model size has no trend: give two sizes or more.")
    x = np.log(n)
    return SizeLaw(_line(x, values_a), _line(x, values_b), _line(x, values_b - values_a))


def _line(x: Array, y: Array) -> LogLine:
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    return LogLine(slope, float(y.mean() - slope * x.mean()), x, y)


def named_size(text: str) -> tuple[str, float]:
    """The group and the number of parameters of `NAME=PARAMS`."""
    name, _, params = text.rpartition("=")
    if not name:
        raise ValueError(f"--sizes takes NAME=PARAMS, such as 7b=6.53B, got {text!r}.")
    return name, parse_params(params)


def parse_params(text: str) -> float:
    """The number of parameters, such as that of `6.53B`."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)([kmbt]?)", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a number of parameters, such as 6.53B or 6.53e9.")
    return float(match[1]) * _UNITS[match[2]]
