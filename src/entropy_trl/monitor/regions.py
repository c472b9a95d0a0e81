"""[`RegionWatch`]: log each entropy region's share of the tokens, the gradient and the entropy change."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from entropy_trl.loss.metrics import StepMetrics
from entropy_trl.monitor.recorder import ObservedMicroBatch, StepFacts
from entropy_trl.tokens.regions import region_metrics


class RegionWatch(TrainerCallback):
    """Log the region metrics ([`region_metrics`]) of every optimizer step.

    Args:
        accelerator (`Accelerator`): The trainer's accelerator.
        log (`Callable[[str, float], None]`): Takes the name and the value of a metric.
    """

    def __init__(self, accelerator: Accelerator, log: Callable[[str, float], None]):
        self.accelerator = accelerator
        self.log = log
        self._metrics: StepMetrics | None = None

    def wants(self, step: int, inputs: dict[str, Any]) -> bool:
        """Whether the trainer shall show this micro-batch: every one is wanted."""
        return True

    def observe(self, seen: ObservedMicroBatch, facts: StepFacts) -> None:
        """Add a micro-batch when its backward pass has computed the gradient with respect to its log-probabilities.

        The gradient contains all that the loss does: ratio clip, edited advantages, penalty, masks, importance weights.
        Divided by the weight that the reduction gives a token, it is the derivative of the token's own loss.
        """
        if self._metrics is None:
            self._metrics = StepMetrics(self.accelerator.device)
        metrics, weights = self._metrics, facts.weights(seen.inputs, seen.batch.mask)
        scaler = self.accelerator.scaler  # of float16
        scale = 1.0 if scaler is None else scaler.get_scale()

        def add(gradient: Tensor) -> None:
            metrics.add(region_metrics(seen.batch, -gradient.float() / (scale * weights)))

        seen.live_logps.register_hook(add)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._metrics = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._metrics is not None:
            for name, value in self._metrics.means(self.accelerator).items():
                self.log(f"entropy_regions/{name}", value)
            self._metrics = None
