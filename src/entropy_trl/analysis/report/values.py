"""Sentences, notes and settings as the report writes them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from entropy_trl.analysis.secrets import masked


def sentence(parts: Iterable[str]) -> str:
    """The parts as one sentence."""
    return "; ".join(parts) + "."


def gathered(notes: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each note once, with the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for note, run in notes:
        runs.setdefault(note, []).append(run)
    return [(note, ", ".join(of_note)) for note, of_note in runs.items()]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """The settings with dotted names, values as text; secrets are masked."""
    for key, stored in config.items():
        value = masked(str(key), stored)
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)
