"""What differs between the supported versions of TRL. Each part names the version that makes it unnecessary."""

import inspect
import warnings
from typing import Any

import torch
import trl
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils


installed = Version(trl.__version__)
#: The versions that `make test-trl` tests, as in `setup.cfg`.
TESTED = SpecifierSet(">=1.13,<1.17")


def adapt_trl() -> None:
    """Warn of a version of TRL that is not tested, and mend what a tested one lacks."""
    if not TESTED.contains(installed, prereleases=True):
        warnings.warn(
            f"TRL {installed} is outside the tested range ({TESTED}): private methods that the trainer overrides may "
            "have changed. Install a tested version of trl.",
            UserWarning,
            stacklevel=2,
        )
    if installed.release[:2] == (1, 15):
        trl_utils._ChunkedLogProbFunction = PlainLogProbs(trl_utils._ChunkedLogProbFunction)


def forward_parameters() -> list[str]:
    """
    List the parameters of TRL's forward pass for log-probabilities and entropies.

    In TRL 1.14 `_get_per_token_logps_and_entropies` only passes its arguments on, which TRL 1.15 does no longer.
    """
    method = GRPOTrainer._get_per_token_logps_and_entropies
    if installed.release[:2] == (1, 14):
        method = GRPOTrainer._full_logits_logps
    return list(inspect.signature(method).parameters)


def completion_ends(trainer: GRPOTrainer) -> set[int]:
    """
    List the last tokens of a completion that TRL does not take for truncated.

    TRL 1.13 looks for the tokenizer's end-of-sequence token alone. TRL 1.14 has `eos_token_ids`, with those of the
    model's generation configuration too.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer.

    Returns:
        `set[int]`: Token ids, the padding token included.
    """
    tokenizer = trainer._tokenizer
    ends = [tokenizer.eos_token_id] if installed < Version("1.14") else trainer.eos_token_ids
    return {*ends, tokenizer.pad_token_id}


def check_fused_loss(use_liger_kernel: bool) -> None:
    """
    Refuse Liger's fused GRPO loss, which an entropy control cannot reach. TRL 1.14 has no such loss any more.

    Raises:
        ValueError: TRL is older than 1.14, and `use_liger_kernel` is on.
    """
    if use_liger_kernel and installed < Version("1.14"):
        raise ValueError(
            f"`use_liger_kernel=True` with TRL {installed}: its fused loss takes no per-token advantages, so the "
            "entropy control would not act. Use TRL 1.14 or newer, or `use_liger_kernel=False`."
        )


class PlainLogProbs:
    """
    Log-probabilities and entropies of TRL 1.15's fused LM head on a device without Triton.

    TRL 1.15 has Triton kernels alone: every forward pass of a trainer fails on a CPU. TRL 1.16 computes them with torch
    there. On devices with Triton this calls TRL's kernels.

    Args:
        kernel (`type` or `None`):
            TRL's autograd function, None where Triton is not installed.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> Any:
        """
        Compute what TRL's function of the same name does, in one piece: the logits of all tokens exist at once.

        Args:
            hidden (`Tensor` of shape `(N, H)`):
                Hidden states of the tokens before those that are scored.
            weight (`Tensor` of shape `(V, H)`):
                Weight of the LM head.
            bias (`Tensor` of shape `(V,)`, *optional*):
                Bias of the LM head.
            targets (`Tensor` of shape `(N,)`):
                The tokens to score.
            temperature (`float`):
                What the logits are divided by.
            chunk_size (`int`):
                Vocabulary entries of a tile, for TRL's kernels.
            softcap (`float`, *optional*):
                Bound of the model's own `tanh` on its logits.
            logit_scale (`float`):
                Factor of the model's logits, before the bound.
            outputs (`tuple[str, ...]`):
                Which results are wanted. GRPO wants `log_probs` and `entropy`.

        Returns:
            `tuple`: Log-probabilities and entropies in float32, of shape `(N,)`, and None three times.
        """
        if hidden.device.type in ("cuda", "xpu") or not set(outputs) <= {"log_probs", "entropy"}:
            return self.kernel.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        logits = hidden @ weight.to(hidden.dtype).T
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        logits = logits.float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logps = torch.log_softmax(logits / temperature, dim=-1)
        entropy = -(logps.exp() * logps).sum(-1) if "entropy" in outputs else None
        return logps.gather(-1, targets[:, None]).squeeze(-1), entropy, None, None, None
