"""What `entropy_control_scores` changes on the embedded task: which tokens are selected, and how training ends.

A rollout is used for eight updates. At each of them the tokens that are selected by the rollout's log-probabilities are
compared with those that the current policy's would select, as the Jaccard index of the two sets (1: the same). Then
both choices train, from one warm start and with the same seeds, and the policies are evaluated on held-out prompts.

    OMP_NUM_THREADS=1 python benchmarks/scores.py --output scores.json
"""

import argparse
import json
from collections import defaultdict
from statistics import fmean
from unittest import mock

import embedded

from entropy_trl.loss.window import StepWindow
from entropy_trl.quickstart.recipe import UPDATES_PER_ROLLOUT


def train(method: str, scores: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and evaluate once; with the rollout's scores, also compare the selections update by update."""
    overlap = defaultdict(list)
    selected_in = StepWindow.selected_in

    def compare(window, inputs, batch):
        selected = selected_in(window, inputs, batch)
        other = window.control.select(batch)  # of the loss's own forward pass: the current policy
        other = other.selected & (other.covariance != 0)
        union = int((selected | other).sum())
        if union:
            update = window.trainer.state.global_step % UPDATES_PER_ROLLOUT + 1
            overlap[update].append(int((selected & other).sum()) / union)
        return selected

    with mock.patch.object(StepWindow, "selected_in", compare if scores == "rollout" else selected_in):
        metrics, _ = embedded.train(method, seed, args, entropy_control_scores=scores)
    means = {str(update): fmean(overlap[update]) for update in sorted(overlap)}
    return {"method": method, "scores": scores, "seed": seed, **metrics, "overlap": means}


def main(argv: list[str] | None = None) -> list[dict]:
    """Run all combinations, print a line each, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    embedded.add_arguments(parser, methods=["clip_cov", "kl_cov"])
    args = parser.parse_args(argv)
    results = []
    for method in args.methods:
        for scores in ("rollout", "current"):
            for seed in args.seeds:
                results.append(result := train(method, scores, seed, args))
                values = " ".join(f"{name} {result[name]:.3f}" for name in embedded.METRICS)
                overlap = " ".join(f"{value:.2f}" for value in result["overlap"].values())
                print(f"{method} {scores} seed {seed}: {values}{' overlap ' + overlap if overlap else ''}", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
