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


def _evaluate() -> FormerCommand:
    from entropy_trl.evaluation import command

    description = (
        "Score models on maths benchmarks by the protocol of arXiv 2505.22617. A run that was interrupted goes on "
        "where it stopped."
    )
    return FormerCommand(description, command.add_arguments, command.prepare, lambda job, _: command.main(job))


def _plan() -> FormerCommand:
    from entropy_trl.plan import command

    description = (
        "Compute what a run takes of given hardware. The training configuration is given as to `entropy-trl train`: "
        "`--config FILE.yaml` and any of its options. Exit code 0: it fits, 1: it does not."
    )
    return FormerCommand(
        description,
        command.add_arguments,
        lambda options: command.make_plan(options, options.training_args, options.model_args),
        lambda plan, options: command.main(plan, options.json),
    )


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


def _quickstart() -> FormerCommand:
    from entropy_trl.quickstart import run as command

    description = "See entropy collapse and its cure on an embedded task, on a CPU, in minutes."
    return FormerCommand(
        description,
        command.add_arguments,
        lambda options: options,
        lambda options, _: command.main(options),
    )


FORMER: dict[str, Callable[[], FormerCommand]] = {
    "evaluate": _evaluate,
    "plan": _plan,
    "law": _law,
    "covariance": _covariance,
    "report": _report,
    "quickstart": _quickstart,
}
