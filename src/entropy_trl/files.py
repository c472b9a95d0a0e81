"""Files that are never seen half written."""

import json
import os
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


def write_output(path: Path, text: str) -> None:
    """Write where the user said: a file in one move, and a pipe or a device such as `/dev/stdout` as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text)
    else:
        write_text(path.resolve(), text)
