"""Evaluation on the benchmarks of arXiv 2505.22617, by its protocol; `command.py` is `entropy-trl evaluate`."""

from entropy_trl.evaluation.benchmarks import BENCHMARKS, Benchmark, Sampling, get_benchmark, load_benchmark


__all__ = ["BENCHMARKS", "Benchmark", "Sampling", "get_benchmark", "load_benchmark"]
