"""Time and memory of loading a file that repeats its rows, as the 1.79 million rows of DAPO-Math-17k on the hub do.

A file of rows in DAPO's schema is repeated and loaded by two processes, one after the other: the first finds nothing in
the cache of `datasets`, the second everything. Memory is the peak of the resident set, and of the part of it that is no
mapped file, which the system cannot take back.

    OMP_NUM_THREADS=1 python benchmarks/data.py --source train.jsonl --repeat 100 --format parquet
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet


SAMPLE = Path(__file__).parents[1] / "src" / "entropy_trl" / "sample_data" / "dapo_math_sample.jsonl"
INTERVAL = 0.01


def repeat(source: Path, times: int, path: Path) -> None:
    """Write the rows of a JSON lines file, all of them `times` over, as JSON lines or Parquet."""
    if path.suffix == ".jsonl":
        text = source.read_text()
        with path.open("w") as file:
            for _ in range(times):
                file.write(text)
        return
    rows = pyarrow.Table.from_pylist([json.loads(line) for line in source.open()])
    # Row groups of a million rows, pyarrow's own choice, take the most memory to read.
    pyarrow.parquet.write_table(pyarrow.concat_tables([rows] * times), path, row_group_size=1 << 20)


class PeakMemory(threading.Thread):
    """The largest resident set, and the largest part of it outside of mapped files, while this thread runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.resident = self.anonymous = 0
        self.running = True
        self.look()

    def look(self):
        memory = self.process.memory_info()
        self.resident = max(self.resident, memory.rss)
        self.anonymous = max(self.anonymous, memory.rss - getattr(memory, "shared", 0))

    def run(self):
        while self.running:
            self.look()
            time.sleep(INTERVAL)


def load(path: str, cache: str) -> dict:
    """In a process of its own: load the file and measure."""
    import datasets

    from entropy_trl.data import load_rows, prepare_rows

    datasets.disable_progress_bars()
    logging.getLogger("entropy_trl").setLevel(logging.ERROR)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    figures = {}
    builder = {".jsonl": "json", ".parquet": "parquet"}[Path(path).suffix]
    steps = {
        "datasets": lambda: len(datasets.load_dataset(builder, data_files={"train": path}, split="train")),
        "entropy_trl": lambda: len(load_rows(path)),
    }
    del prepare_rows
    for name, step in steps.items():
        peak = PeakMemory()
        before = peak.anonymous
        peak.start()
        start = time.perf_counter()
        rows = step()
        seconds = time.perf_counter() - start
        peak.running = False
        peak.join()
        figures[name] = {
            "rows": rows,
            "seconds": seconds,
            "resident": peak.resident,
            "anonymous": peak.anonymous,
            "before": before,
        }
    return figures
