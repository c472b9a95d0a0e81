"""Overlap of training problems with evaluation problems."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from entropy_trl.data.answers import number_text
from entropy_trl.data.loading import load_splits
from entropy_trl.data.options import RowOptions
from entropy_trl.data.reading import HAN, Reading, prompt_text
from entropy_trl.templates import recognise


# A word of an n-gram: letters and digits without case or punctuation, so that `$n$` and `n` are one; a Han character.
_WORD = re.compile(rf"[a-z0-9]+|{HAN.pattern}")
_NGRAM = 13


class Benchmarks:
    """The n-grams of evaluation problems, and which of the problems a training problem overlaps."""

    def __init__(self, files: Sequence[str], threshold: float):
        self.threshold = threshold
        self.problems: list[tuple[str, int]] = []  # the file and the row of each
        self._sizes: list[int] = []
        self._having: dict[str, list[int]] = defaultdict(list)
        self._same: dict[str, list[int]] = defaultdict(list)
        for file in dict.fromkeys(files):
            loaded = load_splits(file, None, streaming=False)
            rows = loaded["test" if "test" in loaded else next(iter(loaded))]
            column = Reading.of(rows.column_names, file, RowOptions()).prompt
            for row, prompt in enumerate(rows[column]):
                prompt = number_text(prompt)
                known = recognise(prompt) if prompt else None
                self._add(file, row, prompt_text(prompt) if known is None else known[1])

    def _add(self, file: str, row: int, problem: str) -> None:
        index = len(self.problems)
        self.problems.append((file, row))
        words = _WORD.findall(problem.lower())
        ngrams = _ngrams(words)
        self._sizes.append(len(ngrams))
        for ngram in ngrams:
            self._having[ngram].append(index)
        if words:
            self._same["".join(words)].append(index)

    def overlaps(self, problem: str) -> list[int]:
        """The evaluation problems that a training problem overlaps, as indices of `problems`."""
        if not self.problems:
            return []
        words = _WORD.findall(problem.lower())
        shared = Counter(index for ngram in _ngrams(words) for index in self._having.get(ngram, ()))
        found = {index for index, number in shared.items() if number >= self.threshold * self._sizes[index]}
        return sorted(found.union(self._same.get("".join(words), ())))

    def names(self, hit: Iterable[int]) -> list[str]:
        return [f"{file}:{row}" for file, row in (self.problems[index] for index in hit)]

    def summary(self, hits: Iterable[Sequence[int]]) -> list[str]:
        """A line for each file: how many of its problems are overlapped, and by how many training rows."""
        hits = list(hits)
        totals = Counter(file for file, _ in self.problems)
        found = Counter(file for file, _ in {self.problems[index] for hit in hits for index in hit})
        rows = Counter(file for hit in hits for file in {self.problems[index][0] for index in hit})
        return [f"{file}: {found[file]} of {totals[file]} problems, by {rows[file]} rows" for file in totals]


def _ngrams(words: Sequence[str]) -> set[str]:
    return {" ".join(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)}
