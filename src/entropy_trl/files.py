"""Files that are never seen half written."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


#: The name of a file that is being written ends so. An interruption may leave one behind, which nothing reads.
PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file in one move: an interruption, or a loss of power, leaves the old file or the new one.

    Args:
        path (`Path`): The file. Its folder is made if need be.

    Yields:
        `Path`: The file to write to, in the same folder. It takes the place of `path` when the block ends, and is
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


def write_output(path: Path, text: str) -> None:
    """Write where the user said: a file in one move, and a pipe or a device such as `/dev/stdout` as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path.resolve(), text)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder if need be, and write a file in it that is gone at once: to be called before long work.

    Args:
        folder (`Path`): The folder.
        option (`str`): The option that names it, for the message.

    Raises:
        ValueError: No file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ValueError(
            f"{option} {str(folder)!r}: nothing can be written there ({error}). Give another folder."
        ) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
