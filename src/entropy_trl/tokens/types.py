"""What a control reads ([`TokenBatch`]) and what it answers ([`Selection`], [`TokenEdit`]). Needs torch only.

Shapes: `B` completions (rows), `T` completion positions, padded. Log-probabilities and entropies are in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_trl.tokens.ranks import ONE_PROCESS, Ranks


#: A metric as (sum, count), so that micro-batches and ranks add up before the division.
MetricSum = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TokenBatch:
    """The completion tokens that a control looks at: one micro-batch, or a whole pool of them.

    Padded positions (`mask` false) may hold anything, -inf and NaN included: the constructor replaces them by 0, so
    that no control needs to think of them and no gradient flows through them.

    Args:
        logps (`Tensor` of shape (B, T)):
            `log pi_theta(y_t | s_t)` in nats. In a pool that is scored with the rollout's policy these are the old
            log-probabilities. May carry gradient.
        old_logps (`Tensor` of shape (B, T)):
            `log pi_old(y_t | s_t)` in nats, no gradient. Strictly on-policy it equals `logps.detach()`.
        advantages (`Tensor` of shape (B,), (B, 1) or (B, T)):
            Plain advantages, before any division by token counts. Kept as (B, 1) when they are one a row.
        mask (`Tensor` of shape (B, T)):
            True (or 1) at the tokens that the loss counts.
        row_ids (`Tensor` of shape (B,), int64, *optional*):
            Identity of each row, unique in the pool and independent of how the rows are split and shuffled. Random
            draws depend on it alone. Defaults to `0..B-1`.
        clipped (`Tensor` of shape (B, T), bool, *optional*):
            Tokens that the loss's own ratio clip already leaves without gradient. Defaults to none.
        seed (`int`, *optional*, defaults to `0`):
            Seed of this optimizer step's random draws.
        rounding (`float`, *optional*):
            How far two forward passes of one policy may differ in a log-probability, nats, relative to
            `max(1, |logp|)`: by rounding, or by dropout where that was measured to be more. Infinite while the policy
            is still the one that scored the rollout. Defaults to 8 machine epsilons of the dtype of `logps`.
        ranks ([`Ranks`], *optional*):
            The processes that the pool extends over, each with its own rows. Defaults to this one alone.
        entropies (`Tensor` of shape (B, T), *optional*):
            Entropy of the next-token distribution under the current policy, nats, no gradient. Always there in a
            micro-batch; in a pool where the control asks for it (`EntropyControl.scores_entropies`).
        progress (`float`, *optional*, defaults to `0`):
            Share of the training's optimizer steps that are done, in [0, 1).
        state (`Mapping[str, float]`, *optional*):
            The control's state at this step (`EntropyControl.next_state`); the same in the whole step.
        shared (`Mapping[str, Tensor]`, *optional*):
            What `EntropyControl.select` found out about the whole pool ([`Selection`]).

    Raises:
        ValueError: If a shape does not fit.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    row_ids: Tensor = None  # type: ignore[assignment]  # filled by __post_init__
    clipped: Tensor | None = None
    seed: int = 0
    rounding: float = 0.0
    ranks: Ranks = ONE_PROCESS
    entropies: Tensor | None = None
    progress: float = 0.0
    state: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.logps.ndim != 2:
            raise ValueError(f"`logps` must have shape (B, T), got {tuple(self.logps.shape)}.")
        shape = self.logps.shape
        for name in ("old_logps", "mask", "clipped", "entropies"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"`{name}` must have the shape of `logps` {tuple(shape)}, got {tuple(value.shape)}.")
        advantages = self.advantages.unsqueeze(1) if self.advantages.ndim == 1 else self.advantages
        if advantages.shape not in (shape, (shape[0], 1)):
            raise ValueError(
                f"`advantages` must have shape ({shape[0]},), ({shape[0]}, 1) or {tuple(shape)}, "
                f"got {tuple(self.advantages.shape)}."
            )
        row_ids = torch.arange(shape[0], device=self.logps.device) if self.row_ids is None else self.row_ids
        if row_ids.shape != shape[:1]:
            raise ValueError(f"`row_ids` must have shape ({shape[0]},), got {tuple(row_ids.shape)}.")

        mask = self.mask.bool()
        logps = self.logps.where(mask, 0.0)
        fixed = {
            "mask": mask,
            "row_ids": row_ids,
            "logps": logps,
            # A step pool scored with the rollout's policy has one tensor for both: one copy then.
            "old_logps": logps.detach() if self.old_logps is self.logps else self.old_logps.detach().where(mask, 0.0),
            "advantages": advantages.where(mask, 0.0) if advantages.shape == shape else advantages,
            "rounding": self.rounding or 8 * torch.finfo(self.logps.dtype).eps,
        }
        if self.clipped is not None:
            fixed["clipped"] = self.clipped & mask
        if self.entropies is not None:
            fixed["entropies"] = self.entropies.detach().where(mask, 0.0)
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @property
    def log_ratio(self) -> Tensor:
        """`logps - old_logps`, (B, T), 0 at padding; carries the gradient of `logps`."""
        return self.logps - self.old_logps


@dataclass(frozen=True)
class Selection:
    """The tokens that a control restrains in a pool.

    Args:
        selected (`Tensor` of shape (B, T), bool): The tokens; never a padded one.
        covariance (`Tensor` of shape (B, T), *optional*): Eq. 10 of arXiv 2505.22617 over the pool; 0 at padding.
        metrics (`Mapping[str, MetricSum]`, *optional*): What the control wants logged of the pool.
        shared (`Mapping[str, Tensor]`, *optional*): Numbers of the whole pool, of all processes, that `edit` needs.
        candidates (`int`, *optional*): Tokens of the pool, of all processes, that the control could choose from.
    """

    selected: Tensor
    covariance: Tensor | None = None
    metrics: Mapping[str, MetricSum] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    candidates: int | None = None


@dataclass(frozen=True)
class TokenEdit:
    """What a control changes in the loss of one micro-batch. `None` leaves TRL's own value, bit for bit.

    Args:
        advantages (`Tensor` of shape (B, T), *optional*): Advantages for TRL's loss; no gradient flows into them.
        penalty (`Tensor` of shape (B, T), *optional*): Added to the per-token loss under the loss's own token weights.
        metrics (`Mapping[str, MetricSum]`, *optional*): What the control wants logged of the micro-batch.
    """

    advantages: Tensor | None = None
    penalty: Tensor | None = None
    metrics: Mapping[str, MetricSum] = field(default_factory=dict)
