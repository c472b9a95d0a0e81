"""The entropy controls, one a file. A new one is one file here and one line in `CONTROLS`."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from entropy_trl.controls.base import EntropyControl
from entropy_trl.controls.clip_cov import ClipCov
from entropy_trl.controls.kl_cov import KLCov


CONTROLS: dict[str, type[ClipCov] | type[KLCov]] = {
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
}

__all__ = ["CONTROLS", "ClipCov", "EntropyControl", "KLCov", "build_control", "nearest"]


def build_control(name: str, kwargs: Mapping[str, Any] | None = None) -> EntropyControl:
    """Make the control called `name` from its keyword arguments.

    Numbers may come as text, since YAML reads `2e-3` (without a dot) as text.

    Args:
        name (`str`): a key of `CONTROLS`.
        kwargs (mapping, *optional*): fields of the control's dataclass.

    Raises:
        ValueError: unknown name or keyword (the message has the valid ones and the nearest), or a bad value.
    """
    if name not in CONTROLS:
        raise ValueError(
            f"Unknown `entropy_control` {name!r}{nearest(str(name), CONTROLS)}. Use none to switch it off."
        )
    cls = CONTROLS[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = dict(kwargs or {})
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"Unknown `entropy_control_kwargs` key {key!r} for {name!r}{nearest(key, fields)}.")
        if fields[key].type is float:
            values[key] = _number(key, value)
    return cls(**values)


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
