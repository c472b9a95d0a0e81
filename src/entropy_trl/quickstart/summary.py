"""What a quickstart has found: its table, the verdict on each method, and the sentence that compares them."""

from typing import Any

from entropy_trl.analysis.verdict import COLLAPSE, Verdict
from entropy_trl.quickstart.evaluate import Metrics
from entropy_trl.quickstart.recipe import LABELS


TABLE_COLUMNS = ("final_entropy", "greedy", "avg@16", "pass@4", "pass@16", "seconds")
# What the closing sentence calls a difference: entropies apart by this factor, and this much more pass@16.
ENTROPY_RATIO, PASS_GAIN = 2.0, 0.05

# What the closing sentence says of GRPO's entropy, by the sign of its verdict.
_SEEN = {
    "collapsed": "collapsed",
    "collapsing": "is collapsing",
    "surging": "is surging",
    "healthy": "did not collapse",
}

Summary = dict[str, Any]


def format_table(summary: Summary) -> str:
    """The summary as a table: a row for the warm-up and one for each method, means over the seeds."""
    rows = [("warm-up", summary["warm_start"])]
    rows += [(LABELS[method], metrics) for method, metrics in summary["methods"].items()]
    lines = ["".join([f"{'method':<12}", *(f"{name:>15}" for name in TABLE_COLUMNS)])]
    for name, metrics in rows:
        cells = [f"{metrics[column]:>15.3f}" for column in TABLE_COLUMNS[:-1]]
        lines.append("".join([f"{name:<12}", *cells, f"{metrics['seconds']:>15.0f}"]))
    return "\n".join(lines)


def format_verdicts(summary: Summary) -> str:
    """The verdict on the entropy of each method, as the report gives it: a line on what was found, and one on why."""
    lines = []
    for method, stored in summary["verdicts"].items():
        found = Verdict(**stored)
        lines.append(f"{LABELS[method]}: {found.sentence} {found.why}")
        if found.alarm is not None:
            lines.append(f"    {found.advice}")
        lines.append(f"    Confidence: {found.confidence} ({found.grounds}).")
    return "\n".join(lines)


def describe(summary: Summary) -> str:
    """One sentence on what the numbers show, and on what they do not."""
    methods: dict[str, Metrics] = summary["methods"]
    n_seeds = len(summary["seeds"])
    start = f"With {n_seeds} seed{'s' if n_seeds > 1 else ''}, "
    warm_entropy = summary["warm_start"]["final_entropy"]
    if "grpo" not in methods:
        return start + "nothing can be compared, because GRPO, the baseline, was not among the methods."
    grpo = methods["grpo"]
    sign = summary["verdicts"]["grpo"]["sign"]
    if sign == "unknown":  # too short: a fall is not called a collapse yet
        fell = grpo["final_entropy"] <= COLLAPSE * warm_entropy
        seen = "cannot be judged from so few points" if fell else _SEEN["healthy"]
    else:
        seen = _SEEN[sign]
    parts = [f"GRPO's entropy {seen} ({warm_entropy:.2f} to {grpo['final_entropy']:.2f} nats)"]
    for method, metrics in methods.items():
        if method == "grpo":
            continue
        ratio = metrics["final_entropy"] / grpo["final_entropy"]
        gain = metrics["pass@16"] - grpo["pass@16"]
        if ratio < ENTROPY_RATIO:
            verdict = "did not keep clearly more"
        elif gain < PASS_GAIN:
            verdict = "kept more, with no clear gain in pass@16"
        else:
            verdict = "kept more and solves more prompts in 16 tries"
        parts.append(
            f"{LABELS[method]} {verdict} ({ratio:.1f} times GRPO's entropy, pass@16 {gain:+.2f}, "
            f"avg@16 {metrics['avg@16'] - grpo['avg@16']:+.2f}, greedy {metrics['greedy'] - grpo['greedy']:+.2f})"
        )
    return start + "; ".join(parts) + "."
