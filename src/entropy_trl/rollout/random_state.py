"""The state of the random generators that data may draw from: Python's, NumPy's and torch's on the CPU."""

import random
from typing import Any

import numpy as np
import torch


#: Of Python, NumPy and torch (on the CPU).
RandomState = tuple[Any, Any, torch.Tensor]


def random_state() -> RandomState:
    """The state of the random generators."""
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()


def restore_random_state(state: RandomState) -> None:
    """Set the random generators to a state that [`random_state`] returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
