"""How much arithmetic one comparison may take: counted in steps, not in time, so that load changes no verdict.

An answer has at most 1,000 characters, but `9^{9^9}` is in seven of them. Every step that may grow pays for itself
before it is taken. The prices are microseconds, roughly.
"""

import threading

from entropy_trl.rewards.tokens import UnreadableError


_MOST = 50_000.0


class TooLargeError(UnreadableError):
    """A comparison that would take too long, or a number that has too many digits."""


class _Account(threading.local):
    left = _MOST


_account = _Account()


def begin() -> None:
    """Start a comparison: what the last one spent no longer counts."""
    _account.left = _MOST


def spend(microseconds: float) -> None:
    """Pay for a step.

    Raises:
        TooLargeError: The comparison has used up what it may spend.
    """
    _account.left -= microseconds
    if _account.left < 0:
        raise TooLargeError("a comparison that takes too long")
