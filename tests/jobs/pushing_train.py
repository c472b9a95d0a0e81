"""What train.py is, with the Hub of the environment: a prepared process imported huggingface_hub with another one."""

import os
import sys

from huggingface_hub import constants

from entropy_trl.cli import train_main


if __name__ == "__main__":
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True
    sys.argv[0] = "train.py"
    sys.exit(train_main())
