"""The command `entropy-trl law`: its options, and the files that it reads and writes."""

import argparse
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from entropy_trl.analysis.law.export import as_dict
from entropy_trl.analysis.law.fit import METHODS, LawFit
from entropy_trl.analysis.law.points import law_points
from entropy_trl.analysis.law.result import RunLaw, law_of
from entropy_trl.analysis.law.sizes import fit_sizes, named_size, over_seeds, parse_params
from entropy_trl.analysis.law.text import Results, report
from entropy_trl.analysis.logs.runs import Run, read_runs
from entropy_trl.analysis.pages import terminal
from entropy_trl.files import write_output


DESCRIPTION = (
    "Fit R = -a exp(H) + b (arXiv 2505.22617, Eq. 6), reward against policy entropy, to the logs of runs made with TRL "
    "or any other trainer: coefficients, ceiling, other curves, early prediction, model sizes."
)

_FIGURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `entropy-trl law`."""

    def add(name: str, **kwargs: Any) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **kwargs)

    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run folder, a folder of run folders, trainer_state.json, a CSV, JSON lines, Parquet, TensorBoard, "
        "trackio or W&B log; runs of one NAME, or whose names differ in a -seedN at the end, are seeds of one group",
    )
    add("reward", metavar="METRIC", help="R (default: the accuracy of an evaluation, or else the training reward)")
    add("entropy", metavar="METRIC", help="H (default: of the same evaluation, or else of the training)")
    add("benchmark", metavar="NAME", help="the evaluation data set, where TRL evaluated on several")
    add(
        "pairing",
        choices=("nearest", "mean"),
        default="nearest",
        help="where H and R were logged at different steps: the H nearest to R's step (default), or the mean of the H "
        "around it",
    )
    add("entropy-unit", choices=("nats", "bits"), help="of the log (default: nats, or as the metric's name says)")
    add("tokens-per-sequence", metavar="N|METRIC", help="divide the entropy by it: the log has that of sequences")
    add("vocab-size", type=int, metavar="N", help="no entropy is above its logarithm (default: as logged)")
    add("smooth", type=int, default=1, metavar="N", help="average N consecutive points to one (default: 1)")
    add("robust", action="store_true", help="Huber's M-estimator: for logs with outliers")
    add("fit-fraction", type=float, default=0.15, metavar="X", help="predict the rest from this part (default: 0.15)")
    add("intervals", choices=METHODS, default="ar1", help="how intervals are computed (default: ar1)")
    add("confidence", type=float, default=0.95, metavar="P", help="of the intervals (default: 0.95)")
    add(
        "sizes", nargs="+", default=[], metavar="NAME=PARAMS", help="parameters of each group's model, such as 7b=6.53B"
    )
    add("extrapolate", metavar="PARAMS", help="the coefficients and the ceiling of a model of this size")
    add("json", type=Path, metavar="FILE", help="write all results")
    add("figure", type=Path, metavar="FILE", help="draw the points and the curves: .png, .svg or .pdf")


def prepare(options: argparse.Namespace) -> Results:
    """Reads the runs and fits the law to each.

    Raises:
        ValueError, OSError, ImportError: A mistake of the user's, in one line.
    """
    if options.figure is not None and options.figure.suffix not in _FIGURES:
        raise ValueError(f"--figure must end in {', '.join(_FIGURES)}, got {str(options.figure)!r}.")
    if options.figure is not None and find_spec("matplotlib") is None:
        raise ImportError("--figure needs matplotlib: pip install 'entropy-trl[analysis]'.")
    for file in (options.json, options.figure):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"There is no folder {str(file.parent)!r} to write {file.name!r} to.")
    if not 0 < options.fit_fraction < 1:
        raise ValueError(f"--fit-fraction must be between 0 and 1, got {options.fit_fraction:g}.")
    if options.vocab_size is not None and options.vocab_size < 2:
        raise ValueError(f"--vocab-size must be at least 2, got {options.vocab_size}.")
    params = dict(named_size(text) for text in options.sizes)
    if options.extrapolate is not None and not params:
        raise ValueError("--extrapolate needs --sizes NAME=PARAMS for two or more groups of runs.")
    target = None if options.extrapolate is None else parse_params(options.extrapolate)
    runs = [_law(run, options) for run in read_runs(options.runs)]
    members: dict[str, list[LawFit]] = {}
    for one in runs:
        members.setdefault(one.run.group, []).append(one.fit)
    groups = {name: over_seeds(fits, options.confidence) for name, fits in members.items()}
    unknown = [name for name in params if name not in groups]
    if unknown:
        raise ValueError(f"--sizes: there is no group of runs {unknown[0]!r}; there are {', '.join(groups)}.")
    sizes = extrapolated = None
    if params:
        chosen = [groups[name] for name in params]
        sizes = fit_sizes(list(params.values()), [c.a.value for c in chosen], [c.b.value for c in chosen])
        extrapolated = None if target is None else sizes.predict(target, options.confidence)
    return Results(runs, groups, sizes, params, extrapolated, options)


def _law(run: Run, options: argparse.Namespace) -> RunLaw:
    tokens: float | str | None = options.tokens_per_sequence
    if tokens is not None and re.fullmatch(r"[\d.]+", str(tokens)):
        tokens = float(tokens)
    points = law_points(
        run,
        options.reward,
        options.entropy,
        benchmark=options.benchmark,
        pairing=options.pairing,
        entropy_unit=options.entropy_unit,
        tokens_per_sequence=tokens,
        vocab_size=options.vocab_size,
        smooth=options.smooth,
    )
    try:
        found = law_of(
            run,
            points,
            robust=options.robust,
            method=options.intervals,
            confidence=options.confidence,
            fit_fraction=options.fit_fraction,
        )
    except ValueError as error:
        raise ValueError(
            f"Run {run.name!r} ({points.reward_metric} against {points.entropy_metric}): {error}"
        ) from error
    # A wrong option and a missing package are told before any output.
    _ = (found.inference, found.diagnostics, found.forms)
    return found


def run(results: Results, options: argparse.Namespace) -> int:
    """Print the results, and write the files that were asked for. Returns the exit code, 0."""
    print(terminal(report(results)))
    if options.json is not None:
        write_output(options.json, json.dumps(as_dict(results), indent=2) + "\n")
    if options.figure is not None:
        from entropy_trl.analysis.figures import law_overview

        law_overview([(one.run.group, one.points, one.fit) for one in results.runs], options.figure)
    return 0
