"""Runs of the scripts in benchmarks/, for tests."""

import importlib.util
import json

from conftest import ROOT


BENCHMARKS = ROOT / "benchmarks"


def run_benchmark(monkeypatch, name, argv, output):
    """Run a benchmark's main() and return the JSON that it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as when the script is started
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = module.main([*argv, "--output", str(output)])
    written = json.loads(output.read_text())
    assert written == json.loads(json.dumps(report, default=str))
    return written
