"""The processes that share a pool, reduced to the three questions that a selection asks of them."""

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The processes over which a pool extends. Every one of them must ask the same questions in the same order."""

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every process's `value`, which has the same shape and dtype on all of them."""
        ...

    def min(self, value: Tensor) -> Tensor:
        """The minimum of every process's `value`, a scalar."""
        ...


class OneProcess:
    """A pool that lies on this process: there is nobody to ask."""

    several = False

    def sum(self, value: Tensor) -> Tensor:
        return value

    def min(self, value: Tensor) -> Tensor:
        return value


class AllProcesses:
    """A pool over all processes of `torch.distributed`'s default group. Moves fixed-size tensors only."""

    several = True

    def sum(self, value: Tensor) -> Tensor:
        value = value.contiguous().clone()
        torch.distributed.all_reduce(value)
        return value

    def min(self, value: Tensor) -> Tensor:
        value = value.contiguous().clone()
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN)
        return value


ONE_PROCESS = OneProcess()
