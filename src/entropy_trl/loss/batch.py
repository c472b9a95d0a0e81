"""[`TokenBatches`]: convert TRL's inputs of the loss to what a control sees."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from entropy_trl.loss.noise import ForwardNoise
from entropy_trl.loss.reduction import CLIPPED_LOSS_TYPES, clipped_tokens, token_weights
from entropy_trl.tokens.ranks import Ranks
from entropy_trl.tokens.types import TokenBatch
from entropy_trl.trl_compat import forward_parameters


#: What TRL's forward pass takes beside the token ids (images and the like), by name.
_FORWARD_INPUTS = set(forward_parameters())


class TokenBatches:
    """Make a [`TokenBatch`] of TRL's inputs, score tokens, and compute their weights in TRL's loss.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer whose loss it is.
        forward (`Callable`): TRL's own forward pass. It must look up the parent's method at the call.
        ranks ([`Ranks`]): The processes that the pool extends over.
        drops_tokens (`bool`): Whether the control drops tokens. It then leaves out those that the ratio clip stopped.

    `state` is the control's state at the current step. The trainer sets it when a step begins. `noise` is what two
    forward passes of one policy differ by, as the last update that could tell measured it.
    """

    def __init__(self, trainer: GRPOTrainer, forward: Callable[..., Any], ranks: Ranks, drops_tokens: bool):
        self.trainer = trainer
        self.forward = forward
        self.ranks = ranks
        self.drops_tokens = drops_tokens
        self.state: Mapping[str, float] = {}
        self.noise = ForwardNoise()

    def of(self, inputs: dict[str, Any], logps: Tensor, entropies: Tensor | None = None) -> TokenBatch:
        """Return the tokens of a micro-batch (or of several, concatenated) as a control sees them.

        Args:
            inputs (`dict`): TRL's inputs of the loss: rows of one rollout.
            logps (`Tensor` of shape (B, T)): Log-probabilities to score the tokens by.
            entropies (`Tensor` of shape (B, T), *optional*): Entropies of the current policy.
        """
        trainer, args = self.trainer, self.trainer.args
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        clipped = None
        if (
            self.drops_tokens
            and trainer.loss_type in CLIPPED_LOSS_TYPES
            and logps is not old_logps  # a step pool, scored with the rollout's policy, has no ratio to clip
        ):
            clipped = clipped_tokens(
                logps - old_logps, advantages, trainer.epsilon_low, trainer.epsilon_high, args.delta
            )
        # Autocast computes in the reduced type although the log-probabilities come out as float32. Two engines were
        # measured to differ by half an epsilon of bf16 (sums are in float32) and by four epsilons of float32.
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
        epsilons = 1 if dtype in (torch.bfloat16, torch.float16) else 8
        return TokenBatch(
            logps=logps,
            old_logps=old_logps,
            advantages=advantages,
            mask=_loss_mask(inputs),
            row_ids=inputs["row_ids"],
            clipped=clipped,
            # Odd multiplier, so that the steps of one seed and the seeds of one step all differ.
            seed=args.seed * 0x9E3779B97F4A7C15 + trainer.state.global_step,
            rounding=max(epsilons * torch.finfo(dtype).eps, self.noise.bound),
            ranks=self.ranks,
            entropies=entropies,
            progress=min(trainer.state.global_step / max(trainer.state.max_steps, 1), 1.0),
            state=self.state,
        )

    def counted(self, inputs: dict[str, Any], entropies: Tensor) -> dict[str, Any]:
        """Return the inputs with the `completion_mask` of the tokens that `top_entropy_quantile` leaves in the loss.

        TRL masks each micro-batch after the control has acted. Every rank must call this together.

        Args:
            inputs (`dict`): TRL's inputs of the loss, of one micro-batch.
            entropies (`Tensor` of shape (B, T)): Entropies of the current policy, nats.
        """
        trainer = self.trainer
        quantile = 1 - trainer.top_entropy_quantile
        high = GRPOTrainer.get_high_entropy_mask(trainer, entropies, _loss_mask(inputs), quantile)
        return inputs | {"completion_mask": inputs["completion_mask"] * high}

    def weights(self, inputs: dict[str, Any], mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight of each token of a micro-batch in TRL's loss, (B, T)."""
        accumulation_steps = self.trainer.current_gradient_accumulation_steps
        step_items = (
            inputs["num_items_in_batch"].clamp(min=1.0)
            / self.trainer.accelerator.num_processes
            * accumulation_steps
            / self.trainer.args.steps_per_generation
        )
        return token_weights(
            self.trainer.loss_type,
            mask,
            accumulation_steps=accumulation_steps,
            max_completion_length=self.trainer.max_completion_length,
            step_items=step_items,
            dtype=dtype,
        )

    def score(
        self, model: torch.nn.Module, inputs: dict[str, Any], compute_entropy: bool = False
    ) -> tuple[Tensor, Any]:
        """Compute log-probabilities (and entropies) of a micro-batch's completion tokens under the current policy.

        This is a forward pass without gradient: (B, T), in nats. A single micro-batch uses the loss's own forward pass.
        A step of several micro-batches needs this one if TRL does not have the rollout's log-probabilities (strictly
        on-policy), or if they are not wanted (`entropy_control_scores="current"`).
        """
        checkpointing = self.trainer.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.trainer.model, checkpointing):
            logps, entropies, _ = self.forward(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].size(1),
                compute_entropy=compute_entropy,
                **{name: inputs[name] for name in _FORWARD_INPUTS & inputs.keys()},
            )
        return logps, entropies

    def check_inputs(self, inputs: dict[str, Any], logps: Tensor) -> None:
        """Check what reaches TRL's loss where no control looks at it. Raises as [`check_finite`] does."""
        logps = logps.detach()
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps if old_logps is None else old_logps
        mask = _loss_mask(inputs)
        self.check_finite(TokenBatch(logps=logps, old_logps=old_logps, advantages=inputs["advantages"], mask=mask))

    def check_finite(self, batch: TokenBatch) -> None:
        """Raise FloatingPointError, on all ranks, if a valid token has a log-probability or advantage not finite."""
        accelerator, step = self.trainer.accelerator, self.trainer.state.global_step
        # TRL turns an infinite advantage into the largest number of its type: twice that is infinite again.
        tensors = (batch.logps.detach(), batch.old_logps, 2 * batch.advantages.float())
        # A sum that is finite has finite terms only. Few steps come past this, and all ranks together.
        total = accelerator.reduce(torch.stack([x.sum(dtype=torch.float32) for x in tensors]), reduction="sum")
        if total.isfinite().all():
            return
        bad = torch.stack([(~x.isfinite() & batch.mask).sum() for x in tensors] + [batch.mask.sum()])
        logps, old_logps, advantages, tokens = accelerator.reduce(bad, reduction="sum").tolist()
        if logps or old_logps or advantages:
            raise FloatingPointError(
                f"Optimizer step {step + 1}: of {tokens} valid completion tokens, {logps} have a "
                f"log-probability that is not finite, {old_logps} a rollout log-probability that is not finite and "
                f"{advantages} an advantage that is not finite. The weights are still those of step "
                f"{step}. Look for an overflow (a lower learning rate, bf16 instead of fp16) or for "
                "a reward function that returns NaN or infinity."
            )


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Return the tokens that TRL's loss counts, (B, T): completion tokens that no tool wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
