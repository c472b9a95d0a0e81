"""A server that speaks SandboxFusion's `/run_code`, in place of a sandbox of this machine.

Such a server runs one text of Python with one input, and answers with the output. So a talk of several messages is
run again from its start for each answer, with all messages so far as the input; a program that has no chance in it
gives the same answers again. The tests' side runs on the server too, by itself.
"""

import json
import time
from typing import Any

import httpx

from entropy_trl.rewards.code.sandbox import portable
from entropy_trl.rewards.code.session import MOST_BYTES, EndedError, StartError, TimeLimitError


_GRACE = 30.0  # seconds that a server may take beside the program


def run_code(url: str, code: str, text: str, seconds: float, memory: int) -> dict[str, Any]:
    """Run a text of Python on the server. Returns what it says of the run.

    Raises:
        StartError: The server does not answer, or could not run anything.
        TimeLimitError: The program took too long.
    """
    request = {
        "code": code,
        "language": "python",
        "stdin": text,
        "run_timeout": max(0.1, seconds),
        "compile_timeout": max(0.1, seconds),
        "memory_limit_MB": memory // 2**20,
    }
    try:
        response = httpx.post(url.rstrip("/") + "/run_code", json=request, timeout=seconds + _GRACE)
        response.raise_for_status()
        answer = response.json()
        result = answer.get("run_result") or {}
        if answer["status"] == "SandboxError" or not result:
            raise StartError(f"the server {url} says {answer.get('message') or answer['status']!r}")
    except (httpx.HTTPError, ValueError, KeyError, AttributeError) as error:
        raise StartError(f"the server {url} does not answer as SandboxFusion does: {error!r}") from None
    if result.get("status") == "TimeLimitExceeded":
        raise TimeLimitError("the time is over")
    return result


class RemoteSandbox:
    """The program's or the tests' side of a talk, on a server. It has the methods of `Sandbox`."""

    def __init__(self, url: str, role: str, start: dict[str, Any], memory: int):
        self._url, self._memory = url, memory
        self._code = portable(role)
        self._sent = [json.dumps(start | {"limits": None, "paths": []}).encode()]
        self._answers: list[bytes] = []
        self._taken = 0

    def __enter__(self) -> "RemoteSandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wait_started(self) -> None:
        """Do nothing: a run begins with each message."""
        self._taken = 1  # of the greeting

    def send(self, message: bytes) -> None:
        """Add a message."""
        self._sent.append(message)

    def receive(self, deadline: float) -> bytes:
        """Return the next message. See `Sandbox.receive`."""
        if self._taken >= len(self._answers):
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise TimeLimitError("the time is over")
            text = "\n".join(message.decode() for message in self._sent) + "\n"
            output = str(run_code(self._url, self._code, text, seconds, self._memory).get("stdout") or "")
            if len(output) > MOST_BYTES:
                raise EndedError("it wrote too much")
            self._answers = [line.encode() for line in output.split("\n")[:-1]]
            if self._taken >= len(self._answers):
                raise EndedError("it has ended")
        self._taken += 1
        return self._answers[self._taken - 1]

    def close(self) -> None:
        """Do nothing: no run goes on."""
