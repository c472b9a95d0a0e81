"""Does the entropy follow a target? Clip-Cov and KL-Cov with `entropy_target` beside what else holds entropy.

Every case trains with one setting (no tuning) from each warm start, at the hot and at the tuned learning rate of
`controls.py`, for the rollouts of the long recipe. Of each run it keeps the entropy curve, the tracking error (mean
distance of the entropy from the target over the second half, as a share of the target) and the held-out accuracy. A run
has collapsed if its entropy was below half of the target in the second half.

A finished run is a line of `--results` and is not repeated, so that the same command goes on where it was interrupted.
It counts only for the same setting, versions and kind of CPU. All of it takes four hours on a quiet core. `--table` writes a
page from what is there, with `--limit 0` without running anything.

    OMP_NUM_THREADS=1 python benchmarks/entropy_target.py --results docs/target/results.jsonl --table docs/target/tables.md
"""  # noqa: E501

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import embedded
import transformers
from control_cases import CASES as COMPARED
from control_cases import Setting
from controls import VERSIONS, prompts_of, shorten

from entropy_trl.quickstart.recipe import RECIPES
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig


TARGET = 0.3
RATES = {"hot": 6e-4, "tuned": 1e-4}
FIRST_SEED = 40  # a training seed of its own for each warm start, which no other benchmark has


def _control(name: str, ratio_clip: float | None, **kwargs: Any) -> Setting:
    return {"entropy_control": name, "entropy_control_kwargs": kwargs, "epsilon": ratio_clip}


#: One setting a case. Those that have a target get the same one.
CASES: dict[str, Setting] = {
    "clip_cov_target": _control("clip_cov", 0.2, fraction=1e-3, entropy_target=TARGET),
    "kl_cov_target": _control("kl_cov", None, fraction=1e-3, entropy_target=TARGET),
    "flexible_target": COMPARED["flexible_target"].settings[2],
    "adaptive_entropy": COMPARED["adaptive_entropy"].settings[1],
    "entropic": COMPARED["entropic"].settings[3],
    "kl_reference": COMPARED["kl_reference"].settings[3],
    "kl_cov": COMPARED["kl_cov"].settings[0],
    "kl_cov_annealed": _control("kl_cov", None, fraction=0.1, coef={"start": 1.0, "end": 0.1, "over": 0.5}),
    "clip_cov": COMPARED["clip_cov"].settings[0],
    "grpo": COMPARED["grpo"].settings[0],
}
LABELS = {
    "clip_cov_target": "Clip-Cov, target",
    "kl_cov_target": "KL-Cov, target",
    "flexible_target": "flexible clipping, target",
    "adaptive_entropy": "adaptive entropy bonus, target",
    "entropic": "EntroPIC, target",
    "kl_reference": "KL to the reference",
    "kl_cov": "KL-Cov",
    "kl_cov_annealed": "KL-Cov, annealed",
    "clip_cov": "Clip-Cov",
    "grpo": "GRPO",
}

Result = dict[str, Any]


def tracking(entropies: list[float], target: float = TARGET) -> dict[str, float]:
    """How near the target the entropies of a run were over its second half."""
    half = entropies[len(entropies) // 2 :]
    return {
        "tracking_error": fmean(abs(entropy - target) for entropy in half) / target,
        "lowest": min(half),
        "highest": max(half),
    }


def keys(args: argparse.Namespace) -> Iterator[Result]:
    """What each run is, in the order of running: hot before tuned, all cases of a warm start together."""
    for rate in args.rates:
        for start in args.warm_starts:
            for case in args.cases:
                yield {
                    "case": case,
                    "rate": RATES[rate],
                    "warm_start": start,
                    "seed": FIRST_SEED + start,
                    "rollouts": args.rollouts,
                    "eval_prompts": args.eval_prompts,
                    "setting": json.loads(json.dumps(CASES[case])),
                    "versions": VERSIONS,
                }


def execute(key: Mapping[str, Any], args: argparse.Namespace) -> Result:
    """Train and evaluate once."""
    metrics, log = embedded.train(
        "grpo",
        key["seed"],
        args,
        held_out=prompts_of("comparison", args.eval_prompts),
        warm_start=key["warm_start"],
        learning_rate=key["rate"],
        token_records=None,
        **key["setting"],
    )
    log = [entry for entry in log if "entropy" in entry]
    entropies = [entry["entropy"] for entry in log]
    result = dict(key) | metrics | tracking(entropies) | {"curve": shorten(entropies)}
    if "entropy_control/saturated" in log[0]:
        result["actuator"] = shorten([entry["entropy_control/actuator"] for entry in log])
        result["saturated"] = fmean(entry["entropy_control/saturated"] for entry in log[len(log) // 2 :])
    return result


def read(file: Path) -> list[Result]:
    """The finished runs. A line that an interruption cut short is taken out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # each run is written with the end of its line
        file.write_text("".join(lines[:-1]))
    return [json.loads(line) for line in lines if line.endswith("\n")]


def table(results: list[Result]) -> str:
    """The page: for each rate the means of each case over the warm starts, and the runs behind them."""
    text = ["# Entropy targets on the embedded task", "", f"Target {TARGET} nats. {__doc__.splitlines()[0]}", ""]
    for name, rate in RATES.items():
        rows = []
        for case, label in LABELS.items():
            runs = sorted((r for r in results if (r["case"], r["rate"]) == (case, rate)), key=lambda r: r["warm_start"])
            if not runs:
                continue
            means = [fmean(run[metric] for run in runs) for metric in ("tracking_error", *embedded.METRICS)]
            collapsed = sum(run["lowest"] < TARGET / 2 for run in runs)
            errors = " ".join(f"{run['tracking_error']:.0%}" for run in runs)
            at_bound = " ".join(f"{run['saturated']:.0%}" for run in runs if "saturated" in run) or "-"
            rows.append(
                f"| {label} | {len(runs)} | {collapsed} | {means[0]:.0%} [{errors}] | {at_bound} | "
                + " | ".join(f"{value:.3f}" for value in means[1:])
                + " |"
            )
        if rows:
            head = ("method", "runs", "collapsed", "tracking error", "at a bound", *embedded.METRICS)
            text += [f"## {name.capitalize()} learning rate, {rate:g}", "", f"| {' | '.join(head)} |"]
            text += ["| --- " * len(head) + "|", *rows, ""]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> list[Result]:
    """Run what is missing, a line each, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rates", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--warm_starts", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--rollouts", type=int, default=RECIPES["long"].rollouts)
    parser.add_argument("--eval_prompts", type=int, default=1024)
    parser.add_argument("--limit", type=int, help="how many of the missing runs to make; default: all")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to read and to add to")
    parser.add_argument("--table", type=Path, help="page to write")
    parser.add_argument("--warm_start_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--warm_start_steps", type=int, default=WarmStartConfig.steps)
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = read(args.results)
    missing = [key for key in keys(args) if not any(result.items() >= key.items() for result in results)]
    for done, key in enumerate(missing[: args.limit], start=1):
        result = execute(key, args)
        results.append(result)
        with args.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"[{done}/{len(missing)}] {key['case']} {key['rate']:g} warm start {key['warm_start']}: tracking error "
            f"{result['tracking_error']:.0%}, lowest {result['lowest']:.3f}, "
            + " ".join(f"{name} {result[name]:.3f}" for name in embedded.METRICS),
            flush=True,
        )
    if args.table is not None:
        args.table.write_text(table(results))
    return results


if __name__ == "__main__":
    main()
