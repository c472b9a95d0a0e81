"""What a dotted path of the user's names."""

import importlib
import os
import sys
from typing import Any


class NoSuchModuleError(ValueError):
    """A dotted path leads to no module."""


def import_from(path: str, option: str) -> Any:
    """The object at a dotted path, from an installed module or one in the current folder; None if it has none.

    Args:
        path (`str`): `MODULE.NAME`.
        option (`str`): what an error message calls the option that the path was given for.

    Raises:
        NoSuchModuleError: there is no such module. What fails inside of a module that is there is raised as it is.
    """
    module_name, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return vars(importlib.import_module(module_name)).get(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and an import of its own fails
        raise NoSuchModuleError(f"{option} {path!r}: there is no module {error.name!r}.") from error
