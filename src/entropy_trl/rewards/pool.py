"""Processes that compare answers with a time limit that holds.

`multiprocessing` would import the user's script in each worker (seconds, and a second training run where the script has
no `if __name__ == "__main__"`), and none of the standard library's pools can end one task. So the workers are plain
subprocesses that hold nothing: the answer to whatever goes wrong in one is to kill it and start another.
"""

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import wait


TIMEOUT, CRASH = "timeout", "crash"
"""The outcomes of a comparison that a worker did not finish."""

_START_LIMIT = 300.0  # seconds; imports over a network file system at the start of a big job are slow
_MOST_FAILED_STARTS = 3


class WorkerPool:
    """Compares answers in up to `size` processes, which are started when there is work for them.

    Safe to use from several threads, whose calls then follow one another, and after a fork. The processes end with the
    pool, with the interpreter, and when this process is killed.
    """

    def __init__(self, size: int, time_limit: float):
        self.size = size
        self.time_limit = time_limit
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        weakref.finalize(self, _stop, self._workers, self._process)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The outcome for each pair of answer and reference, in their order: that of `verify`, `TIMEOUT` or `CRASH`."""
        if self._process != os.getpid():  # forked: the workers, and perhaps a held lock, are the parent's
            self._begin()
        with self._lock:
            try:
                return self._compare(pairs)
            except BaseException:  # replies that are still to come would be taken for those of the next call
                _stop(self._workers, self._process)
                raise

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        outcomes: dict[int, str] = {}
        waiting = list(reversed(range(len(pairs))))
        while len(outcomes) < len(pairs):
            while len(self._workers) < min(self.size, len(pairs) - len(outcomes)):
                self._workers.append(_Worker(self.time_limit))
            for worker in [worker for worker in self._workers if worker.is_idle][: len(waiting)]:
                if worker.begin(waiting[-1], pairs[waiting[-1]]):
                    waiting.pop()
                else:  # it ended between two calls
                    self._drop(worker)
            busy = [worker for worker in self._workers if not worker.is_idle]
            deadline = min((worker.deadline for worker in busy), default=0.0)
            readable = wait([worker.replies for worker in busy], max(0.0, deadline - time.monotonic()))
            for worker in busy:
                reply = os.read(worker.replies, 1).decode() if worker.replies in readable else None
                if reply is None and time.monotonic() < worker.deadline:
                    continue
                if worker.task is not None:
                    outcomes[worker.task] = reply or (TIMEOUT if reply is None else CRASH)
                if reply:
                    worker.is_idle, worker.task = True, None
                    self._failed_starts = 0
                else:
                    self._failed_starts += worker.task is None
                    self._drop(worker)
                    if self._failed_starts == _MOST_FAILED_STARTS:
                        raise RuntimeError(
                            f"The workers of math_reward do not start: {self._failed_starts} in a row have ended or "
                            "hung while they imported the comparison. Their errors are on stderr, above."
                        )
        return [outcomes[task] for task in range(len(pairs))]

    def _drop(self, worker: "_Worker") -> None:
        worker.stop()
        if worker in self._workers:
            self._workers.remove(worker)


class _Worker:
    """A subprocess that is starting, comparing or idle."""

    def __init__(self, time_limit: float):
        # It finds what this process finds, but nothing of the current folder. A fixed hash seed
        # gives sets one order in all processes and runs, so that no verdict can depend on it.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "0",
        }
        command = [sys.executable, "-P", "-m", "entropy_trl.rewards.worker", str(time_limit)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        self._time_limit = time_limit
        self.replies = self._process.stdout.fileno()
        self.deadline = time.monotonic() + _START_LIMIT
        self.is_idle = False
        self.task: int | None = None

    def begin(self, task: int, pair: tuple[str, str]) -> bool:
        """Starts a comparison; False if the process is gone. A request is shorter than what a pipe holds."""
        try:
            self._requests.write(json.dumps(pair).encode() + b"\n")
        except BrokenPipeError:
            return False
        self.is_idle, self.task = False, task
        self.deadline = time.monotonic() + self._time_limit
        return True

    def stop(self) -> None:
        """Ends the process and waits for it, so that no zombie stays. May be called again, and by two threads."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _stop(workers: list[_Worker], process: int) -> None:
    """Ends the workers, if they are this process's own."""
    if process == os.getpid():
        for worker in list(workers):  # at exit a daemon thread may be here too, and may not finish
            worker.stop()
        workers.clear()
