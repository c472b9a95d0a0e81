"""Loss and gradient of both methods equal the authors' formulas: through TRL's loss, token-mean, micro-batch pool."""

import math

import oracle
import pytest
import torch


INF = math.inf
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2, "coef": 0.7}}
CLIP_COV = {
    "entropy_control": "clip_cov",
    "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.05, "cov_high": 3.0},
}

MASKS = {
    "padded": None,
    "tool-style": torch.tensor([[1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool(),
    "one row empty": torch.tensor([[0] * 6, [1] * 6, [1] * 3 + [0] * 3, [1] * 6]).bool(),
    "one token": torch.tensor([[0] * 6, [0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6]).bool(),
    "empty": torch.zeros(4, 6).bool(),
}


def run(trainer, set_forward, logps, inputs):
    """Loss, gradient and the logged metrics of one micro-batch."""
    set_forward(logps)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient, logps.grad = logps.grad.clone(), None
    return loss.detach(), gradient


def control_metrics(trainer):
    return {k.removeprefix("entropy_control/"): v[-1] for k, v in trainer._metrics["train"].items() if "/" in k}


def expected(logps, inputs, **kwargs):
    leaf = logps.detach().double().requires_grad_()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    loss = oracle.loss(leaf, inputs, "bnpo", **kwargs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def check(actual, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def parity_trainer(make_trainer):
    def make(control, **overrides):
        return make_trainer(**control, entropy_control_pool="micro_batch", loss_type="bnpo", **overrides)

    return make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("per_token", [False, True], ids=["per-row", "per-token"])
@pytest.mark.parametrize("drift", [0.0, 0.3, 3.0])
def test_kl_cov(parity_trainer, set_forward, loss_inputs, dtype, mask, per_token, drift):
    trainer = parity_trainer(KL_COV)
    logps, inputs = loss_inputs(dtype=dtype, drift=drift, mask=MASKS[mask], per_token=per_token)
    cov = oracle.covariances(logps, inputs["advantages"], inputs["completion_mask"])
    selected = oracle.kl_cov_selected(cov, 0.2)
    actual = run(trainer, set_forward, logps, inputs)
    check(actual, expected(logps, inputs, low=INF, high=INF, penalised=selected, coef=0.7), dtype)
    # Without the penalty the loss would be another: the test above can fail.
    if drift and selected:
        plain = expected(logps, inputs, low=INF, high=INF)
        assert not torch.allclose(plain[1], actual[1].double(), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("per_token", [False, True], ids=["per-row", "per-token"])
@pytest.mark.parametrize("drift", [0.0, 0.3, 3.0])
def test_clip_cov(parity_trainer, set_forward, loss_inputs, dtype, mask, per_token, drift):
    trainer = parity_trainer(CLIP_COV)
    logps, inputs = loss_inputs(dtype=dtype, drift=drift, mask=MASKS[mask], per_token=per_token)
    mask, advantages = inputs["completion_mask"], inputs["advantages"]
    actual = run(trainer, set_forward, logps, inputs)

    # The draw is ours; what may be drawn, and how many, is the authors'.
    cov = oracle.covariances(logps, advantages, mask)
    clipped = oracle.ratio_clipped(logps, inputs["old_per_token_logps"], advantages, mask, 1.0, 1.0)
    candidates = oracle.clip_cov_candidates(cov, 0.05, 3.0, clipped)
    batch = trainer._batches.of(inputs, logps.detach())
    dropped = {tuple(i) for i in trainer.entropy_control.select(batch).selected.nonzero().tolist()}
    assert dropped <= candidates
    assert len(dropped) == oracle.clip_cov_count(0.2, len(cov), len(candidates))
    check(actual, expected(logps, inputs, low=1.0, high=1.0, dropped=dropped), dtype)
    assert all(actual[1][i] == 0 for i in dropped)
    if dropped:
        plain = expected(logps, inputs, low=1.0, high=1.0)
        assert not torch.allclose(plain[1], actual[1].double(), rtol=1e-3)


def test_clip_cov_spares_tokens_that_the_ratio_clip_stopped(parity_trainer, set_forward, loss_inputs):
    trainer = parity_trainer(CLIP_COV, epsilon=0.05)
    logps, inputs = loss_inputs(rows=8, length=30, drift=1.0)
    args = (inputs["advantages"], inputs["completion_mask"])
    clipped = oracle.ratio_clipped(logps, inputs["old_per_token_logps"], *args, 0.05, 0.05)
    band = oracle.clip_cov_candidates(oracle.covariances(logps, *args), 0.05, 3.0)
    assert clipped & band and band - clipped
    selected = trainer.entropy_control.select(trainer._batches.of(inputs, logps.detach())).selected
    assert not clipped & {tuple(i) for i in selected.nonzero().tolist()}


@pytest.mark.parametrize("control", [KL_COV, CLIP_COV], ids=["kl_cov", "clip_cov"])
@pytest.mark.parametrize("garbage", [-INF, INF, float("nan"), 1e30])
def test_garbage_at_padding_changes_nothing(parity_trainer, set_forward, loss_inputs, control, garbage):
    trainer = parity_trainer(control)
    logps, inputs = loss_inputs()
    clean = run(trainer, set_forward, logps, inputs)
    valid = inputs["completion_mask"].bool()
    dirty = torch.where(valid, logps.detach(), garbage).requires_grad_()
    dirty_inputs = inputs | {"old_per_token_logps": torch.where(valid, inputs["old_per_token_logps"], garbage)}
    actual = run(trainer, set_forward, dirty, dirty_inputs)
    assert torch.equal(actual[0], clean[0]) and torch.equal(actual[1], clean[1])


def test_kl_cov_ties_go_to_the_first_token(parity_trainer, set_forward, loss_inputs):
    logps, inputs = loss_inputs(mask=torch.ones(4, 6).bool())
    with torch.no_grad():
        logps[:] = torch.tensor([[-1.0], [-1.0], [-3.0], [-3.0]])
    inputs["advantages"] = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    trainer = parity_trainer(KL_COV)
    actual = run(trainer, set_forward, logps, inputs)
    first = {(0, t) for t in range(4)}  # floor(0.2 * 24) of 24 equal covariances
    check(actual, expected(logps, inputs, low=INF, high=INF, penalised=first, coef=0.7), torch.float64)


def test_on_policy_kl_cov_has_no_penalty_gradient(parity_trainer, set_forward, loss_inputs):
    logps, inputs = loss_inputs(drift=0.0)
    actual = run(parity_trainer(KL_COV), set_forward, logps, inputs)
    check(actual, expected(logps, inputs, low=INF, high=INF), torch.float64)


def test_scale_of_the_covariance_is_that_of_the_plain_advantages(parity_trainer, set_forward, loss_inputs):
    # Trap 3 of the published implementations: dividing the advantages by token counts first empties the band.
    logps, inputs = loss_inputs()
    trainer = parity_trainer(CLIP_COV)
    run(trainer, set_forward, logps, inputs)
    cov = oracle.covariances(logps, inputs["advantages"], inputs["completion_mask"])
    metrics = control_metrics(trainer)
    assert metrics["cov_top_0.0002"] == pytest.approx(max(cov.values()), rel=1e-6)
    assert metrics["cov_mean"] == pytest.approx(sum(cov.values()) / len(cov), rel=1e-6)
    assert metrics["in_band_fraction"] == pytest.approx(sum(0.05 < c < 3 for c in cov.values()) / len(cov))


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_random_selection_draws_as_many_tokens(parity_trainer, set_forward, loss_inputs, name):
    logps, inputs = loss_inputs(rows=16, length=40)
    control = {"clip_cov": CLIP_COV, "kl_cov": KL_COV}[name]
    drawn = {}
    for selection in ("covariance", "random"):
        kwargs = control["entropy_control_kwargs"] | {"selection": selection}
        trainer = parity_trainer(control | {"entropy_control_kwargs": kwargs})
        batch = trainer._batches.of(inputs, logps.detach())
        chosen = trainer.entropy_control.select(batch)
        assert not (chosen.selected & ~batch.mask).any()
        drawn[selection] = chosen
    by_cov, by_chance = drawn["covariance"].selected, drawn["random"].selected
    assert by_cov.sum() == by_chance.sum() > 0
    covariance = drawn["covariance"].covariance
    assert covariance[by_cov].mean() > covariance[by_chance].mean() + 0.1
