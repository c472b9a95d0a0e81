"""The results of `entropy-trl law` for people: a heading and a table for each question."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from entropy_trl.analysis.law.compare import SPENT_AT
from entropy_trl.analysis.law.fit import FORMS, Estimate
from entropy_trl.analysis.law.result import RunLaw
from entropy_trl.analysis.law.sizes import Coefficients, SizeLaw, parse_params
from entropy_trl.analysis.logs.runs import Run
from entropy_trl.analysis.tables import NONE, text_table


@dataclass(frozen=True)
class Results:
    """All that the command computes."""

    runs: list[RunLaw]
    groups: dict[str, Coefficients]
    sizes: SizeLaw | None
    params: dict[str, float]
    extrapolated: Coefficients | None
    options: argparse.Namespace


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
    yield text_table(("run", "points", "a", "b", "ceiling -a + b", "R2", "RMSE"), rows)
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
        for form in FORMS:
            score = one.forms.scores.get(form)
            cells.append(NONE if score is None else f"{score.fit.r2:.3f} {score.cv_rmse:.4f}")
        rows.append([_label(one.run), *cells, one.verdict])
    yield text_table(("run", "exp(H)", "H", "ln(H)", "exp(H) is"), rows)


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
        yield text_table(head, rows)
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
        yield text_table(("run", *(f"first {fraction:.0%}" for fraction in SPENT_AT)), rows)
    yield from reasons


def _residuals(results: Results) -> Iterator[str]:
    yield "Residuals: autocorrelation, effective points, Durbin-Watson; p-values of Breusch-Pagan and Jarque-Bera"
    rows = []
    for one in results.runs:
        d = one.diagnostics
        cells = (f"{d.autocorrelation:.2f}", f"{one.inference.effective_points:.1f}", f"{d.durbin_watson:.2f}")
        rows.append([_label(one.run), *cells, f"{d.breusch_pagan:.2g}", f"{d.jarque_bera:.2g}"])
    yield text_table(("run", "autocorr.", "eff. points", "DW", "BP", "JB"), rows)


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
        head.append(f"at {parse_params(results.options.extrapolate):.3g} parameters")
    yield text_table(head, rows)
    if len(results.params) == 2:
        yield "Two sizes lie on any line: there is no interval, and R2 says nothing."


def _notes(results: Results) -> Iterator[str]:
    said: dict[str, list[str]] = {}
    for one in results.runs:
        for note in [*one.notes, *one.residual_warnings]:
            said.setdefault(note, []).append(_label(one.run))
    for note, names in said.items():
        yield f"note: {note}" + (f" ({', '.join(names)})" if len(results.runs) > 1 else "")
