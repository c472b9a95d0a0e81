"""Train with entropy control: `accelerate launch train.py --config FILE.yaml [--any_field value]`."""

import sys

from entropy_trl.cli import train_main


if __name__ == "__main__":
    sys.exit(train_main())
