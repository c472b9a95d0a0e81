"""What `entropy_control_scores` changes on the embedded task: which tokens are selected, and how training ends.

A rollout is used for eight updates. At each of them the tokens that are selected by the rollout's log-probabilities are
compared with those that the current policy's would select, as the Jaccard index of the two sets (1: the same). Then
both choices train, from one warm start and with the same seeds, and the policies are evaluated on held-out prompts.

    OMP_NUM_THREADS=1 python benchmarks/scores.py --output scores.json
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from transformers import PrinterCallback

from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.quickstart import run, task
from entropy_trl.quickstart.evaluate import evaluate_policy
from entropy_trl.quickstart.recipe import RECIPES, UPDATES_PER_ROLLOUT, training_arguments
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up
from entropy_trl.trainer import _StepWindow


METRICS = ("final_entropy", "greedy", "avg@16", "pass@16")


def train(method: str, scores: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and evaluate once; with the rollout's scores, also compare the selections update by update."""
    overlap = defaultdict(list)
    selected_in = _StepWindow.selected_in

    def compare(window, inputs, batch):
        selected = selected_in(window, inputs, batch)
        other = window.control.select(batch)  # of the loss's own forward pass: the current policy
        other = other.selected & (other.covariance != 0)
        union = int((selected | other).sum())
        if union:
            update = window.trainer.state.global_step % UPDATES_PER_ROLLOUT
            overlap[update].append(int((selected & other).sum()) / union)
        return selected

    recipe = RECIPES["short"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(method, recipe, seed, Path(folder)) | {"save_strategy": "no"}
        if args.rollouts:
            arguments["max_steps"] = args.rollouts * UPDATES_PER_ROLLOUT
        model, tokenizer, _ = load_or_warm_up(args.warm_start, args.warm_start_dir)
        trainer = CovGRPOTrainer(
            model=model,
            reward_funcs=task.countdown_reward,
            args=CovGRPOConfig(**arguments, entropy_control_scores=scores, disable_tqdm=True),
            train_dataset=task.build_dataset(),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        with mock.patch.object(_StepWindow, "selected_in", compare if scores == "rollout" else selected_in):
            trainer.train()
    metrics = evaluate_policy(model, task.held_out_prompts(args.eval_prompts), run.SAMPLES, run.EVALUATION_SEED)
    return {
        "method": method,
        "scores": scores,
        "seed": seed,
        **{name: metrics[name] for name in METRICS},
        "overlap": {str(update + 1): fmean(overlap[update]) for update in sorted(overlap)},
    }


def main(argv: list[str] | None = None) -> list[dict]:
    """Run all combinations, print a line each, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=["clip_cov", "kl_cov"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, help="default: the short recipe's 120")
    parser.add_argument("--eval_prompts", type=int, default=1024)
    parser.add_argument("--warm_start_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--warm_start_steps", type=int, default=WarmStartConfig.steps)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    args.warm_start = WarmStartConfig(0, args.warm_start_steps, min(WarmStartConfig.noisy_steps, args.warm_start_steps))
    torch.set_num_threads(1)
    results = []
    for method in args.methods:
        for scores in ("rollout", "current"):
            for seed in args.seeds:
                results.append(result := train(method, scores, seed, args))
                values = " ".join(f"{name} {result[name]:.3f}" for name in METRICS)
                overlap = " ".join(f"{value:.2f}" for value in result["overlap"].values())
                print(f"{method} {scores} seed {seed}: {values}{' overlap ' + overlap if overlap else ''}", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
