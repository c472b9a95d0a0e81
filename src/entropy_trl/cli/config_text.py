"""`entropy-trl train --print_config`: the resolved configuration, as YAML that runs."""

import argparse
import math
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from entropy_trl.analysis.secrets import masked
from entropy_trl.controls import describe_control


if TYPE_CHECKING:
    from entropy_trl.config import CovGRPOConfig


def config_text(values: Mapping[str, Any], defaults: Mapping[str, Any], training_args: "CovGRPOConfig") -> str:
    """The configuration of a run as YAML: what differs from the defaults, and then the defaults.

    Secrets are left out. Defaults that are null are left out too.

    Args:
        values (`Mapping[str, Any]`): The options as the parser read them, from the command line and the file.
        defaults (`Mapping[str, Any]`): The parser's defaults.
        training_args ([`CovGRPOConfig`]): The configuration that was made of them.
    """
    import yaml

    shown, left_out = {}, []
    for name, value in values.items():
        if masked(name, value) == value:
            shown[name] = value
        else:
            left_out.append(name)
    given = {name: value for name, value in shown.items() if value != defaults[name]}
    rest = {name: value for name, value in shown.items() if name not in given and value is not None}
    control = training_args.make_entropy_control()
    if control is not None:
        given["entropy_control"], given["entropy_control_kwargs"] = describe_control(control)
    rest = {name: value for name, value in rest.items() if name not in given}
    low, high = training_args.ratio_clip()
    text = [
        "# What differs from the defaults, and all hyper-parameters of the control.",
        *(f"# {name} was given and is left out: it is a secret." for name in left_out),
        f"# The ratio clip in force: {_bound(low)} below, {_bound(high)} above.",
        yaml.safe_dump(_plain(given), sort_keys=False),
        "# The defaults.",
        yaml.safe_dump(_plain(rest), sort_keys=False),
    ]
    return "\n".join(text)


def parser_defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The defaults of a parser by name, before a file replaces them."""
    defaults: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest != "help":
            defaults.setdefault(action.dest, action.default)
    return defaults


def _bound(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "none"


def _plain(value: Any) -> Any:
    """A value in the types that YAML has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
