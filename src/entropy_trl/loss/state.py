"""[`ControlState`]: the numbers that a control carries from step to step."""

import logging
import math
from pathlib import Path
from typing import Any

from entropy_trl.controls import EntropyControl


logger = logging.getLogger(__name__)


class ControlState:
    """The state of a control (`EntropyControl.next_state`), as a run goes on and as checkpoints keep it."""

    file = "entropy_control_state.json"

    def __init__(self, control: EntropyControl, name: str | None):
        self.control = control
        self.name = name
        self.values = control.initial_state()

    def advance(self, entropy: float, progress: float) -> None:
        """Go on to the state after a step with this mean entropy; stay where no token had one."""
        if self.values and not math.isnan(entropy):
            self.values = self.control.next_state(self.values, entropy, progress)

    def reset(self) -> None:
        self.values = self.control.initial_state()

    def state(self) -> dict[str, Any]:
        return dict(self.values)

    def load(self, stored: dict[str, Any], checkpoint: Path) -> None:
        if not self.values:
            return  # a control without a state does not care what the checkpoint has
        if stored.keys() == self.values.keys():
            for name, value in stored.items():
                # A number that is yet to be measured starts as NaN, and may stay so.
                unmeasured = math.isnan(self.control.initial_state()[name])
                if type(value) not in (int, float) or not (math.isfinite(value) or unmeasured):
                    raise ValueError(
                        f"{checkpoint / self.file}: {name!r} of the entropy control {self.name!r} is {value!r}, which "
                        "no run reaches: the file is damaged. Resume from another checkpoint."
                    )
            self.values = stored
        else:
            logger.warning(
                f"{checkpoint} was saved with another entropy control: the state of {self.name!r} starts afresh."
            )
