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


def check_writable(folder: str | Path, option: str) -> None:
    """Check that files can be written to a folder, which need not exist: to be called before long work.

    Writes a file there, or in the folder that it would be made in, which is gone at once: permissions alone say nothing
    about a read-only file system, and nothing to an administrator.

    Args:
        folder (`str` or `Path`): The folder.
        option (`str`): The option that names it, for the message.

    Raises:
        ValueError: No file can be written there; in one line.
    """
    path = Path(folder)
    try:
        existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{str(existing)!r} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _cannot_write(path, option, error, "folder") from error


def check_writable_file(path: Path, option: str) -> None:
    """Check that a file can be written, whose folder must exist.

    Args:
        path (`Path`): The file, a pipe or a device.
        option (`str`): The option that names it, for the message.

    Raises:
        ValueError: It cannot; in one line.
    """
    try:
        folder = path.resolve().parent
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(path.parent)!r}")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("permission denied")
        if path.is_file() or not path.exists():  # see `write_output`
            with tempfile.TemporaryFile(dir=folder):
                pass
    except (OSError, ValueError) as error:
        raise _cannot_write(path, option, error, "file") from error


def _cannot_write(path: Path, option: str, error: Exception, what: str) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ValueError(f"{option} {str(path)!r}: nothing can be written there ({reason}). Give another {what}.")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
