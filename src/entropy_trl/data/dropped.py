"""The rows that are left out: reasons, counts, names."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from entropy_trl.files import write_output
from entropy_trl.templates import ANSWER_FORMATS


NO_PROMPT = "have no prompt"
MIXED_PROMPT = "have a prompt of another kind than the first row has: one is plain text, the other a chat"
NO_ANSWER = "have no answer"
STRUCTURE = "have an answer that is a list of several values or a structure: name one field with solution_column"
NOT_TEXT = "have an answer that is no text and no number, but a date, a time or another type"
INEXACT = "have an integer answer that is stored as a float, which has lost digits"
NO_RESULT = "have an answer that is no result, but a placeholder or a worked solution"
NOT_ACCEPTED = "have an answer that math_reward cannot read: it would be wrong as its own answer"
BAD_FORMAT = f"have an answer_format that is none of {', '.join(ANSWER_FORMATS)}"
NO_PROBLEM = "have a prompt with instructions of an unknown wording, which prompt_template cannot replace"
TOO_LONG = "have a prompt longer than max_prompt_length"
_BAD_ANSWERS = (NO_ANSWER, STRUCTURE, NOT_TEXT, INEXACT, NO_RESULT, NOT_ACCEPTED)
BAD = (NO_PROMPT, MIXED_PROMPT, *_BAD_ANSWERS, BAD_FORMAT, NO_PROBLEM, TOO_LONG)
OTHER_LANGUAGE = "are in another language"
OVERLAP = "overlap an evaluation problem"
REPEAT = "repeat an earlier row's prompt and answer"
CONFLICT = "have a prompt that has another answer in another row"
LATER_CONFLICT = "have a prompt that has another answer in an earlier row, which is taken"

NAMED_ROWS = 5


class Dropped:
    """The rows left out of a data set, by reason."""

    def __init__(self, name: str, count: int = 0, different: int = 0):
        self.name, self.count, self.different = name, count, different
        self.repeats = 0  # equal rows, which are not listed: DAPO-Math-17k has 1.8 million
        self.rows: dict[str, list[int]] = {}  # of a stream only those that are named
        self.numbers: Counter[str] = Counter()
        self.overlaps: list[str] = []

    def add(self, reason: str, rows: Iterable[int]) -> None:
        self.rows[reason] = [int(row) for row in rows]
        self.numbers[reason] = len(self.rows[reason])

    def add_one(self, reason: str, row: int) -> None:
        self.numbers[reason] += 1
        if self.numbers[reason] <= NAMED_ROWS:
            self.rows.setdefault(reason, []).append(row)

    @property
    def total(self) -> int:
        return self.repeats + self.numbers.total()

    def _line(self, reason: str) -> str:
        rows, number = self.rows.get(reason, []), self.numbers[reason]
        named = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if number > NAMED_ROWS else "")
        number += self.repeats if reason == REPEAT else 0
        return f"{number} {reason}" + (f" ({'rows' if len(rows) > 1 else 'row'} {named})" if rows else "")

    def __str__(self) -> str:
        order = [REPEAT, CONFLICT, LATER_CONFLICT, *BAD, OTHER_LANGUAGE, OVERLAP]
        given = [reason for reason in order if reason in self.rows or (reason == REPEAT and self.repeats)]
        lines = [f"Data set {self.name!r}: kept {self.count - self.total} of {self.count} rows. Of the others"]
        for reason in given:
            lines.append(f"  {self._line(reason)}")
            lines += [f"    {line}" for line in self.overlaps if reason == OVERLAP]
        return "\n".join(lines)

    def check(self, max_bad_rows: float) -> None:
        """Raises ValueError if too many rows cannot be used."""
        bad = [reason for reason in BAD if reason in self.rows]
        number = sum(self.numbers[reason] for reason in bad)
        # The number as written: 0.29 of 100 rows are 29, although the product of the floats is 28.999.
        if number > Fraction(str(max_bad_rows)) * self.different:
            raise ValueError(
                f"Data set {self.name!r}: {number} of {self.different} different rows cannot be used, more than "
                f"max_bad_rows ({max_bad_rows:g} of them) allows: {'; '.join(map(self._line, bad))}."
            )

    def check_rest(self) -> None:
        """Raises ValueError if no row is left."""
        if self.total == self.count:
            raise ValueError(f"No row is left. {self}." if self.count else f"Data set {self.name!r} has no rows.")

    def write(self, file: str, overlaps: Mapping[int, Sequence[str]]) -> None:
        lines = [dropped_line(row, reason, overlaps.get(row, ())) for reason, rows in self.rows.items() for row in rows]
        write_lines(file, sorted(lines, key=lambda line: int(line["row"])))


def dropped_line(row: int, reason: str, overlaps: Sequence[str]) -> dict[str, Any]:
    return {"row": row, "reason": reason} | ({"overlaps": list(overlaps)} if overlaps else {})


def write_lines(file: str, lines: Iterable[Mapping[str, Any]], mode: Literal["w", "a"] = "w") -> None:
    path = Path(file).expanduser()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if mode == "w":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, text)
        return
    with path.open("a", encoding="utf-8") as opened:
        opened.write(text)
