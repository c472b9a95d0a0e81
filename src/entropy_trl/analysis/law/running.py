"""The law `R = -a exp(H) + b` of a run that is still logging: each log costs the same, however long the run is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.law.fit import Array, check_entropy
from entropy_trl.analysis.law.points import MIN_EVALUATIONS, is_left_out, law_points, one_benchmark, pair, unit_of
from entropy_trl.analysis.logs.runs import Run, Series, is_number


class RunningFit(NamedTuple):
    """The least-squares fit to the points so far, as [`~entropy_trl.analysis.law.fit.fit_law`] gives it.

    Attributes:
        a (`float`): The slope.
        b (`float`): The intercept.
        r2 (`float`): The share of the reward's variance that the fit explains; NaN if the reward is constant.
        points (`int`): The number of points.
    """

    a: float
    b: float
    r2: float
    points: int

    @property
    def ceiling(self) -> float:
        """`R` at `H = 0`."""
        return self.b - self.a

    def predict(self, entropy: float) -> float:
        """`R` at an entropy in nats."""
        return self.b - self.a * math.exp(entropy)


class RunningLaw:
    """Points and fit of a log that grows at its end.

    The points are those of [`~entropy_trl.analysis.law.points.law_points`]. The whole log is read again only where the
    choice of the metrics may change: with a new metric, or one of the first evaluations. Other entries are added to
    the sums of the fit. Where rewards and entropies are logged at different steps, their columns are paired again at
    each log, without reading the log.

    Args:
        reward, entropy, benchmark (`str`, *optional*): As for [`~entropy_trl.analysis.law.points.law_points`].
    """

    def __init__(self, reward: str | None = None, entropy: str | None = None, benchmark: str | None = None):
        self._asked = reward, entropy
        self._benchmark = benchmark
        self._read = 0
        self._names: set[str] = set()
        self._few: set[str] = set()
        self._metrics: tuple[str, str] | None = None
        self._unit = 1.0
        self._rewards, self._entropies = _Column(), _Column()
        self._together = True
        self._sums = _Sums()
        self._paired: tuple[Array, _Sums, npt.NDArray[np.int64]] | None = None

    @property
    def reward_metric(self) -> str | None:
        """The name of the reward that is fitted; None while there are no points."""
        return None if self._metrics is None else self._metrics[0]

    @property
    def entropy_metric(self) -> str | None:
        """The name of the entropy that is fitted; None while there are no points."""
        return None if self._metrics is None else self._metrics[1]

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The steps of the points that [`read`] has returned."""
        return self._entropies.steps if self._together or self._paired is None else self._paired[2]

    def read(self, log: Sequence[Mapping[str, Any]]) -> Array | None:
        """Take the entries that are new in the log, and return the entropies of all points; None while there are none.

        Raises:
            ValueError: As for [`~entropy_trl.analysis.law.points.law_points`], and if a reward is infinite.
        """
        shorter = len(log) < self._read  # another run's log
        new, self._read = log[self._read :], len(log)
        if shorter or any(not self._add(entry) for entry in new if "step" in entry):
            self._read_all(log)
        if self._metrics is None:
            return None
        if self._together:
            return self._entropies.values
        if self._paired is None:
            self._paired = self._pair()
        return self._paired[0]

    def fit(self) -> RunningFit | None:
        """The fit to the points that were read; None if the entropy has not moved by a thousandth."""
        sums = self._sums if self._together or self._paired is None else self._paired[1]
        return sums.fit()

    def _add(self, entry: Mapping[str, Any]) -> bool:
        """Add an entry to the points; False if the whole log has to be read instead."""
        names = {name for name, value in entry.items() if is_number(value)}
        if not names <= self._names or names & self._few:
            return False
        if self._metrics is None or is_left_out(entry, self._benchmark):
            return True
        step = int(entry["step"])
        reward, entropy = (
            float(entry[name]) if name in names and not np.isnan(float(entry[name])) else None for name in self._metrics
        )
        columns = ((self._rewards, reward), (self._entropies, entropy))
        if any(value is not None and step <= column.last_step for column, value in columns):
            return False  # an earlier value is replaced
        if reward is not None:
            _check_reward(reward)
            self._rewards.append(step, reward)
        if entropy is not None:
            entropy = float(check_entropy(entropy * self._unit))
            self._entropies.append(step, entropy)
        if reward is not None and entropy is not None and self._together:
            self._sums.add(entropy, reward)
        elif reward is not None or entropy is not None:
            self._together, self._paired = False, None
        return True

    def _read_all(self, log: Sequence[Mapping[str, Any]]) -> None:
        run = Run(name="this run", log=[dict(entry) for entry in log if "step" in entry])
        self._names = {"step", *run.metrics}
        asked_reward, asked_entropy = self._asked
        reward = asked_reward or run.find("reward") or run.find("accuracy")
        if not {reward, asked_entropy or run.find("entropy")} <= set(run.metrics):
            self._metrics = None
            return
        points = law_points(run, asked_reward, asked_entropy, benchmark=self._benchmark)
        run = one_benchmark(run, self._benchmark)
        evaluated = [] if asked_reward else run.candidates("accuracy")
        self._few = {name for name in evaluated if _count(run, name) < MIN_EVALUATIONS}
        self._metrics = points.reward_metric, points.entropy_metric
        self._unit = unit_of(points.entropy_metric)
        rewards, entropies = (run.series(name) for name in self._metrics)
        _check_reward(*rewards.values.tolist())
        self._rewards = _Column(rewards.steps, rewards.values)
        self._entropies = _Column(entropies.steps, entropies.values * self._unit)
        self._together = np.array_equal(rewards.steps, entropies.steps)
        self._sums, self._paired = _Sums.of(points.entropy, points.reward), None

    def _pair(self) -> tuple[Array, "_Sums", npt.NDArray[np.int64]]:
        entropies = Series(self._entropies.steps, self._entropies.values)
        kept, paired = pair(self._rewards.steps, entropies, "nearest")
        if not kept.any():
            raise ValueError(f"No entropy was logged near a step of {self.reward_metric}.")
        return paired, _Sums.of(paired, self._rewards.values[kept]), self._rewards.steps[kept]


def _count(run: Run, metric: str) -> int:
    try:
        return len(run.series(metric).steps)
    except ValueError:  # logged as NaN only
        return 0


def _check_reward(*rewards: float) -> None:
    infinite = sum(not math.isfinite(reward) for reward in rewards)
    if infinite:
        raise ValueError(f"{infinite} of {len(rewards)} rewards are infinite: no curve fits them.")


class _Column:
    """Steps and values that grow at the end."""

    def __init__(self, steps: npt.ArrayLike = (), values: npt.ArrayLike = ()):
        self._steps, self._values = np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)
        self._count = len(self._steps)

    def append(self, step: int, value: float) -> None:
        if self._count == len(self._steps):
            room = max(self._count, 64)
            self._steps, self._values = np.pad(self._steps, (0, room)), np.pad(self._values, (0, room))
        self._steps[self._count], self._values[self._count] = step, value
        self._count += 1

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        return self._steps[: self._count]

    @property
    def values(self) -> Array:
        return self._values[: self._count]

    @property
    def last_step(self) -> float:
        return int(self._steps[self._count - 1]) if self._count else -math.inf


class _Sums:
    """Sums of squares about the means, updated point by point (Welford, 1962): no difference of large numbers."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.r = self.xx = self.xr = self.rr = 0.0
        self.lowest, self.highest = math.inf, 0.0  # entropies

    @classmethod
    def of(cls, entropy: Array, reward: Array) -> "_Sums":
        sums = cls()
        if len(entropy):
            x = np.exp(entropy)
            sums.count, sums.x, sums.r = len(x), float(x.mean()), float(reward.mean())
            sums.lowest, sums.highest = float(entropy.min()), float(entropy.max())
            x, r = x - sums.x, reward - sums.r
            sums.xx, sums.xr = float(x @ x), float(x @ r)
            sums.rr = float(r @ r) if np.ptp(reward) else 0.0
        return sums

    def add(self, entropy: float, reward: float) -> None:
        self.count += 1
        self.lowest, self.highest = min(self.lowest, entropy), max(self.highest, entropy)
        to_x, to_r = math.exp(entropy) - self.x, reward - self.r
        self.x += to_x / self.count
        self.r += to_r / self.count
        left = to_r * (self.count - 1) / self.count
        self.xx += to_x * to_x * (self.count - 1) / self.count
        self.xr += to_x * left
        self.rr += to_r * left

    def fit(self) -> RunningFit | None:
        if not self.xx or self.highest - self.lowest < 1e-3 * self.highest:
            return None
        slope = self.xr / self.xx
        # Squares of rewards beyond 1e154 are infinite: then the share cannot be told.
        r2 = slope * (self.xr / self.rr) if 0 < self.rr < math.inf else math.nan
        return RunningFit(-slope, self.r - slope * self.x, r2, self.count)
