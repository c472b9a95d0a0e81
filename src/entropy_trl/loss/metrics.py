"""Metrics of one optimizer step, kept as sums and counts until the step is over."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from entropy_trl.tokens.types import MetricSum


class StepMetrics:
    """Adds up (sum, count) pairs over the micro-batches of a step, then over the ranks; a mean is their ratio."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, MetricSum]) -> None:
        """Add sums and counts of some tokens. Every rank must add the same names in the same order."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().to(self._device).double(), count.to(self._device).double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Sum over the ranks (one collective) and divide. A mean over no token is NaN, which TRL leaves out."""
        if not self._sums:
            return {}
        totals = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
        return dict(zip(self._sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
