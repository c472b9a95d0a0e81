"""How every command reads its options: hyphens and underscores are one, and each help text has the default."""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any

from entropy_trl.cli.errors import UsageError


_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+|inf|nan)([eE][+-]?\d+)?")


def one_spelling(argv: Sequence[str], options: Iterable[str]) -> list[str]:
    """Spell each option of a command line as the parser does, and join a negative number to its option.

    Args:
        argv (`Sequence[str]`): The command line.
        options (`Iterable[str]`): The parser's option strings, such as `--max_steps`.

    Returns:
        `list[str]`: `["--max_steps=-1e3"]` for `["--max-steps", "-1e3"]`: argparse takes `-1e3` for an option.
    """
    known = {option: option for option in options}
    underscored = {option.replace("-", "_"): option for option in known}
    spelled: list[str] = []
    for argument in argv:
        if not argument.startswith("--"):
            if _NEGATIVE.fullmatch(argument) and spelled and re.fullmatch(r"--[\w-]+", spelled[-1]):
                spelled[-1] += f"={argument}"
            else:
                spelled.append(argument)
            continue
        name, equals, value = argument.partition("=")
        spelled.append(known.get(name) or underscored.get(name.replace("-", "_"), name))
        spelled[-1] += equals + value
    return spelled


class HelpFormatter(argparse.HelpFormatter):
    """Help that shows one spelling of each option, and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = dict.fromkeys(re.sub(r"(?<=\w)-(?=\w)", "_", option) for option in action.option_strings)
        spelled, action.option_strings = action.option_strings, [*shown]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spelled

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        takes_value = action.option_strings and action.nargs != 0
        if not takes_value or action.required or re.search(r"\bdefault\b", text, re.IGNORECASE):
            return text
        start, _, end = text.rpartition(" (")
        if start and end.endswith(")"):  # a default that depends on something, or a number
            return f"{start} (default: {end}"
        default = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else action.default
        return f"{text} (default: {str(default or 'none').replace('%', '%%') if default != 0 else 0})"


class CommandParser(argparse.ArgumentParser):
    """The parser of a command's options. A mistake in them is told like every other one."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(one_spelling(args, self._option_string_actions), namespace)

    def error(self, message: str) -> Any:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists the options.")
