"""[`ControlWatch`]: warn, once in a training, of a control that does nothing."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from entropy_trl.controls import Chain, ClipCov, EntropyControl
from entropy_trl.loss.noise import warn_of_dropout
from entropy_trl.tokens.selection import highest_values, selection_count
from entropy_trl.tokens.types import Selection, TokenBatch


logger = logging.getLogger(__name__)

#: Steps to look at. The band is empty if it was so in more than half of them.
STEPS = 10
#: A penalty is noise if at least this share of the penalised tokens is, on average over the steps.
_NOISE_SHARE = 0.9
#: Shares of the tokens whose quantile of the covariance the warning states, beside that of `fraction`.
_SHARES = (0.02, 0.2)


class ControlWatch:
    """Watch what the control does, and warn where it does nothing.

    - Clip-Cov, if its band had no token in most of the last 10 steps. The warning states the quantiles of the
      covariance, and the band that would have held `fraction` of the tokens. Steps whose covariance is 0, because all
      advantages are equal, do not count.
    - KL-Cov, if at least 90% of its penalties in the last 10 steps were noise (in the last two rollouts, where these
      have more steps).

    Checkpoints keep the counts, so that a resumed run warns when the uninterrupted one would.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer, whose model may have dropout: of that it warns at once.
        control ([`EntropyControl`]): The trainer's control.
    """

    file = "entropy_control_watch.json"

    def __init__(self, trainer: GRPOTrainer, control: EntropyControl):
        self.trainer = trainer
        parts = list(control.controls.values()) if isinstance(control, Chain) else [control]
        self.clip_cov = next((part for part in parts if isinstance(part, ClipCov)), None)
        args = trainer.args
        updates = math.ceil(args.steps_per_generation * trainer.num_iterations / args.gradient_accumulation_steps)
        self.steps_of_noise = max(STEPS, 2 * updates)
        if not control.acts_on_policy:
            warn_of_dropout(trainer.model, trainer.model.config.to_dict())
        self.reset()

    def reset(self) -> None:
        # For each of the last steps the highest covariances if the band was empty in all its pools, otherwise nothing.
        self.bands: list[list[float]] = []
        self.noise: list[float] = []  # the share of the penalties that are noise, for each of the last steps
        self.told: list[str] = []
        self._step: list[list[float]] = []  # of the pools of the step at hand

    def see(self, pool: TokenBatch, selection: Selection) -> None:
        """Look at a pool of the step. Where it extends over several processes, all of them must call this together."""
        if self.clip_cov is None or selection.candidates is None or "band" in self.told:
            return
        covariance = selection.covariance
        assert covariance is not None  # Clip-Cov has it
        if selection.candidates:
            self._step.append([])
        elif pool.ranks.sum(covariance.count_nonzero()):
            eligible = pool.mask if pool.clipped is None else pool.mask & ~pool.clipped
            tokens = int(pool.ranks.sum(pool.mask.count_nonzero()))
            shares = (self.clip_cov.fraction, *_SHARES)
            ks = [1, *(selection_count(share, tokens) for share in shares)]
            highest = highest_values(covariance, eligible, ks, pool.ranks)
            if all(map(math.isfinite, highest)):  # as many tokens are eligible
                self._step.append(highest)

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        """Take stock of a step (counted from 1), and warn if it is time."""
        if self._step:
            empty = [] if not all(self._step) else [max(pool[0] for pool in self._step)]
            if empty:  # a band below the lowest quantile suits all pools
                empty += [min(pool[i] for pool in self._step) for i in range(1, len(self._step[0]))]
            self.bands = [*self.bands[1 - STEPS :], empty]
            self._step = []
        found = [band for band in self.bands if band]
        if len(self.bands) == STEPS and len(found) > STEPS / 2:
            self._tell("band", self._empty_band(step, found))
            self.bands = []

        share, distance = (_of(means, name) for name in ("selected_at_rounding", "selected_abs_log_ratio"))
        if not math.isnan(share):
            self.noise = [*self.noise[1 - self.steps_of_noise :], share]
        if len(self.noise) == self.steps_of_noise and sum(self.noise) >= _NOISE_SHARE * self.steps_of_noise:
            self._tell("noise", self._only_noise(step, distance))

    def _tell(self, what: str, message: str) -> None:
        if what not in self.told:
            self.told.append(what)
            if self.trainer.accelerator.is_main_process:
                logger.warning(message)

    def _empty_band(self, step: int, found: list[list[float]]) -> str:
        control = self.clip_cov
        assert control is not None
        highest, *quantiles = zip(*found, strict=True)
        low, high = _below(min(quantiles[0])), control.cov_high
        if max(highest) >= high:
            high = -_below(-max(highest))
        shares = (control.fraction, *_SHARES)
        pairs = zip(shares, quantiles, strict=True)
        above = ", ".join(f"the top {100 * share:.3g}% of the tokens began at {_range(q)}" for share, q in pairs)
        return (
            f"Step {step}: in {len(found)} of the last {STEPS} steps Clip-Cov restrained nothing, because no token had "
            f"a covariance between `cov_low` {control.cov_low:g} and `cov_high` {control.cov_high:g}. The highest "
            f"covariance was {_range(highest)} in these steps; {above}. `cov_low={low!r}` with "
            f"`cov_high={high!r}` would have held `fraction` ({control.fraction:g}) of the tokens in each of them. "
            "Larger batches have higher covariances too. This is not said again."
        )

    def _only_noise(self, step: int, distance: float) -> str:
        steps = f"Step {step}: in the last {self.steps_of_noise} steps"
        if distance == 0:
            return (
                f"{steps} KL-Cov did nothing. `abs(logp - old_logp)` was 0 for the penalised tokens, where the penalty "
                "has no gradient: every update was the first one of its rollout, or the weights did not change. Make "
                "several updates a rollout (`steps_per_generation` a multiple of `gradient_accumulation_steps`, or "
                "`num_iterations` of 2 or more), raise the learning rate, or use `clip_cov`, which acts on-policy too. "
                "This is not said again."
            )
        return (
            f"{steps} {sum(self.noise) / len(self.noise):.0%} of the tokens that KL-Cov penalised differed from the "
            f"rollout's policy by no more than noise (now {distance:.2g} nats): noise decides the direction of the "
            "penalty. Make more updates a rollout (a larger `steps_per_generation` or `num_iterations`), raise the "
            "learning rate, compute in float32 instead of bf16, set dropout to 0, or use `clip_cov`. This is not said "
            "again."
        )

    def state(self) -> dict[str, Any]:
        return {"bands": self.bands, "noise": self.noise, "told": self.told}

    def load(self, stored: dict[str, Any], checkpoint: Path) -> None:
        self.reset()
        if not stored:
            return  # a checkpoint of an earlier version
        bands, noise, told = (stored.get(name) for name in ("bands", "noise", "told"))
        lengths = (0, 2 + len(_SHARES))
        numbers = isinstance(bands, list) and all(isinstance(band, list) and len(band) in lengths for band in bands)
        numbers = numbers and all(type(value) in (int, float) for band in bands or [] for value in band)
        numbers = numbers and isinstance(noise, list) and all(type(share) in (int, float) for share in noise)
        if not (numbers and isinstance(told, list)):
            raise ValueError(
                f"{checkpoint / self.file} holds {stored!r}, which no run writes: the file is damaged. Resume from "
                "another checkpoint."
            )
        self.bands, self.noise, self.told = bands or [], noise or [], told or []


def _of(means: Mapping[str, float], name: str) -> float:
    """The control's metric, with or without the name that a chain puts in front; NaN if there is none."""
    return next((value for key, value in means.items() if key.rsplit("/", 1)[-1] == name), math.nan)


def _below(value: float) -> float:
    """The largest number of two digits that is below `value`."""
    if value == 0:
        return -1e-9
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    units = math.ceil(value / unit)
    # The quotient may come out above the whole number that it is.
    return next(number for i in (1, 2) if (number := float(f"{(units - i) * unit:.2g}")) < value)


def _range(values: tuple[float, ...]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"
