"""The figures of a report: drawn with matplotlib, saved as SVG and PNG, and made ready to stand in a page.

In a page the colours of a figure are CSS variables (`PAGE_COLOURS`, defined in `report.css`), so that it follows the
page into dark mode, and its text is text in the page's own font. A colour that has no variable is an error.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.law.fit import LawFit
from entropy_trl.analysis.law.points import Points
from entropy_trl.analysis.logs.runs import Series
from entropy_trl.analysis.pages import printable
from entropy_trl.analysis.svg import FILE_ONLY, GRID, INK, MUTED, page_element
from entropy_trl.files import replacing, write_text


try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.markers import MarkerStyle
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("matplotlib is needed for figures: pip install 'entropy-trl[analysis]'") from error


Array = npt.NDArray[np.float64]


class Style(NamedTuple):
    """How a method is drawn: the line style and the marker say the same as the colour, without colour."""

    colour: str
    line: str
    marker: str


# Okabe and Ito's colours, which stay apart for colour-blind readers. A known method has the same style everywhere.
STYLES: dict[str, Style] = {
    "grpo": Style("#000000", "-", "o"),
    "clip_higher": Style("#E69F00", "--", "s"),
    "clip_cov": Style("#0072B2", "-", "^"),
    "kl_cov": Style("#D55E00", "-", "D"),
    "clip_random": Style("#56B4E9", ":", "v"),
    "kl_random": Style("#CC79A7", ":", "P"),
}
_OTHERS = (Style("#009E73", "-.", "X"), *STYLES.values())
_LINES = ("-", "--", "-.", ":")


_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "entropy-trl",  # the same figure has the same ids
    "text.parse_math": False,  # names of runs may have dollar signs
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SIZE = (4.7, 3.1)  # inches; 72 of its units are an inch in the page, so that text keeps its size on a phone
#: A line is drawn with the extremes of each of so many parts; more cannot be told apart at this width.
_PARTS = 150
_LARGEST = 1e300
_LONGEST_NAME = 40
_LEGEND_COLUMNS = 4
#: Ticks are multiples of these.
_STEPS = [1, 2, 2.5, 5, 10]


def styles(groups: Sequence[str]) -> dict[str, Style]:
    """A style for each group of runs: that of the method after which it is named, or else one that is free."""
    known = {group: _method(group) for group in groups if _method(group) in STYLES}
    chosen = {group: STYLES[method] for group, method in known.items()}
    free = [style for style in _OTHERS if style not in chosen.values()] or list(_OTHERS)
    for i, group in enumerate(group for group in groups if group not in chosen):
        style = free[i % len(free)]
        turn = _LINES[(_LINES.index(style.line) + i // len(free)) % len(_LINES)]
        chosen[group] = style._replace(line=turn)
    return {group: chosen[group] for group in groups}


def _method(group: str) -> str:
    return re.sub(r"[^a-z]+", "_", group.lower())


class Curve(NamedTuple):
    """A metric of one group: the mean of its runs where all have values, their range, and the runs by seed."""

    steps: npt.NDArray[np.int64]
    mean: Array
    low: Array
    high: Array
    runs: dict[str, Series]


def curves(lines: Mapping[str, Curve], chosen: Mapping[str, Style], label: str) -> Figure:
    """One line a group over the steps, with the range of its runs as a band; runs that go on alone are thin lines."""
    figure, axes = _start("step", label)
    for group, line in lines.items():
        style = chosen[group]
        if len(line.runs) > 1:
            steps, low, high = thinned(line.steps, drawable(line.low), drawable(line.high))
            axes.fill_between(steps, low, high, color=style.colour, alpha=0.16, linewidth=0)
            for series in line.runs.values():
                if len(line.steps) == 0 or series.steps[-1] > line.steps[-1]:
                    axes.plot(
                        *thinned(series.steps, drawable(series.values)),
                        color=style.colour,
                        linestyle=style.line,
                        linewidth=0.7,
                        alpha=0.7,
                    )
        marker = style.marker if len(line.steps) <= 12 else ""
        axes.plot(
            *thinned(line.steps, drawable(line.mean)),
            color=style.colour,
            linestyle=style.line,
            linewidth=1.8,
            marker=marker,
            markersize=3.5,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _from_zero(axes)
    return figure


def same_scale(drawings: Sequence[Figure], both: bool = False) -> None:
    """Give figures that are compared one y axis, and one x axis too if `both`."""
    panels = [drawing.axes[0] for drawing in drawings]
    if len(panels) > 1:
        lows, highs = zip(*(axes.get_ylim() for axes in panels), strict=True)
        lefts, rights = zip(*(axes.get_xlim() for axes in panels), strict=True)
        for axes in panels:
            axes.set_ylim(min(lows), max(highs))
            if both:
                axes.set_xlim(min(lefts), max(rights))


def law(fits: Sequence[LawFit], bands: Sequence[Callable[[Array], tuple[Array, Array]]], style: Style) -> Figure:
    """R against exp(H): points, fitted line with the interval of its mean, and the ceiling at H = 0.

    A fit whose reward does not rise as entropy falls has no ceiling: its line ends with the points.

    Args:
        fits (`Sequence[LawFit]`): Fits of the runs of one group.
        bands (`Sequence[Callable[[Array], tuple[Array, Array]]]`): For each fit, the interval at values of exp(H).
        style ([`Style`]): Style of the group.
    """
    figure, axes = _start("exp(H)", "R")
    largest = max(float(np.exp(fit.entropy).max()) for fit in fits)
    right = 1.0 + 1.04 * (largest - 1.0)
    for fit, band in zip(fits, bands, strict=True):
        x = np.linspace(1.0 if fit.a > 0 else float(np.exp(fit.entropy).min()), right, 60)
        low, high = band(x)
        axes.fill_between(x, low, high, color=style.colour, alpha=0.16 / len(fits) ** 0.5, linewidth=0)
        axes.plot(x, fit.predict(np.log(x)), color=style.colour, linewidth=1.4)
        axes.plot(*thinned(np.exp(fit.entropy), fit.reward), style.marker, color=style.colour, markersize=4, alpha=0.75)
        if fit.a > 0:
            axes.plot([1.0], [fit.ceiling], "*", color=style.colour, markersize=10, clip_on=False, zorder=3)
    rewards = np.concatenate([fit.reward for fit in fits] + [[fit.ceiling for fit in fits if fit.a > 0]])
    margin = 0.25 * (float(np.ptp(rewards)) or 0.1)  # a wide interval shall not hide the points
    axes.set_ylim(rewards.min() - margin, rewards.max() + margin)
    axes.set_xlim(1.0, right)
    return figure


def law_overview(laws: Sequence[tuple[str, Points, LawFit]], path: Path) -> None:
    """Draw R against H: the points of each run, and its curve from the largest entropy down to the ceiling at `H = 0`.

    Args:
        laws (`Sequence[tuple[str, Points, LawFit]]`): The group, the points and the fit of each run.
        path (`Path`): The file; its suffix says the format.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # names of runs and metrics may have dollar signs
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        colours = {group: f"C{i % 10}" for i, group in enumerate(dict.fromkeys(group for group, _, _ in laws))}
        for group, _, fit in laws:
            h = np.linspace(0, fit.entropy.max(), 200)
            inside = h >= fit.entropy.min()
            x, y = thinned(fit.entropy, fit.reward)
            axes.scatter(x, y, s=14, color=colours[group], alpha=0.7, linewidths=0)
            axes.plot(h[inside], fit.predict(h[inside]), color=colours[group], linewidth=1.2)
            axes.plot(h[~inside], fit.predict(h[~inside]), color=colours[group], linewidth=0.8, linestyle=":")
        axes.set_xlim(left=0)
        axes.set_xlabel(printable(f"entropy H ({laws[0][1].entropy_metric}), nats a token"))
        axes.set_ylabel(printable(f"R ({laws[0][1].reward_metric})"))
        axes.set_title("R = -a exp(H) + b; dotted: down to the ceiling at H = 0", fontsize=10)
        handles = [Line2D([], [], color=colour, marker="o", linestyle="", markersize=4) for colour in colours.values()]
        # A label that begins with "_" would be left out: the names are set afterwards.
        texts = axes.legend(handles, [str(i) for i in range(len(handles))], frameon=False).get_texts()
        for text, group in zip(texts, colours, strict=True):
            text.set_text(printable(group))
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix.removeprefix(".") or "png")


def histogram(values: Mapping[str, Array], chosen: Mapping[str, Style], label: str) -> Figure:
    """Shares of the values in 40 bins between the 0.1% and the 99.9% quantile, in percent on a logarithmic scale.

    The first and the last bin count what lies beyond: a few extreme values would leave all others one bin.
    """
    figure, axes = _start(label, "share of the tokens")
    everything = np.concatenate(list(values.values()))
    low, high = (float(end) for end in np.quantile(everything, [0.001, 0.999]))
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    floor = 0.5 / max(len(of_group) for of_group in values.values())
    for group, of_group in values.items():
        shares = np.histogram(np.clip(of_group, edges[0], edges[-1]), edges)[0] / len(of_group)
        style = chosen[group]
        heights = np.maximum(shares, floor)
        axes.stairs(heights, edges, baseline=floor, fill=True, color=style.colour, alpha=0.16 / len(values) ** 0.5)
        axes.stairs(heights, edges, baseline=None, color=style.colour, linestyle=style.line, linewidth=1.4)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda share, _: ""))
    return figure


def scatter(
    points: Mapping[str, tuple[Array, Array]], chosen: Mapping[str, Style], x_label: str, y_label: str
) -> Figure:
    """Points by group, and the two zero lines."""
    figure, axes = _start(x_label, y_label)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for group, (x, y) in points.items():
        axes.plot(
            *thinned(drawable(x), drawable(y)),
            chosen[group].marker,
            color=chosen[group].colour,
            markersize=4,
            alpha=0.75,
        )
    return figure


def categories(
    values: Mapping[str, Sequence[tuple[float | None, float | None]]],
    names: Sequence[str],
    chosen: Mapping[str, Style],
    x_label: str,
    y_label: str,
) -> Figure:
    """Values with standard errors by category, the groups side by side."""
    figure, axes = _start(x_label, y_label)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for i, (group, of_group) in enumerate(values.items()):
        known = [(at, value, error or 0.0) for at, (value, error) in enumerate(of_group) if value is not None]
        if not known:
            continue
        at, value, errors = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
        shift = 0.5 * ((i + 0.5) / len(values) - 0.5)
        style = chosen[group]
        axes.errorbar(
            at + shift, value, errors, fmt=style.marker, color=style.colour, markersize=4.5, elinewidth=1.2, capsize=0
        )
    axes.set_xticks(range(len(names)), names)
    axes.grid(visible=False, axis="x")
    return figure


def _start(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_subplot()
        axes.set_xlabel(printable(x_label))
        axes.set_ylabel(printable(y_label))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    return figure, axes


def _from_zero(axes: Axes) -> None:
    """Start the axis at 0 where that costs little room, and show a change of a few percent as the little it is."""
    first, last = axes.dataLim.intervaly
    if not np.isfinite([first, last]).all():
        return
    needed = 0.2 * max(abs(first), abs(last)) or 0.1
    if last - first < needed:
        middle = (first + last) / 2
        axes.set_ylim(middle - needed / 2, middle + needed / 2)
    low, high = axes.get_ylim()
    if 0 < first < 0.6 * high or (low < 0 <= first):
        axes.set_ylim(bottom=0)


def drawable(values: Array) -> Array:
    """The values, with NaN for those that leave no room on an axis: matplotlib's arithmetic would overflow."""
    return np.where(np.abs(values) < _LARGEST, values, np.nan)


def thinned(*columns: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Leave out rows that cannot be seen: keep the extremes of each column in each of 150 parts of a long table.

    So a spike of one point stays in the drawing. The first and the last row are kept too.

    Args:
        *columns (`np.ndarray`): Columns of one length, in the order in which they are drawn.

    Returns:
        `list[np.ndarray]`: The columns with the rows that are left: all of them up to 300, and
        `300 * len(columns) + 2` at most.
    """
    count = len(columns[0])
    if count <= 2 * _PARTS:
        return list(columns)
    rows = {0, count - 1}
    edges = np.linspace(0, count, _PARTS + 1).astype(np.int64)
    for start, end in pairwise(edges.tolist()):
        for column in columns:
            part = column[start:end]
            rows |= {start + int(part.argmin()), start + int(part.argmax())}
    kept = np.array(sorted(rows))
    return [column[kept] for column in columns]


def publish(
    figure: Figure, name: str, title: str, finding: str, legend: Mapping[str, Style], folder: Path | None
) -> str:
    """Writes `NAME.svg` and `NAME.png`, with a title and a legend, and returns the figure as an element of a page.

    The page has its own headings and legend, so that the element has none.

    Args:
        figure (`Figure`): The figure, from one of the functions above.
        name (`str`): Name of the files, and in the element's ids; unique in the page.
        title (`str`): Title of the figure.
        finding (`str`): What it shows, in words, for those who do not see it.
        legend (`Mapping[str, Style]`): The styles by the name of the group.
        folder (`Path | None`): Where the files go; no files if None.
    """
    with matplotlib.rc_context(_SETTINGS):
        rows = -(-len(legend) // _LEGEND_COLUMNS)
        above, below = 0.3, 0.1 + 0.22 * rows  # inches
        width, height = _SIZE
        total = above + height + below
        figure.set_size_inches(width, total)
        figure.set_layout_engine("constrained", rect=(0, below / total, 1, height / total))
        heading = figure.text(0.5, 1 - 0.08 / total, shortened(title), va="top", ha="center", fontsize=11)
        heading.set_gid(FILE_ONLY)
        figure.patch.set_gid(FILE_ONLY)
        _add_legend(figure, legend)
        svg = StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        if folder is not None:
            write_text(folder / f"{name}.svg", svg.getvalue())
            figure.set_layout_engine("none")  # everything is in its place
            with replacing(folder / f"{name}.png") as part:
                figure.savefig(part, dpi=160, format="png")
    return page_element(svg.getvalue(), name, title, finding, tuple(72 * x for x in (0, above, width, height)))


def _add_legend(figure: Figure, legend: Mapping[str, Style]) -> None:
    if not legend:
        return
    handles = [
        Line2D([], [], color=s.colour, linestyle=s.line, linewidth=1.8, marker=s.marker, markersize=4)
        for s in legend.values()
    ]
    # A label that begins with "_" would be left out: the names are set afterwards.
    blank = [str(i) for i in range(len(handles))]
    columns = min(len(handles), _LEGEND_COLUMNS)
    box = figure.legend(handles, blank, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    box.set_gid(FILE_ONLY)
    box.set_in_layout(False)
    for text, name in zip(box.get_texts(), legend, strict=True):
        text.set_text(shortened(name))


def marker_outline(marker: str) -> str:
    """A marker as the path of an SVG, about 7 units wide around 0."""
    style = MarkerStyle(marker)
    outline = style.get_path().transformed(style.get_transform()).to_polygons(closed_only=False)
    points: list[list[list[float]]] = [np.asarray(polygon).tolist() for polygon in outline]
    return " ".join("M" + "L".join(f"{6 * x:.1f} {-6 * y:.1f}" for x, y in polygon) + "Z" for polygon in points)


def shortened(text: str) -> str:
    """A name that fits into a legend."""
    text = printable(text)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"
