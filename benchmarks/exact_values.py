"""Exact values on the quickstart's task, for `covariance.py`.

A prompt has 27 chains of operators, whose prefixes are 79 states, and any other token leads to reward 0. So the value
of every token in every state follows from the policy's log-probabilities.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from entropy_trl.analysis.covariance import DistributionCovariance, distribution_covariance
from entropy_trl.quickstart import task


LENGTH = task.COMPLETION_LENGTH
CHAINS = torch.tensor(list(product(range(len(task.OPERATORS)), repeat=task.N_OPERATORS)))  # (27, 3)
OPERATOR_IDS = torch.tensor([task.TOKEN_ID[operator] for operator in task.OPERATORS])

# The states after t tokens are the different prefixes of the chains: one for each choice of the operators so far.
STATES = [len(task.OPERATORS) ** ((t + 1) // 2) for t in range(LENGTH)]  # 1, 3, 3, 9, 9, 27, 27
STARTS = [sum(STATES[:t]) for t in range(LENGTH + 1)]


@dataclass(frozen=True)
class Chains:
    """All chains of P prompts: `sequences` (P, 27, 14) token ids with the prompt, `right` (P, 27) booleans."""

    sequences: Tensor
    right: Tensor

    @classmethod
    def of(cls, prompts: list[str]) -> "Chains":
        digits = torch.tensor([[int(digit) for digit in prompt[: task.N_DIGITS]] for prompt in prompts])
        n, m = len(prompts), len(CHAINS)
        operators = CHAINS.repeat(n, 1)
        values = task.running_values(digits.repeat_interleave(m, dim=0), operators)
        written = torch.stack([OPERATOR_IDS[operators], values + task.TOKEN_ID["0"]], dim=2).view(n, m, -1)
        ids = torch.tensor([[task.TOKEN_ID[character] for character in prompt] for prompt in prompts])
        end = torch.full((n, m, 1), task.EOS_ID)
        targets = torch.tensor([int(prompt[-2]) for prompt in prompts])
        sequences = torch.cat([ids[:, None].expand(n, m, -1), written, end], dim=2)
        return cls(sequences, values.view(n, m, -1)[:, :, -1] == targets[:, None])

    @property
    def completions(self) -> Tensor:
        """(P, 27, 7) token ids."""
        return self.sequences[:, :, task.PROMPT_LENGTH :]

    def logps(self, model: Qwen2ForCausalLM) -> Tensor:
        """(P, 79, V) log-probabilities of the next token in each state, float64; carries the model's gradient."""
        n, m, length = self.sequences.shape
        logits = model(input_ids=self.sequences.reshape(n * m, length)).logits
        logits = logits[:, task.PROMPT_LENGTH - 1 : -1].double().view(n, m, LENGTH, -1)
        return torch.cat([logits[:, :: m // STATES[t], t] for t in range(LENGTH)], dim=1).log_softmax(dim=-1)


@dataclass(frozen=True)
class Solution:
    """Exact values of a policy, float64.

    Attributes:
        logps: (P, 79, V) log-probabilities.
        values: (P, 79) probability of a right answer from each state.
        action_values: (P, 79, V) the same after each token.
        reach: (P, 79) probability that a completion passes through each state.
        next_ids: list over t of (P, states, 1 or 3), the tokens that lead on.
    """

    logps: Tensor
    values: Tensor
    action_values: Tensor
    reach: Tensor
    next_ids: list[Tensor]

    @property
    def advantages(self) -> Tensor:
        return self.action_values - self.values[..., None]

    @property
    def entropies(self) -> Tensor:
        return -(self.logps.exp() * self.logps).sum(dim=-1)

    @property
    def weights(self) -> Tensor:
        """(P, 79) share of each state among the states that completions pass through."""
        return self.reach / self.reach.sum()

    def covariance(self) -> DistributionCovariance:
        vocabulary = self.logps.shape[-1]
        return distribution_covariance(
            self.logps.reshape(-1, vocabulary).numpy(),
            self.advantages.reshape(-1, vocabulary).numpy(),
            self.reach.flatten().numpy(),
        )


def solve(logps: Tensor, chains: Chains) -> Solution:
    """Values by going backwards through the chains, and probabilities of reaching the states by going forwards."""
    n = len(logps)
    ids, probabilities = [], []
    for t in range(LENGTH):
        if t % 2 == 0 and t < LENGTH - 1:
            next_ids = OPERATOR_IDS.expand(n, STATES[t], -1)
        else:
            next_ids = chains.completions[:, :: len(CHAINS) // STATES[t], t, None]
        ids.append(next_ids)
        probabilities.append(logps[:, STARTS[t] : STARTS[t + 1]].exp().gather(2, next_ids))
    values, action_values = [], []
    after = chains.right.double()
    for t in reversed(range(LENGTH)):
        of_next = after.view(n, STATES[t], -1)
        action_values.append(logps.new_zeros(n, STATES[t], logps.shape[2]).scatter(2, ids[t], of_next))
        after = (probabilities[t] * of_next).sum(dim=2)
        values.append(after)
    reach = [logps.new_ones(n, 1)]
    for t in range(LENGTH - 1):
        reach.append((reach[-1][..., None] * probabilities[t]).view(n, -1))
    return Solution(
        logps, torch.cat(values[::-1], dim=1), torch.cat(action_values[::-1], dim=1), torch.cat(reach, dim=1), ids
    )
