"""Lets accelerate shard with FSDP2 on CPUs: the one thing in the launched tests that is not as users run it.

accelerate 1.15 turns FSDP on for accelerators only. On CPUs it trains plain DDP without a word (`use_cpu`), or starts
processes that know nothing of each other. Here it takes the processes for those of several GPUs, with gloo and the CPU.
"""

import os

from accelerate import state
from accelerate.utils import DistributedType


def enable():
    """Call it before anything asks accelerate for its state; the training arguments have `use_cpu=False`."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
