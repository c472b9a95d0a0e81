"""Hyper-parameters that change over the training."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from entropy_trl.controls.base import EntropyControl, check_number
from entropy_trl.tokens.types import Selection, TokenBatch, TokenEdit


@dataclass(frozen=True)
class Schedule:
    """A number that moves linearly from `start` to `end` and then stays there.

    At the share `p` of the training's optimizer steps that are done, 0 at the first step, the value is

        start + (end - start) * min(p / over, 1).

    Args:
        start (`float`): Value at the first step.
        end (`float`): Value from the share `over` of the training on.
        over (`float`, *optional*, defaults to `1.0`): Share of the training in which the value moves, in (0, 1].

    Raises:
        ValueError: If `start` or `end` is not a finite number, or `over` is out of its range.

    Example:
        >>> Schedule(1.0, 0.1, over=0.5).at(0.25)
        0.55
    """

    start: float
    end: float
    over: float = 1.0

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)
        check_number("over", self.over, 0.0, 1.0, low_included=False)

    def at(self, progress: float) -> float:
        """Return the value where the share `progress` of the steps is done."""
        done = min(progress / self.over, 1.0)
        return (1 - done) * self.start + done * self.end


@dataclass(frozen=True)
class Scheduled(EntropyControl):
    """A control some of whose hyper-parameters follow a [`Schedule`].

    It acts as the control with the values of the step at hand, which depend on the number of optimizer steps alone:
    they are the same in all micro-batches and processes, and after a resume. They are logged by their names.

    Args:
        control ([`EntropyControl`]): The control, with the values at the start.
        schedules (`Mapping[str, Schedule]`): The schedules by the name of the hyper-parameter.

    Raises:
        ValueError: If the control refuses a value at the start or the end of a schedule.
    """

    control: EntropyControl
    schedules: Mapping[str, Schedule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Every combination of ends: two hyper-parameters may fit each other at the start and not on the way.
        names = list(self.schedules)
        for values in itertools.product(*((s.start, s.end) for s in self.schedules.values())):
            changed = dict(zip(names, values, strict=True))
            try:
                end = _replaced(self.control, changed)
            except ValueError as error:
                shown = ", ".join(f"{name} {value:g}" for name, value in changed.items())
                raise ValueError(f"The schedule in `entropy_control_kwargs` reaches {shown}: {error}") from error
            if end.claims != self.control.claims or end.published_epsilon != self.control.published_epsilon:
                raise ValueError(f"{', '.join(names)} of {type(self.control).__name__} cannot follow a schedule.")

    # What is a constant of other controls is that of the control here.
    @property
    def published_epsilon(self) -> tuple[float, float]:  # type: ignore[override]
        return self.control.published_epsilon

    @property
    def acts_on_policy(self) -> bool:  # type: ignore[override]
        return self.control.acts_on_policy

    @property
    def drops_tokens(self) -> bool:  # type: ignore[override]
        return self.control.drops_tokens

    @property
    def needs_pool(self) -> bool:  # type: ignore[override]
        return self.control.needs_pool

    @property
    def scores_entropies(self) -> bool:  # type: ignore[override]
        return self.control.scores_entropies

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return self.control.claims

    @property
    def compares_sequences(self) -> bool:
        return self.control.compares_sequences

    def at(self, progress: float) -> EntropyControl:
        return _replaced(self.control, self.values(progress))

    def values(self, progress: float) -> dict[str, float]:
        """Return the scheduled hyper-parameters where the share `progress` of the steps is done."""
        return {name: schedule.at(progress) for name, schedule in self.schedules.items()}

    def select(self, pool: TokenBatch) -> Selection:
        return self.at(pool.progress).select(pool)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        edit = self.at(batch.progress).edit(batch, selected)
        once = torch.ones((), dtype=torch.float64, device=batch.logps.device)
        metrics = {name: (once * value, once) for name, value in self.values(batch.progress).items()}
        return replace(edit, metrics={**edit.metrics, **metrics})

    def initial_state(self) -> dict[str, float]:
        return self.at(0.0).initial_state()

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        return self.at(progress).next_state(state, entropy, progress)

    def check_pool_size(self, tokens: int) -> None:
        # The largest value of each, which is at one of the ends.
        _replaced(self.control, {name: max(s.start, s.end) for name, s in self.schedules.items()}).check_pool_size(
            tokens
        )


def _replaced(control: Any, values: Mapping[str, float]) -> EntropyControl:
    changed: EntropyControl = replace(control, **values)
    return changed


def schedule_of(name: str, value: Mapping[str, Any]) -> Schedule:
    """Read a schedule from a configuration.

    Args:
        name (`str`): The hyper-parameter, for error messages.
        value (`Mapping[str, Any]`): `start`, `end` and, optionally, `over`. Numbers may come as text.

    Raises:
        ValueError: If a key is missing or unknown, or a value is no number or out of its range.
    """
    example = f"{{{name}: {{start: 1.0, end: 0.1, over: 0.5}}}}"
    if not {"start", "end"} <= value.keys() <= {"start", "end", "over"}:
        raise ValueError(
            f"`entropy_control_kwargs` key {name!r} got {dict(value)!r}: a schedule has `start`, `end` and, "
            f"optionally, `over`. Give a number, or a schedule such as {example}."
        )
    where = f"The schedule of {name!r} in `entropy_control_kwargs`"
    try:
        return Schedule(**{key: read_number(f"{name}.{key}", number) for key, number in value.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error} Example: {example}.") from error


def read_number(key: str, value: Any) -> float:
    """Read a number of `entropy_control_kwargs`, which YAML may give as text.

    Raises:
        ValueError: If `value` is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"`entropy_control_kwargs` key {key!r} must be a number, got {value!r}.")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"`entropy_control_kwargs` key {key!r} must be a number, got {value!r}.") from None
