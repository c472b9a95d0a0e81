"""All controls and baselines on the embedded task, with the same budget of tuning, from one warm start.

1. The learning rate is tuned for GRPO on the short recipe, one seed each: of `RATES` the one with the best mean
   accuracy (avg@16).
2. The setting of every method is tuned on the short recipe: four settings, each trained twice at the hot and once at
   the tuned rate. The best score, the mean of avg@16 and pass@16, over both rates wins.
3. Every method is trained with its setting for the rollouts of the short and of the long recipe, at both rates, with
   each seed.
4. The methods of `FOLLOWED_UP` are trained with the same settings from other warm starts, once from each (long recipe,
   hot rate).

1 to 3 are the part `comparison`, 4 is the part `other_warm_starts`. The tuning and the comparison have seeds and
held-out prompts of their own, which no other benchmark here has. On two cores all of it takes about four hours on one
machine and seven on another. It needs the `analysis` extra.

A finished run is a file in `--folder` and is not repeated, so that the same command goes on where it was interrupted.
It counts only for the weights that it started from and the same versions and kind of CPU: another kind makes another
warm start of the same seed.
`--report` writes data, tables and figures from what is there, at the end or with `--processes 0` at any time. A part
that is left out of `--parts` stays as the report has it, also where that was made on another machine.

    OMP_NUM_THREADS=1 python benchmarks/controls.py --processes 2 --report docs/controls
"""

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import control_data
import control_report
import embedded
import torch
import transformers
import trl
from control_cases import CASES, FOLLOWED_UP, TUNED, UNTUNED

from entropy_trl.files import write_json
from entropy_trl.quickstart import task
from entropy_trl.quickstart.recipe import RECIPES
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up


HOT = RECIPES["short"].learning_rate
RATES = (3e-5, 1e-4, 2e-4, 3e-4, HOT)
#: The first one tunes the rate, and the settings at both rates; the others the settings at the hot rate.
TUNING_SEEDS = (100, 101)
SEEDS = (10, 11, 12)
WARM_STARTS = (1, 2, 3, 4)
FIRST_WARM_START_SEED = 20  # a training seed of its own for each warm start
CURVE_POINTS = 40
VERSIONS = {
    "torch": torch.__version__,
    "trl": trl.__version__,
    "transformers": transformers.__version__,
    "cpu": torch.backends.cpu.get_cpu_capability(),
}
PARTS = ("comparison", "other_warm_starts")

Result = dict[str, Any]
Prompts = Literal["quickstart", "tuning", "comparison"]


@dataclass(frozen=True)
class Run:
    """One training: `setting` is an index into the settings of the case."""

    case: str
    setting: int
    recipe: str
    rate: float
    seed: int
    warm_start: int = 0

    @property
    def name(self) -> str:
        start = f"warm{self.warm_start}-" if self.warm_start else ""
        return f"{start}{self.recipe}-{self.rate:g}-{self.case}-{self.setting}-seed{self.seed}"


def key_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What a stored result must have been made with, beside its name."""
    return {
        "arguments": CASES[run.case].settings[run.setting],
        "rollouts": args.rollouts or RECIPES[run.recipe].rollouts,
        "eval_prompts": args.eval_prompts,
        "warm_start_weights": weights_of(embedded.warm_start_config(args, run.warm_start), args.warm_start_dir),
        "versions": VERSIONS,
    }


@cache
def weights_of(config: WarmStartConfig, folder: Path) -> str:
    """Ten hexadecimal digits over the weights of a warm start, which is made if it is not there."""
    torch.set_num_threads(1)
    model, _, _ = load_or_warm_up(config, folder)
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode() + weights.numpy().tobytes())
    return digest.hexdigest()[:10]


def stored(run: Run, args: argparse.Namespace) -> Result | None:
    """The stored result of a run, if there is one."""
    path = args.folder / f"{run.name}.json"
    if not path.exists():
        return None
    result: Result = json.loads(path.read_text())
    return result if result.items() >= key_of(run, args).items() else None


def execute(run: Run, args: argparse.Namespace) -> Result:
    """The result of a run: the stored one, or that of training and evaluating now."""
    result = stored(run, args)
    if result is not None:
        return result
    transformers.utils.logging.disable_progress_bar()
    key = key_of(run, args)
    metrics, log = embedded.train(
        "grpo",
        run.seed,
        argparse.Namespace(**vars(args) | {"rollouts": key["rollouts"]}),
        held_out=prompts_of("tuning" if run.seed in TUNING_SEEDS else "comparison", args.eval_prompts),
        warm_start=run.warm_start,
        learning_rate=run.rate,
        token_records=None,
        **key["arguments"],
    )
    entropies = [entry["entropy"] for entry in log if "entropy" in entry]
    result = asdict(run) | key | metrics | {"mean_entropy": fmean(entropies), "curve": shorten(entropies)}
    write_json(args.folder / f"{run.name}.json", result)
    return result


def prompts_of(use: Prompts, count: int) -> list[str]:
    """The held-out prompts for a use. Those of the quickstart are the other benchmarks' too."""
    first = get_args(Prompts).index(use) * count
    return task.held_out_prompts(first + count)[first:]


def solvable(prompts: Sequence[str]) -> dict[str, list[float]]:
    """The share of prompts that can be solved with the first two operators fixed (9 shares), and the first one (3)."""
    right = embedded.right_chains(prompts)
    shares = {"two operators fixed": right.any(3), "one operator fixed": right.any(3).any(2)}
    return {name: share.double().mean(0).flatten().tolist() for name, share in shares.items()}


def shorten(values: list[float]) -> list[float]:
    """Means of at most `CURVE_POINTS` equal stretches, with four digits."""
    count = min(CURVE_POINTS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [round(fmean(values[a:b]), 4) for a, b in pairwise(edges)]


def execute_all(runs: Iterable[Run], args: argparse.Namespace) -> list[Result]:
    """Results of the runs, in their order. Without processes only those that are stored."""
    runs = list(runs)
    results = {run: result for run in runs if (result := stored(run, args)) is not None}
    if args.processes > 0:
        missing = [run for run in runs if run not in results]
        for run in missing:
            key_of(run, args)  # makes its warm start, before two processes would
        for done, (run, result) in enumerate(_made(missing, args), start=1):
            results[run] = result
            values = " ".join(f"{name} {result[name]:.3f}" for name in embedded.METRICS)
            print(f"[{done}/{len(missing)}] {run.name}: {values}", flush=True)
    return [results[run] for run in runs if run in results]


def _made(runs: list[Run], args: argparse.Namespace) -> Iterator[tuple[Run, Result]]:
    """The runs with their results, as they finish."""
    if args.processes == 1 or len(runs) < 2:
        yield from ((run, execute(run, args)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        waiting = {pool.submit(execute, run, args): run for run in runs}
        try:
            yield from ((waiting[future], future.result()) for future in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)  # where one has failed, the rest would run all the same


def tuned_rate(results: list[Result]) -> float:
    """The learning rate with the best mean accuracy."""
    return float(max(results, key=lambda result: result["avg@16"])["rate"])


def tuned_settings(scores: Mapping[tuple[str, int], Mapping[float, float]]) -> dict[str, int]:
    """For each case the setting whose mean score over the rates is best (the first of equal ones), and for its null.

    Args:
        scores: for each case and setting the score by rate ([`control_data.tuning_scores`]).
    """
    means: dict[str, dict[int, float]] = {}
    for (case, setting), by_rate in scores.items():
        means.setdefault(case, {})[setting] = fmean(by_rate.values())
    chosen = {case: max(by_setting, key=by_setting.__getitem__) for case, by_setting in means.items()}
    nulls = {name: chosen[case.null_of] for name, case in CASES.items() if case.null_of in chosen}
    return {case: setting for case in CASES for setting in [(chosen | nulls).get(case)] if setting is not None}


def compare(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The tuning and the cells: what is missing is run, without processes it is left out."""
    rates = execute_all((Run("grpo", 0, "short", rate, TUNING_SEEDS[0]) for rate in RATES), args)
    if len(rates) < len(RATES):
        parser.error(f"{args.folder} has no tuning of the learning rate; give --processes 1 or more")
    tuned = tuned_rate(rates)
    print(f"tuned learning rate: {tuned:g}", flush=True)
    where = {(tuned, TUNING_SEEDS[0]), *((HOT, seed) for seed in TUNING_SEEDS)}
    wanted = {CASES[method].null_of or method for method in ("grpo", *args.methods)}
    tuning = []
    for case in (case for case in CASES if case in wanted):
        settings = range(len(CASES[case].settings))
        runs = [Run(case, setting, "short", rate, seed) for setting in settings for rate, seed in sorted(where)]
        of_case = execute_all(runs, args)
        if len(of_case) == len(runs):
            tuning += of_case
    chosen = tuned_settings(control_data.tuning_scores(tuning))
    print(f"settings: {chosen}", flush=True)
    results = []
    for recipe in args.recipes:
        for rate in dict.fromkeys((HOT, tuned)):
            runs = [Run(case, chosen[case], recipe, rate, seed) for seed in args.seeds for case in chosen]
            of_cell = execute_all(runs, args)
            print(f"{recipe} {rate:g}: {len(of_cell)} of {len(runs)} runs", flush=True)
            results += of_cell
    return {
        "versions": VERSIONS,
        "hot_rate": HOT,
        "tuned_rate": tuned,
        "tuning_seeds": TUNING_SEEDS,
        "seeds": args.seeds,
        "eval_prompts": args.eval_prompts,
        "chosen": chosen,
        "settings": {case: CASES[case].settings for case in chosen},
        "warm_start": embedded.evaluate_warm_start(args, 0, prompts_of("comparison", args.eval_prompts)),
        "solvable": {use: solvable(prompts_of(use, args.eval_prompts)) for use in get_args(Prompts)},
        "rates": rates,
        "tuning": tuning,
        "results": results,
    }


def follow_up(comparison: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The long recipe at the hot rate from other warm starts, with the settings of a comparison."""
    chosen = comparison["chosen"] | dict.fromkeys(UNTUNED, 0)
    settings = {case: chosen[case] for case in FOLLOWED_UP if case in chosen}
    runs = [
        Run(case, setting, "long", HOT, FIRST_WARM_START_SEED + start, start)
        for start in args.warm_starts
        for case, setting in settings.items()
    ]
    results = execute_all(runs, args)
    print(f"other warm starts: {len(results)} of {len(runs)} runs", flush=True)
    prompts = prompts_of("comparison", args.eval_prompts)
    return {
        "versions": VERSIONS,
        "rate": HOT,
        "rollouts": args.rollouts or RECIPES["long"].rollouts,
        "eval_prompts": args.eval_prompts,
        "settings": {case: CASES[case].settings[setting] for case, setting in settings.items()},
        "warm_starts": args.warm_starts,
        "seeds": [FIRST_WARM_START_SEED + start for start in args.warm_starts],
        "before": [embedded.evaluate_warm_start(args, start, prompts) for start in args.warm_starts],
        "results": results,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print a line each, and return what the report is made from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")
    parser.add_argument("--methods", nargs="+", choices=TUNED, default=list(TUNED), help="of the comparison, with GRPO")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the comparison")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="of the comparison")
    parser.add_argument("--warm_starts", nargs="+", type=int, default=list(WARM_STARTS), help="beside the first, 0")
    parser.add_argument("--rollouts", type=int, help="rollouts a run, instead of the recipe's")
    parser.add_argument("--eval_prompts", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("runs/controls"), help="where finished runs are kept")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time; 0 only reads what is there")
    parser.add_argument("--report", type=Path, help="folder to write data, tables and figures into")
    parser.add_argument("--warm_start_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--warm_start_steps", type=int, default=WarmStartConfig.steps)
    args = parser.parse_args(argv)
    for name, used in (("seeds", TUNING_SEEDS), ("warm_starts", (0,))):
        values = getattr(args, name)
        if len({*values, *used}) < len(values) + len(used):
            parser.error(f"--{name} {values}: give each once, and none of {used}, used elsewhere here")
    there = args.report is not None and (args.report / "results.json").exists()
    report = control_data.read(args.report) if there else {}
    if report and set(args.parts) < set(PARTS) and report["eval_prompts"] != args.eval_prompts:
        parser.error(f"--eval_prompts {args.eval_prompts}: the part that is kept has {report['eval_prompts']}")
    if "comparison" not in args.parts:
        settings = json.loads(json.dumps({case: CASES[case].settings for case in report.get("chosen", ())}))
        if not settings or settings != report["settings"]:
            parser.error(f"--parts {' '.join(args.parts)} takes the settings from --report, and {args.report} has none")
    args.folder.mkdir(parents=True, exist_ok=True)
    if "comparison" in args.parts:
        report |= compare(args, parser)
    if "other_warm_starts" in args.parts:
        report["other_warm_starts"] = follow_up(report, args)
    if args.report is not None:
        control_report.write(report, args.report)
    return report


if __name__ == "__main__":
    main()
