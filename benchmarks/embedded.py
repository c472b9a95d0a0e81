"""One run on the quickstart's task, for the benchmarks that compare trainings: the short recipe from one warm start."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Qwen2ForCausalLM

from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.quickstart import task
from entropy_trl.quickstart.curve import CURVE_PROMPTS, EVALUATION_SEED, SAMPLES, HeldOutCurve
from entropy_trl.quickstart.evaluate import evaluate_policy, sample
from entropy_trl.quickstart.recipe import RECIPES, UPDATES_PER_ROLLOUT, training_arguments
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up


METRICS = ("final_entropy", "greedy", "avg@16", "pass@4", "pass@16")


def add_arguments(parser: argparse.ArgumentParser, methods: list[str]) -> None:
    """The options of every such benchmark."""
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=RECIPES["short"].rollouts)
    parser.add_argument("--eval_prompts", type=int, default=1024)
    parser.add_argument("--warm_start_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--warm_start_steps", type=int, default=WarmStartConfig.steps)
    parser.add_argument("--output", type=Path, help="JSON file to write")


def warm_start_config(args: argparse.Namespace, seed: int = 0) -> WarmStartConfig:
    """The warm start that the options ask for."""
    return WarmStartConfig(seed, args.warm_start_steps, min(WarmStartConfig.noisy_steps, args.warm_start_steps))


def train(
    method: str,
    seed: int,
    args: argparse.Namespace,
    curve: bool = False,
    held_out: Sequence[str] | None = None,
    warm_start: int = 0,
    **overrides: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train from the warm start with seed `warm_start` and evaluate, once.

    Returns the metrics on the prompts `held_out` and the trainer's log.

    One more metric, `cpu_seconds`, is the processor time of the training, which other processes do not lengthen. With
    `curve`, the log also has the held-out metrics along the way, as the quickstart measures them.
    """
    torch.set_num_threads(1)
    model, tokenizer, _ = load_or_warm_up(warm_start_config(args, warm_start), args.warm_start_dir)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(method, RECIPES["short"], seed, Path(folder))
        arguments |= {"max_steps": args.rollouts * UPDATES_PER_ROLLOUT, "save_strategy": "no", "disable_tqdm": True}
        trainer = CovGRPOTrainer(
            model=model,
            reward_funcs=task.countdown_reward,
            args=CovGRPOConfig(**arguments | overrides),
            train_dataset=task.build_dataset(),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        if curve:
            every = max(args.rollouts // 12, 1) * UPDATES_PER_ROLLOUT
            curve_prompts = task.held_out_prompts(min(CURVE_PROMPTS, args.eval_prompts))
            trainer.add_callback(HeldOutCurve(curve_prompts, every, f"{method} {overrides} seed {seed}"))
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    prompts = task.held_out_prompts(args.eval_prompts) if held_out is None else held_out
    return _evaluate(model, prompts) | {"cpu_seconds": seconds}, trainer.state.log_history


def evaluate_warm_start(args: argparse.Namespace, seed: int, prompts: Sequence[str]) -> dict[str, float]:
    """The metrics of a warm start, before any RL."""
    torch.set_num_threads(1)
    model, _, _ = load_or_warm_up(warm_start_config(args, seed), args.warm_start_dir)
    return _evaluate(model, prompts)


def _evaluate(model: Qwen2ForCausalLM, prompts: Sequence[str]) -> dict[str, float]:
    metrics = evaluate_policy(model, prompts, SAMPLES, EVALUATION_SEED)
    return {name: metrics[name] for name in METRICS} | foresight(model, prompts)


def foresight(model: Qwen2ForCausalLM, prompts: Sequence[str]) -> dict[str, float]:
    """Whether a policy chooses the operators before the last one for the target.

    Returns:
        `completable`, the share of its answers whose operators before the last one can be completed to the target, and
        `completable_blind`, the same where it wrote them for the same digits and another target. They are equal in
        expectation for a policy whose first operators do not depend on the target.
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    shifts = torch.randint(1, 10, (len(prompts),), generator=generator).tolist()
    others = [
        task.format_prompt([int(digit) for digit in prompt[: task.N_DIGITS]], (int(prompt[-2]) + shift) % 10)
        for prompt, shift in zip(prompts, shifts, strict=True)
    ]
    return {
        name: completable(prompts, sample(model, asked, SAMPLES, generator).tokens)
        for name, asked in (("completable", prompts), ("completable_blind", others))
    }


def completable(prompts: Sequence[str], tokens: Tensor) -> float:
    """The share of answers that some last operator makes right: `tokens` (P, S, 7) for P prompts.

    Only the operators of the answers count, not the values that they write.
    """
    operators = tokens[:, :, 0 : task.COMPLETION_LENGTH - 1 : 2][:, :, :-1] - task.TOKEN_ID[task.OPERATORS[0]]
    are_operators = ((operators >= 0) & (operators < len(task.OPERATORS))).all(dim=2)
    first, second = operators.clamp(0, len(task.OPERATORS) - 1).unbind(dim=2)
    rows = torch.arange(len(prompts)).unsqueeze(1)
    return (right_chains(prompts).any(3)[rows, first, second] & are_operators).double().mean().item()


def right_chains(prompts: Sequence[str]) -> Tensor:
    """(P, 3, 3, 3) booleans: which of the 27 chains of operators reach the target of each of P prompts."""
    digits = torch.tensor([[int(digit) for digit in prompt[: task.N_DIGITS]] for prompt in prompts])
    targets = torch.tensor([int(prompt[-2]) for prompt in prompts])
    chains = torch.cartesian_prod(*[torch.arange(len(task.OPERATORS))] * task.N_OPERATORS)
    values = task.running_values(digits.repeat_interleave(len(chains), 0), chains.repeat(len(prompts), 1))[:, -1]
    return values.view(len(prompts), *[len(task.OPERATORS)] * task.N_OPERATORS) == targets.view(-1, 1, 1, 1)
