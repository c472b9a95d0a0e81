"""Advantage estimators against their formulas in plain Python, and in the trainer, with each control."""

import math

import pytest
import torch

from entropy_trl.estimators import ESTIMATORS, estimate_advantages


NAN = float("nan")


def mean(values):
    return sum(values) / len(values)


def whitened(values):
    center = mean(values)
    spread = math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1))
    return [(v - center) / (spread + 1e-8) for v in values]


def groups(rewards, size):
    return [rewards[i : i + size] for i in range(0, len(rewards), size)]


ORACLES = {
    "rloo": lambda r, g: [
        x - mean([y for j, y in enumerate(group) if j != i]) for group in groups(r, g) for i, x in enumerate(group)
    ],
    "reinforce_pp": lambda r, g: whitened(r),
    "reinforce_pp_baseline": lambda r, g: whitened([x - mean(group) for group in groups(r, g) for x in group]),
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
