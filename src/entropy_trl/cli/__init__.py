"""The command line: `entropy-trl` with its commands, and what `train.py` runs."""

from entropy_trl.cli.errors import UsageError
from entropy_trl.cli.main import COMMANDS, main, train_main
from entropy_trl.cli.train import parse_train_args


__all__ = ["COMMANDS", "UsageError", "main", "parse_train_args", "train_main"]
