"""What a reader leaves out of a damaged log: one warning each, which the report repeats on its page."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from entropy_trl.analysis.pages import terminal


logger = logging.getLogger(__name__)

_notes: ContextVar[list[str] | None] = ContextVar("notes on what is not read", default=None)


def note_unread(text: str) -> None:
    """Warn that something is not read, and add it to the notes of [`collecting_unread`].

    Args:
        text (`str`): A sentence that names the file.
    """
    logger.warning(terminal(text))
    notes = _notes.get()
    if notes is not None:
        notes.append(text)


@contextmanager
def collecting_unread() -> Iterator[list[str]]:
    """Collect what is not read while logs are read.

    Yields:
        `list[str]`: The sentences, which grow as logs are read.
    """
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
