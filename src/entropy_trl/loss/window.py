"""[`StepWindow`]: what a control selects in one optimizer step."""

from collections.abc import Mapping
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer

from entropy_trl.controls import EntropyControl
from entropy_trl.controls.base import SELECTED_TOKENS
from entropy_trl.loss.batch import TokenBatches
from entropy_trl.loss.metrics import StepMetrics
from entropy_trl.loss.watch import ControlWatch
from entropy_trl.tokens.covariance import covariance_metrics
from entropy_trl.tokens.types import TokenBatch


class StepWindow:
    """One optimizer step: the tokens that the control selected in it, and its metrics.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer, with the arguments of a [`CovGRPOConfig`].
        batches ([`TokenBatches`]): Makes the token batches.
        control ([`EntropyControl`]): The control that selects.
        model (`torch.nn.Module`): The model to score a pool of several micro-batches with.
        watch ([`ControlWatch`]): Warns where the control does nothing.

    Raises:
        RuntimeError: If TRL's rollout buffer does not have the micro-batches of the step.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        batches: TokenBatches,
        control: EntropyControl,
        model: torch.nn.Module,
        watch: ControlWatch,
    ):
        self.trainer = trainer
        self.batches = batches
        self.control = control
        self.watch = watch
        self.size = trainer.current_gradient_accumulation_steps
        self.position = 0
        self.metrics = StepMetrics(trainer.accelerator.device)
        self.micro_batches: list[dict[str, Any]] = []
        self.selected: Tensor | None = None
        self.shared: Mapping[str, Tensor] = {}
        # A control that selects nothing (STEER) takes its numbers over all tokens, as its source does.
        self.filters_tokens = trainer.top_entropy_quantile < 1.0 and SELECTED_TOKENS in control.claims
        if control.needs_pool and trainer.args.entropy_control_pool == "step" and self.size > 1:
            self._select_step(model)

    def _select_step(self, model: torch.nn.Module) -> None:
        """Select over all micro-batches of the step before the first of them is trained on."""
        trainer = self.trainer
        first = trainer._step % trainer.args.steps_per_generation
        self.micro_batches = (trainer._buffered_inputs or [])[first : first + self.size]
        if len(self.micro_batches) < self.size:
            raise RuntimeError(
                f"Optimizer step {trainer.state.global_step + 1} has {self.size} micro-batches, but only "
                f"{len(self.micro_batches)} of them belong to the current rollout (TRL {trl.__version__}): a pool "
                'over the step is not possible. Use `entropy_control_pool="micro_batch"`.'
            )
        compute_entropy = self.control.scores_entropies or self.filters_tokens
        key = self._score_key(self.micro_batches[0])
        scored, counted = [], self.micro_batches
        if compute_entropy or key is None:
            scored = [self.batches.score(model, inputs, compute_entropy) for inputs in self.micro_batches]
        if self.filters_tokens:
            pairs = zip(self.micro_batches, scored, strict=True)
            counted = [self.batches.counted(inputs, entropies) for inputs, (_, entropies) in pairs]
        keys = ["completion_mask", "advantages", "row_ids"]
        keys += [name for name in ("tool_mask", key or "old_per_token_logps") if name in self.micro_batches[0]]
        pool = {name: torch.cat([inputs[name] for inputs in counted]) for name in keys}
        entropies = torch.cat([values for _, values in scored]) if compute_entropy else None
        scores = pool[key] if key else torch.cat([logps for logps, _ in scored])
        batch = self.batches.of(pool, scores, entropies)
        self.batches.check_finite(batch)
        self.selected = self._select(batch)

    def _score_key(self, inputs: dict[str, Any]) -> str | None:
        """Name the log-probabilities in TRL's inputs that score the pool; None for those of the current policy."""
        scores = self.trainer.args.entropy_control_scores
        if scores == "current" or self.control.scores_entropies:
            return None
        key = "sampling_per_token_logps" if scores == "sampling" else "old_per_token_logps"
        if inputs.get(key) is not None:
            return key
        if scores == "sampling":
            raise RuntimeError(
                '`entropy_control_scores="sampling"` found no `sampling_per_token_logps` in the rollout: the pool has '
                'no scores. Generate with vLLM, or use `entropy_control_scores="rollout"`.'
            )
        return None

    def _select(self, pool: TokenBatch) -> Tensor:
        selection = self.control.select(pool)
        self.watch.see(pool, selection)
        selected = selection.selected
        if selection.covariance is not None:
            one_sequence = pool.mask.shape[0] == 1 and not pool.ranks.several  # only a random draw may take that
            if self.trainer.args.entropy_control_pool == "step" and not one_sequence:
                # Where all advantages are equal there is nothing to select. The authors' code takes arbitrary tokens.
                selected = selected & (selection.covariance != 0)
            self.metrics.add(covariance_metrics(selection.covariance, pool.mask, selected, pool.ranks))
        self.metrics.add(selection.metrics)
        self.shared = selection.shared
        return selected

    @property
    def policy_is_unchanged(self) -> bool:
        """Whether the policy of the current micro-batch is still the one that the rollout was scored with."""
        trainer = self.trainer
        done = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations)
        # All that the rollout has been used for so far lies in this step, which ends with its first update.
        return trainer._buffered_inputs is not None and done <= self.position

    def means(self) -> dict[str, float]:
        """Return the metrics of the step, over all micro-batches and processes. One collective."""
        means = self.metrics.means(self.trainer.accelerator)
        self.batches.noise.update(means)
        self.watch.end_step(self.trainer.state.global_step + 1, means)
        return means

    def selected_in(self, inputs: dict[str, Any], batch: TokenBatch) -> Tensor:
        """Return the selected tokens of the current micro-batch, (B, T), bool."""
        if self.selected is not None:
            if self.micro_batches[self.position]["completion_ids"] is not inputs["completion_ids"]:
                raise RuntimeError(
                    f"Micro-batch {self.position + 1} of {self.size} is not the one in TRL's rollout buffer (TRL "
                    f"{trl.__version__}): the selection made for the step does not fit it. Use "
                    '`entropy_control_pool="micro_batch"` with a trainer that changes the inputs of the loss.'
                )
            rows = inputs["completion_ids"].size(0)
            return self.selected[self.position * rows : (self.position + 1) * rows]
        if not self.control.needs_pool:
            return torch.zeros_like(batch.mask)
        counted = inputs
        if self.filters_tokens:
            assert batch.entropies is not None  # always there in a micro-batch
            counted = self.batches.counted(inputs, batch.entropies)
        key = self._score_key(inputs) if self.trainer.args.entropy_control_pool == "step" else None
        if key is not None:
            # The same scores as in a step of several micro-batches, so that the cut of the step does not matter.
            # With the sampler's scores there is no older policy, as there.
            hidden = {"old_per_token_logps"} - {key}
            pool = {name: value for name, value in counted.items() if name not in hidden}
            batch = self.batches.of(pool, inputs[key])
            if key == "sampling_per_token_logps":
                self.batches.check_finite(batch)
        elif counted is not inputs:
            batch = self.batches.of(counted, batch.logps.detach(), batch.entropies)
        return self._select(batch)
