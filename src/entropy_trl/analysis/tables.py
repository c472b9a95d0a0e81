"""Numbers and tables as all commands, pages and cards write them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np


#: Stands where there is no value.
NONE = "\u2013"

#: Rows that a table of a long series has.
ROWS = 12

Item = TypeVar("Item")


def number(value: float | None, form: str | None = None) -> str:
    """A number as text.

    Args:
        value (`float`, *optional*): The number; None and NaN give [`NONE`].
        form (`str`, *optional*): A format specification. Defaults to three digits that count, or all before the decimal
            point.
    """
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    value += 0.0  # -0.0 becomes 0.0
    if form is not None:
        return f"{value:{form}}"
    if value == 0 or abs(value) >= 99.95:  # three digits of 99.95 are "100."
        # A number of hundreds of digits would fill the page.
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:#.3g}"


def spread(items: Sequence[Item], rows: int = ROWS) -> list[Item]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= rows:
        return list(items)
    return [items[round(i * (len(items) - 1) / (rows - 1))] for i in range(rows)]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column starts at the left, the others end at the right."""
    lines = [[cell if cell != NONE else "-" for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(_padded(line, widths)).rstrip() for line in lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = False) -> str:
    """A table in Markdown.

    Args:
        head (`Sequence[str]`): The names of the columns.
        rows (`Sequence[Sequence[str]]`): The cells; `|` in them is escaped.
        aligned (`bool`, *optional*): Whether the columns line up as text too, all but the first at the right.
    """
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (head, *rows)]
    rule = ["---"] * len(head)
    if aligned:
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
        lines = [_padded(line, widths) for line in lines]
        rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


def plain(value: Any, digits: int | None = None) -> Any:
    """The value for JSON, which has no arrays, no NaN and no infinity: null stands for the last two.

    Args:
        value (`Any`): A structure of mappings, sequences, arrays and numbers.
        digits (`int`, *optional*): Digits of a number that are kept. Defaults to all.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), digits)
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value
