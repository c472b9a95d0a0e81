"""The names under which the mean reward of each of the data's sources is logged."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any


logger = logging.getLogger(__name__)

MOST_SOURCES = 20
"""Sources that get a metric each. Each is one more exchange between processes a rollout, and one more chart."""

_REST = "other"
_APART = "source/"


class SourceNames:
    """The names of sources: up to 20 have their own, and all others are `other`.

    The first call's most frequent sources come first, and a source keeps its name. So a curve does not change its
    meaning in the course of a training.

    Args:
        reserved (`Sequence[str]`): Names of other metrics. A source of that name becomes `source/<name>`, so that
            neither mixes into the other.
    """

    def __init__(self, reserved: Sequence[str]):
        self._reserved = {*reserved, _REST}
        self._known: set[str] = set()
        self._told = False

    def of(self, sources: Sequence[Any]) -> list[str | None]:
        """Return the name of each row's source, None for a row without one."""
        texts = [None if source is None else str(source) for source in sources]
        for text, _ in Counter(text for text in texts if text is not None).most_common():
            if len(self._known) == MOST_SOURCES:
                break
            self._known.add(text)
        names = [None if text is None else self._name(text) for text in texts]
        if _REST in names and not self._told:
            self._told = True
            logger.warning(
                "The data has more than %d sources (column 'data_source' or 'source'): %d have a metric each, and the "
                "mean reward of the others is math_reward/%s.",
                MOST_SOURCES,
                MOST_SOURCES,
                _REST,
            )
        return names

    def _name(self, text: str) -> str:
        if text not in self._known:
            return _REST
        return _APART + text if text in self._reserved or text.startswith(_APART) else text
