"""Dynamic sampling (DAPO, arXiv 2503.14476): only prompts whose completions differ in reward make up a rollout.

Where all completions of a prompt have the same reward, all advantages are 0 and the prompt teaches nothing. Such groups
are dropped, and others are generated from new prompts until the rollout is full, for a number of rounds at most.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import GRPOConfig

from entropy_trl.rollout.random_state import random_state, restore_random_state


logger = logging.getLogger(__name__)

Row = dict[str, Any]
#: The completions of one prompt. A completion is a mapping of what there is to know of it.
Group = list[dict[str, Any]]

#: At least this share of the groups of a further round is expected to be kept, however few were so far.
_LEAST_RATE = 1 / 8


class PromptStream:
    """The data set's rows, epoch after epoch, from a position that a checkpoint can hold.

    Each epoch has every row once, in an order of its own given by the seed. Every process has the same stream. A row is
    read when it is taken, also where it was put back: random numbers that its transform draws then depend on nothing
    that a checkpoint does not have. (A streamed data set cannot be read again. There the row itself comes back.)

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows.
        shuffle (`bool`): Whether the order is shuffled; a streamed data set is shuffled within its buffer.
        seed (`int`): Seed of the order.
    """

    file = "prompt_stream.json"

    def __init__(self, dataset: Dataset | IterableDataset, shuffle: bool, seed: int):
        self.dataset = dataset.shuffle(seed=seed) if isinstance(dataset, IterableDataset) and shuffle else dataset
        self.shuffle = shuffle
        self.seed = seed
        self._position = 0
        self._rows: Iterator[Row] | None = None  # of a streamed data set
        self._order: tuple[int, Tensor] | None = None  # of an epoch

    @property
    def position(self) -> int:
        """How many rows have been taken since the first epoch began."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position, self._rows = value, None

    def reset(self) -> None:
        self.position = 0

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load(self, stored: dict[str, Any], checkpoint: Path) -> None:
        position = stored.get("position", 0)
        if type(position) is not int or position < 0:
            raise ValueError(
                f"{checkpoint / self.file}: the position in the prompts is {position!r}, not a count: the file is "
                "damaged. Resume from another checkpoint."
            )
        self.position = position
        if not stored:
            logger.warning(f"{checkpoint} was saved without dynamic sampling: its prompts start from the first.")

    @property
    def epoch(self) -> float:
        """How often the rows have been taken; of a data set of unknown length not a number."""
        return self._position / len(self.dataset) if isinstance(self.dataset, Dataset) else float("nan")

    def take(self, n: int) -> list[Row]:
        """The next `n` rows."""
        if isinstance(self.dataset, Dataset):
            rows = [self.dataset[self._index(self._position + i)] for i in range(n)]
        else:
            if self._rows is None:  # a stream is read from its start
                self._rows = islice(self._epochs(self.dataset), self._position, None)
            rows = list(islice(self._rows, n))
        self._position += n
        return rows

    def put_back(self, rows: list[Row]) -> None:
        """Let the last rows that were taken come again."""
        if not isinstance(self.dataset, Dataset):
            self._rows = chain(rows, self._rows or ())
        self._position -= len(rows)

    def _index(self, position: int) -> int:
        """Where the row at a position lies in the data set."""
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][place])

    @staticmethod
    def _epochs(dataset: IterableDataset) -> Iterator[Row]:
        for epoch in count():
            dataset.set_epoch(epoch)
            rows = iter(dataset)
            first = next(rows, None)
            if first is None:
                raise ValueError("Dynamic sampling: the streamed data set has no rows.")
            yield first
            yield from rows


def check_prompts(args: GRPOConfig, dataset: Any) -> None:
    """Check that the training data fills one rollout.

    TRL makes rollouts of whole batches of prompts and leaves out the rest, so fewer prompts than one rollout has train
    nothing, with no error. Of a streamed data set so many rows are read here, and again in training: the random numbers
    that they draw are the same both times.

    Args:
        args ([`~trl.GRPOConfig`]): The sizes of a rollout.
        dataset (`Dataset` or `IterableDataset`): The training data. TRL itself refuses anything else.

    Raises:
        ValueError: If the data has fewer rows than a rollout has prompts.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    needed = args.generation_batch_size // args.num_generations
    state = random_state()
    rows = len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in islice(dataset, needed))
    restore_random_state(state)
    if rows < needed:
        raise ValueError(
            f"The training data has {rows} {'row' if rows == 1 else 'rows'}, and a rollout needs {needed} different "
            f"prompts (generation_batch_size={args.generation_batch_size} completions, {args.num_generations} for each "
            "prompt): no step would run. Add rows, raise num_generations, or lower per_device_train_batch_size or "
            "steps_per_generation (by default gradient_accumulation_steps)."
        )


def has_signal(rewards: Tensor) -> bool:
    """Whether the rewards of a group's completions, (G,) or one column a reward, differ; what is NaN does not count."""
    columns = rewards.view(len(rewards), -1).T
    return any(len(known := column[~column.isnan()]) and known.max() - known.min() > 1e-6 for column in columns)


@dataclass
class Rollout:
    """What the rounds of one rollout came to: the groups of this process, and counts of all processes' groups.

    `used` is how many of the generated groups lie before the end of the rollout: the prompts behind them were too many.
    """

    groups: list[Group]
    rounds: int
    generated: int
    with_signal: int
    used: int


class NoSignalError(RuntimeError):
    """The rounds were over before the rollout was full."""


def fill_rollout(
    generate: Callable[[int], list[Group]],
    keep: Callable[[Group], bool],
    gather_flags: Callable[[list[bool]], list[bool]],
    exchange: Callable[[list[Group]], list[Group]],
    *,
    rank: int,
    processes: int,
    groups_per_process: int,
    max_rounds: int,
    train_on_incomplete: bool,
) -> Rollout:
    """Generate in rounds until all processes together have as many groups with a signal as they need.

    All processes make the same rounds, with the same number of groups each. Those that are kept are the first ones with
    a signal, by round, process and place, which is the order of the prompts. Where a process has more of them than it
    trains on, others get its last ones.

    Args:
        generate (`Callable[[int], list[Group]]`): Makes a number of new groups on this process; called on all
            processes at once.
        keep (`Callable[[Group], bool]`): Whether a group has a signal.
        gather_flags (`Callable[[list[bool]], list[bool]]`): Every process's flags in one list, by process.
        exchange (`Callable[[list[Group]], list[Group]]`): Every process's groups in one list, by process.
        rank, processes (`int`): Which process this is, of how many.
        groups_per_process (`int`): Groups that a process trains on.
        max_rounds (`int`): Rounds, the first one included.
        train_on_incomplete (`bool`): Fill up with groups without a signal after the last round, instead of an error.

    Raises:
        NoSignalError: After the last round, on all processes.
    """
    needed = groups_per_process * processes
    made: list[Group] = []  # of this process
    flags: list[bool] = []  # of all processes, by round, process and place
    owners: list[int] = []
    rounds = 0
    while sum(flags) < needed and rounds < max_rounds:
        n = groups_per_process
        if rounds:
            rate = max(sum(flags) / len(flags), _LEAST_RATE)
            n = min(n, math.ceil((needed - sum(flags)) / rate / processes))
        groups = generate(n)
        made += groups
        flags += gather_flags([keep(group) for group in groups])
        owners += [process for process in range(processes) for _ in range(n)]
        rounds += 1
    with_signal = [i for i, flag in enumerate(flags) if flag]
    if len(with_signal) < needed and not train_on_incomplete:
        raise NoSignalError(
            f"Dynamic sampling: after {rounds} rounds of generation (`max_generation_rounds`) only {len(with_signal)} "
            f"of {len(flags)} prompts have completions that differ in reward, and a rollout needs {needed}. They "
            "are too easy or too hard for the policy, or the reward reads none of its answers: look at the completions "
            '(`log_completions`). `dynamic_sampling_incomplete="train"` goes on with what there is.'
        )
    without = [i for i, flag in enumerate(flags) if not flag]
    chosen = sorted(with_signal[:needed] + without[: max(needed - len(with_signal), 0)])
    own = iter(made)
    held = {i: next(own) for i, owner in enumerate(owners) if owner == rank}
    have = Counter(owners[i] for i in chosen)
    groups = [held[i] for i in chosen if i in held]
    if any(have[process] != groups_per_process for process in range(processes)):
        moved = exchange(groups[groups_per_process:])
        first = sum(max(groups_per_process - have[process], 0) for process in range(rank))
        groups = groups[:groups_per_process] + moved[first : first + max(groups_per_process - have[rank], 0)]
    return Rollout(groups, rounds, len(flags), len(with_signal), chosen[-1] + 1)
