"""The command `entropy-trl covariance`: its options, and the files that it reads and writes."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from entropy_trl.analysis.covariance.records import StepRecords, read_records
from entropy_trl.analysis.covariance.result import Results, covariance_of
from entropy_trl.analysis.covariance.text import report
from entropy_trl.analysis.covariance.tokens import render_completions
from entropy_trl.analysis.pages import terminal
from entropy_trl.analysis.tables import plain
from entropy_trl.files import write_output


DESCRIPTION = (
    "Analyse the token records of a run as arXiv 2505.22617 does: the covariance by quantile, over training, against "
    "the entropy change and by difficulty, and which tokens carry it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `entropy-trl covariance`."""
    parser.add_argument("run", help="output folder of a run that recorded tokens, or a file of records")
    parser.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="the recorded steps to use (default: all)")
    parser.add_argument(
        "--level",
        choices=("token", "sequence"),
        default="token",
        help="token: Eq. 10 over the step, as the controls use it (default). sequence: whole completions of a prompt, "
        "by log-probability a token, as in the paper's Fig. 8",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=1,
        help="recorded steps that one point of the entropy change averages (default: 1)",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        help="which tokens: the share with the highest covariance (default: those that the control restrained, or 0.02 "
        "without one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write completions with their tokens coloured")
    parser.add_argument(
        "--completions", type=int, default=3, help="--html: completions of the first, middle and last step (default: 3)"
    )


def prepare(options: argparse.Namespace) -> tuple[Results, list[StepRecords]]:
    """Read the records and compute everything.

    Raises:
        ValueError, OSError: A mistake of the user's, in one line.
    """
    for name in ("window", "completions"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    if options.fraction is not None and not 0 < options.fraction <= 1:
        raise ValueError(f"--fraction is a share of the tokens, in (0, 1], got {options.fraction:g}.")
    for file in (options.json, options.html):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {str(file.parent)!r} to write {file.name!r} to.")
    unread: list[str] = []
    records = read_records(options.run, options.steps, unread)
    for line in unread:
        print(terminal(f"warning: {line}"), file=sys.stderr)
    results = covariance_of(str(options.run), records, options.level, options.window, options.fraction)
    return results, records


def run(prepared: tuple[Results, list[StepRecords]], options: argparse.Namespace) -> int:
    """Print the results, and write what was asked for. Returns the exit code."""
    results, records = prepared
    print(terminal(report(results)))
    if options.json is not None:
        write_output(options.json, json.dumps(plain(asdict(results)), indent=2) + "\n")
        print(f"\nAll results are in {options.json}.")
    if options.html is not None:
        shown = [records[i] for i in sorted({0, len(records) // 2, len(records) - 1})]
        write_output(options.html, render_completions(shown, options.completions))
        print(f"\nCompletions with their tokens coloured are in {options.html}.")
    return 0
