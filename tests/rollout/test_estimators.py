"""Advantage estimators against their formulas in plain Python, and in the trainer, with each control."""

import math
from fractions import Fraction

import pytest
import torch

from entropy_trl.rollout.estimators import ESTIMATORS, estimate_advantages


NAN = float("nan")


def mean(values):
    return sum(values) / len(values)


def whitened(values):
    center = mean(values)
    spread = math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1))
    return [(v - center) / (spread + 1e-8) for v in values]


def groups(rewards, size):
    return [rewards[i : i + size] for i in range(0, len(rewards), size)]


def above_quantile(group, k=0.4):
    """Eq. 3 of arXiv 2509.22611: the smallest reward that at least a share k of the rewards do not exceed."""
    exact = Fraction(str(k)) * len(group)
    baseline = min(x for x in group if sum(y <= x for y in group) >= exact)
    spread = math.sqrt(sum((x - mean(group)) ** 2 for x in group) / (len(group) - 1))
    return [(x - baseline) / (spread + 1e-4) for x in group]


ORACLES = {
    "rloo": lambda r, g: [
        x - mean([y for j, y in enumerate(group) if j != i]) for group in groups(r, g) for i, x in enumerate(group)
    ],
    "reinforce_pp": lambda r, g: whitened(r),
    "reinforce_pp_baseline": lambda r, g: whitened([x - mean(group) for group in groups(r, g) for x in group]),
    "quantile": lambda r, g: [a for group in groups(r, g) for a in above_quantile(group)],
}
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 0.0, 2.0]


def test_every_estimator_has_an_oracle():
    assert {"grpo", *ORACLES} == set(ESTIMATORS)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("size", [2, 4, 6])
def test_against_the_formula(name, size):
    advantages = estimate_advantages(name, torch.tensor(REWARDS, dtype=torch.float64), size)
    assert advantages.tolist() == pytest.approx(ORACLES[name](REWARDS, size), abs=1e-7)


@pytest.mark.parametrize("name", ORACLES)
def test_what_was_not_scored_counts_in_no_mean(name):
    rewards = torch.tensor([1.0, NAN, 0.0, 1.0, NAN, NAN, NAN, 0.3])
    advantages = estimate_advantages(name, rewards, 4)
    assert (advantages[rewards.isnan()] == 0).all() and advantages.isfinite().all()
    if name == "rloo":
        assert advantages.tolist() == pytest.approx([0.5, 0, -1.0, 0.5, 0, 0, 0, 0])
    if name == "reinforce_pp":
        assert advantages[~rewards.isnan()].tolist() == pytest.approx(whitened([1.0, 0.0, 1.0, 0.3]))


@pytest.mark.parametrize("k", [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("size", [2, 5, 8, 10])
def test_quantile_of_rewards_0_and_1_is_a_threshold_on_the_success_rate(k, size):
    # Eq. 4: the baseline is 0 where p <= 1 - K, and only the successes count; else it is 1, and only the failures.
    for right in range(1, size):
        rewards = [1.0] * right + [0.0] * (size - right)
        advantages = estimate_advantages("quantile", torch.tensor(rewards, dtype=torch.float64), size, k).tolist()
        assert advantages == pytest.approx(above_quantile(rewards, k), abs=1e-12)
        hard = Fraction(right, size) <= 1 - Fraction(str(k))
        assert all(a > 0 for a in advantages[:right]) if hard else not any(advantages[:right])
        assert all(a < 0 for a in advantages[right:]) if not hard else not any(advantages[right:])


@pytest.mark.parametrize(
    ("k", "size", "expected"),
    [
        (0.07, 100, 7),
        (0.29, 100, 29),
        (5 / 6, 6, 5),
        (2 / 3, 3, 2),
        (0.4 + 1e-10, 5, 3),
        (1e-12, 5, 1),
    ],
)
def test_the_quantile_is_the_exact_order_statistic(k, size, expected):
    """The products of these are above or below a whole number by rounding, or by less than a billionth."""
    rewards = torch.arange(1, size + 1, dtype=torch.float64)
    advantages = estimate_advantages("quantile", rewards, size, k)
    assert rewards[advantages == 0].tolist() == [expected]


def test_quantile_of_a_group_by_hand():
    # Sorted: 0, 0.2, 0.2, 0.9, 1. Of five, K = 0.4 is the second, K = 0.41 the third, K = 0.7 the fourth.
    rewards = torch.tensor([0.2, 1.0, 0.0, 0.9, 0.2], dtype=torch.float64)
    unit = float(rewards.std()) + 1e-4
    for k, baseline in ((0.4, 0.2), (0.41, 0.2), (0.7, 0.9), (0.99, 1.0), (0.01, 0.0)):
        expected = [(r - baseline) / unit for r in rewards.tolist()]
        assert estimate_advantages("quantile", rewards, 5, k).tolist() == pytest.approx(expected)
    # A completion without a score is in no quantile: of 0.2, 1, 0 and 0.9 the second.
    unscored = torch.tensor([0.2, 1.0, 0.0, 0.9, NAN], dtype=torch.float64)
    assert estimate_advantages("quantile", unscored, 5, 0.4)[[0, 4]].tolist() == [0, 0]
    assert estimate_advantages("quantile", unscored, 5, 0.4)[1] > 0 > estimate_advantages("quantile", unscored, 5)[2]


def test_quantile_order_of_the_group_does_not_matter():
    rewards, order = torch.tensor([0.3, 1.0, 0.3, 0.0, 0.7, 0.7]), torch.tensor([4, 0, 5, 2, 1, 3])
    advantages = estimate_advantages("quantile", rewards, 6, 0.6)
    assert torch.equal(estimate_advantages("quantile", rewards[order], 6, 0.6), advantages[order])


@pytest.mark.parametrize("quantile", [0.4, 0.75])
def test_quantile_of_the_configuration(make_trainer, quantile):
    trainer = make_trainer(advantage_estimator="quantile", advantage_quantile=quantile, max_steps=2)
    trainer.train()
    advantages, rewards = trainer._logs["advantages"], trainer._logs["rewards"]["digit_reward"]
    expected = [a for group in groups(list(rewards), 4) for a in above_quantile(group, quantile)]
    assert list(advantages) == pytest.approx(expected, abs=1e-5)
    shares = sum(a > 0 for a in advantages), sum(a < 0 for a in advantages)
    assert shares[0] > shares[1] if quantile == 0.4 else shares[0] < shares[1]


@pytest.mark.parametrize("quantile", [0, 1, -0.4, float("nan")])
def test_quantile_out_of_range(make_config, quantile):
    with pytest.raises(ValueError, match="advantage_quantile"):
        make_config(advantage_quantile=quantile)


@pytest.mark.parametrize("name", ORACLES)
def test_equal_rewards_have_no_advantage(name):
    assert (estimate_advantages(name, torch.full((8,), 0.3), 4).abs() < 1e-6).all()


def test_unknown_name():
    with pytest.raises(ValueError, match="'rlo'"):
        estimate_advantages("rlo", torch.zeros(4), 2)


@pytest.mark.parametrize("control", ["clip_cov", "kl_cov", None])
@pytest.mark.parametrize("name", ORACLES)
def test_in_the_trainer(make_trainer, name, control):
    kwargs = {"fraction": 0.2, "cov_low": 0.02} if control == "clip_cov" else None
    trainer = make_trainer(
        advantage_estimator=name, entropy_control=control, entropy_control_kwargs=kwargs, max_steps=2
    )
    generate, seen = trainer._generate_and_score_completions, []

    def record(inputs):
        output = generate(inputs)
        seen.append((output["advantages"], trainer._rewards[:, 0], list(trainer._logs["advantages"])))
        return output

    trainer._generate_and_score_completions = record
    trainer.train()
    ((advantages, rewards, logged),) = seen
    assert advantages.tolist() == pytest.approx(ORACLES[name](rewards.tolist(), 4), abs=1e-5)
    assert advantages.abs().max() > 0.1
    assert logged == pytest.approx(advantages.tolist())
    if control is not None:
        assert max(log.get("entropy_control/selected_fraction", 0) for log in trainer.state.log_history) > 0


def test_evaluation_has_trls_advantages(make_trainer, monkeypatch):
    trainer = make_trainer(advantage_estimator="rloo", max_steps=2)
    trainer.train()
    monkeypatch.setattr("entropy_trl.trainer.estimate_advantages", None)  # would be an error if it were called
    assert "eval_reward" in trainer.evaluate(trainer.train_dataset.select(range(8)))


def test_settings_that_cannot_be(make_config):
    with pytest.raises(ValueError, match="did you mean 'rloo'"):
        make_config(advantage_estimator="rlo")
    with pytest.raises(ValueError, match="sum_then_normalize"):
        make_config(advantage_estimator="rloo", multi_objective_aggregation="normalize_then_sum")
