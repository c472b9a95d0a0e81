"""What train.py is, with FSDP2 made possible on CPUs."""

import os
import sys

import fsdp_on_cpu

from entropy_trl.cli import train_main


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu.enable()
    sys.exit(train_main())
