"""Rows of problems with verifiable answers: loading, reading, and leaving out the bad ones."""

from entropy_trl.data.answers import final_result
from entropy_trl.data.loading import load_splits
from entropy_trl.data.options import DEFAULT_TEMPLATE, RowOptions
from entropy_trl.data.rows import load_rows, prepare_rows


__all__ = ["DEFAULT_TEMPLATE", "RowOptions", "final_result", "load_rows", "load_splits", "prepare_rows"]
