"""Evaluation of a policy on held-out prompts: greedy and mean accuracy, pass@k and entropy."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

from entropy_trl.evaluation.metrics import pass_at_k
from entropy_trl.quickstart import task


Metrics = dict[str, float]


@dataclass(frozen=True)
class Samples:
    """Completions of P prompts, S each.

    Attributes:
        tokens (`Tensor`): (P, S, 7) token ids; what follows `<eos>` is `<pad>`.
        entropy (`float`): Mean entropy of the next-token distribution over the sampled tokens, `<eos>` included, in
            nats.
    """

    tokens: Tensor
    entropy: float


@torch.no_grad()
def sample(model: Qwen2ForCausalLM, prompts: Sequence[str], samples: int, generator: torch.Generator | None) -> Samples:
    """Sample at temperature 1 with a KV cache; greedy decoding when `generator` is None.

    All randomness comes from `generator`, so that evaluating in the middle of a training changes nothing in it.
    """
    was_training = model.training
    model.eval()
    n_rows = len(prompts) * samples
    prompt_ids = torch.tensor([[task.TOKEN_ID[character] for character in prompt] for prompt in prompts])
    cache = DynamicCache(config=model.config)
    # each prompt is read once; its cache is then repeated for its samples
    logits = model(input_ids=prompt_ids, past_key_values=cache, use_cache=True).logits[:, -1]
    cache.batch_repeat_interleave(samples)
    logits = logits.repeat_interleave(samples, dim=0)

    tokens = torch.full((n_rows, task.COMPLETION_LENGTH), task.PAD_ID)
    alive = torch.ones(n_rows, dtype=torch.bool)
    total_entropy, n_tokens = 0.0, 0
    for position in range(task.COMPLETION_LENGTH):
        logps = logits.float().log_softmax(dim=-1)
        probabilities = logps.exp()
        entropies = -(probabilities * logps).sum(dim=-1)
        total_entropy += entropies[alive].double().sum().item()
        n_tokens += int(alive.sum())
        if generator is None:
            chosen = logps.argmax(dim=-1)
        else:
            chosen = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        tokens[:, position] = torch.where(alive, chosen, task.PAD_ID)
        alive &= chosen != task.EOS_ID
        if position + 1 == task.COMPLETION_LENGTH or not alive.any():
            break
        logits = model(input_ids=chosen.unsqueeze(1), past_key_values=cache, use_cache=True).logits[:, -1]
    model.train(was_training)
    return Samples(tokens.view(len(prompts), samples, -1), total_entropy / n_tokens)


def count_right(prompts: Sequence[str], tokens: Tensor) -> list[int]:
    """Right answers among the samples of each prompt: P numbers. `tokens` is (P, S, 7)."""
    return [
        sum(task.verify_ids(prompt, ids) for ids in rows) for prompt, rows in zip(prompts, tokens.tolist(), strict=True)
    ]


def evaluate_policy(
    model: Qwen2ForCausalLM, prompts: Sequence[str], samples: int = 16, seed: int = 0, greedy: bool = True
) -> Metrics:
    """Accuracy and entropy of a policy on `prompts` at temperature 1.

    Args:
        model (`Qwen2ForCausalLM`): The policy.
        prompts (`Sequence[str]`): Prompts to solve.
        samples (`int`, *optional*, defaults to `16`): Samples a prompt, S.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.
        greedy (`bool`, *optional*, defaults to `True`): Also decode greedily.

    Returns:
        `Metrics`: `final_entropy` (nats a token, on the policy's own samples), `greedy` (accuracy), `avg@S` (mean
        accuracy of the samples) and `pass@k` for k = 4 and k = S where S allows them; all but the entropy are
        fractions from 0 to 1.
    """
    drawn = sample(model, prompts, samples, torch.Generator().manual_seed(seed))
    right = count_right(prompts, drawn.tokens)
    metrics = {"final_entropy": drawn.entropy}
    if greedy:
        metrics["greedy"] = fmean(count_right(prompts, sample(model, prompts, 1, None).tokens))
    metrics[f"avg@{samples}"] = fmean(right) / samples
    for k in sorted({4, samples}):
        if k <= samples:
            metrics[f"pass@{k}"] = fmean(pass_at_k(samples, c, k) for c in right)
    return metrics
