"""What two forward passes of one policy differ by: [`ForwardNoise`] measures it, [`warn_of_dropout`] warns of it."""

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from entropy_trl.tokens.types import MetricSum, TokenBatch


#: A difference up to this many times the root mean square counts as noise. That of dropout has heavy tails.
_SPREAD = 3.0

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: Settings of heads that a language model does not have.
_OTHER_HEADS = ("classifier", "summary", "classification")


class ForwardNoise:
    """The difference of two forward passes of one policy, relative to `max(1, |logp|)`.

    The first update after a rollout measures it: the policy is still the one that scored the rollout, so that
    `logp - old_logp` is nothing but noise. Rounding is part of it, and so is dropout. The later updates of the rollout
    compare their differences with it. Checkpoints keep it, because a resumed run may begin with one of these.
    """

    file = "forward_noise.json"
    metric = "forward_noise"

    def __init__(self) -> None:
        #: Root mean square of the differences in the last update that could measure it; 0 before the first one.
        self.level = 0.0

    @property
    def bound(self) -> float:
        """The difference up to which a later update of the rollout cannot tell drift from noise."""
        return _SPREAD * self.level

    @staticmethod
    def sums(batch: TokenBatch) -> dict[str, MetricSum]:
        """Return the sum and the count of the squared differences in a micro-batch of an unchanged policy."""
        logps = batch.logps.detach().double()
        squares = ((logps - batch.old_logps.double()) / logps.abs().clamp(min=1.0)).square()
        return {ForwardNoise.metric: (squares.where(batch.mask, 0.0).sum(), batch.mask.sum())}

    def update(self, means: dict[str, float]) -> None:
        """Take the level from the metrics of a step that measured it, and put it there instead of its square."""
        if self.metric in means and not math.isnan(means[self.metric]):
            self.level = means[self.metric] = math.sqrt(means[self.metric])

    def reset(self) -> None:
        self.level = 0.0

    def state(self) -> dict[str, Any]:
        return {"level": self.level}

    def load(self, stored: dict[str, Any], checkpoint: Path) -> None:
        level = stored.get("level", 0.0)  # a checkpoint of an earlier version has none
        if type(level) not in (int, float) or not 0 <= level < math.inf:
            raise ValueError(
                f"{checkpoint / self.file}: the noise of a forward pass is {level!r}, which no run measures: the file "
                "is damaged. Resume from another checkpoint."
            )
        self.level = level


def warn_of_dropout(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Warn of dropout: its noise is in `logp - old_logp`, which KL-Cov penalises at full strength.

    Args:
        model (`torch.nn.Module`): The policy. Dropout may be a module, or a rate that a module hands to a function.
        config (`Mapping[str, Any]`): The model's configuration as a dictionary, from which some models read their
            rates directly.
    """
    rates = [module.p for module in model.modules() if isinstance(module, _DROPOUT) and module.p > 0]
    found = [f"{len(rates)} dropout modules (up to {max(rates):g})"] if rates else []
    settings: dict[str, float] = {}
    for values in [config, *(vars(module) for module in model.modules() if not isinstance(module, _DROPOUT))]:
        for name, rate in _dropout_rates(values):
            settings[name] = max(rate, settings.get(name, 0.0))
    found += [f"`{name}` {rate:g}" for name, rate in sorted(settings.items())]
    if found:
        warnings.warn(
            f"The model has dropout: {', '.join(found)}. The control penalises its noise at full strength, and in the "
            "first update of a rollout nothing else. `selected_at_rounding` counts these tokens and `forward_noise` "
            "measures the noise. Set dropout to 0 (`lora_dropout=0` for LoRA, where TRL's default is 0.05).",
            UserWarning,
            stacklevel=4,
        )


def _dropout_rates(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the positive dropout rates of a configuration, nested ones too, or of a module's attributes."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name.endswith("config"):
            yield from _dropout_rates(value)
        elif "drop" in name and type(value) in (int, float) and 0 < value <= 1 and not name.startswith(_OTHER_HEADS):
            yield name, float(value)
