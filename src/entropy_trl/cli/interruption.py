"""Ctrl-C and SIGTERM: the step is abandoned, and one line says how to go on.

A step may take minutes, and a launcher or a scheduler kills a process that does not end soon. So the step is not
finished: the run goes on from its last complete checkpoint, which a step that was cut short cannot damage.
"""

import atexit
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from entropy_trl.cli.errors import is_first_rank


#: Seconds after which another signal ends a process that does not come to its end.
_PATIENCE = 5.0


class Interrupted(KeyboardInterrupt):
    """Raised wherever the main thread is when SIGINT or SIGTERM comes.

    Args:
        number (`int`): The signal.
    """

    def __init__(self, number: int):
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        super().__init__(self.name)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise [`Interrupted`] over the first SIGINT or SIGTERM. Ctrl-C under a launcher sends both, so more are ignored.

    A signal that the caller ignores (`nohup`, a shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    came: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not came:
            came.append(time.monotonic())
            raise Interrupted(number)
        if time.monotonic() - came[0] > _PATIENCE:
            os._exit(128 + number)

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def say(stop: Interrupted, prog: str, rest: str) -> int:
    """Print the one line, on the first rank. Returns the exit code."""
    if is_first_rank():
        print(f"\n{prog}: interrupted by {stop.name}{rest}", file=sys.stderr, flush=True)
    return stop.exit_code


def resuming_command(prog: str, argv: Sequence[str]) -> str:
    """The command line that resumes a training, in place of any `--resume_from_checkpoint` that it has."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip:
            skip = False
            continue
        name, equals, _ = argument.partition("=")
        if name.replace("-", "_") == "__resume_from_checkpoint":
            skip = not equals
        else:
            kept.append(argument)
    return shlex.join([*prog.split(), *kept, "--resume_from_checkpoint", "true"])


def leave(exit_code: int) -> NoReturn:
    """End one of several processes at once: a process group cannot be taken down when the others may be gone."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
