"""A sandbox of this machine: a process, its messages, and its end."""

import contextlib
import json
import os
import selectors
import subprocess
import time
from typing import Any

from entropy_trl.rewards.code.sandbox import boot_message, command
from entropy_trl.rewards.code.seccomp import call_filter


class TimeLimitError(Exception):
    """A program took too long."""


class EndedError(Exception):
    """A sandbox ended, or said what cannot be read."""


class StartError(Exception):
    """A sandbox did not start."""


MOST_BYTES = 32 * 2**20  # of all messages of a sandbox
_BLOCK = 1 << 16
_START_LIMIT = 120.0


class Sandbox:
    """A sandbox that runs one program, or its tests. It ends with its `with` block, and with this process.

    Args:
        role (`str`): `"program"` or `"tests"`.
        start (`dict[str, Any]`): The first message.
    """

    def __init__(self, role: str, start: dict[str, Any]):
        self._buffer = bytearray()
        self._received = 0
        self._started = False
        reading, writing = os.pipe()
        try:
            os.write(writing, call_filter(starter=bool(start.get("script"))))
        finally:
            os.close(writing)
        try:
            self._process = subprocess.Popen(
                command(reading),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=[reading],
            )
        except OSError as error:
            raise StartError(str(error)) from None
        finally:
            os.close(reading)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._unsent = bytearray(boot_message(role) + json.dumps(start).encode() + b"\n")

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wait_started(self) -> None:
        """Wait until the sandbox stands; its time counts from here.

        Raises:
            StartError: It does not come to stand.
        """
        try:
            if self.receive(time.monotonic() + _START_LIMIT) == b'["hello"]':
                return
            reason = "it does not say hello"
        except (TimeLimitError, EndedError) as error:
            reason = str(error)
        self._process.kill()
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip()
        raise StartError(f"{reason} {said[-500:]}".strip())

    def send(self, message: bytes) -> None:
        """Send a message, which `receive` writes while it waits."""
        self._unsent += message + b"\n"

    def receive(self, deadline: float) -> bytes:
        """Return the next message.

        Raises:
            TimeLimitError: The deadline is over.
            EndedError: The sandbox has ended, or wrote too much.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            self._exchange(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _exchange(self, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            if self._unsent:
                selector.register(self._in, selectors.EVENT_WRITE)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeLimitError("the time is over")
        for key, _ in ready:
            if key.fd == self._in:
                try:
                    del self._unsent[: os.write(self._in, memoryview(self._unsent)[:_BLOCK].tobytes())]
                except BrokenPipeError:
                    self._unsent.clear()
                except BlockingIOError:
                    continue
            else:
                block = os.read(self._out, _BLOCK)
                self._received += len(block)
                if not block or self._received > MOST_BYTES:
                    raise EndedError("it has ended" if not block else "it wrote too much")
                self._buffer += block

    def close(self) -> None:
        """End the sandbox with all that is in it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
