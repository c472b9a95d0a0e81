"""Mistakes of the user's: one line on stderr and exit code 2.

Only the steps that read what the user wrote are guarded so. Anything else that fails keeps its traceback.
`ENTROPY_TRL_DEBUG=1` shows the traceback of a mistake too.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, TextIO

from entropy_trl.dotted_path import NoSuchModuleError, import_from


class UsageError(Exception):
    """A mistake of the user's, told in one line."""


def tell(error: UsageError, prog: str) -> int:
    """Says a mistake of the user's, once, and returns the exit code for it."""
    if is_first_rank():
        if os.environ.get("ENTROPY_TRL_DEBUG"):
            traceback.print_exc()
        from entropy_trl.analysis.pages import terminal

        print(terminal(f"{prog}: error: {error}"), file=sys.stderr)
    return 2


def is_first_rank() -> bool:
    """Whether this process is the one that speaks. Asked before there is a process group, so of the launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds, raised over what the user wrote, into a `UsageError` of one line."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UsageError(f"{error.doc!r} is not valid JSON: {error}.") from error
    except kinds as error:
        raise UsageError(_words(error)) from error


@contextmanager
def for_machines(log_format: str) -> Iterator[TextIO]:
    """Keep stdout for JSON if `log_format` is `"json"`: what this program and libraries print goes to stderr.

    Yields:
        `TextIO`: stdout.
    """
    stdout = sys.stdout
    with redirect_stdout(sys.stderr) if log_format == "json" else nullcontext():
        yield stdout


def _words(error: Exception) -> str:
    """An error in one line. Those of the operating system name the path, not the number of the error."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror and error.filename is not None:
        path = repr(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            return f"{path} is or lies in a file, where a folder is needed. Give another path."
        return f"{path}: {error.strerror[0].lower()}{error.strerror[1:]}. Check the path."
    return " ".join(str(error).split()) or type(error).__name__


def import_object(path: str, option: str) -> Callable[..., Any]:
    """The function at a dotted path, from an installed module or one in the current folder."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UsageError(f"{option}: {path!r} is not a dotted path such as my_module.my_function.")
    try:
        function: Any = import_from(path, f"{option}:")
    except NoSuchModuleError as error:
        raise UsageError(str(error)) from error
    if not callable(function):
        raise UsageError(f"{option}: {path!r}: module {module_name!r} has no function {name!r}.")
    found: Callable[..., Any] = function
    return found
