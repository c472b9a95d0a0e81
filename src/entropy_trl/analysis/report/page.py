"""What all sections of the report share: the groups of runs, the figures, and what is told at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from entropy_trl._version import __version__
from entropy_trl.analysis import figures
from entropy_trl.analysis.logs.runs import Run
from entropy_trl.analysis.report.values import sentence


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page, with what it shows in words and in numbers."""

    name: str
    title: str
    findings: list[str]
    note: str
    svg: Markup
    head: list[str]
    rows: list[list[str]]


class Page:
    """The runs of a report, by group.

    Attributes:
        groups (`dict[str, dict[str, Run]]`): Runs by group, and there by what tells them apart, such as the seed.
        styles (`dict[str, Style]`): How a group is drawn.
        chosen (`Mapping[str, str | None]`): Metrics that the user asked for, by the kind of metric.
        smooth (`int`): Logged points in the running mean of noisy metrics.
        numbers (`dict[str, Any]`): What goes into the JSON file; the sections fill it.
        missing (`list[str]`): What is not on the page, a sentence each; the sections fill it.
        last (`dict[str, dict[tuple[str, str], float]]`): The last value of each curve, by its key and by (group, run).
    """

    def __init__(self, runs: Sequence[Run], folder: Path, chosen: Mapping[str, str | None], smooth: int):
        self.folder = folder
        self.chosen = {kind: metric for kind, metric in chosen.items() if metric is not None}
        self.smooth = smooth
        self.groups: dict[str, dict[str, Run]] = {}
        for run in runs:
            members = self.groups.setdefault(run.group, {})
            members[_label(run, members)] = run
        self.styles = figures.styles(list(self.groups))
        self.numbers: dict[str, Any] = {"entropy_trl": __version__, "smooth": smooth}
        self.missing: list[str] = []
        self.last: dict[str, dict[tuple[str, str], float]] = {}

    def each(self) -> Iterable[tuple[str, str, Run]]:
        """Group, label and run."""
        for group, members in self.groups.items():
            for label, run in members.items():
                yield group, label, run

    def figure(
        self,
        drawing: Figure,
        name: str,
        title: str,
        findings: Sequence[str],
        note: str,
        table: tuple[list[str], list[list[str]]],
        groups: Iterable[str],
    ) -> PageFigure:
        """Writes the files of a figure and makes it an element of the page.

        Args:
            drawing (`Figure`): The figure, from `figures`.
            name (`str`): Name of the files, unique in the page.
            title (`str`): Title of the figure.
            findings (`Sequence[str]`): What it shows, in words.
            note (`str`): What it is made of.
            table (`tuple[list[str], list[list[str]]]`): Its numbers: head and rows.
            groups (`Iterable[str]`): Those that are drawn.
        """
        legend = {group: self.styles[group] for group in groups}
        svg = figures.publish(drawing, name, title, f"{title}. {sentence(findings)}", legend, self.folder)
        return PageFigure(name, title, list(findings), note, Markup(svg), *table)


def _label(run: Run, taken: Mapping[str, Run]) -> str:
    """What tells a run from the others of its group."""
    label = run.name if run.seed is None else f"seed {run.seed}"
    if label in taken and run.path is not None:
        label = f"{label} ({run.path.name})"
    number, unique = 2, label
    while unique in taken:
        unique, number = f"{label} ({number})", number + 1
    return unique


def full_name(group: str, label: str) -> str:
    """The name of a run among all runs."""
    return label if label.startswith(group) else f"{group}, {label}"
