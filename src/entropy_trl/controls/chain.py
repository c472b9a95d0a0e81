"""Several controls, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from entropy_trl.controls.base import CLIP_RANGE, EntropyControl
from entropy_trl.tokens.types import MetricSum, Selection, TokenBatch, TokenEdit


Value = TypeVar("Value")


@dataclass(frozen=True)
class Chain(EntropyControl):
    """Controls that act together: each edits what the one before left of the advantages, and their penalties add up.

    The ratio clip is that of the control that has the clip range for its own, or else that of the first control. The
    names of states, shared numbers and metrics are prefixed by the control's.

    Args:
        controls (`Mapping[str, EntropyControl]`): The controls by name, in order.

    Raises:
        ValueError: If there are fewer than two, or two controls want the same thing.
    """

    controls: Mapping[str, EntropyControl]

    def __post_init__(self) -> None:
        if len(self.controls) < 2:
            raise ValueError(f"A chain has two controls or more, got {', '.join(self.controls) or 'none'}.")
        wanted: dict[str, str] = {}
        for name, control in self.controls.items():
            for claim in sorted(control.claims):
                if claim in wanted:
                    raise ValueError(
                        f"`{wanted[claim]}` and `{name}` cannot act together: both want {claim}. Leave one out."
                    )
                wanted[claim] = name

    # What is a constant of other controls follows from this one's parts.
    @property
    def published_epsilon(self) -> tuple[float, float]:  # type: ignore[override]
        owners = [control for control in self.controls.values() if CLIP_RANGE in control.claims]
        return (owners or list(self.controls.values()))[0].published_epsilon

    @property
    def acts_on_policy(self) -> bool:  # type: ignore[override]
        return all(control.acts_on_policy for control in self.controls.values())

    @property
    def drops_tokens(self) -> bool:  # type: ignore[override]
        return any(control.drops_tokens for control in self.controls.values())

    @property
    def needs_pool(self) -> bool:  # type: ignore[override]
        return any(control.needs_pool for control in self.controls.values())

    @property
    def scores_entropies(self) -> bool:  # type: ignore[override]
        return any(control.scores_entropies for control in self.controls.values())

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(control.claims for control in self.controls.values()))

    @property
    def compares_sequences(self) -> bool:
        return any(control.compares_sequences for control in self.controls.values())

    def select(self, pool: TokenBatch) -> Selection:
        selected, covariance, candidates = torch.zeros_like(pool.mask), None, None
        metrics: dict[str, MetricSum] = {}
        shared: dict[str, Tensor] = {}
        for name, control in self.controls.items():
            if control.needs_pool:
                found = control.select(replace(pool, state=_part(pool.state, name)))
                selected = selected | found.selected  # one control at most marks tokens
                covariance = found.covariance if covariance is None else covariance
                candidates = found.candidates if candidates is None else candidates
                metrics |= _prefixed(found.metrics, name)
                shared |= _prefixed(found.shared, name)
        return Selection(selected, covariance, metrics, shared, candidates)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        advantages, penalty = None, None
        metrics: dict[str, MetricSum] = {}
        for name, control in self.controls.items():
            own = replace(
                batch,
                advantages=batch.advantages if advantages is None else advantages,
                state=_part(batch.state, name),
                shared=_part(batch.shared, name),
            )
            edit = control.edit(own, selected)
            advantages = advantages if edit.advantages is None else edit.advantages
            if edit.penalty is not None:
                penalty = edit.penalty if penalty is None else penalty + edit.penalty
            metrics |= _prefixed(edit.metrics, name)
        return TokenEdit(advantages, penalty, metrics)

    def initial_state(self) -> dict[str, float]:
        states = {name: control.initial_state() for name, control in self.controls.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        following: dict[str, float] = {}
        for name, control in self.controls.items():
            following |= _prefixed(control.next_state(_part(state, name), entropy, progress), name)
        return following

    def check_pool_size(self, tokens: int) -> None:
        for control in self.controls.values():
            control.check_pool_size(tokens)


def _prefixed(values: Mapping[str, Value], name: str) -> dict[str, Value]:
    return {f"{name}/{key}": value for key, value in values.items()}


def _part(values: Mapping[str, Value], name: str) -> dict[str, Value]:
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
