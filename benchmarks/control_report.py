"""Data, tables and figures of `controls.py`, from the results of its runs.

Tables and figures are made from the data alone, so that they can be made again anywhere:

    python benchmarks/control_report.py docs/controls
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from control_data import data, read
from control_figures import draw
from control_tables import tables

from entropy_trl.files import write_text


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json`, and from it `tables.md` and the figures, into the folder."""
    write_text(folder / "results.json", data(report))
    render(folder)


def render(folder: Path) -> None:
    """Make tables and figures from the data in the folder."""
    report = read(folder)
    (folder / "tables.md").write_text(tables(report))
    draw(report, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with results.json")
    render(parser.parse_args().folder)
