"""Whether the entropy regions E1 to E4 of arXiv 2602.09782 keep their promise on the tiny model of the embedded task.

Completions are sampled from the warm start, with the advantages of GRPO. An update then has gradient from the tokens of
one region only, and the entropy of the full next-token distribution is measured in the same states before and after:
E1 and E4 should lower it, E2 and E3 raise it. Three kinds of update:

- tabular, a token alone: a step on the logits of the token's own state, to first order and of length 0.2;
- network, a token alone: a small SGD step on all weights; the entropy of the token's own state and of all states;
- network, all tokens of the region in a batch: the mean entropy of the region's own states and of all states.

    OMP_NUM_THREADS=1 python benchmarks/regions.py --output regions.json
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from entropy_trl.quickstart import task
from entropy_trl.quickstart.evaluate import sample
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up
from entropy_trl.rollout.estimators import estimate_advantages
from entropy_trl.tokens.regions import REGIONS, entropy_change, estimated_entropy_change, token_regions


PROMPTS, GENERATIONS = 32, 8
LOGIT_STEP = 0.2  # changes the ratio by about as much as a clip range allows
RAISES = {"e1": False, "e2": True, "e3": True, "e4": False}
MEASURES = {
    "tabular_first": "tabular, a token, first order",
    "tabular_step": "tabular, a token, step of 0.2",
    "token_own": "network, a token, its state",
    "token_all": "network, a token, all states",
    "batch_own": "network, a batch's region, its states",
    "batch_all": "network, a batch's region, all states",
}


class Batch:
    """A batch of sampled completions, and the entropies of its states under a policy."""

    def __init__(self, model: torch.nn.Module, prompts: list[str], seed: int) -> None:
        self.model = model
        drawn = sample(model, prompts, GENERATIONS, torch.Generator().manual_seed(seed))
        self.tokens = drawn.tokens.flatten(0, 1)
        right = [
            task.verify_ids(p, ids) for p, rows in zip(prompts, drawn.tokens.tolist(), strict=True) for ids in rows
        ]
        rewards = torch.tensor(right).double()
        centred = estimate_advantages("rloo", rewards, GENERATIONS) * (GENERATIONS - 1) / GENERATIONS
        spread = rewards.view(-1, GENERATIONS).std(dim=1).repeat_interleave(GENERATIONS)
        self.advantages = (centred / (spread + 1e-4)).unsqueeze(1)  # TRL's GRPO
        ids = torch.tensor([[task.TOKEN_ID[c] for c in p] for p in prompts]).repeat_interleave(GENERATIONS, dim=0)
        self.ids = torch.cat([ids, self.tokens], dim=1)
        self.mask = self.tokens != task.PAD_ID
        with torch.no_grad():
            self.logits = self.forward()
        self.logps = self.chosen(self.logits)
        self.entropies = entropies(self.logits)
        self.regions = token_regions(self.logps, self.entropies, self.advantages, self.mask)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.ids).logits[:, task.PROMPT_LENGTH - 1 : -1]

    def chosen(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)

    def change(self, tokens: Tensor, length: float) -> Tensor:
        """Change of all states' entropies by an SGD step of that length with gradient from `tokens` only."""
        parameters = list(self.model.parameters())
        # The ratio is 1 and its gradient that of the log-probability.
        objective = (self.chosen(self.forward()) * self.advantages)[tokens].mean()
        gradients = torch.autograd.grad(objective, parameters)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += gradient * (length / norm)
            after = entropies(self.forward())
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        return after - self.entropies


def entropies(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def measure(batch: Batch, single_tokens: int, length: float, generator: torch.Generator) -> dict[str, Any]:
    """For each region the changes of entropy that should have its sign, one a case, by kind of update."""
    weights = batch.advantages.expand_as(batch.logps)
    logp = batch.logits.log_softmax(-1)
    onehot = torch.nn.functional.one_hot(batch.tokens, logp.shape[-1])
    gradient = weights.unsqueeze(-1) * (onehot - logp.exp())
    direction = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    step = entropies(batch.logits + LOGIT_STEP * direction) - batch.entropies
    exact = entropy_change(batch.logits, batch.tokens, weights)
    estimate = estimated_entropy_change(batch.logps, batch.entropies, weights)
    result = {}
    for number, name in enumerate(REGIONS, start=1):
        region = batch.regions == number
        places = region.nonzero()
        cases: dict[str, list[float]] = {
            "tabular_first": exact[region].tolist(),
            "tabular_step": step[region].tolist(),
            "estimate": estimate[region].tolist(),
            # How far the token is from being as surprising as the mean: where the sign is lost (see the docs).
            "margin": (batch.logps + batch.entropies)[region].tolist(),
            "token_own": [],
            "token_all": [],
        }
        for index in torch.randperm(len(places), generator=generator)[:single_tokens].tolist():
            only = torch.zeros_like(region)
            only[tuple(places[index])] = True
            change = batch.change(only, length)
            cases["token_own"].append(change[only].item())
            cases["token_all"].append(change[batch.mask].mean().item())
        change = batch.change(region, length) if len(places) else None
        cases["batch_own"] = [] if change is None else [change[region].mean().item()]
        cases["batch_all"] = [] if change is None else [change[batch.mask].mean().item()]
        result[name] = cases
    return result


def summarise(cases: dict[str, dict[str, list[float]]], tokens: int) -> dict[str, dict[str, float]]:
    """Per region and kind of update: the share of cases with the predicted sign, by count and by size."""
    summary = {}
    for name, changes in cases.items():
        if not changes["tabular_first"]:
            raise ValueError(f"No token of the batches is in region {name}: take more batches.")
        sign = 1 if RAISES[name] else -1
        row: dict[str, float] = {"tokens": len(changes["tabular_first"]) / tokens}
        for kind in MEASURES:
            values = [sign * value for value in changes[kind]]
            row[kind] = fmean(value > 0 for value in values)
            row[f"{kind}_by_size"] = sum(v for v in values if v > 0) / sum(map(abs, values))
            row[f"{kind}_cases"] = len(values)
            row[f"{kind}_mean"] = fmean(changes[kind])
        failed = [m for m, v in zip(changes["margin"], changes["tabular_first"], strict=True) if sign * v <= 0]
        row["failed_margin_max"] = max(map(abs, failed), default=0.0)
        row["estimate_over_exact"] = sum(changes["estimate"]) / sum(changes["tabular_first"])
        summary[name] = row
    return summary


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=10, help="batches a seed")
    parser.add_argument("--single_tokens", type=int, default=10, help="tokens of a region and batch, trained on alone")
    parser.add_argument("--length", type=float, default=1e-3, help="length of the small step on the weights")
    parser.add_argument("--warm_start_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--warm_start_steps", type=int, default=WarmStartConfig.steps)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warm_start = WarmStartConfig(0, args.warm_start_steps, min(WarmStartConfig.noisy_steps, args.warm_start_steps))
    model = load_or_warm_up(warm_start, args.warm_start_dir)[0].double().eval()
    prompts = task.build_dataset(PROMPTS * args.batches * len(args.seeds))["prompt"]
    cases: dict[str, dict[str, list[float]]] = {name: {} for name in REGIONS}
    tokens, pairs = 0, []
    for index, seed in enumerate(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        for number in range(args.batches):
            first = (index * args.batches + number) * PROMPTS
            batch = Batch(model, list(prompts[first : first + PROMPTS]), seed=1000 * seed + number)
            tokens += int(batch.mask.sum())
            for name, changes in measure(batch, args.single_tokens, args.length, generator).items():
                for kind, values in changes.items():
                    cases[name].setdefault(kind, []).extend(values)
    for changes in cases.values():
        pairs += list(zip(changes["estimate"], changes["tabular_first"], strict=True))
    report = {
        "tokens": tokens,
        "regions": summarise(cases, tokens),
        "estimate_correlation": float(torch.corrcoef(torch.tensor(pairs).T)[0, 1]),
    }
    print(f"{'share of cases with the predicted sign (by size)':50}" + "".join(f"{name:>16}" for name in REGIONS))
    rows = report["regions"].values()
    print(f"{'share of the tokens':50}" + "".join(f"{row['tokens']:16.3f}" for row in rows))
    for kind, label in MEASURES.items():
        print(f"{label:50}" + "".join(f"{row[kind]:9.3f} ({row[kind + '_by_size']:.3f})" for row in rows))
    for kind, label in (
        ("failed_margin_max", "largest |ln p + H| of a failure"),
        ("estimate_over_exact", "estimate / exact"),
    ):
        print(f"{label:50}" + "".join(f"{row[kind]:16.3f}" for row in rows))
    print(f"correlation of the estimate with the exact change: {report['estimate_correlation']:.3f}")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
