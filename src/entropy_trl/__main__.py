"""`python -m entropy_trl`, which is `entropy-trl`."""

import sys

from entropy_trl.cli import main


if __name__ == "__main__":
    sys.exit(main(prog="python -m entropy_trl"))
