"""Time and memory of loading a file that repeats its rows, as the 1.79 million rows of DAPO-Math-17k on the hub do.

A file of rows in DAPO's schema is written many times over and loaded by three processes, one after the other:

- `datasets`: `datasets.load_dataset` alone, which turns the file into a memory-mapped table;
- `entropy_trl`: `load_rows`, which finds that table in the cache of `datasets`, but nothing of its own;
- `cached`: `load_rows` again, which finds everything, as a second run and the other processes of a machine do.

Memory is the peak of the resident set, and of the part of it that is no mapped file (which the system can take back),
both with what the imports take.

    OMP_NUM_THREADS=1 python benchmarks/data.py --source train.jsonl --repeat 100 --format parquet
"""

import argparse
import json
import os
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
STEPS = ("datasets", "entropy_trl", "cached")
INTERVAL = 0.01


def repeat(source: Path, times: int, path: Path) -> None:
    """Write the rows of a JSON lines file, all of them `times` over, as JSON lines or Parquet."""
    if path.suffix == ".jsonl":
        text = source.read_text(encoding="utf-8")
        with path.open("w", encoding="utf-8") as file:
            for _ in range(times):
                file.write(text)
        return
    with source.open(encoding="utf-8") as file:
        rows = pyarrow.Table.from_pylist([json.loads(line) for line in file])
    # Row groups of a million rows are pyarrow's own choice, and take the most memory to read.
    pyarrow.parquet.write_table(pyarrow.concat_tables([rows] * times), path, row_group_size=1 << 20)


class PeakMemory(threading.Thread):
    """The largest resident set, and the largest part of it outside of mapped files, while this thread runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.running = True
        self.peak = {"resident": 0, "anonymous": 0}
        self.look()
        self.imports = self.peak["anonymous"]

    def look(self):
        memory = self.process.memory_info()
        now = {"resident": memory.rss, "anonymous": memory.rss - getattr(memory, "shared", 0)}
        self.peak = {name: max(self.peak[name], now[name]) for name in now}

    def run(self):
        while self.running:
            self.look()
            time.sleep(INTERVAL)


def measure(step: str, path: Path) -> dict:
    """Load the file once. In a process of its own, since memory that was needed once stays with a process."""
    import datasets

    from entropy_trl.data import load_rows

    datasets.disable_progress_bars()
    builder = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    memory = PeakMemory()
    memory.start()
    start = time.perf_counter()
    if step == "datasets":
        rows = datasets.load_dataset(builder, data_files={"train": str(path)})["train"]
    else:
        rows = load_rows(str(path))
    seconds = time.perf_counter() - start
    memory.running = False
    memory.join()
    return {"step": step, "rows": len(rows), "seconds": seconds, "imports": memory.imports, **memory.peak}


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure all steps, print a line each, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--source", type=Path, default=SAMPLE, help="JSON lines; default: the 64 rows of the package")
    parser.add_argument("--repeat", type=int, default=100)
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", nargs=2, metavar=("STEP", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{args.format}"
        repeat(args.source, args.repeat, path)
        print(f"{path.stat().st_size / 1e6:.0f} MB of {args.format}")
        environment = os.environ | {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        for step in STEPS:
            command = [sys.executable, __file__, "--measure", step, str(path)]
            child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results.append(result := json.loads(child.stdout))
            memory = ", ".join(f"{name} {result[name] / 1e6:.0f} MB" for name in ("imports", "anonymous", "resident"))
            print(f"{step}: {result['rows']} rows in {result['seconds']:.1f} s; {memory}", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
