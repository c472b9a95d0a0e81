"""Import the object at a user-supplied dotted path."""

import importlib
import os
import sys
from typing import Any


#: Modules of entropy_trl by their former name, which configurations and modules of users may still have.
MOVED = {
    f"entropy_trl.{old}": f"entropy_trl.{new}"
    for old, new in {
        "types": "tokens.types",
        "ranks": "tokens.ranks",
        "covariance": "tokens.covariance",
        "selection": "tokens.selection",
        "regions": "tokens.regions",
        "sampling": "rollout.sampling",
        "estimators": "rollout.estimators",
        "diversity": "rollout.diversity",
        "metrics": "loss.metrics",
        "reduction": "loss.reduction",
        "callbacks": "monitor.entropy_law",
        "recorder": "monitor.recorder",
        "checkpoint": "saving.checkpoint",
        "hub": "saving.hub",
        "model_card": "saving.model_card",
        "plan.cost": "plan.memory",
        "script_args": "cli.train_arguments",
        "analysis.runs": "analysis.logs.runs",
        "analysis.formats": "analysis.logs.formats",
        "analysis.pairs": "analysis.law.points",
        "analysis.law_sizes": "analysis.law.sizes",
        "analysis.law_command": "analysis.law.command",
        "analysis.records": "analysis.covariance.records",
        "analysis.regions": "analysis.covariance.regions",
        "analysis.tokens": "analysis.covariance.tokens",
        "analysis.covariance_command": "analysis.covariance.command",
        "analysis.report_command": "analysis.report.command",
    }.items()
}


class NoSuchModuleError(ValueError):
    """A dotted path leads to no module, or to one that imports a module under its former name."""


def import_from(path: str, option: str) -> Any:
    """Import the object at a dotted path, from an installed module or one in the current folder.

    Args:
        path (`str`): `MODULE.NAME`.
        option (`str`): What an error message calls the option that the path was given for.

    Returns:
        `Any`: The object, or `None` if the module does not have it.

    Raises:
        NoSuchModuleError: There is no such module, or entropy_trl has it under another name now. An error inside a
            module that exists is raised as it is.
    """
    module_name, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return vars(importlib.import_module(module_name)).get(name)
    except ModuleNotFoundError as error:
        if error.name in MOVED:
            raise NoSuchModuleError(
                f"{option} {path!r} needs {error.name!r}: there is no module {error.name!r} any more. Import "
                f"{MOVED[error.name]!r} instead."
            ) from error
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and an import of its own fails
        raise NoSuchModuleError(f"{option} {path!r}: there is no module {error.name!r}.") from error
