"""Distinct completions: the counts against sets of tuples, and in training."""

import random

import pytest
import torch

from entropy_trl.rollout.diversity import completion_digests, diversity_metrics


def test_digests_are_equal_where_the_tokens_are():
    digests = completion_digests([[3, 4], [3, 4], [3, 4, 9], [4, 3], [3], []]).tolist()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


def test_metrics_against_sets():
    rng = random.Random(0)
    for _ in range(20):
        groups = [[(rng.randrange(4), rng.random() < 0.5) for _ in range(6)] for _ in range(5)]
        flat = [completion for group in groups for completion in group]
        digests = torch.tensor([digest for digest, _ in flat])
        correct = torch.tensor([is_right for _, is_right in flat])
        metrics = diversity_metrics(digests, correct, group_size=6)
        right = [{digest for digest, is_right in group if is_right} for group in groups]
        assert metrics["distinct_completions"] == pytest.approx(sum(len({d for d, _ in g}) for g in groups) / 5)
        assert metrics["distinct_correct"] == pytest.approx(sum(len(digests) for digests in right) / 5)
        assert metrics["solved"] == pytest.approx(sum(len(digests) > 0 for digests in right) / 5)


def one_right(completions, **kwargs):
    """Right where the first character is even: the same completion always has the same reward."""
    return [float(bool(c) and c[0] in "02468") for c in completions]


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_control": None},
        {"entropy_control": "clip_cov"},
        # Most completions of 3 tokens are truncated: the loss leaves them out, and they differ all the same.
        {"entropy_control": None, "mask_truncated_completions": True, "max_completion_length": 3},
    ],
)
def test_the_trainer_logs_them(make_trainer, options):
    trainer = make_trainer(max_steps=2, **options)
    trainer.reward_funcs = [one_right]
    groups = []
    calculate = trainer._calculate_rewards

    def watch(inputs, prompts, completions, completion_ids_list):
        rewards = calculate(inputs, prompts, completions, completion_ids_list)
        made = list(zip(map(tuple, completion_ids_list), rewards[:, 0].tolist(), strict=True))
        groups.extend(made[i : i + 4] for i in range(0, len(made), 4))
        return rewards

    trainer._calculate_rewards = watch
    trainer.train()
    logged = trainer.state.log_history[0]
    assert len(groups) == 4
    assert logged["diversity/distinct_completions"] == sum(len({ids for ids, _ in group}) for group in groups) / 4
    right = [{ids for ids, reward in group if reward > 0.5} for group in groups]
    assert logged["diversity/distinct_correct"] == sum(map(len, right)) / 4 > 0
    assert logged["diversity/solved"] == sum(map(bool, right)) / 4
    assert "diversity/solved" not in trainer.state.log_history[1]  # once a rollout
