"""[`EntropyLawCallback`]: the law `R = -a exp(H) + b` while a run trains."""

import importlib
import importlib.util
import logging
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_trl.analysis.law.fit import Array
from entropy_trl.analysis.law.running import RunningFit, RunningLaw
from entropy_trl.analysis.logs.runs import Run, Series
from entropy_trl.analysis.verdict import COLLAPSE, ENDS, SURGE, verdict
from entropy_trl.analysis.verdict import MIN_POINTS as ALARM_POINTS


logger = logging.getLogger(__name__)

PREFIX = "entropy_law/"

#: The trackers that take pictures.
TRACKERS = ("wandb", "trackio")

#: Points that a fit needs before it is logged: with fewer the coefficients jump.
MIN_POINTS = 10


class EntropyLawCallback(TrainerCallback):
    """Log the fit of `R = -a exp(H) + b` (arXiv 2505.22617, Eq. 6), and warn when entropy collapses or surges.

    With each log it adds, under `entropy_law/`:

    - `entropy_spent`: share of the entropy that the run started with which is gone, `1 - H / H_start`.
    - `a`, `b`, `r2`, `ceiling` (`-a + b`, the reward that the law predicts for `H = 0`) and `remaining` (the ceiling
      minus the reward that the fit gives for the entropy now), from 10 points on.

    `H_start` and `H` are means over the first and the last 5% of the points. A point is an evaluation
    (`eval_entropy` and its accuracy) once there are five, and until then an entry with the training entropy and reward.

    For [`CovGRPOTrainer`] (`entropy_law=True` in its configuration does the same) and TRL's `GRPOTrainer`. With the
    latter the trackers, which report before it acts, do not have its values; `state.log_history` has.

    Args:
        collapse (`float`): Entropy down to this share of that at the start is a collapse. It is warned of from 5 points
            on, with advice for the control that is running, and once until entropy is half-way back.
        surge (`float`): Entropy up to this multiple of that at the start is a surge, warned of in the same way.
        reward, entropy, benchmark (`str`, *optional*): Metrics to take instead, and the evaluation data set where there
            are several (see [`~entropy_trl.analysis.law.points.law_points`]).
        figures (`bool`): Whether to give W&B and trackio, where they are on, the figures of the run at its end. Needs
            matplotlib and statsmodels (the `analysis` extra).

    Raises:
        ValueError: If `collapse` is not in (0, 1), or `surge` not above 1.
        ImportError: If `figures` is set, and matplotlib is missing.
    """

    def __init__(
        self,
        collapse: float = COLLAPSE,
        reward: str | None = None,
        entropy: str | None = None,
        benchmark: str | None = None,
        figures: bool = False,
        surge: float = SURGE,
    ):
        if not 0 < collapse < 1:
            raise ValueError(f"`collapse` is a share of the entropy at the start, in (0, 1), got {collapse!r}.")
        if not 1 < surge < math.inf:
            raise ValueError(f"`surge` is a multiple of the entropy at the start, above 1, got {surge!r}.")
        for module in ("matplotlib", "statsmodels") if figures else ():
            if importlib.util.find_spec(module) is None:
                raise ImportError(
                    f"The figures need {module}: pip install 'entropy-trl[analysis]', or set `figures=False`."
                )
        self.collapse = collapse
        self.surge = surge
        self.reward = reward
        self.entropy = entropy
        self.benchmark = benchmark
        self.figures = figures
        self._alarm = ""  # the kind that was warned of last, until entropy is half-way back
        self._settings: dict[str, Any] = {}
        self._has_points = True
        self._law = RunningLaw(reward, entropy, benchmark)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._alarm, self._settings, self._has_points = "", args.to_dict(), True
        self._law = RunningLaw(self.reward, self.entropy, self.benchmark)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        entropies = self._entropies(state)
        if entropies is None or logs is None:
            return
        count = max(round(ENDS * len(entropies)), 1)
        start, now = float(entropies[:count].mean()), float(entropies[-count:].mean())
        if start <= 0:
            return
        values = {"entropy_spent": 1 - now / start}
        fit = self._law.fit() if len(entropies) >= MIN_POINTS else None
        if fit is not None:
            remaining = fit.ceiling - fit.predict(now)
            values |= {"a": fit.a, "b": fit.b, "r2": fit.r2, "ceiling": fit.ceiling, "remaining": remaining}
        values = {f"{PREFIX}{name}": value for name, value in values.items() if math.isfinite(value)}
        logs |= values
        if state.log_history:
            state.log_history[-1] |= values
        if state.is_world_process_zero and len(entropies) >= ALARM_POINTS:
            self._warn(state.global_step, entropies, now / start, now, fit)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.figures and state.is_world_process_zero:
            _report_figures(args, state)

    def _entropies(self, state: TrainerState) -> Array | None:
        """The entropies of the points so far; None while there are none, and where there can be none, said once."""
        if not self._has_points:
            return None
        try:
            return self._law.read(state.log_history)
        except ValueError as error:
            self._give_up(state, error)
            return None

    def _give_up(self, state: TrainerState, error: ValueError) -> None:
        """Log no more of the law in this run, and say so once: training goes on without it."""
        self._has_points = False
        if state.is_world_process_zero:
            logger.warning(f"The entropy law is not logged in this run. {error}")

    def _warn(self, step: int, entropies: Array, ratio: float, now: float, fit: RunningFit | None) -> None:
        if math.sqrt(self.collapse) < ratio < math.sqrt(self.surge):
            self._alarm = ""  # it has recovered: a second one is worth another warning
        if self.collapse < ratio < self.surge:
            return  # most logs: the verdict would be that it is healthy
        found = verdict(
            [Series(self._law.steps, entropies)],
            self._settings,
            metric=str(self._law.entropy_metric),
            collapse=self.collapse,
            surge=self.surge,
        )
        if found.alarm is None or found.alarm == self._alarm:
            return
        self._alarm = found.alarm
        prospect = ""
        if fit is not None and fit.a > 0 and self._alarm == "collapse":
            gain = fit.ceiling - fit.predict(now)
            prospect = (
                f" By the law, fitted to {fit.points} points of {self._law.reward_metric}, the reward can still rise "
                f"by {gain:.3g}, to {fit.ceiling:.3g}, while exploration goes on as it does now."
            )
        logger.warning(f"Step {step}: {found.sentence} {found.why}{prospect} {found.advice}")


def _report_figures(args: TrainingArguments, state: TrainerState) -> None:
    """Give the trackers that are on the figures of the run's report, or warn why they get none."""
    try:
        _send_figures(args, state)
    # The caller saves the model after this. Whatever a log, matplotlib or a tracker raises, the model must not be
    # lost for the sake of a picture.
    except Exception as error:
        logger.warning(
            f"{', '.join(args.report_to)} get no figures of this run, because drawing or sending them failed with "
            f"{type(error).__name__}: {error}. The training is complete. `entropy-trl report {args.output_dir}` draws "
            "them again.",
            exc_info=True,
        )


def _send_figures(args: TrainingArguments, state: TrainerState) -> None:
    from entropy_trl.analysis.report import write_report

    trackers = [importlib.import_module(name) for name in TRACKERS if name in args.report_to]
    output_dir = Path(str(args.output_dir))
    run = Run(output_dir.name, output_dir, [entry for entry in state.log_history if "step" in entry], args.to_dict())
    with TemporaryDirectory() as folder:
        write_report([run], folder)
        for tracker in trackers:
            images = sorted(Path(folder).glob("figures/*.png"))
            tracker.log({f"report/{image.stem}": tracker.Image(str(image)) for image in images})
