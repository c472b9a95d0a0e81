"""The entropy controls, one a file. A new one is one file here and one line in `CONTROLS`."""

from entropy_trl.controls.base import EntropyControl
from entropy_trl.controls.ce_gppo import CEGPPO
from entropy_trl.controls.chain import Chain
from entropy_trl.controls.clip_cov import ClipCov
from entropy_trl.controls.entropic import EntroPIC
from entropy_trl.controls.flexible_clip import FlexibleClip
from entropy_trl.controls.kl_cov import KLCov
from entropy_trl.controls.steer import Steer
from entropy_trl.controls.targeted_clip_higher import TargetedClipHigher


CONTROLS: dict[str, type[EntropyControl]] = {
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "flexible_clip": FlexibleClip,
    "ce_gppo": CEGPPO,
    "entropic": EntroPIC,
    "steer": Steer,
    "targeted_clip_higher": TargetedClipHigher,
}

# Not at the top: `build` reads CONTROLS from here.
from entropy_trl.controls.build import build_control, describe_control, nearest  # noqa: E402


__all__ = [
    "CEGPPO",
    "CONTROLS",
    "Chain",
    "ClipCov",
    "EntroPIC",
    "EntropyControl",
    "FlexibleClip",
    "KLCov",
    "Steer",
    "TargetedClipHigher",
    "build_control",
    "describe_control",
    "nearest",
]
