"""What `entropy-trl`, `python -m entropy_trl` and `train.py` run: one way through every command.

A command is a module with four names: `DESCRIPTION`; `add_arguments(parser)`; `prepare(options)`, which reads and
checks what the user gave; and `run(prepared, options)`, which does the work and returns the exit code. An error of
`prepare` over what the user gave is one line on stderr and exit code 2.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from entropy_trl._version import __version__
from entropy_trl.cli.checks import check_file
from entropy_trl.cli.errors import UsageError, is_first_rank, tell, usage_errors
from entropy_trl.cli.interruption import Interrupted, interruptible, say
from entropy_trl.cli.parser import CommandParser
from entropy_trl.cli.train import make_parser, read_train_args
from entropy_trl.cli.train_help import train_help


#: The commands: module, and what it does.
COMMANDS = {
    "train": ("entropy_trl.cli.train", "train a model with entropy control"),
    "evaluate": ("entropy_trl.evaluation.command", "score models on maths benchmarks by the paper's protocol"),
    "plan": ("entropy_trl.plan.command", "compute a run's memory, time and communication on paper"),
    "law": (
        "entropy_trl.analysis.law.command",
        "fit reward against entropy, R = -a exp(H) + b, to logs of any trainer",
    ),
    "covariance": (
        "entropy_trl.analysis.covariance.command",
        "show which tokens drive a run's entropy, from its token records",
    ),
    "report": (
        "entropy_trl.analysis.report.command",
        "write a page on one or more runs: curves, entropy law, covariance, settings, results",
    ),
    "quickstart": (
        "entropy_trl.quickstart.command",
        "see entropy collapse and its cure on an embedded task, on a CPU, in minutes",
    ),
    "env": ("entropy_trl.cli.env", "print versions, devices and optional packages, for a bug report"),
}

#: Options of commands that name a file to write. It is written last, so it is checked first.
_WRITTEN_FILES = ("json", "html", "figure")

#: Exit code of a command whose reader closed the pipe: what a shell reports after SIGPIPE.
_SIGPIPE = 141


class Command(Protocol):
    """What a command's module has."""

    DESCRIPTION: str

    @property
    def add_arguments(self) -> Callable[[argparse.ArgumentParser], None]: ...
    @property
    def prepare(self) -> Callable[[argparse.Namespace], Any]: ...
    @property
    def run(self) -> Callable[[Any, argparse.Namespace], int]: ...


def main(argv: Sequence[str] | None = None, prog: str = "entropy-trl") -> int:
    """Run the console command `entropy-trl`. Returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Entropy control for reinforcement learning with verifiable rewards, on Hugging Face TRL.",
        epilog="commands:\n" + "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"entropy-trl {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="what to do; `entropy-trl COMMAND --help` lists its options")
    command = parser.parse_args(argv[:1]).command
    try:
        exit_code = _run_guarded(command, argv[1:], f"entropy-trl {command}")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return _SIGPIPE
    return exit_code


def train_main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Train as the command line and its config file say. Returns the exit code, as [`main`] does."""
    return _run_guarded("train", list(sys.argv[1:] if argv is None else argv), prog)


def _run_guarded(name: str, argv: Sequence[str], prog: str) -> int:
    """Run a command. Returns its exit code, also after Ctrl-C (130) and SIGTERM (143)."""
    try:
        with interruptible():
            return _run_command(name, argv, prog)
    except Interrupted as stop:
        return say(stop, prog, ".")


def _run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Run a command. Returns its exit code, 2 for a mistake of the user's."""
    if not is_first_rank():  # what every rank would say, the first one says
        logging.getLogger("entropy_trl").setLevel(logging.ERROR)
    # The user's own code runs while a training is prepared. A bug in it keeps its traceback.
    mistakes = () if name == "train" else (ValueError, OSError, ImportError)
    try:
        command = _load(name)
        parser = CommandParser(prog=prog, description=command.DESCRIPTION, add_help=name != "train")
        command.add_arguments(parser)
        options = _parse(name, parser, argv)
        for option in _WRITTEN_FILES:
            if isinstance(path := vars(options).get(option), Path):
                check_file(path, f"--{option}")
        options.prog, options.argv = prog, argv
        with usage_errors(*mistakes):
            prepared = command.prepare(options)
    except UsageError as error:
        return tell(error, prog)
    return command.run(prepared, options)


def _load(name: str) -> Command:
    with usage_errors(ImportError):  # matplotlib
        command: Command = import_module(COMMANDS[name][0])
    return command


def _parse(name: str, parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command. Those of a training configuration are `training_args` and so on."""
    if name not in ("train", "plan"):
        return parser.parse_args(argv)
    options, rest = parser.parse_known_args(argv)
    gpus = None
    if name == "plan":  # this machine may have no GPU, where bf16 is refused unless the CPU is asked for
        rest, gpus = [*rest, "--use_cpu", "true"], options.gpus
    train_parser = make_parser(parser.prog, gpus, needs_sources=name == "train")
    if name == "train" and (options.help or options.help_all):
        print(train_help(parser, train_parser, everything=options.help_all), end="")
        raise SystemExit(0)
    parsed = read_train_args(train_parser, rest)
    options.values, options.defaults = train_parser.values, train_parser.defaults
    options.script_args, options.training_args, options.model_args, options.mixture_args = parsed
    return options
