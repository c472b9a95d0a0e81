"""`settings.json` in a run's folder: the configuration, versions, command and commit that a run was made with."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_trl._version import __version__
from entropy_trl.analysis.secrets import masked
from entropy_trl.files import write_json


SETTINGS = "settings.json"

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "deepspeed")
#: Seconds that git may take, on a file system that is slow. The run is worth more than its commit.
_GIT_TIMEOUT = 10


class RunSettings(TrainerCallback):
    """Write `settings.json` to the run's folder when training begins, on the first process, in one move.

    The file has the fields of the configuration, and beside them `versions`, `command` and `git_commit` (of the folder
    that the command runs in; `-dirty` at its end stands for changes that are not committed). Keys, tokens and passwords
    are masked, and the user's home folder is `~`: the file goes to the Hub with the model.

    Args:
        command (`Sequence[str]`, *optional*): The command line, word by word. Defaults to that of the process.
        more (`Mapping[str, Any]`, *optional*): Settings that are not in the configuration, such as the data's.
    """

    def __init__(self, command: Sequence[str] | None = None, more: Mapping[str, Any] | None = None):
        self._command = list(sys.argv if command is None else command)
        self._more = dict(more or {})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            file = Path(str(args.output_dir)) / SETTINGS
            write_json(file, run_settings({**self._more, **args.to_dict()}, self._command))


def run_settings(options: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """The settings of a run as JSON values, without secrets.

    Args:
        options (`Mapping[str, Any]`): The configuration.
        command (`Sequence[str]`): The command line, word by word.
    """
    values: dict[str, Any] = json.loads(json.dumps(dict(options), default=_named))
    settings = {name: masked(name, value) for name, value in values.items()}
    settings |= {
        "versions": _versions(),
        "command": shlex.join(_masked_words(command)),
        "git_commit": _git_commit(),
    }
    shortened: dict[str, Any] = _without_home(settings)
    return shortened


def _masked_words(command: Sequence[str]) -> list[str]:
    """The words of a command line, with the values of secret options masked, also inside JSON."""
    words: list[str] = []
    option = ""
    for word in command:
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            option = name.lstrip("-").replace("-", "_")
            words.append(f"{name}={_masked_word(option, value)}" if equals else word)
        else:
            words.append(_masked_word(option, word))
    return words


def _masked_word(option: str, word: str) -> str:
    if word.startswith("{"):
        try:
            return json.dumps(masked(option, json.loads(word)))
        except json.JSONDecodeError:
            pass  # text with a brace
    return str(masked(option, word))


def _versions() -> dict[str, str]:
    found = {"entropy_trl": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the current folder; None outside a repository, without git, or before the first commit."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _without_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_home(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = str(Path.home())
    return value.replace(f"{home}/", "~/") if isinstance(value, str) and home != "/" else value


def _named(value: Any) -> str:
    """A value that JSON does not have, such as a dtype, as text."""
    return str(value)
