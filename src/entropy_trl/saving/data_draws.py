"""Random numbers that the data draw while they are read: a resumed run draws them again as they were.

accelerate reads one batch ahead. A checkpoint has the state of the random generators after that batch was read; a
resumed run reads the batch again, and needs the state from before.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from entropy_trl.files import write_text
from entropy_trl.rollout.random_state import RandomState, random_state, restore_random_state


logger = logging.getLogger(__name__)


def draws_file(checkpoint: str | Path, rank: int) -> Path:
    """Where process `rank` keeps the random state that the batch read ahead was read with."""
    return Path(checkpoint) / f"data_rank{rank}.json"


def save_random_state(path: Path, state: RandomState) -> None:
    """Write a state as JSON, for [`load_random_state`]."""
    python, (name, keys, *rest), torch_state = state
    stored = {"python": python, "numpy": [name, keys.tolist(), *rest], "torch": bytes(torch_state.tolist()).hex()}
    write_text(path, json.dumps(stored) + "\n")


def load_random_state(path: Path) -> RandomState:
    """Read what [`save_random_state`] wrote.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        stored = json.loads(path.read_text())
        version, internal, gauss = stored["python"]
        name, keys, *rest = stored["numpy"]
        torch_state = torch.tensor(list(bytes.fromhex(stored["torch"])), dtype=torch.uint8)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from another checkpoint.") from error
    return (version, tuple(internal), gauss), (name, np.array(keys, dtype=np.uint32), *rest), torch_state


def _same(a: RandomState, b: RandomState) -> bool:
    numpy = all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    return bool(a[0] == b[0] and numpy and torch.equal(a[2], b[2]))


def warn_of_workers(dataset: Any) -> None:
    """Say that transforms in loader workers are not repeated: their generators begin anew where a run resumes."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        logger.warning(
            "The data have a transform and are read by workers (dataloader_num_workers): random numbers that it draws "
            "are not those of a run that was not interrupted. Set dataloader_num_workers to 0 for an exact resume."
        )


class WatchedReads:
    """A collator that sees with which random state each batch of training is read, in the process that reads it.

    Args:
        collate (`Callable`): The collator itself.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate
        self._before: RandomState | None = None  # while a batch is asked for: the state that the next read starts from
        self._ahead: tuple[RandomState, RandomState] | None = None  # before and after the read of the batch read ahead
        self._after_first: Callable[[], None] | None = None

    def __call__(self, rows: list[Any]) -> Any:
        if self._before is not None:
            self._ahead = self._before, random_state()
            if self._after_first is not None:
                after_first, self._after_first = self._after_first, None
                after_first()
            self._before = random_state()
        return self.collate(rows)

    def resume(self, file: Path, after_first: Callable[[], None]) -> None:
        """Read the first batch of a resumed run with the state in a file, if there is one, and call `after_first`."""
        self._after_first = after_first
        if file.exists():
            restore_random_state(load_random_state(file))
            return

        def warn_if_it_drew() -> None:
            self.warn_if_random(f"{file.parent} does not have the random state of the next batch")
            after_first()

        self._after_first = warn_if_it_drew

    def warn_if_random(self, why: str) -> None:
        """Say that a resumed run is not exact if the latest read drew random numbers."""
        if self.state_to_keep is not None:
            logger.warning(
                f"Reading the data draws random numbers, and {why}: they are not those of a run that was not "
                "interrupted."
            )

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass on the batches of training."""
        while True:
            self._ahead, self._before = None, random_state()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._before = None
            yield batch

    @property
    def state_to_keep(self) -> RandomState | None:
        """The state that the batch read ahead was read with, if reading it drew random numbers."""
        return None if self._ahead is None or _same(*self._ahead) else self._ahead[0]
