"""The covariance of arXiv 2505.22617 over whole distributions, against samples and against the entropy's change.

On the quickstart's task the value of every token in every state is known: a prompt has 27 chains of operators, whose
prefixes are 79 states, and any other token leads to reward 0. So the advantages `A(s, a) = Q(s, a) - V(s)`, the
covariances of Theorems 1 and 2 and the policy gradient are computed exactly, and compared with

1. Eq. 10 on sampled completions, as training computes it, for a growing number of completions a prompt;
2. the entropy change of a softmax policy with one logit for each state and action;
3. the entropy change of the network itself, by one small step of SGD or AdamW, and along a short training.

    OMP_NUM_THREADS=1 python benchmarks/covariance.py --output covariance.json
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_values import LENGTH, STARTS, Chains, Solution, solve
from torch import Tensor
from transformers import Qwen2ForCausalLM

from entropy_trl import token_covariance
from entropy_trl.quickstart import task
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up


ETAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
GROUP_SIZES = (2, 8, 32, 128)


@dataclass(frozen=True)
class Sampled:
    """G completions of each of P prompts. (P, G, 7): `logps`, `advantages` and `alive`; (P, G): `rewards`.

    `alive` are the tokens that were drawn in one of the 79 states.
    """

    logps: Tensor
    advantages: Tensor
    alive: Tensor
    rewards: Tensor


def sample(solution: Solution, right: Tensor, size: int, generator: torch.Generator) -> Sampled:
    """Draw completions from the exact policy."""
    n, _, vocabulary = solution.logps.shape
    rows = torch.arange(n)[:, None]
    state, alive = torch.zeros(n, size, dtype=torch.long), torch.ones(n, size, dtype=torch.bool)
    logps, advantages, masks = [], [], []
    for t in range(LENGTH):
        here = STARTS[t] + state
        policy = solution.logps[rows, here]
        chosen = torch.multinomial(policy.exp().view(-1, vocabulary), 1, generator=generator).view(n, size, 1)
        logps.append(policy.gather(2, chosen).squeeze(2))
        advantages.append(solution.advantages[rows, here].gather(2, chosen).squeeze(2))
        masks.append(alive)
        leads_on = solution.next_ids[t][rows, state] == chosen
        alive = alive & leads_on.any(dim=2)
        state = state * leads_on.shape[2] + leads_on.long().argmax(dim=2)  # of a dead end: any, it is masked
    rewards = (alive & right.gather(1, state)).double()
    return Sampled(torch.stack(logps, 2), torch.stack(advantages, 2), torch.stack(masks, 2), rewards)


def advantage_kinds(drawn: Sampled, start_values: Tensor) -> dict[str, Tensor]:
    """The advantages whose sample covariance is compared, (P * G, 7) or (P * G, 1)."""
    rewards = drawn.rewards
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    size = rewards.shape[1]
    kinds = {
        "A(s, a)": drawn.advantages.flatten(0, 1),
        "R - V(prompt)": rewards - start_values[:, None],
        "R - mean of the group": centred,
        "R - mean of the others": centred * size / (size - 1),
        "group-normalised": centred / (rewards.std(dim=1, keepdim=True) + 1e-4),
    }
    return {name: a if a.shape[-1] == LENGTH else a.reshape(-1, 1) for name, a in kinds.items()}


def limits(solution: Solution) -> dict[str, dict[str, float]]:
    """What Eq. 10 tends to as completions are added, for each kind of advantage, in two parts.

    The law of total covariance: `within`, the mean of `Cov_{a~pi}(log pi, .)` over states, and `between`, the
    covariance over states of the means of both. With `A(s, a)` the second is 0, as its mean in a state is.
    """
    start = solution.values[:, :1]
    to_go = solution.action_values - start[..., None]
    deviation = (start * (1 - start)).sqrt()[..., None] + 1e-4
    kinds = {"A(s, a)": solution.advantages, "R - V(prompt)": to_go, "group-normalised": to_go / deviation}
    kinds |= dict.fromkeys(("R - mean of the group", "R - mean of the others"), to_go)
    policy = solution.logps.exp()
    results = {}
    for name, advantages in kinds.items():
        logp_means, means = (policy * solution.logps).sum(-1), (policy * advantages).sum(-1)
        within = (policy * (solution.logps - logp_means[..., None]) * (advantages - means[..., None])).sum(-1)
        weights = solution.weights
        between = (weights * logp_means * means).sum() - (weights * logp_means).sum() * (weights * means).sum()
        results[name] = {"within": float((weights * within).sum()), "between": float(between)}
    return results


def against_samples(solution: Solution, right: Tensor, replicates: int) -> list[dict[str, Any]]:
    """Bias and spread of the mean of Eq. 10 over replicates, for each group size and kind of advantage."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for size in GROUP_SIZES:
        estimates: dict[str, list[float]] = {}
        for _ in range(replicates):
            drawn = sample(solution, right, size, generator)
            mask = drawn.alive.flatten(0, 1)
            for name, advantages in advantage_kinds(drawn, solution.values[:, 0]).items():
                covariance = token_covariance(drawn.logps.flatten(0, 1), advantages, mask)
                estimates.setdefault(name, []).append(float(covariance.sum() / mask.sum()))
        for name, values in estimates.items():
            limit = sum(limits(solution)[name].values())
            mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
            rows.append(
                {
                    "completions": size,
                    "advantages": name,
                    "limit": limit,
                    "mean": mean,
                    "bias": mean - limit,
                    "bias_error": spread / replicates**0.5,
                    "spread": spread,
                }
            )
    return rows


def tabular(solution: Solution) -> list[dict[str, float]]:
    """Entropy change of the tabular softmax policy over `-eta * Cov`, for both theorems and falling step sizes."""
    exact = solution.covariance()
    policy, before = solution.logps.exp(), solution.entropies
    rows = []
    for eta in ETAS:
        row = {"eta": eta}
        for name, change, covariance in (
            ("policy_gradient", policy * solution.advantages, exact.policy_gradient),
            ("natural_gradient", solution.advantages, exact.natural_gradient),
        ):
            logps = (solution.logps + eta * change).log_softmax(dim=-1)
            measured = -(logps.exp() * logps).sum(dim=-1) - before
            predicted = -eta * torch.from_numpy(covariance).view_as(measured)
            row[name] = float((solution.weights * measured).sum() / (solution.weights * predicted).sum())
        rows.append(row)
    return rows


def correlations(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, float]:
    """Pearson's correlation with weights, and the share of the weight with the same sign, where `x` is not 0."""
    x, y, weights = x.flatten(), y.flatten(), weights.flatten()
    covariance = np.cov(x.numpy(), y.numpy(), aweights=weights.numpy())
    pearson = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]) ** 0.5
    known = weights * (x != 0)  # a state from which no answer is right has advantages of 0
    return {"pearson": float(pearson), "same_sign": float((known * (x * y > 0)).sum() / known.sum())}


def predictions(solution: Solution) -> dict[str, Tensor]:
    """(P, 79) entropy changes, up to a factor, that tabular policies predict of a step along the policy gradient."""
    exact = solution.covariance()
    theorem_1, theorem_2 = (
        -torch.from_numpy(values).view_as(solution.values) for values in (exact.policy_gradient, exact.natural_gradient)
    )
    return {
        "Theorem 1": theorem_1,
        "Theorem 1 x reach": theorem_1 * solution.reach,  # the gradient of a tabular policy has this factor
        "Theorem 2": theorem_2,
    }


def of_prompts(x: Tensor, solution: Solution) -> Tensor:
    """(P,) means over the states of each prompt, as often as completions pass through them."""
    return (solution.reach * x).sum(dim=1) / solution.reach.sum(dim=1)


def one_step(model: Qwen2ForCausalLM, chains: Chains, optimizer: Any, lr: float) -> dict[str, Any]:
    """One step along the exact policy gradient from the model as it is; the model is left as it was.

    `linear` is the part of the mean change that the first order of the network's own weights gives: 1 where the step
    is small enough for what follows to be about the tabular assumption alone. `times_tabular` is the mean change over
    the one of a tabular policy by a step of the same size along its own gradient.
    """
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stepper = optimizer(model.parameters(), lr=lr, weight_decay=0.0)
    before = solve(chains.logps(model), chains)
    (-before.values[:, 0].mean()).backward()
    stepper.step()
    with torch.no_grad():
        after = solve(chains.logps(model), chains)
    moved = {name: parameter.detach() - saved[name] for name, parameter in model.named_parameters()}
    model.load_state_dict(saved)
    model.zero_grad()

    fixed = before.weights.detach()
    (fixed * solve(chains.logps(model), chains).entropies).sum().backward()
    first_order = sum(float((p.grad * moved[name]).sum()) for name, p in model.named_parameters() if p.grad is not None)
    model.zero_grad()

    before = solve(before.logps.detach(), chains)
    change = after.entropies - before.entropies
    mean_change = float((fixed * change).sum())
    equal = torch.ones(len(change), dtype=torch.float64)
    expected = predictions(before)
    own = float((fixed * expected["Theorem 1 x reach"]).sum()) / len(change)
    return {
        "lr": lr,
        "mean_change": mean_change,
        "times_tabular": mean_change / (lr * own),
        "linear": first_order / mean_change,
        "reward_change": float((after.values[:, 0] - before.values[:, 0]).mean()),
        "states": {name: correlations(x, change, fixed) for name, x in expected.items()},
        "prompts": {
            name: correlations(of_prompts(x, before), of_prompts(change, before), equal) for name, x in expected.items()
        },
        "by_prediction": by_prediction(expected["Theorem 2"], change, fixed),
    }


def by_prediction(expected: Tensor, change: Tensor, weights: Tensor) -> dict[str, dict[str, float]]:
    """What the entropy did in the states in which it should fall, rise or stay."""
    groups = {"fall": expected < 0, "rise": expected > 0, "stay": expected == 0}
    of = {name: weights * chosen for name, chosen in groups.items()}
    return {
        name: {
            "weight": float(weight.sum()),
            "mean_change": float((weight * change).sum() / weight.sum()),
            "fell": float((weight * (change < 0)).sum() / weight.sum()),
        }
        for name, weight in of.items()
    }


def along_training(model: Qwen2ForCausalLM, chains: Chains, steps: int, lr: float) -> dict[str, Any]:
    """AdamW on the exact policy gradient: each step's entropy change on its own states against its covariance."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    changes, names = [], ("natural_gradient", "policy_gradient")
    covariances: dict[str, list[float]] = {name: [] for name in names}
    entropies, rewards = [], []
    solution = solve(chains.logps(model), chains)
    for _ in range(steps):
        optimizer.zero_grad()
        (-solution.values[:, 0].mean()).backward()
        optimizer.step()
        exact = solve(solution.logps.detach(), chains)
        for name in names:
            covariances[name].append(getattr(exact.covariance(), f"mean_{name}"))
        solution = solve(chains.logps(model), chains)
        changes.append(float((exact.weights * (solution.entropies.detach() - exact.entropies)).sum()))
        entropies.append(float((exact.weights * exact.entropies).sum()))
        rewards.append(float(exact.values[:, 0].mean()))
    return {
        "lr": lr,
        "steps": steps,
        "entropy": [entropies[0], entropies[-1]],
        "reward": [rewards[0], rewards[-1]],
        "covariance": {name: [values[0], values[-1]] for name, values in covariances.items()},
        "covariance_positive": {name: float(np.mean(np.array(v) > 0)) for name, v in covariances.items()},
        "entropy_fell": float(np.mean(np.array(changes) < 0)),
        "pearson": {name: float(np.corrcoef(values, changes)[0, 1]) for name, values in covariances.items()},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything, print it, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="of the training on exact gradients")
    parser.add_argument("--warm_start_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--warm_start_steps", type=int, default=WarmStartConfig.steps)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warm_start = WarmStartConfig(0, args.warm_start_steps, min(WarmStartConfig.noisy_steps, args.warm_start_steps))
    model, _, _ = load_or_warm_up(warm_start, args.warm_start_dir)
    model.eval()
    chains = Chains.of(task.train_prompts(args.prompts))
    with torch.no_grad():
        solution = solve(chains.logps(model), chains)
    exact = solution.covariance()
    report: dict[str, Any] = {
        "prompts": args.prompts,
        "reward": float(solution.values[:, 0].mean()),
        "entropy": float((solution.weights * solution.entropies).sum()),
        "alive": float(solution.reach.sum() / (args.prompts * LENGTH)),
        "theorem_1": exact.mean_policy_gradient,
        "theorem_2": exact.mean_natural_gradient,
        "limits": limits(solution),
    }
    print(" ".join(f"{name} {value:.4g}" for name, value in report.items() if name != "limits"))
    for name, parts in report["limits"].items():
        print(f"{name:<24} limit of Eq. 10: within states {parts['within']:+.5f}, between {parts['between']:+.5f}")
    report["samples"] = against_samples(solution, chains.right, args.replicates)
    for row in report["samples"]:
        print(
            f"{row['completions']:>4} completions, {row['advantages']:<24} limit {row['limit']:+.5f} "
            f"bias {row['bias']:+.5f} +- {row['bias_error']:.5f} spread {row['spread']:.5f}"
        )
    report["tabular"] = tabular(solution)
    for row in report["tabular"]:
        print(" ".join(f"{name} {value:.6g}" for name, value in row.items()))
    optimizers = [(torch.optim.SGD, 1e-3), (torch.optim.AdamW, 1e-5), (torch.optim.AdamW, 6e-4)]
    report["network"] = {f"{kind.__name__} {lr:g}": one_step(model, chains, kind, lr) for kind, lr in optimizers}
    for name, result in report["network"].items():
        print(
            f"{name}: mean change {result['mean_change']:+.3e} (linear {result['linear']:.3f}), "
            f"{result['times_tabular']:.3g} times the tabular one, reward {result['reward_change']:+.3e}"
        )
        for over in ("states", "prompts"):
            for prediction, values in result[over].items():
                print(f"  {over:<8} {prediction:<18} r {values['pearson']:+.3f} same sign {values['same_sign']:.2f}")
        for prediction, values in result["by_prediction"].items():
            print(f"  should {prediction}: " + " ".join(f"{key} {value:+.3g}" for key, value in values.items()))
    report["training"] = along_training(model, chains, args.steps, lr=1e-4)
    print("training: " + " ".join(f"{name} {value}" for name, value in report["training"].items()))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
