"""The command `entropy-trl report`: its options, and the page that it writes."""

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from entropy_trl.analysis.law.points import one_benchmark
from entropy_trl.analysis.logs.runs import Run, read_runs
from entropy_trl.analysis.logs.unread import collecting_unread
from entropy_trl.analysis.report import SMOOTH, check_metrics, page_path, write_report
from entropy_trl.analysis.report.watch import watch


#: Seconds between two reads of the logs that are watched.
INTERVAL = 30.0


DESCRIPTION = (
    "Write one self-contained HTML page on runs made with TRL or any other trainer, with its figures as SVG and PNG "
    "and its numbers as JSON: curves with seeds as bands, reward against exp(entropy), covariance, completions by "
    "token covariance, settings that differ, and results. Runs that are not over are fine."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `entropy-trl report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="run folders, folders of them, or logs of any trainer; runs of one NAME, or of names that differ in a "
        "-seedN at the end only, are drawn as one line with a band",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        metavar="FOLDER",
        help="where report.html, report.json and figures go, or a name that ends in .html (default: report)",
    )
    parser.add_argument("--title", help="of the page (default: the names of the runs)")
    parser.add_argument("--entropy", metavar="METRIC", help="the metric to take as the entropy, nats a token")
    parser.add_argument("--reward", metavar="METRIC", help="the metric to take as the reward, in curves and law")
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help="the evaluation data set, where TRL evaluated on several under the same names",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=SMOOTH,
        metavar="N",
        help=f"logged points in the running mean of noisy training metrics; 1 for none (default: {SMOOTH})",
    )
    parser.add_argument(
        "--watch", action="store_true", help="write the page again as the runs grow, until they are finished or Ctrl-C"
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=INTERVAL,
        metavar="SECONDS",
        help=f"between two reads of the logs with --watch (default: {INTERVAL:g})",
    )


def prepare(options: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Reads the runs and checks the options. Returns the runs, and what could not be read.

    Raises:
        ValueError, OSError, ImportError: A mistake of the user's, in one line.
    """
    if find_spec("scipy") is None:
        raise ImportError("The report fits the law with SciPy: pip install 'entropy-trl[analysis]'")
    if options.smooth < 1:
        raise ValueError(f"--smooth must be at least 1 point, got {options.smooth}.")
    if not 0 < options.interval < math.inf:
        raise ValueError(f"--interval must be a number of seconds above 0, got {options.interval:g}.")
    if options.watch:
        _check_paths(options.runs)
    folder = page_path(options.output).parent
    prepared: tuple[list[Run], list[str]] = ([], []) if options.watch else _read(options)
    folder.mkdir(parents=True, exist_ok=True)
    return prepared


def run(prepared: tuple[Sequence[Run], Sequence[str]], options: argparse.Namespace) -> int:
    """Writes the page, and prints where it is. Returns the exit code."""

    def write(runs: Sequence[Run], unread: Sequence[str]) -> Path:
        return write_report(
            runs, options.output, options.title, options.entropy, options.reward, smooth=options.smooth, unread=unread
        )

    if options.watch:
        unread: list[str] = []

        def read() -> Sequence[Run]:
            runs, unread[:] = _read(options)
            return runs

        print(f"The report will be in {page_path(options.output)}. Ctrl-C ends the watch.", flush=True)
        watch(read, lambda runs: write(runs, unread), options.interval)
        return 0
    runs, notes = prepared
    page = write(runs, notes)
    print(f"The report of {len(runs)} run{'s' if len(runs) > 1 else ''} is in {page}.")
    return 0


def _read(options: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """The runs, checked against the options, and what could not be read."""
    with collecting_unread() as unread:
        runs = [one_benchmark(run, options.benchmark) for run in read_runs(options.runs)]
    check_metrics(runs, (options.entropy, options.reward))
    return runs, unread


def _check_paths(specs: Sequence[str]) -> None:
    """Check that what is to be watched exists: a path that is mistyped would be waited for without end."""
    for spec in specs:
        path = Path(spec if Path(spec).expanduser().exists() else spec.rpartition("=")[2]).expanduser()
        if not path.exists():
            raise ValueError(f"There is no file or folder {str(path)!r} to watch: give the output folder of a run.")
