"""Correctness and speed of `code_reward` on HumanEval and MBPP: which references score 1, and which broken ones.

    python benchmarks/code_rewards.py --humaneval test.jsonl --mbpp mbpp.jsonl

Each reference solution runs in bare Python first. One that passes there should score 1.0 in the sandbox, and a mutated
one 0.0: its first `return` gives another value, or where it has none, its body does nothing. The speed is programs a
second in the sandbox beside the same tests in bare subprocesses, with the same number of workers.
"""

import argparse
import ast
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_trl.rewards.code import CodeReward


@dataclass
class Problem:
    """A problem with its reference, its tests for the sandbox, and all of it as one script."""

    name: str
    program: str
    tests: str
    script: str


def humaneval(path: Path) -> list[Problem]:
    """Read HumanEval's file."""
    problems = []
    for row in map(json.loads, path.read_text().splitlines()):
        tests = {
            "kind": "asserts",
            "prefix": row["prompt"],
            "setup": row["test"],
            "entry_point": row["entry_point"],
            "cases": ["check(candidate)"],
        }
        program = row["prompt"] + row["canonical_solution"]
        script = f"{program}\n{row['test']}\ncheck({row['entry_point']})\n"
        problems.append(Problem(row["task_id"], program, json.dumps(tests), script))
    return problems


def mbpp(path: Path) -> list[Problem]:
    """Read MBPP's file."""
    problems = []
    for row in map(json.loads, path.read_text().splitlines()):
        cases = row["test_list"] + row["challenge_test_list"]
        tests = {"kind": "asserts", "setup": row["test_setup_code"], "cases": cases}
        program = row["code"].replace("\r\n", "\n")
        script = "\n".join([program, row["test_setup_code"], *cases])
        problems.append(Problem(f"MBPP/{row['task_id']}", program, json.dumps(tests), script))
    return problems


class _Mutation(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.Return:
        return ast.Return(ast.List([ast.Constant("mutated")], ast.Load()))


def mutated(program: str) -> str:
    """Return a program whose functions return what no test expects."""
    return ast.unparse(ast.fix_missing_locations(_Mutation().visit(ast.parse(program))))


def bare(script: str, time_limit: float) -> bool:
    """Whether a script passes in a bare subprocess."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, timeout=time_limit, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def measure(problems: list[Problem], reward: CodeReward) -> dict[str, Any]:
    """Return the row of a benchmark in the table, with what did not go as it should."""

    def score(programs: list[str], tests: list[str], kinds: list[str]) -> list[float]:
        return reward(programs, tests, code_format="whole", log_extra=lambda _, values: kinds.extend(values))

    with ThreadPoolExecutor(reward.workers) as threads:
        begun = time.monotonic()
        passes = list(threads.map(lambda problem: bare(problem.script, reward.time_limit), problems))
        bare_seconds = time.monotonic() - begun
    tests = [problem.tests for problem in problems]
    kinds: list[str] = []
    begun = time.monotonic()
    scores = score([problem.program for problem in problems], tests, kinds)
    seconds = time.monotonic() - begun
    broken = score([mutated(problem.program) for problem in problems], tests, [])
    names = [problem.name for problem in problems]
    return {
        "problems": len(problems),
        "pass_bare": sum(passes),
        "pass_both": sum(p and s == 1.0 for p, s in zip(passes, scores, strict=True)),
        "pass_sandbox_only": [n for n, p, s in zip(names, passes, scores, strict=True) if s == 1.0 and not p],
        "pass_bare_only": [
            f"{n} ({kind})" for n, p, s, kind in zip(names, passes, scores, kinds, strict=True) if p and s < 1.0
        ],
        "mutated_score": [n for n, s in zip(names, broken, strict=True) if s],
        "outcomes": dict(Counter(kinds)),
        "bare_per_second": len(problems) / bare_seconds,
        "sandbox_per_second": len(problems) / seconds,
    }


def hanging(reward: CodeReward, count: int) -> float:
    """Return the seconds that `count` programs take that never end."""
    programs = [f"def f(x):\n    n = {index}\n    while True:\n        pass" for index in range(count)]
    tests = json.dumps({"kind": "asserts", "cases": ["assert f(1) == 1"]})
    begun = time.monotonic()
    assert reward(programs, [tests] * count, code_format="whole") == [0.0] * count
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", type=Path, help="the 164 problems, as JSON lines")
    parser.add_argument("--mbpp", type=Path, help="the 974 problems, as JSON lines")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=10.0)
    parser.add_argument("--hanging", type=int, default=0, help="how many programs that never end to time")
    parser.add_argument("--limit", type=int, help="problems of each file, for a quick look")
    parser.add_argument("--output", type=Path, help="where to write the numbers, as JSON")
    options = parser.parse_args()
    reward = CodeReward(options.workers, options.time_limit)
    results: dict[str, Any] = {}
    for name, read in (("humaneval", humaneval), ("mbpp", mbpp)):
        if path := getattr(options, name):
            results[name] = measure(read(path)[: options.limit], reward)
    if options.hanging:
        limit = options.time_limit * options.hanging / options.workers
        results["hanging"] = {"seconds": hanging(reward, options.hanging), "time_limit_x_programs_per_worker": limit}
    print("| benchmark | problems | pass bare | of these 1.0 | mutated 1.0 | bare /s | sandbox /s |")
    print("|---|---|---|---|---|---|---|")
    for name in set(results) - {"hanging"}:
        row = results[name]
        print(
            f"| {name} | {row['problems']} | {row['pass_bare']} | {row['pass_both']} | {len(row['mutated_score'])} | "
            f"{row['bare_per_second']:.1f} | {row['sandbox_per_second']:.1f} |"
        )
    print(json.dumps(results, indent=2))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
