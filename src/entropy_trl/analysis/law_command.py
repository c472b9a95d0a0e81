"""The command `entropy-trl law`: its options, what it computes from logs, and what it prints."""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from entropy_trl.analysis import law
from entropy_trl.analysis.law import (
    Diagnostics,
    EarlyPrediction,
    Estimate,
    FormComparison,
    Inference,
    LawFit,
    Spent,
)
from entropy_trl.analysis.law_sizes import Coefficients, SizeLaw, fit_sizes, over_seeds
from entropy_trl.analysis.pages import printable, terminal
from entropy_trl.analysis.pairs import Points, law_points
from entropy_trl.analysis.runs import Run, read_runs


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_FIGURES = (".png", ".svg", ".pdf")
#: Below these the command says that the law does not show, or that the intervals rest on little.
_LOW_R2, _FEW_EFFECTIVE = 0.5, 6.0
_SMALL_P = 0.01


@dataclass(frozen=True)
class RunLaw:
    """What the law says about one run. `early` and `spent` are a text, the reason, where they cannot be had."""

    run: Run
    points: Points
    fit: LawFit
    inference: Inference
    diagnostics: Diagnostics
    forms: FormComparison
    early: EarlyPrediction | str
    spent: list[Spent] | str


@dataclass(frozen=True)
class Results:
    """All that the command computes."""

    runs: list[RunLaw]
    groups: dict[str, Coefficients]
    sizes: SizeLaw | None
    params: dict[str, float]
    extrapolated: Coefficients | None
    options: argparse.Namespace


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
    add("intervals", choices=law.METHODS, default="ar1", help="how intervals are computed (default: ar1)")
    add("confidence", type=float, default=0.95, metavar="P", help="of the intervals (default: 0.95)")
    add(
        "sizes", nargs="+", default=[], metavar="NAME=PARAMS", help="parameters of each group's model, such as 7b=6.53B"
    )
    add("extrapolate", metavar="PARAMS", help="the coefficients and the ceiling of a model of this size")
    add("json", type=Path, metavar="FILE", help="write all results")
    add("figure", type=Path, metavar="FILE", help="draw the points and the curves: .png, .svg or .pdf")


def analyse(options: argparse.Namespace) -> Results:
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
    params = dict(_size(text) for text in options.sizes)
    if options.extrapolate is not None and not params:
        raise ValueError("--extrapolate needs --sizes NAME=PARAMS for two or more groups of runs.")
    target = None if options.extrapolate is None else _params(options.extrapolate)
    runs = [_run_law(run, options) for run in read_runs(options.runs)]
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


def _run_law(run: Run, options: argparse.Namespace) -> RunLaw:
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
    h, r = points.entropy, points.reward
    try:
        fit = law.fit_law(h, r, robust=options.robust)
    except ValueError as error:
        raise ValueError(
            f"Run {run.name!r} ({points.reward_metric} against {points.entropy_metric}): {error}"
        ) from error
    early: EarlyPrediction | str
    try:
        early = law.predict_early(h, r, points.steps, options.fit_fraction, robust=options.robust)
    except ValueError as error:
        early = str(error)
    spent: list[Spent] | str
    try:
        spent = law.entropy_spent(h, r, points.steps)
    except ValueError as error:
        spent = str(error)
    inference = fit.inference(options.intervals, options.confidence)
    forms = law.compare_forms(h, r, options.robust)
    return RunLaw(run, points, fit, inference, fit.diagnostics(), forms, early, spent)


def _size(text: str) -> tuple[str, float]:
    name, _, params = text.rpartition("=")
    if not name:
        raise ValueError(f"--sizes takes NAME=PARAMS, such as 7b=6.53B, got {text!r}.")
    return name, _params(params)


def _params(text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)([kmbt]?)", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a number of parameters, such as 6.53B or 6.53e9.")
    return float(match[1]) * _UNITS[match[2]]


def main(results: Results, options: argparse.Namespace) -> int:
    """Prints the results, and writes the files that were asked for. Returns the exit code, 0."""
    print(terminal(report(results)))
    if options.json is not None:
        options.json.write_text(json.dumps(as_dict(results), indent=2) + "\n")
    if options.figure is not None:
        draw(results, options.figure)
    return 0


# Text


def report(results: Results) -> str:
    """The results for people."""
    parts = (
        _coefficients(results),
        _forms(results),
        _early(results),
        _spent(results),
        _residuals(results),
        _sizes(results),
        _notes(results),
    )
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([row[0].ljust(len(first)), *others]).rstrip()


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _coefficients(results: Results) -> Iterator[str]:
    options, first = results.options, results.runs[0]
    how = "Huber's M-estimator" if options.robust else "least squares"
    intervals = f"{options.confidence:.0%} intervals ({options.intervals})"
    yield f"R = -a exp(H) + b (arXiv 2505.22617, Eq. 6), by {how}; {intervals}"
    names = {(one.points.reward_metric, one.points.entropy_metric) for one in results.runs}
    if len(names) == 1:
        yield f"R: {first.points.reward_metric}   H: {first.points.entropy_metric}, nats a token"
    rows = []
    for name in results.groups:
        members = [one for one in results.runs if one.run.group == name]
        for one in members:
            estimates = [_interval(e) for e in (one.inference.a, one.inference.b, one.inference.ceiling)]
            shown = [_label(one.run), str(one.fit.points), *estimates, f"{one.fit.r2:.3f}", f"{one.fit.rmse:.4f}"]
            rows.append(shown)
        if len(members) > 1:
            estimates = [_interval(e) for e in results.groups[name]]
            rows.append([f"{name}: mean of {len(members)}", "", *estimates, "", ""])
    yield ""
    yield from _table(("run", "points", "a", "b", "ceiling -a + b", "R2", "RMSE"), rows)
    if len(names) > 1:
        yield ""
        for one in results.runs:
            yield f"{_label(one.run)}: R is {one.points.reward_metric}, H is {one.points.entropy_metric}"


def _label(run: Run) -> str:
    return run.name if run.seed is None or run.name != run.group else f"{run.name} (seed {run.seed})"


def _forms(results: Results) -> Iterator[str]:
    yield "Other curves through the same points: R2, and error on blocks of the training that were left out"
    rows = []
    for one in results.runs:
        cells = []
        for form in law.FORMS:
            score = one.forms.scores.get(form)
            cells.append("-" if score is None else f"{score.fit.r2:.3f} {score.cv_rmse:.4f}")
        rows.append([_label(one.run), *cells, _verdict(one.forms)])
    yield from _table(("run", "exp(H)", "H", "ln(H)", "exp(H) is"), rows)


def _verdict(forms: FormComparison) -> str:
    names = {"linear": "H", "log": "ln(H)"}
    said: dict[str, list[str]] = {}
    for form, verdict in forms.verdict.items():
        said.setdefault(verdict, []).append(names[form])
    prepositions = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}
    return ", ".join(f"{prepositions[verdict]} {' and '.join(others)}" for verdict, others in said.items())


def _early(results: Results) -> Iterator[str]:
    fraction = results.options.fit_fraction
    yield f"Early prediction: fitted to the first {fraction:.0%} of the training, the rest predicted from its entropies"
    rows, reasons = [], []
    for one in results.runs:
        early = one.early
        if isinstance(early, str):
            reasons.append(f"{_label(one.run)}: {early}")
            continue
        rows.append(
            [
                _label(one.run),
                f"{early.fit.points} to step {early.last_step}",
                f"{early.rmse:.4f}",
                f"{early.predicted[-1]:.3f} for {one.points.reward[-1]:.3f}",
                f"{early.unchanged_rmse:.4f}",
                f"{early.mean_rmse:.4f}",
            ]
        )
    if rows:
        head = ("run", "points", "RMSE of the rest", "last point", "RMSE if R stayed", "RMSE of its mean")
        yield from _table(head, rows)
    yield from reasons


def _spent(results: Results) -> Iterator[str]:
    yield "Entropy spent and reward gained, of the whole from the first to the last point"
    rows, reasons = [], []
    for one in results.runs:
        if isinstance(one.spent, str):
            reasons.append(f"{_label(one.run)}: {one.spent}")
        else:
            rows.append([_label(one.run), *(f"{s.entropy:.0%} for {s.reward:.0%}" for s in one.spent)])
    if rows:
        yield from _table(("run", *(f"first {fraction:.0%}" for fraction in law.SPENT_AT)), rows)
    yield from reasons


def _residuals(results: Results) -> Iterator[str]:
    yield "Residuals: autocorrelation, effective points, Durbin-Watson; p-values of Breusch-Pagan and Jarque-Bera"
    rows = []
    for one in results.runs:
        d = one.diagnostics
        cells = (f"{d.autocorrelation:.2f}", f"{one.inference.effective_points:.1f}", f"{d.durbin_watson:.2f}")
        rows.append([_label(one.run), *cells, f"{d.breusch_pagan:.2g}", f"{d.jarque_bera:.2g}"])
    yield from _table(("run", "autocorr.", "eff. points", "DW", "BP", "JB"), rows)


def _sizes(results: Results) -> Iterator[str]:
    if results.sizes is None:
        return
    yield "Model sizes: a and b linear in ln(parameters)"
    named = {"a": results.sizes.a, "b": results.sizes.b, "ceiling": results.sizes.ceiling}
    rows = []
    for name, line in named.items():
        cells = [f"{line.slope * math.log(10):+.3f}", f"{line.r2:.3f}"]
        if results.extrapolated is not None:
            cells.append(_interval(getattr(results.extrapolated, name)))
        rows.append([name, *cells])
    head = ["", "per tenfold size", "R2"]
    if results.extrapolated is not None:
        head.append(f"at {_params(results.options.extrapolate):.3g} parameters")
    yield from _table(head, rows)
    if len(results.params) == 2:
        yield "Two sizes lie on any line: there is no interval, and R2 says nothing."


def _notes(results: Results) -> Iterator[str]:
    said: dict[str, list[str]] = {}
    for one in results.runs:
        for note in [*one.points.notes, *_warnings(one)]:
            said.setdefault(note, []).append(_label(one.run))
    for note, names in said.items():
        yield f"note: {note}" + (f" ({', '.join(names)})" if len(results.runs) > 1 else "")


def _warnings(one: RunLaw) -> Iterator[str]:
    fit = one.fit
    if fit.a <= 0:
        yield "a is not positive: the reward does not rise as the entropy falls, so the law does not hold here."
    elif fit.r2 < _LOW_R2:
        yield f"the law explains less than {_LOW_R2:.0%} of the variance: the ceiling means little."
    if one.inference.effective_points < _FEW_EFFECTIVE:
        yield "autocorrelated residuals leave fewer than 6 effective points: the intervals are rough."
    if fit.reward.max() <= 1 < fit.ceiling:
        yield "the ceiling is above 1, which no accuracy reaches: the law does not hold down to H = 0 here."
    if one.diagnostics.jarque_bera < _SMALL_P:
        yield "the residuals are not normal (Jarque-Bera): see whether --robust changes the coefficients."


# Files


def as_dict(results: Results) -> dict[str, Any]:
    """The results for programs; what is not a number is null."""
    options = results.options
    content = {
        "law": "R = -a exp(H) + b, H in nats a token",
        "method": options.intervals,
        "confidence": options.confidence,
        "robust": options.robust,
        "fit_fraction": options.fit_fraction,
        "runs": [_run_dict(one) for one in results.runs],
        "groups": {name: _coefficients_dict(c) for name, c in results.groups.items()},
        "params": results.params,
        "extrapolated": None
        if results.extrapolated is None
        else {"params": _params(options.extrapolate)} | _coefficients_dict(results.extrapolated),
    }
    if results.sizes is not None:
        lines = {"a": results.sizes.a, "b": results.sizes.b, "ceiling": results.sizes.ceiling}
        content["sizes"] = {
            name: {"slope": line.slope, "intercept": line.intercept, "r2": line.r2} for name, line in lines.items()
        }
    finite: dict[str, Any] = _finite(content)
    return finite


def _run_dict(one: RunLaw) -> dict[str, Any]:
    early = one.early
    return {
        "name": one.run.name,
        "group": one.run.group,
        "seed": one.run.seed,
        "reward_metric": one.points.reward_metric,
        "entropy_metric": one.points.entropy_metric,
        "steps": one.points.steps,
        "entropy": one.points.entropy,
        "reward": one.points.reward,
        **{name: getattr(one.inference, name)._asdict() for name in ("a", "b", "ceiling")},
        "r2": one.fit.r2,
        "rmse": one.fit.rmse,
        "effective_points": one.inference.effective_points,
        "diagnostics": one.diagnostics._asdict(),
        "forms": {
            form: {"a": s.fit.a, "b": s.fit.b, "r2": s.fit.r2, "rmse": s.fit.rmse, "aic": s.aic, "cv_rmse": s.cv_rmse}
            for form, s in one.forms.scores.items()
        },
        "exp_is": one.forms.verdict,
        "early": early
        if isinstance(early, str)
        else {name: value for name, value in early._asdict().items() if name != "fit"}
        | {"a": early.fit.a, "b": early.fit.b, "points": early.fit.points},
        "spent": one.spent if isinstance(one.spent, str) else [s._asdict() for s in one.spent],
        "notes": [*one.points.notes, *_warnings(one)],
    }


def _coefficients_dict(coefficients: Coefficients) -> dict[str, Any]:
    return {name: estimate._asdict() for name, estimate in coefficients._asdict().items()}


def _finite(value: Any) -> Any:
    """Without arrays, and with None for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_finite(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(results: Results, path: Path) -> None:
    """Draw the points of each run, and its curve from the largest entropy down to the ceiling at `H = 0`."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # names of runs and metrics may have dollar signs
        _draw(results, path)


def _draw(results: Results, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from entropy_trl.analysis.figures import thinned

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {name: f"C{i % 10}" for i, name in enumerate(results.groups)}
    labelled: set[str] = set()
    for one in results.runs:
        group = one.run.group
        h = np.linspace(0, one.fit.entropy.max(), 200)
        x, y = thinned(one.fit.entropy, one.fit.reward)
        axes.scatter(
            x,
            y,
            s=14,
            color=colours[group],
            alpha=0.7,
            linewidths=0,
            label="_nolegend_" if group in labelled else f"group {len(labelled)}",
        )
        inside = h >= one.fit.entropy.min()
        axes.plot(h[inside], one.fit.predict(h[inside]), color=colours[group], linewidth=1.2)
        axes.plot(h[~inside], one.fit.predict(h[~inside]), color=colours[group], linewidth=0.8, linestyle=":")
        labelled.add(group)
    axes.set_xlim(left=0)
    axes.set_xlabel(printable(f"entropy H ({results.runs[0].points.entropy_metric}), nats a token"))
    axes.set_ylabel(printable(f"R ({results.runs[0].points.reward_metric})"))
    axes.set_title("R = -a exp(H) + b; dotted: down to the ceiling at H = 0", fontsize=10)
    # A label that begins with "_" would be left out: the names are set afterwards.
    for text, name in zip(axes.legend(frameon=False).get_texts(), results.groups, strict=True):
        text.set_text(printable(name))
    figure.savefig(path, dpi=150)
