"""Countdown in words: three numbers and a target. Every problem has several right answers.

    python examples/smollm2/countdown.py data/smollm2        # writes warm_up.jsonl, train.jsonl, tune.jsonl, test.jsonl

    Make 43 from 3, 5 and 8: 8 * 5 + 3

An answer uses each number once. It is right if its value is the target; products come before sums.

The four files have no problem in common: a hash of the problem decides which file it belongs to.
`train_rows` and `countdown_reward` are what `entropy-trl train` reads, by their dotted paths.
"""

import argparse
import itertools
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset


# How many numbers a problem has, the largest of them and the largest target.
COUNT = 3
LARGEST_NUMBER = 20
LARGEST_TARGET = 99

# Of 20 hash values: those whose problems belong to a file, and how many of them it gets (None: all).
FILES: dict[str, tuple[range, int | None]] = {
    "warm_up": (range(0, 6), None),
    "train": (range(6, 16), None),
    "tune": (range(16, 18), 256),
    "test": (range(18, 20), 512),
}

_EXPRESSION = re.compile(r"\d{1,3}(?: [+*-] \d{1,3})*")


def value(numbers: Sequence[int], operators: Sequence[str]) -> int:
    """The value of `numbers[0] operators[0] numbers[1] ...`; products come first."""
    total, sign, product = 0, 1, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total, sign, product = total + sign * product, 1 if operator == "+" else -1, number
    return total + sign * product


def format_prompt(numbers: Sequence[int], target: int) -> str:
    """The problem in words. The completion begins after the colon."""
    *most, last = map(str, numbers)
    return f"Make {target} from {', '.join(most)} and {last}:"


def solutions(numbers: Sequence[int], target: int) -> list[str]:
    """All right answers, as texts, in a fixed order."""
    return sorted(
        {
            " ".join([str(order[0]), *(f"{o} {n}" for o, n in zip(operators, order[1:], strict=True))])
            for order in set(itertools.permutations(numbers))
            for operators in itertools.product("+-*", repeat=len(numbers) - 1)
            if value(order, operators) == target
        }
    )


def parts(text: str) -> tuple[list[int], list[str]] | None:
    """The numbers and operators of an expression; None if the text is no expression."""
    words = text.strip()
    if not _EXPRESSION.fullmatch(words):
        return None
    return [int(word) for word in words.split(" ")[::2]], words.split(" ")[1::2]


def is_right(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether a completion is an expression that uses each number once and equals the target."""
    found = parts(text)
    return found is not None and Counter(found[0]) == Counter(numbers) and value(*found) == target


def form(text: str) -> str | None:
    """An expression with factors and terms in order, so that `3 + 8 * 5` is `5 * 8 + 3`; None if it is none."""
    if parts(text) is None:
        return None
    terms = re.findall(r"([+-]?) ?(\d+(?: \* \d+)*)", text.strip())
    return " ".join(sorted(f"{sign or '+'}{'*'.join(sorted(term.split(' * ')))}" for sign, term in terms))


def countdown_reward(
    completions: Sequence[str], numbers: Sequence[Sequence[int]], target: Sequence[int], **kwargs: Any
) -> list[float]:
    """1.0 for each right answer, else 0.0."""
    rows = zip(completions, numbers, target, strict=True)
    return [float(is_right(completion, row, goal)) for completion, row, goal in rows]


def problems(file: str) -> list[dict[str, Any]]:
    """All problems of one file that can be solved, in an order that is always the same."""
    hashes, _ = FILES[file]
    found = []
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST_NUMBER + 1), COUNT):
        orders = set(itertools.permutations(numbers))
        signs = itertools.product("+-*", repeat=COUNT - 1)
        targets = {value(order, operators) for operators in signs for order in orders}
        for target in sorted(targets & set(range(1, LARGEST_TARGET + 1))):
            prompt = format_prompt(numbers, target)
            if zlib.crc32(prompt.encode()) % 20 in hashes:
                found.append({"prompt": prompt, "numbers": list(numbers), "target": target})
    random.Random(file).shuffle(found)
    return found


def rows(file: str) -> list[dict[str, Any]]:
    """The problems of a file; those of the warm-up have a `completion`, drawn from all right answers."""
    result = problems(file)[: FILES[file][1]]
    if file == "warm_up":
        generator = random.Random(0)
        for row in result:
            row["completion"] = " " + generator.choice(solutions(row["numbers"], row["target"]))
    return result


def train_rows() -> Dataset:
    """The problems to train on."""
    return Dataset.from_list(rows("train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write the four files to")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        lines = [json.dumps(row) for row in rows(file)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{folder / file}.jsonl: {len(lines):,} problems")


if __name__ == "__main__":
    main()
