"""Commands whose modules do not have a command's four names yet. A line goes when its module has them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class FormerCommand:
    """The four names of a command (see `entropy_trl.cli.main`)."""

    DESCRIPTION: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    prepare: Callable[[argparse.Namespace], Any]
    run: Callable[[Any, argparse.Namespace], int]


def _law() -> FormerCommand:
    from entropy_trl.analysis import law_command as command

    description = (
        "Fit R = -a exp(H) + b (arXiv 2505.22617, Eq. 6), reward against policy entropy, to the logs of runs made with "
        "TRL or any other trainer: coefficients, ceiling, other curves, early prediction, model sizes."
    )
    return FormerCommand(description, command.add_arguments, command.analyse, command.main)


def _covariance() -> FormerCommand:
    from entropy_trl.analysis import covariance_command as command

    description = (
        "Analyse the token records of a run as arXiv 2505.22617 does: the covariance by quantile, over training, "
        "against the entropy change and by difficulty, and which tokens carry it."
    )
    return FormerCommand(
        description,
        command.add_arguments,
        command.analyse,
        lambda found, options: command.main(found[0], found[1], options),
    )


def _report() -> FormerCommand:
    from entropy_trl.analysis import report_command as command

    description = (
        "Write one self-contained HTML page on runs made with TRL or any other trainer, with its figures as SVG and "
        "PNG and its numbers as JSON: curves with seeds as bands, reward against exp(entropy), covariance, completions "
        "by token covariance, settings that differ, and results. Runs that are not over are fine."
    )
    return FormerCommand(description, command.add_arguments, command.prepare, command.main)


FORMER: dict[str, Callable[[], FormerCommand]] = {
    "law": _law,
    "covariance": _covariance,
    "report": _report,
}
