"""[`LossCall`]: one call of TRL's loss, with the advantages withheld until the control has seen the forward pass."""

import math
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer

from entropy_trl.loss.noise import ForwardNoise
from entropy_trl.loss.window import StepWindow
from entropy_trl.tokens.types import TokenBatch, TokenEdit


class LossCall:
    """One call of TRL's loss on a micro-batch.

    It withholds the advantages from TRL until the control has seen TRL's forward pass.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer.
        window ([`StepWindow`]): The optimizer step that the micro-batch belongs to.
        inputs (`dict`): TRL's inputs of the loss. They are copied, not changed.
    """

    def __init__(self, trainer: GRPOTrainer, window: StepWindow, inputs: dict[str, Any]):
        self.trainer = trainer
        self.window = window
        self.original = inputs
        # A copy: TRL replays the buffered inputs when num_iterations > 1.
        self.inputs = WithheldInputs(inputs)
        self.loss_masks: list[Tensor] = []
        self.batch: TokenBatch | None = None
        self.edit: TokenEdit | None = None
        self.selected: Tensor | None = None

    def after_forward(self, logps: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Let the control act. Returns the log-probs and entropies that TRL continues with, and releases advantages."""
        if self.batch is not None:
            raise RuntimeError(
                f"TRL {trl.__version__} makes a second forward pass in its loss; entropy_trl knows one. Use a TRL "
                "version that entropy_trl was tested with."
            )
        self.batch = self.window.batches.of(self.original, logps, entropies)
        self.window.batches.check_finite(self.batch)
        with torch.no_grad():
            self.selected = self.window.selected_in(self.original, self.batch)
        if self.window.shared:
            self.batch = replace(self.batch, shared=self.window.shared)
        if not self.window.control.acts_on_policy and self.window.policy_is_unchanged:
            # Whatever the log-probabilities differ by, none of it is drift.
            self.batch = replace(self.batch, rounding=math.inf)
            if "old_per_token_logps" in self.original:
                self.window.metrics.add(ForwardNoise.sums(self.batch))
        if self.window.batches.state:
            total = entropies.detach().where(self.batch.mask, 0.0).sum(dtype=torch.float64)
            self.window.metrics.add({"step_entropy": (total, self.batch.mask.sum())})
        self.edit = self.window.control.edit(self.batch, self.selected)
        self.window.metrics.add(self.edit.metrics)

        edited = self.edit.advantages
        self.inputs.release(self.original["advantages"] if edited is None else edited.detach())
        if "old_per_token_logps" in self.inputs:
            self.inputs["old_per_token_logps"] = self.batch.old_logps
        return self.batch.logps, entropies.where(self.batch.mask, 0.0)

    def result(self) -> tuple[TokenBatch, TokenEdit]:
        """What the control saw and did. Raises RuntimeError unless TRL did what the control relies on."""
        if self.batch is None or self.edit is None:
            problem = "computed its loss without `_get_per_token_logps_and_entropies`"
        elif not self.inputs.advantages_read:
            problem = "computed its loss without reading the advantages"
        else:
            return self.batch, self.edit
        raise RuntimeError(
            f"TRL {trl.__version__} {problem}: the entropy control did not act. Use a TRL version that entropy_trl was "
            "tested with, or set `entropy_control=None`."
        )

    def reduce_penalty(self, batch: TokenBatch, penalty: Tensor) -> Tensor:
        """The control's penalty, (B, T), as a scalar: with the weights that TRL's loss gives the tokens."""
        weights = self.window.batches.weights(self.original, batch.mask, penalty.dtype)
        for mask in self.loss_masks:
            weights = weights * mask
        total = (weights * penalty).sum()
        # The share of each micro-batch in the loss is in its weights already, so the step's penalty is their sum; and
        # DDP averages over the ranks. Hence the count: one a step and rank.
        self.window.metrics.add({"penalty": (total, torch.tensor(1.0 / self.window.size))})
        return total


class WithheldInputs(dict[str, Any]):
    """TRL's inputs of the loss without the advantages, until they are released."""

    def __init__(self, inputs: dict[str, Any]):
        super().__init__(inputs)
        del self["advantages"]
        self.advantages_read = False

    def release(self, advantages: Tensor) -> None:
        self["advantages"] = advantages

    def __getitem__(self, key: str) -> Any:
        if key == "advantages":
            self.advantages_read = True
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        if key == "advantages":
            raise RuntimeError(
                f"TRL {trl.__version__} reads the advantages before its forward pass: the entropy control cannot act. "
                "Use a TRL version that entropy_trl was tested with, or set `entropy_control=None`."
            )
        raise KeyError(key)
