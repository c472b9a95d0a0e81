"""Entropy control for reinforcement learning with verifiable rewards, on Hugging Face TRL."""

from entropy_trl._version import __version__
from entropy_trl.config import CovGRPOConfig
from entropy_trl.controls import CONTROLS, ClipCov, EntropyControl, KLCov, build_control
from entropy_trl.covariance import covariance_metrics, token_covariance
from entropy_trl.reduction import clipped_tokens, token_weights
from entropy_trl.selection import draw_mask, top_k_mask
from entropy_trl.trainer import CovGRPOTrainer
from entropy_trl.types import Selection, TokenBatch, TokenEdit


__all__ = [
    "CONTROLS",
    "ClipCov",
    "CovGRPOConfig",
    "CovGRPOTrainer",
    "EntropyControl",
    "KLCov",
    "Selection",
    "TokenBatch",
    "TokenEdit",
    "__version__",
    "build_control",
    "clipped_tokens",
    "covariance_metrics",
    "draw_mask",
    "token_covariance",
    "token_weights",
    "top_k_mask",
]
