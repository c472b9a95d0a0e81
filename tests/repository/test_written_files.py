"""Files that users and uploads read are replaced in one move: a reader never sees half of one."""

import os

import numpy as np
import pytest

from entropy_trl.analysis.figures import histogram, publish, styles
from entropy_trl.data.dropped import write_lines
from entropy_trl.quickstart.plot import draw


LOG = [{"step": step, "entropy": 0.5, "reward": 0.1, "held_out/pass@16": 0.2} for step in (1, 2)]


def draw_quickstart(path):
    draw({"grpo": [LOG]}, path)


def write_dropped_rows(path):
    write_lines(str(path), [{"row": 1, "reason": "x"}])


def draw_report_figure(path):
    chosen = styles(["a"])
    publish(histogram({"a": np.array([0.1, 1.0])}, chosen, "x"), path.stem, "t", "f", chosen, path.parent)


@pytest.mark.parametrize("write", [draw_quickstart, write_dropped_rows, draw_report_figure])
def test_a_file_is_replaced_and_not_written_over(write, tmp_path):
    path, opened = tmp_path / "file.png", tmp_path / "as_opened_before"
    path.write_text("old")
    os.link(path, opened)  # what a reader that has the file open sees
    write(path)
    assert opened.read_text() == "old"
    assert path.read_bytes() != b"old"
    assert not list(tmp_path.glob("*.part"))
