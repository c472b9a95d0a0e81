"""Entropy curves of `flexible_clip` on the embedded task: does each strategy make the curve that its name says?

Every case trains with each seed from one warm start. A finished run is a file in `--folder` and is not repeated.
With the published thresholds the ratio clip hardly binds on so small a task; so the strategies have sharper ones too.

    OMP_NUM_THREADS=1 python benchmarks/flexible_clip.py --folder runs/flexible_clip --figure flexible_clip.png
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import embedded

from entropy_trl.files import write_json


#: The upper threshold falls from 2 to 0 with the probability. The lower one is 0.9 where it is to lower entropy, and
#: 0.02 elsewhere.
SHARP = {
    "upper_slope": -2.0,
    "upper_base": 2.0,
    "lower_slope": 0.0,
    "lower_base": 0.9,
    "epsilon_std": 0.2,
    "epsilon_std_lower": 0.02,
}
#: For each case the arguments of the control, or None for GRPO.
CASES: dict[str, dict[str, Any] | None] = {
    "grpo": None,
    "increase_then_decrease": SHARP | {"strategy": "increase_then_decrease"},
    "increase_then_decrease fade_in": SHARP | {"strategy": "increase_then_decrease", "second_half_lower": "fade_in"},
    "decrease_increase_decrease": SHARP | {"strategy": "decrease_increase_decrease"},
    "oscillatory_decay": SHARP | {"strategy": "oscillatory_decay", "entropy_floor": 0.4},
    "target": SHARP | {"strategy": "target", "entropy_target": 0.25},
    "published increase_then_decrease": {"strategy": "increase_then_decrease"},
}


def train(case: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once; `curve` has a row of (update, entropy) for each rollout."""
    kwargs = CASES[case]
    control: dict[str, Any] = {}
    if kwargs is not None:
        control = {"entropy_control": "flexible_clip", "entropy_control_kwargs": kwargs, "epsilon": None}
    metrics, log = embedded.train("grpo", seed, args, **control)
    log = [entry for entry in log if "entropy" in entry]
    clipped = {
        side: fmean(entry.get(f"entropy_control/clipped_{side}", entry[f"clip_ratio/{side}_mean"]) for entry in log)
        for side in ("low", "high")
    }
    return {
        "case": case,
        "seed": seed,
        "kwargs": kwargs,
        "rollouts": args.rollouts,
        **metrics,
        "clipped": clipped,
        "curve": [[entry["step"], entry["entropy"]] for entry in log],
        "raising": [entry["entropy_control/raising"] for entry in log if "entropy_control/raising" in entry],
    }


def quarters(curve: list[list[float]]) -> list[float]:
    """Mean entropy of each quarter of the run."""
    size = max(len(curve) // 4, 1)
    return [fmean(entropy for _, entropy in curve[i * size : (i + 1) * size]) for i in range(min(4, len(curve)))]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a case: a thin line a seed, a thick one for their mean, GRPO's mean in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in dict.fromkeys(result["case"] for result in results) if case != "grpo"]
    means = {case: mean_curve([r["curve"] for r in results if r["case"] == case]) for case in (*cases, "grpo")}
    columns = min(3, max(len(cases), 1))
    rows = -(-max(len(cases), 1) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, case in zip(panels, cases, strict=False):
        if means["grpo"]:
            axes.plot(*zip(*means["grpo"], strict=True), color="#999999", linewidth=1, label="GRPO")
        for result in results:
            if result["case"] == case:
                axes.plot(*zip(*result["curve"], strict=True), color="#0072B2", linewidth=0.5, alpha=0.6)
        axes.plot(*zip(*means[case], strict=True), color="#0072B2", linewidth=1.8)
        target = (CASES[case] or {}).get("entropy_target")
        if target is not None:
            axes.axhline(target, color="#D55E00", linestyle=":", linewidth=1)
        axes.set_title(case.replace("_", " "), fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.supxlabel("updates", fontsize=9)
    figure.supylabel("entropy, nats a token (grey: GRPO)", fontsize=9)
    figure.savefig(path, dpi=90)


def mean_curve(curves: list[list[list[float]]]) -> list[tuple[float, float]]:
    """The mean over seeds, which log at the same updates."""
    return [(rows[0][0], fmean(row[1] for row in rows)) for rows in zip(*curves, strict=True)]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all cases, print a line each, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    embedded.add_arguments(parser, methods=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path("runs/flexible_clip"), help="where finished runs are kept")
    parser.add_argument("--figure", type=Path, help="PNG file to draw the curves into")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        for case in args.methods:
            path = args.folder / f"{case.replace(' ', '-')}-seed{seed}.json"
            stored = json.loads(path.read_text()) if path.exists() else None
            if stored is None or (stored["kwargs"], stored["rollouts"]) != (CASES[case], args.rollouts):
                stored = train(case, seed, args)
                write_json(path, stored)
            results.append(stored)
            values = " ".join(f"{name} {stored[name]:.3f}" for name in embedded.METRICS)
            by_quarter = " ".join(f"{value:.3f}" for value in quarters(stored["curve"]))
            print(f"{case} seed {seed}: entropy by quarter {by_quarter}; {values}", flush=True)
    if args.figure is not None:
        draw(results, args.figure)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
