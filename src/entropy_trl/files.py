"""Files that are never seen half written."""

import json
import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write in one move, so that an interruption leaves the old file or the new one. The folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """[`write_text`] of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_writable(folder: Path, option: str) -> None:
    """Make a folder if need be, and write a file in it that is gone at once: to be called before long work.

    Args:
        folder (`Path`): the folder.
        option (`str`): the option that names it, for the message.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ValueError(
            f"{option} {str(folder)!r}: nothing can be written there ({error}). Give another folder."
        ) from error
