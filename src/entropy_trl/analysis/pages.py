"""What makes text from logs and records safe to show: the template engine of all pages, and text for a terminal."""

import unicodedata
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


#: Characters that a terminal or a page may obey instead of show: controls (ESC, C1), marks that turn the direction of
#: writing, lone surrogates, line separators, and what has no meaning yet.
_HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # they belong to words and emoji, and turn nothing


def printable(text: str, keep: str = "") -> str:
    """Replace each character that cannot be seen, or turns the direction of writing, by a sign for it.

    Args:
        text (`str`): Any text.
        keep (`str`): Characters to keep all the same, such as line breaks.
    """
    return "".join(
        c if c in keep or c in _JOINERS or unicodedata.category(c) not in _HIDDEN else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def terminal(text: str) -> str:
    """The text of one or more lines as it may be printed: names from a log cannot send commands to the terminal."""
    return printable(text, keep="\n")


@cache
def environment() -> Environment:
    """The template engine of every page: it escapes all values, and templates are the only source of tags."""
    return Environment(
        loader=PackageLoader("entropy_trl.analysis", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )


def style_sheet(name: str) -> str:
    """A style sheet beside the templates."""
    engine = environment()
    assert engine.loader is not None
    source, _, _ = engine.loader.get_source(engine, name)
    return source
