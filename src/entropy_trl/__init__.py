"""Entropy control for reinforcement learning with verifiable rewards, on Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from entropy_trl._version import __version__


if TYPE_CHECKING:
    from entropy_trl.config import CovGRPOConfig
    from entropy_trl.controls import (
        CEGPPO,
        CONTROLS,
        Chain,
        ClipCov,
        EntroPIC,
        EntropyControl,
        EntropyTarget,
        FlexibleClip,
        KLCov,
        Schedule,
        Scheduled,
        Steer,
        TargetedClipHigher,
        build_control,
    )
    from entropy_trl.loss.reduction import clipped_tokens, token_weights
    from entropy_trl.monitor.entropy_law import EntropyLawCallback
    from entropy_trl.monitor.recorder import CovarianceRecorder
    from entropy_trl.tokens.covariance import covariance_metrics, token_covariance
    from entropy_trl.tokens.regions import entropy_change, estimated_entropy_change, region_metrics, token_regions
    from entropy_trl.tokens.selection import draw_mask, top_k_mask
    from entropy_trl.tokens.types import Selection, TokenBatch, TokenEdit
    from entropy_trl.trainer import CovGRPOTrainer


__all__ = [
    "CEGPPO",
    "CONTROLS",
    "Chain",
    "ClipCov",
    "CovGRPOConfig",
    "CovGRPOTrainer",
    "CovarianceRecorder",
    "EntroPIC",
    "EntropyControl",
    "EntropyLawCallback",
    "EntropyTarget",
    "FlexibleClip",
    "KLCov",
    "Schedule",
    "Scheduled",
    "Selection",
    "Steer",
    "TargetedClipHigher",
    "TokenBatch",
    "TokenEdit",
    "__version__",
    "build_control",
    "clipped_tokens",
    "covariance_metrics",
    "draw_mask",
    "entropy_change",
    "estimated_entropy_change",
    "region_metrics",
    "token_covariance",
    "token_regions",
    "token_weights",
    "top_k_mask",
]

# Names are imported when they are first used, so that what needs neither torch nor TRL (the workers of `math_reward`,
# the command line's `--help`) does not wait for them.
_MODULES = {
    name: module
    for module, names in {
        "monitor.entropy_law": ("EntropyLawCallback",),
        "config": ("CovGRPOConfig",),
        "controls": (
            "CEGPPO",
            "CONTROLS",
            "Chain",
            "ClipCov",
            "EntroPIC",
            "EntropyControl",
            "EntropyTarget",
            "FlexibleClip",
            "KLCov",
            "Schedule",
            "Scheduled",
            "Steer",
            "TargetedClipHigher",
            "build_control",
        ),
        "tokens.covariance": ("covariance_metrics", "token_covariance"),
        "monitor.recorder": ("CovarianceRecorder",),
        "loss.reduction": ("clipped_tokens", "token_weights"),
        "tokens.regions": ("entropy_change", "estimated_entropy_change", "region_metrics", "token_regions"),
        "tokens.selection": ("draw_mask", "top_k_mask"),
        "trainer": ("CovGRPOTrainer",),
        "tokens.types": ("Selection", "TokenBatch", "TokenEdit"),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
