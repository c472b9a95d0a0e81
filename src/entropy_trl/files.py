"""Files that are never seen half written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


#: The name of a file that is being written ends so. An interruption may leave one behind, which nothing reads.
PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file in one move: an interruption, or a loss of power, leaves the old file or the new one.

    Args:
        path (`Path`): the file. Its folder is made if need be.

    Yields:
        `Path`: the file to write to, in the same folder. It takes the place of `path` when the block ends, and is
        removed if the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        yield part
        sync(part)  # before the move: a file system may store the new name before the content
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text, in UTF-8, in one move (see [`replacing`])."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """[`write_text`] of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
