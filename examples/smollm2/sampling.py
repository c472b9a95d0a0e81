"""Draw completions from a bf16 copy of the policy, each prompt read once for all of its samples.

`rollout` is a `rollout_func` of TRL's GRPOTrainer (`rollout_func: examples.smollm2.sampling.rollout` in a
configuration). transformers' `generate` reads a prompt once for each sample and, under autocast, casts all weights at
every token. README.md has the measured times. Needs one process and a model without adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel


#: So many completions are drawn together: a gigabyte of logits and caches.
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Sample:
    """One completion: its tokens, the one that ends it included, and the policy's entropy at each, in nats."""

    ids: list[int]
    entropies: list[float]


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    generator: torch.Generator | None = None,
    greedy: bool = False,
) -> list[Sample]:
    """Draw one completion for each prompt at temperature 1.

    Args:
        model (`PreTrainedModel`): Policy. Its generation configuration names the tokens that end a completion.
        prompts (`Sequence[Sequence[int]]`): Token ids. Equal prompts are read once.
        max_tokens (`int`): Largest number of tokens of a completion.
        generator (`torch.Generator`, *optional*): Source of all randomness; by default torch's own.
        greedy (`bool`, *optional*, defaults to `False`): Take the most likely token instead.
    """
    position = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    owner = torch.tensor([position[tuple(ids)] for ids in prompts])
    lengths = torch.tensor([len(ids) for ids in position])
    width = int(lengths.max())
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in position])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()

    cache = DynamicCache(config=model.config)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1).logits
    cache.batch_select_indices(owner)
    logits, mask, places = logits[owner, -1], mask[owner], places[owner, -1:]

    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    rows = torch.arange(len(prompts))  # those that are not finished
    ids: list[list[int]] = [[] for _ in prompts]
    entropies: list[list[float]] = [[] for _ in prompts]
    for step in range(max_tokens):
        logps = logits.float().log_softmax(dim=-1)
        probabilities = logps.exp()
        chosen = logps.argmax(-1) if greedy else torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        entropy = -(probabilities * logps).sum(-1)
        for row, token, value in zip(rows.tolist(), chosen.tolist(), entropy.tolist(), strict=True):
            ids[row].append(token)
            entropies[row].append(value)
        kept = torch.isin(chosen, ends, invert=True).nonzero().squeeze(1)
        if step + 1 == max_tokens or not len(kept):
            break
        if len(kept) < len(rows):
            rows, chosen, mask, places = rows[kept], chosen[kept], mask[kept], places[kept]
            cache.batch_select_indices(kept)
        mask, places = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1), places + 1
        logits = model(chosen[:, None], attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]
    return [Sample(*pair) for pair in zip(ids, entropies, strict=True)]


class Rollout:
    """TRL's `rollout_func`: the completions of a batch of text prompts, drawn from a bf16 copy of the policy."""

    def __init__(self) -> None:
        self.copy: PreTrainedModel | None = None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        args = trainer.args
        for name, plain in (("temperature", 1), ("top_p", 1), ("top_k", 0), ("min_p", None), ("repetition_penalty", 1)):
            value = getattr(args, name)
            if value != plain:
                raise ValueError(
                    f"{name} is {value}, and this rollout_func draws from the policy as it is. Set {name} to {plain}, "
                    "or remove rollout_func."
                )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(policy, PeftModel):
            raise ValueError("The model has adapters, which this rollout_func does not merge. Remove rollout_func.")
        if self.copy is None:
            with torch.random.fork_rng(devices=[]):  # the weights it starts with must not move the random state
                self.copy = AutoModelForCausalLM.from_config(policy.config, dtype=torch.bfloat16).eval()
            self.copy.generation_config.eos_token_id = trainer.eos_token_ids
        self.copy.load_state_dict(policy.state_dict())
        ids = trainer.processing_class(prompts)["input_ids"]
        samples = [
            sample
            for first in range(0, len(ids), ROWS_AT_A_TIME)
            for sample in draw(self.copy, ids[first : first + ROWS_AT_A_TIME], trainer.max_completion_length)
        ]
        return {"prompt_ids": ids, "completion_ids": [sample.ids for sample in samples], "logprobs": None}


rollout = Rollout()
