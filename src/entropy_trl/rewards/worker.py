"""A worker process of the pool: `python -m entropy_trl.rewards.worker TIME_LIMIT`. Imports neither torch nor TRL.

Reads one request a line, a JSON list of answer and reference, and writes one byte for each. It ends when its input
does, which is when its parent closes it or is gone, however the parent ended.
"""

import contextlib
import json
import os
import resource
import signal
import sys

from entropy_trl.rewards.equality import verify


READY = b"r"

_MEMORY = 4 * 2**30
# The parent kills a worker that takes too long. This is for a worker that is busy when its parent is killed: the kernel
# ends it, where a handler in Python would wait for a long multiplication to be over.
_GRACE = 2.0


def main(time_limit: float) -> None:
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent then ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    verify("x + 1", "1 + x")  # fills the caches
    with contextlib.suppress(BrokenPipeError):
        os.write(replies, READY)
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, time_limit + _GRACE)
            outcome = verify(*json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(replies, outcome.encode())


if __name__ == "__main__":
    main(float(sys.argv[1]))
