"""Streams: the same in one pass, keeping a digest of each row read."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import datasets

from entropy_trl.data.answers import normal, normal_answer
from entropy_trl.data.dropped import (
    LATER_CONFLICT,
    NAMED_ROWS,
    OVERLAP,
    REPEAT,
    TOO_LONG,
    Dropped,
    dropped_line,
    write_lines,
)
from entropy_trl.data.loading import UNREADABLE, cause
from entropy_trl.data.options import RowOptions
from entropy_trl.data.overlap import Benchmarks
from entropy_trl.data.reading import Reading, digest, prompt_length


logger = logging.getLogger(__name__)

# A stream is judged by so many different rows, or by all it has: those at its start before anything is trained.
_FIRST_ROWS = 1000


def prepare_stream(
    rows: datasets.IterableDataset,
    columns: list[str],
    name: str,
    reading: Reading,
    benchmarks: "Benchmarks",
    options: RowOptions,
) -> datasets.IterableDataset:
    stream = _Stream(rows, columns, name, reading, benchmarks, options)
    for _ in stream(_FIRST_ROWS):  # a wrong column or template is told before training
        pass
    return datasets.IterableDataset.from_generator(stream)


class _Stream:
    """Generates the rows of a stream that can be used. Each pass begins at the start, and knows of no other.

    A generator is one shard, whatever its source has. So each process that takes a part of the stream reads all of it
    and finds the same repeats, and a pass that is resumed skips the rows that have been used.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        columns: Sequence[str],
        name: str,
        reading: Reading,
        benchmarks: "Benchmarks",
        options: RowOptions,
    ):
        self._rows, self._name, self._reading, self._benchmarks = rows, name, reading, benchmarks
        self._others = [column for column in columns if column not in reading.consumed]
        self._options = options
        self._told = -1  # the last row that is reported on, by whichever pass
        self._summed_up = False
        if options.dropped_rows_file is not None:
            write_lines(options.dropped_rows_file, [])

    def __call__(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows to train on, out of all or the first `limit` that there are."""
        dropped, digests, hits = Dropped(self._name), Digests(), []
        for index, row in enumerate(islice(self._source(), limit)):
            dropped.count += 1
            text = repr([row.get(column) for column in self._reading.columns])
            if digests.put(digest(text), 0) is not None:
                dropped.repeats += 1
                continue
            dropped.different += 1
            read = self._reading.row(row)
            reason, problem = read.pop("dropped"), read.pop("problem")
            reason = reason or self._repeat(digests, problem, read.get("solution", ""))
            hit = [] if reason else self._benchmarks.overlaps(problem)
            reason = reason or (OVERLAP if hit else "") or self._too_long(read["prompt"])
            if reason == OVERLAP:
                hits.append(hit)
            if reason:
                self._drop(dropped, reason, index, hit)
            if dropped.different >= _FIRST_ROWS:
                dropped.check(self._options.max_bad_rows)
            if not reason:
                yield {column: row.get(column) for column in self._others} | read
        if limit is None or dropped.count < limit:
            dropped.overlaps = self._benchmarks.summary(hits)
            dropped.check(self._options.max_bad_rows)
            dropped.check_rest()
            if dropped.total and not self._summed_up:
                logger.warning("%s", dropped)
            self._summed_up = True

    def _source(self) -> Iterator[dict[str, Any]]:
        # `iter` reads all shards, where iterating in a worker process of a data loader would read that worker's only.
        count = 0
        try:
            for batch in self._rows.iter(batch_size=_FIRST_ROWS):
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))
                    count += 1
        except UNREADABLE as error:
            raise ValueError(
                f"Data set {self._name!r} cannot be read after row {count}: {cause(error)}. Without streaming, "
                "integers beyond 64 bits and columns of several types are read (dataset_streaming false)."
            ) from error

    def _repeat(self, digests: "Digests", problem: str, answer: str) -> str:
        """Why a row with this problem and answer is left out after those before it, if it is."""
        answer_digest = digest(normal_answer(answer))
        before = digests.put(digest("problem:" + normal(problem)), answer_digest)
        return "" if before is None else REPEAT if before == answer_digest else LATER_CONFLICT

    def _too_long(self, prompt: Any) -> str:
        limit = self._options.max_prompt_length
        if limit is None or prompt_length(prompt, self._options.tokenizer, self._options.chat_template_kwargs) <= limit:
            return ""
        return TOO_LONG

    def _drop(self, dropped: "Dropped", reason: str, row: int, hit: Sequence[int]) -> None:
        dropped.add_one(reason, row)
        if row <= self._told:
            return  # by an earlier pass
        self._told = row
        if reason != REPEAT and dropped.numbers[reason] <= NAMED_ROWS:
            logger.warning("Data set %r: row %d is dropped: rows that %s.", self._name, row, reason)
        if self._options.dropped_rows_file is not None:
            line = dropped_line(row, reason, self._benchmarks.names(hit))
            write_lines(self._options.dropped_rows_file, [line], mode="a")


class Digests:
    """A map of digests to digests, of 64 bits each: 16 bytes a slot, with a third to two thirds of the slots in use."""

    def __init__(self) -> None:
        self._used = 0
        self._make(1024)

    def _make(self, slots: int) -> None:
        self._keys, self._values = (array("Q", bytes(8 * slots)) for _ in range(2))

    def put(self, key: int, value: int) -> int | None:
        """Sets what is not there yet. Returns what was there, None if nothing."""
        key = key or 1  # 0 is an empty slot
        slot = self._slot(key)
        if self._keys[slot]:
            return self._values[slot]
        self._keys[slot], self._values[slot] = key, value
        self._used += 1
        if 3 * self._used > 2 * len(self._keys):
            keys, values = self._keys, self._values
            self._make(2 * len(keys))
            for key, value in zip(keys, values, strict=True):
                if key:
                    slot = self._slot(key)
                    self._keys[slot], self._values[slot] = key, value
        return None

    def _slot(self, key: int) -> int:
        last = len(self._keys) - 1
        slot = key & last
        while self._keys[slot] and self._keys[slot] != key:
            slot = (slot + 1) & last
        return slot
