"""Make a control from its name and keyword arguments, and the other way round."""

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from entropy_trl.controls import CONTROLS
from entropy_trl.controls.base import EntropyControl
from entropy_trl.controls.chain import Chain
from entropy_trl.dotted_path import import_from


def build_control(name: str, kwargs: Mapping[str, Any] | None = None) -> EntropyControl:
    """Make a control from its name and keyword arguments.

    Numbers may come as text, since YAML reads `2e-3` (without a dot) as text.

    Args:
        name (`str`): A key of `CONTROLS`; the dotted path of a class of one's own (`my_module.MyControl`); or several
            of these, joined by `+`, for a [`Chain`].
        kwargs (`Mapping[str, Any]`, *optional*): Fields of the control's dataclass; of a chain, such a mapping for
            each name.

    Raises:
        ValueError: Unknown name or keyword (the message has the valid ones and the nearest), or a bad value.
    """
    kwargs = dict(kwargs or {})
    names = [part.strip() for part in str(name).split("+")]
    if len(names) == 1:
        return _build_one(names[0], kwargs)
    if len(set(names)) < len(names):
        raise ValueError(f"`entropy_control` {name!r} names a control twice.")
    for key, value in kwargs.items():
        if key not in names or not isinstance(value, dict):
            raise ValueError(
                f"`entropy_control_kwargs` of a chain are a mapping for each control, such as "
                f"{{{names[0]!r}: {{...}}}}; got {key!r}: {value!r}{nearest(key, names)}."
            )
    return Chain({part: _build_one(part, kwargs.get(part, {})) for part in names})


def describe_control(control: EntropyControl) -> tuple[str, dict[str, Any]]:
    """The name and keyword arguments from which `build_control` makes this control again.

    Raises:
        ValueError: If the control cannot be described: its class is not a dataclass at the top of a module.
    """
    if isinstance(control, Chain):
        parts = [describe_control(part) for part in control.controls.values()]
        return "+".join(name for name, _ in parts), dict(parts)
    path = f"{type(control).__module__}.{type(control).__qualname__}"
    instance: Any = control
    if not dataclasses.is_dataclass(instance) or "<locals>" in path:
        raise ValueError(
            f"The entropy control {path} must be a dataclass at the top level of a module, so that a run can store "
            "what it was made with."
        )
    names = [name for name, known in CONTROLS.items() if known is type(control)]
    values = {field.name: getattr(control, field.name) for field in dataclasses.fields(instance)}
    return names[0] if names else path, values


def _build_one(name: str, kwargs: Mapping[str, Any]) -> EntropyControl:
    cls: Any = CONTROLS[name] if name in CONTROLS else _import_control(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = dict(kwargs)
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"Unknown `entropy_control_kwargs` key {key!r} for {name!r}{nearest(key, fields)}.")
        if fields[key].type in (float, "float"):
            values[key] = _number(key, value)
    for key, f in fields.items():
        if f.init and f.default is f.default_factory is dataclasses.MISSING and key not in values:
            raise ValueError(f"`entropy_control_kwargs` of {name!r} must give {key!r}, which has no default.")
    return cls(**values)


def _import_control(path: str) -> Any:
    """The class at a dotted path, from an installed module or one in the current folder."""
    module_name, _, _ = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"Unknown `entropy_control` {path!r}{nearest(path, CONTROLS)}. Use none to switch it off, or the dotted "
            "path of a class of your own."
        )
    cls: Any = import_from(path, "`entropy_control`")
    is_control = inspect.isclass(cls) and issubclass(cls, EntropyControl)
    if not (is_control and dataclasses.is_dataclass(cls)):
        raise ValueError(
            f"`entropy_control` {path!r} is not a dataclass that derives from `entropy_trl.EntropyControl`: module "
            f"{module_name!r} has {cls!r} there."
        )
    if inspect.isabstract(cls):
        raise ValueError(f"`entropy_control` {path!r} does not say what it does: its class must define `edit`.")
    return cls


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"`entropy_control_kwargs` key {key!r} must be a number, got {value!r}.")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"`entropy_control_kwargs` key {key!r} must be a number, got {value!r}.") from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, if one is near, and all of them."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}. Valid: {', '.join(map(repr, valid))}"
