"""The entropy regions E1 to E4: against plain-Python loops, and the exact change of entropy."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from benchmark_runs import run_benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import logs, same_weights

from entropy_trl.analysis.covariance.records import read_records
from entropy_trl.tokens.regions import REGIONS, entropy_change, estimated_entropy_change, region_metrics, token_regions
from entropy_trl.tokens.types import TokenBatch


def region_of(logp, entropy, advantage):
    """The table of the paper, one token at a time; None for no region."""
    if advantage == 0 or -logp == entropy:
        return None
    expected = -logp < entropy
    return {(True, True): "e1", (False, True): "e2", (True, False): "e3", (False, False): "e4"}[expected, advantage > 0]


def random_batch(seed=0, rows=6, length=8, per_token=False, drift=0.4):
    """Tokens sampled from random distributions over 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits = 2 * normal(rows, length, 5)
    tokens = torch.multinomial(logits.softmax(-1).view(-1, 5), 1, generator=generator).view(rows, length)
    logps = logits.log_softmax(-1)
    advantages = normal(rows, length if per_token else 1)
    advantages[0] = 0.0
    chosen = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return TokenBatch(
        logps=chosen,
        old_logps=chosen - drift * normal(rows, length),
        advantages=advantages,
        mask=torch.rand(rows, length, generator=generator) < 0.8,
        entropies=-(logps.exp() * logps).sum(-1),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_metrics_are_those_of_the_loop(seed, per_token):
    batch = random_batch(seed, per_token=per_token)
    stopped = batch.mask & (torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.3)
    sums = {e: dict.fromkeys(("tokens", "stopped", "gradient", "entropy"), 0.0) for e in REGIONS}
    total = 0.0
    where = oracle.tokens(batch.mask)
    for b, t in where:
        logp, entropy = float(batch.logps[b, t]), float(batch.entropies[b, t])
        advantage = oracle.advantage(batch.advantages.expand_as(batch.logps), b, t)
        left = 0.0 if stopped[b, t] else advantage * math.exp(logp - float(batch.old_logps[b, t]))
        p = math.exp(logp)
        total += abs(left) * (1 - p)
        region = region_of(logp, entropy, advantage)
        if region is not None:
            sums[region]["tokens"] += 1
            sums[region]["stopped"] += float(stopped[b, t])
            sums[region]["gradient"] += abs(left) * (1 - p)
            sums[region]["entropy"] += -left * p * (1 - p) * (logp + entropy)
    weights = (batch.advantages * batch.log_ratio.exp()).masked_fill(stopped, 0.0).masked_fill(~batch.mask, math.nan)
    metrics = region_metrics(batch, weights)
    assert metrics.keys() == {f"{e}_{name}" for e in REGIONS for name in ("tokens", "stopped", "gradient", "entropy")}
    for e in REGIONS:
        count = {"tokens": len(where), "stopped": sums[e]["tokens"], "gradient": total, "entropy": len(where)}
        for name in count:
            total_of_metric, counted = (float(x) for x in metrics[f"{e}_{name}"])
            assert total_of_metric == pytest.approx(sums[e][name], rel=1e-9, abs=1e-12), (e, name)
            assert counted == pytest.approx(count[name], rel=1e-9), (e, name)


def test_every_region_occurs_and_has_its_sign():
    metrics = {name: float(total) for name, (total, _) in region_metrics(random_batch(rows=40)).items()}
    assert all(metrics[f"{e}_tokens"] > 0 for e in REGIONS)
    assert metrics["e1_entropy"] < 0 < metrics["e2_entropy"]
    assert metrics["e4_entropy"] < 0 < metrics["e3_entropy"]
    assert all(metrics[f"{e}_stopped"] == 0 for e in REGIONS)


def test_shares_of_the_gradient_add_up():
    metrics = region_metrics(random_batch())
    assert sum(float(metrics[f"{e}_gradient"][0]) for e in REGIONS) == pytest.approx(float(metrics["e1_gradient"][1]))


def test_golden():
    # p = 1/2 of a distribution with H = ln 4: -ln p = ln 2 < ln 4, and A = 2 > 0: e1. r = 1, so the gradient is 2 * 1/2
    # and the change -2 * 1/2 * 1/2 * (ln 1/2 + ln 4) = -ln(2) / 2.
    batch = TokenBatch(
        logps=torch.tensor([[-math.log(2)]]),
        old_logps=torch.tensor([[-math.log(2)]]),
        advantages=torch.tensor([2.0]),
        mask=torch.ones(1, 1),
        entropies=torch.tensor([[math.log(4)]]),
    )
    metrics = {name: tuple(map(float, pair)) for name, pair in region_metrics(batch).items()}
    assert metrics["e1_tokens"] == (1, 1) and metrics["e2_tokens"] == (0, 1)
    assert metrics["e1_gradient"] == pytest.approx((1, 1))
    assert metrics["e1_entropy"] == pytest.approx((-math.log(2) / 2, 1))


def test_a_token_at_the_entropy_or_without_advantage_has_no_region():
    logps, entropies = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    advantages = torch.tensor([[1.0, 0.0, -1.0]])
    assert token_regions(logps, entropies, advantages, torch.ones(1, 3).bool()).tolist() == [[0, 0, 0]]


def test_padding_and_row_order_do_not_matter():
    batch = random_batch(3)
    expected = region_metrics(batch)
    garbage = {name: getattr(batch, name).masked_fill(~batch.mask, math.nan) for name in ("logps", "entropies")}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = TokenBatch(
        *(x[order] for x in (batch.logps, batch.old_logps, batch.advantages, batch.mask)),
        entropies=batch.entropies[order],
    )
    for other in (replace(batch, **garbage), shuffled):
        for name, pair in region_metrics(other).items():
            assert torch.allclose(torch.stack(pair).double(), torch.stack(expected[name]).double(), rtol=1e-12), name


def logged_regions(trainer):
    """What each step logged, without the prefix."""
    entries = [log for log in trainer.state.log_history if "loss" in log]
    prefix = "entropy_regions/"
    return [{k.removeprefix(prefix): v for k, v in log.items() if k.startswith(prefix)} for log in entries]


def surrogate(row, low, high):
    """The derivative of `min(r A, clip(r) A)` by `ln p`."""
    ratio, advantage = math.exp(row.logp - row.old_logp), row.advantage
    stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    return 0.0 if stopped else ratio * advantage


def sapo(row):
    ratio = math.exp(row.logp - row.old_logp)
    gate = 1 / (1 + math.exp(-(1.0 if row.advantage > 0 else 1.05) * (ratio - 1)))
    return 4 * gate * (1 - gate) * ratio * row.advantage


def penalised(row):
    sign = (row.logp > row.old_logp) - (row.logp < row.old_logp)
    return row.advantage * math.exp(row.logp - row.old_logp) - (0.7 * sign if row.selected else 0.0)


CLIP_COV = {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.02, "cov_high": 9}}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2, "coef": 0.7}}
#: Arguments, and the derivative of a token's own objective by its log-probability, from what was recorded of it.
OBJECTIVES = {
    **{
        loss_type: ({"entropy_control": None, "loss_type": loss_type, "epsilon": 0.1}, lambda r: surrogate(r, 0.1, 0.1))
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
    },
    "sapo": ({"entropy_control": None, "loss_type": "sapo"}, sapo),
    "cispo": (
        {"entropy_control": None, "loss_type": "cispo", "epsilon_high": 1.01},
        lambda r: min(math.exp(r.logp - r.old_logp), 1.01) * r.advantage,
    ),
    "clip_cov": (CLIP_COV | {"epsilon": 0.1}, lambda r: 0.0 if r.selected else surrogate(r, 0.1, 0.1)),
    "kl_cov": (KL_COV, penalised),
    "kl_cov, bf16": (KL_COV | {"bf16": True}, penalised),
}


@pytest.mark.parametrize(
    ("objective", "accumulation"), [*((name, 1) for name in OBJECTIVES), ("grpo", 2), ("bnpo", 2), ("kl_cov", 2)]
)
def test_the_trainer_logs_the_gradient_that_it_trained_with(make_trainer, tmp_path, objective, accumulation):
    """By region, from the tokens that were recorded: the objectives written out against TRL's backward pass."""
    arguments, derivative = OBJECTIVES[objective]
    trainer = make_trainer(
        **arguments,
        output_dir=str(tmp_path / "run"),
        entropy_regions=True,
        token_records={"every": 1},
        steps_per_generation=4,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8,
    )
    trainer.train()
    logged, steps = logged_regions(trainer), read_records(tmp_path / "run")
    assert len(logged) == len(steps) == 4
    tolerance = 2e-2 if "bf16" in objective else 1e-4
    for metrics, step in zip(logged, steps, strict=True):
        sums = {(e, name): 0.0 for e in REGIONS for name in ("tokens", "stopped", "gradient", "entropy")}
        total, rows = 0.0, list(step.table().itertuples())
        for row in rows:
            p, weight = math.exp(row.logp), derivative(row)
            total += abs(weight) * (1 - p)
            region = region_of(row.logp, row.entropy, row.advantage)
            if region is not None:
                sums[region, "tokens"] += 1
                sums[region, "stopped"] += weight == 0
                sums[region, "gradient"] += abs(weight) * (1 - p)
                sums[region, "entropy"] += -weight * p * (1 - p) * (row.logp + row.entropy)
        for e in REGIONS:
            counts = {"tokens": len(rows), "stopped": sums[e, "tokens"], "gradient": total, "entropy": len(rows)}
            for name, count in counts.items():
                if count:  # a mean over nothing is None
                    expected = pytest.approx(sums[e, name] / count, rel=tolerance, abs=tolerance / 10)
                    assert metrics[f"{e}_{name}"] == expected, (step.step, e, name)
    stopped = sum(metrics[f"{e}_stopped"] or 0 for metrics in logged for e in REGIONS)  # None without tokens
    assert (stopped > 0) == (objective not in ("sapo", "cispo", "kl_cov", "kl_cov, bf16"))


@pytest.mark.parametrize("control", [{"entropy_control": None}, CLIP_COV, KL_COV], ids=["off", "clip_cov", "kl_cov"])
def test_the_training_does_not_notice(make_trainer, control):
    trainers = []
    for regions in (True, False):
        trainers.append(make_trainer(**control, entropy_regions=regions))
        trainers[-1].train()
    watched, plain = trainers
    assert same_weights(watched, plain)
    assert all(logged_regions(watched)) and not any(logged_regions(plain))
    kept = [{k: v for k, v in log.items() if not k.startswith("entropy_regions/")} for log in logs(watched)]
    assert kept == logs(plain)


def test_observation_may_begin_inside_a_rollout(make_trainer, tmp_path, caplog):
    """A run that resumes inside a rollout watches it from there on; its rewards, which a recorder needs, are gone."""
    options = {"entropy_control": None, "dynamic_sampling": True, "output_dir": str(tmp_path / "run")}
    make_trainer(**options, save_strategy="steps", save_steps=1, max_steps=3).train()
    trainer = make_trainer(**options, max_steps=6, entropy_regions=True, token_records={"every": 1})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [bool(metrics) for metrics in logged_regions(trainer)] == [False] * 3 + [True] * 3
    assert [step.step for step in read_records(tmp_path / "run")] == [5, 6]
    assert "Step 4 is not recorded" in caplog.text


def test_entropies_are_needed():
    with pytest.raises(ValueError, match="entropies"):
        region_metrics(replace(random_batch(), entropies=None))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 20]))
def test_entropy_change_is_that_of_a_small_step(seed, vocabulary):
    # By autograd: the gradient of J = w ln p on the logits, and the entropy after a small step along it.
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)).requires_grad_()
    token = torch.randint(vocabulary, (), generator=generator)
    weight = torch.randn((), generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(weight * logits.log_softmax(-1)[token], logits)

    def entropy(z):
        return torch.distributions.Categorical(logits=z.detach()).entropy()

    step = 1e-5
    change = (entropy(logits + step * gradient) - entropy(logits - step * gradient)) / (2 * step)
    assert float(entropy_change(logits.detach(), token, weight)) == pytest.approx(float(change), rel=1e-6, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_where_the_sign_of_a_region_is_certain(seed):
    """E2 and E4 have their sign always; E1 and E3 lose it where 0 < p (ln p + H) < S, and only there."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    logps = logits.log_softmax(-1)
    tokens = torch.randint(6, (200,), generator=generator)
    logp = logps.gather(-1, tokens[:, None]).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    baseline = (logps.exp().square() * (logps + entropy[:, None])).sum(-1)
    assert (baseline >= 0).all()
    for advantage in (1.0, -1.0):
        change = entropy_change(logits, tokens, torch.full_like(logp, advantage))
        surprising = -logp > entropy
        assert (change[surprising] * advantage > 0).all()  # e2 raises, e4 lowers
        term = logp.exp() * (logp + entropy)
        lost = change[~surprising] * advantage > 0  # e1 should lower, e3 raise
        assert torch.equal(lost, (term < baseline)[~surprising])


def test_the_estimate_is_half_the_exact_change_for_two_tokens():
    # p q (ln p + H) against 2 p q (ln p + H), see the docs; and it never has another sign than the region.
    logits = torch.tensor([[0.3, -1.1], [2.0, 0.0]], dtype=torch.float64)
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    weights = torch.tensor([1.5, -0.5], dtype=torch.float64)
    for token in (0, 1):
        exact = entropy_change(logits, torch.full((2,), token), weights)
        estimate = estimated_entropy_change(logps[:, token], entropy, weights)
        torch.testing.assert_close(2 * estimate, exact)


def test_a_token_that_cannot_come_does_not_matter():
    logits = torch.tensor([[0.3, -1.1, -math.inf]])
    token, weight = torch.tensor([0]), torch.ones(1)
    torch.testing.assert_close(entropy_change(logits, token, weight), entropy_change(logits[:, :2], token, weight))


@pytest.mark.filterwarnings("ignore")
def test_benchmark(monkeypatch, tmp_path, capsys):
    argv = ["--seeds", "0", "--batches", "1", "--single_tokens", "2", "--warm_start_steps", "120"]
    report = run_benchmark(
        monkeypatch, "regions", [*argv, "--warm_start_dir", str(tmp_path)], tmp_path / "regions.json"
    )
    assert list(report["regions"]) == list(REGIONS)
    for name, row in report["regions"].items():
        assert row["tabular_first_cases"] == round(row["tokens"] * report["tokens"]) > 0
        assert (row["token_own_cases"], row["batch_own_cases"]) == (2, 1)
        assert row["tabular_first"] > 0.5 and 0 <= row["batch_all"] <= 1
        if name in ("e2", "e4"):
            assert row["tabular_first"] == 1 and row["failed_margin_max"] == 0
    assert "share of the tokens" in capsys.readouterr().out
