"""The other controls against their formulas in plain Python, through TRL's loss, and in real training."""

import math

import oracle
import pytest
import torch
import yaml
from test_features import CASES as FEATURE_CASES
from test_features import ENTROPIES, FEATURES, importance
from transformers import TrainerCallback

from entropy_trl import CEGPPO, EntroPIC, Steer, TargetedClipHigher, build_control
from entropy_trl.cli import parse_train_args
from entropy_trl.loss.batch import TokenBatches
from entropy_trl.tokens.types import TokenBatch


INF = math.inf
NAMES = ("targeted_clip_higher", "steer", "ce_gppo", "entropic")
WITH_STATE = {"targeted_clip_higher": {"k": 0.5}, "entropic": {"alpha": 0.6, "integral": 2.0}}
#: So strong that a few tokens of a tiny model feel them.
KWARGS = {
    "targeted_clip_higher": {"epsilon": 0.1, "delta": 0.05, "k_max": 0.2, "entropy_target": 1.5},
    "steer": {"weight_min": 0.3},
    "ce_gppo": {"beta_low": 0.5, "beta_high": 0.8, "epsilon_low": 0.1, "epsilon_high": 0.15},
    "entropic": {"entropy_target": 1.5, "min_probability": 0.2},
}
#: The entropies of the tiny model in training fall from 2.9; no token of it is likely.
TRAINED = KWARGS | {
    "targeted_clip_higher": KWARGS["targeted_clip_higher"] | {"entropy_target": 2.8},
    "entropic": {"entropy_target": 2.8, "min_probability": 0.06},
}
MASKS = {
    "padded": None,
    "tool-style": torch.tensor([[1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool(),
    "one row empty": torch.tensor([[0] * 6, [1] * 6, [1] * 3 + [0] * 3, [1] * 6]).bool(),
    "empty": torch.zeros(4, 6).bool(),
}


# The formulas, one token at a time; they share nothing with the package.


def tokens(mask):
    return [(b, t) for b, row in enumerate(mask.tolist()) for t, valid in enumerate(row) if valid]


def advantage(inputs, b, t):
    a = inputs["advantages"]
    return float(a[b]) if a.dim() == 1 else float(a[b, t])


def clipped_loss(r, a, low, high):
    """PPO's -min(r A, clip(r, low, high) A)."""
    return -torch.min(r * a, torch.clamp(r, low, high) * a)


def omegas(logps, inputs, entropies):
    found, logps = {}, logps.detach()
    for b, t in tokens(inputs["completion_mask"]):
        p, p_old = math.exp(float(logps[b, t])), math.exp(float(inputs["old_per_token_logps"][b, t]))
        found[b, t] = advantage(inputs, b, t) / p_old * p * (1 - p) * (math.log(p) + float(entropies[b, t]))
    return found


def token_losses(name, logps, inputs, entropies, kwargs, state):
    """{(b, t): the loss of that token}, differentiable in `logps`."""
    losses = {}
    change = omegas(logps, inputs, entropies) if name == "steer" else {}
    for b, t in tokens(inputs["completion_mask"]):
        a = advantage(inputs, b, t)
        r = torch.exp(logps[b, t] - inputs["old_per_token_logps"][b, t])
        if name == "targeted_clip_higher":
            low, high = 1 - kwargs["epsilon"], 1 / (1 - kwargs["epsilon"]) + state["k"]
            loss = clipped_loss(r, a, low, high)
        elif name == "ce_gppo":
            low, high = 1 - kwargs["epsilon_low"], 1 + kwargs["epsilon_high"]
            if a < 0 and r < low:
                loss = -kwargs["beta_low"] * low / r.detach() * r * a
            elif a > 0 and r > high:
                loss = -kwargs["beta_high"] * high / r.detach() * r * a
            else:
                loss = -r * a
        elif name == "steer":
            kappa = -math.log(kwargs["weight_min"]) / max(max(abs(x) for x in change.values()), 0.02)
            loss = math.exp(-kappa * abs(change[b, t])) * clipped_loss(r, a, 0.8, 1.28)
        else:
            loss = clipped_loss(r, a, 0.8, 1.2)
            if math.exp(float(logps[b, t].detach())) > kwargs["min_probability"]:
                loss = loss + state["alpha"] * -r * abs(a)
        losses[b, t] = loss
    return losses


def expected(name, logps, inputs, entropies, **kwargs):
    """Token-mean loss, and its gradient."""
    leaf = logps.detach().double().requires_grad_()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    losses = token_losses(name, leaf, inputs, entropies, KWARGS[name] | kwargs, WITH_STATE.get(name, {}))
    loss = sum(losses.values(), 0.0 * leaf.sum()) / max(len(losses), 1)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.fixture
def loss_of(make_trainer, set_forward):
    """Loss and gradient of a micro-batch through the real trainer, and the trainer."""

    def compute(name, logps, inputs, entropies, **kwargs):
        trainer = make_trainer(
            entropy_control=name,
            entropy_control_kwargs=None if name is None else KWARGS[name] | kwargs,
            loss_type="bnpo",
            **({"epsilon": INF} if name is None else {}),
        )
        if name in WITH_STATE:
            assert trainer._control_state.values.keys() == WITH_STATE[name].keys()
            trainer._control_state.values = dict(WITH_STATE[name])
        set_forward(logps, entropies)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        return (loss.detach(), *torch.autograd.grad(loss, logps)), trainer

    return compute


def entropies_like(logps, seed=1):
    return torch.rand(logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def check(name, loss_of, logps, inputs, dtype, **kwargs):
    entropies = entropies_like(logps)
    actual, trainer = loss_of(name, logps, inputs, entropies.to(dtype), **kwargs)
    loss, gradient = expected(name, logps, inputs, entropies, **kwargs)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual[1].double(), gradient, rtol=tolerance, atol=tolerance)
    if name != "targeted_clip_higher":  # there a stopped token has the loss 0 instead of a constant
        torch.testing.assert_close(actual[0].double(), loss, rtol=tolerance, atol=tolerance)
    return actual, trainer


CASES = pytest.mark.parametrize("mask", MASKS)
DRIFT = pytest.mark.parametrize("drift", [0.0, 0.3, 3.0])
SHAPE = pytest.mark.parametrize("per_token", [False, True], ids=["per-row", "per-token"])
TYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


@CASES
@DRIFT
@SHAPE
@TYPE
def test_targeted_clip_higher_is_ppos_clip_with_its_own_range(loss_of, loss_inputs, mask, drift, per_token, dtype):
    logps, inputs = loss_inputs(dtype=dtype, drift=drift, mask=MASKS[mask], per_token=per_token)
    (_, gradient), trainer = check("targeted_clip_higher", loss_of, logps, inputs, dtype)
    stopped = (gradient == 0) & inputs["completion_mask"].bool()
    assert bool(stopped.any()) == (drift > 0 and mask != "empty")
    if mask != "empty":
        metrics = {k.split("/")[1]: v[-1] for k, v in trainer._metrics["train"].items() if "entropy_control" in k}
        share = float(stopped.sum() / inputs["completion_mask"].sum())
        assert metrics["clipped_high"] + metrics["clipped_low"] == pytest.approx(share)
        assert metrics["k"] == 0.5


@CASES
@DRIFT
@SHAPE
@TYPE
def test_ce_gppo_gradient_outside_the_range(loss_of, loss_inputs, mask, drift, per_token, dtype):
    logps, inputs = loss_inputs(dtype=dtype, drift=drift, mask=MASKS[mask], per_token=per_token)
    (_, gradient), trainer = check("ce_gppo", loss_of, logps, inputs, dtype)
    valid = inputs["completion_mask"].bool()
    assert (gradient[valid] != 0).all()  # no token is lost
    if drift and mask != "empty":
        # The bound: outside the range the gradient is beta * (1 -+ epsilon) * |A| whatever the ratio.
        r = (logps - inputs["old_per_token_logps"]).detach().exp()
        a = inputs["advantages"] if per_token else inputs["advantages"][:, None].expand_as(r)
        above = (r > 1.15) & (a > 0) & valid
        assert above.any()
        share = (gradient / a * valid.sum())[above].double()
        torch.testing.assert_close(share, torch.full_like(share, -0.8 * 1.15), rtol=1e-5, atol=0)
        assert trainer._metrics["train"]["entropy_control/outside_high"][-1] == pytest.approx(
            float(above.sum() / valid.sum())
        )


def test_ce_gppo_with_factors_of_0_is_the_plain_clip(loss_of, loss_inputs):
    logps, inputs = loss_inputs(drift=0.5)
    entropies = entropies_like(logps)
    (_, gradient), _ = loss_of("ce_gppo", logps, inputs, entropies, beta_low=0.0, beta_high=0.0)
    leaf = logps.detach().requires_grad_()
    losses = [
        clipped_loss(torch.exp(leaf[b, t] - inputs["old_per_token_logps"][b, t]), advantage(inputs, b, t), 0.9, 1.15)
        for b, t in tokens(inputs["completion_mask"])
    ]
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(losses) / len(losses), leaf)[0])


@pytest.mark.parametrize("log_ratio", [-60.0, -100.0, -1000.0])
def test_ce_gppo_of_a_vanishing_ratio_is_finite(loss_of, loss_inputs, log_ratio):
    logps, inputs = loss_inputs(dtype=torch.float32, mask=torch.ones(4, 6).bool())
    inputs["advantages"] = torch.tensor([-5.0, -1.0, -2.0, 1.0])
    with torch.no_grad():
        logps[:] = inputs["old_per_token_logps"] + log_ratio
    (loss, gradient), _ = loss_of("ce_gppo", logps, inputs, entropies_like(logps).float())
    assert loss.isfinite() and gradient.isfinite().all()
    if log_ratio == -60:
        torch.testing.assert_close(gradient[0], torch.full((6,), 0.5 * 0.9 * 5 / 24), rtol=1e-4, atol=0)


@CASES
@DRIFT
@SHAPE
@TYPE
def test_steer_weights(loss_of, loss_inputs, mask, drift, per_token, dtype):
    logps, inputs = loss_inputs(dtype=dtype, drift=drift, mask=MASKS[mask], per_token=per_token)
    _, trainer = check("steer", loss_of, logps, inputs, dtype)
    change = omegas(logps, inputs, entropies_like(logps))
    if change:
        largest = max(abs(x) for x in change.values())
        assert trainer._metrics["train"]["entropy_control/omega_max"][-1] == pytest.approx(largest, rel=1e-5)
        weights = [0.3 ** (abs(x) / max(largest, 0.02)) for x in change.values()]
        mean = sum(weights) / len(weights)
        assert trainer._metrics["train"]["entropy_control/weight_mean"][-1] == pytest.approx(mean, rel=1e-5)
        assert min(weights) == pytest.approx(0.3) and mean < 0.97


def batch_of(logps, inputs, entropies, **kwargs):
    return TokenBatch(
        logps=logps,
        old_logps=inputs["old_per_token_logps"],
        advantages=inputs["advantages"],
        mask=inputs["completion_mask"],
        entropies=entropies,
        **kwargs,
    )


def test_steer_by_hand():
    # p = pi_old = 1/2, A = 1: Omega = 1/2 * (ln 1/2 + H), which is 0.25 for H = ln 2 + 0.5 and 0.1 for H = ln 2 + 0.2.
    logps = torch.full((1, 3), math.log(0.5), dtype=torch.float64)
    entropies = torch.tensor([[math.log(2) + 0.5, math.log(2) - 0.2, math.log(2)]], dtype=torch.float64)
    inputs = {
        "old_per_token_logps": logps,
        "advantages": torch.ones(1, dtype=torch.float64),
        "completion_mask": torch.ones(1, 3),
    }
    batch = batch_of(logps, inputs, entropies)
    control = Steer(weight_min=0.8)
    shared = control.select(batch).shared
    assert float(shared["omega_max"]) == pytest.approx(0.25)
    weighted = control.edit(batch_of(logps, inputs, entropies, shared=shared), torch.zeros(1, 3)).advantages
    assert weighted.tolist()[0] == pytest.approx([0.8, 0.8 ** (0.1 / 0.25), 1.0])
    # Where nothing changes the entropy by as much as the floor, no weight is as small.
    floor = Steer(weight_min=0.8, omega_floor=2.5)
    weighted = floor.edit(batch_of(logps, inputs, entropies, shared=shared), torch.zeros(1, 3)).advantages
    assert float(weighted[0, 0]) == pytest.approx(0.8**0.1)


def test_steer_without_entropies_is_an_error(loss_inputs):
    logps, inputs = loss_inputs()
    with pytest.raises(ValueError, match="entropies"):
        Steer().select(batch_of(logps, inputs, None))


@CASES
@DRIFT
@SHAPE
@TYPE
def test_entropic_adds_its_term_to_the_likely_tokens(loss_of, loss_inputs, mask, drift, per_token, dtype):
    logps, inputs = loss_inputs(dtype=dtype, drift=drift, mask=MASKS[mask], per_token=per_token)
    _, trainer = check("entropic", loss_of, logps, inputs, dtype)
    where = tokens(inputs["completion_mask"])
    if where:
        share = sum(math.exp(float(logps[i].detach())) > 0.2 for i in where) / len(where)
        assert trainer._metrics["train"]["entropy_control/high_probability"][-1] == pytest.approx(share)


def test_entropic_is_a_factor_inside_the_clip(loss_of, loss_inputs):
    # 1 + alpha on the gradient of a likely token that was right, 1 - alpha of one that was wrong; 1 of the others.
    logps, inputs = loss_inputs(drift=0.02)
    entropies = entropies_like(logps)
    (_, with_term), _ = loss_of("entropic", logps, inputs, entropies)
    (_, without), _ = loss_of("entropic", logps, inputs, entropies, min_probability=1.0)
    valid = inputs["completion_mask"].bool()
    likely, right = (logps.exp() > 0.2).detach(), inputs["advantages"][:, None] > 0
    factor = torch.where(likely, torch.where(right, 1.6, 0.4), 1.0).to(torch.float64)
    assert (likely & right & valid).any() and (likely & ~right & valid).any()
    torch.testing.assert_close(with_term[valid], (factor * without)[valid])
    assert torch.equal(with_term[~likely], without[~likely])


def test_entropic_all_tokens_are_above_a_threshold_of_0(loss_inputs):
    logps, inputs = loss_inputs()
    edit = EntroPIC(min_probability=0).edit(batch_of(logps, inputs, None, state={"alpha": 1.0}), torch.zeros(4, 6))
    likely, valid = edit.metrics["high_probability"]
    assert likely == valid == inputs["completion_mask"].sum()


# With every feature of TRL's loss


def edits(name, logps, inputs):
    """What the oracle of TRL's losses is told of a control: edited advantages, or a term that is added."""
    kwargs, state = KWARGS[name], WITH_STATE.get(name, {})
    if name == "entropic":

        def added(b, t, log_ratio):
            likely = math.exp(float(logps[b, t].detach())) > kwargs["min_probability"]
            return -state["alpha"] * torch.exp(log_ratio) * abs(advantage(inputs, b, t)) if likely else 0.0

        return {"added": added}
    edited, mask = {}, inputs["completion_mask"] * inputs.get("tool_mask", 1)
    change = omegas(logps, inputs | {"completion_mask": mask}, ENTROPIES) if name == "steer" else {}
    for b, t in tokens(mask):
        a, r = advantage(inputs, b, t), math.exp(float(logps[b, t] - inputs["old_per_token_logps"][b, t]))
        if name == "steer":
            a *= kwargs["weight_min"] ** (abs(change[b, t]) / max(0.02, *(abs(x) for x in change.values())))
        elif name == "targeted_clip_higher":
            low, high = 1 - kwargs["epsilon"], 1 / (1 - kwargs["epsilon"]) + state["k"]
            a = 0.0 if (a > 0 and r > high) or (a < 0 and r < low) else a
        elif a < 0 and r < 1 - kwargs["epsilon_low"]:
            a *= kwargs["beta_low"] * (1 - kwargs["epsilon_low"]) / r
        elif a > 0 and r > 1 + kwargs["epsilon_high"]:
            a *= kwargs["beta_high"] * (1 + kwargs["epsilon_high"]) / r
        edited[b, t] = a
    return {"edited": edited}


OWNERS_OF_THE_CLIP = ("targeted_clip_higher", "ce_gppo")


def refusal(name, loss_type, feature):
    """The words of the error where the two do not fit, else None."""
    if feature == "sequence level" and name != "entropic":
        return "importance_sampling_level"
    if name in OWNERS_OF_THE_CLIP and "epsilon_high" in FEATURES[feature][0]:
        return "ratio clip of its own"
    if name in OWNERS_OF_THE_CLIP and loss_type in ("cispo", "sapo", "vespo"):
        return "moves the ratio clip"
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("loss_type", "feature"), FEATURE_CASES)
def test_features_of_trls_loss(make_trainer, make_config, set_forward, loss_inputs, name, loss_type, feature):
    config, change, told = FEATURES[feature]
    if name in OWNERS_OF_THE_CLIP and feature == "delta":
        config, told = {"delta": config["delta"]}, {"delta": told["delta"]}
    config = {"loss_type": loss_type, "entropy_control": name, "entropy_control_kwargs": KWARGS[name]} | config
    config["entropy_control_pool"] = "micro_batch"
    if words := refusal(name, loss_type, feature):
        with pytest.raises(ValueError, match=words):
            make_config(**config)
        return
    trainer = make_trainer(**{k: v for k, v in config.items() if k != "beta"})
    trainer.beta = config.get("beta", 0.0)  # no reference model is needed: its log-probs are given
    trainer.use_vllm = change is importance
    trainer._control_state.values = dict(WITH_STATE.get(name, {}))
    logps, inputs = loss_inputs(drift=0.5)
    inputs = change(inputs) if change else inputs
    told = {"low": trainer.epsilon_low, "high": trainer.epsilon_high} | told | edits(name, logps.detach(), inputs)
    if callable(told.get("token_filter")):
        told["token_filter"] = told["token_filter"](inputs)

    set_forward(logps, ENTROPIES)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logps)
    leaf = logps.detach().clone().requires_grad_()
    expected_loss = oracle.loss(leaf, inputs, loss_type, **told)
    torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected_loss, leaf)[0], rtol=1e-6, atol=1e-9)
    if feature == "plain":  # the control does something, which TRL's own clip or masks may hide
        plain = {key: value for key, value in told.items() if key not in ("edited", "added")}
        (without,) = torch.autograd.grad(oracle.loss(leaf, inputs, loss_type, **plain), leaf)
        assert not torch.allclose(gradient, without, rtol=1e-3)


# The states


@pytest.mark.parametrize(("k", "highest"), [(0.0, 2.5), (0.25, 2.75)])
def test_targeted_clip_higher_bounds_at_the_published_epsilon(k, highest):
    ratios = torch.tensor([[highest - 0.01, highest + 0.01, 0.41, 0.39]], dtype=torch.float64)
    batch = TokenBatch(
        logps=ratios.log(),
        old_logps=torch.zeros_like(ratios),
        advantages=torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
        mask=torch.ones(1, 4, dtype=torch.bool),
        state={"k": k},
    )
    control = build_control("targeted_clip_higher", {})
    edit = control.edit(batch, torch.zeros_like(batch.mask))
    assert edit.advantages.tolist() == [[1.0, 0.0, -1.0, 0.0]]


def test_targeted_clip_higher_state():
    control = TargetedClipHigher(delta=0.25, k_max=0.6, entropy_target=0.3)
    state, ks = control.initial_state(), []
    for entropy in (0.2, 0.1, 0.29, 0.3, 0.31, 0.5, 0.5, 0.5):
        state = control.next_state(state, entropy, 0.5)
        ks.append(state["k"])
    # Up by 0.25 to the limit, not at all on the target, down to 0.
    assert ks == pytest.approx([0.25, 0.5, 0.6, 0.6, 0.35, 0.1, 0.0, 0.0])


def test_entropic_state():
    control = EntroPIC(entropy_target=0.1, k_p=2.0, k_i=0.1)
    state, errors = control.initial_state(), []
    assert state == {"alpha": 0.0, "integral": 0.0}
    for entropy in (0.3, 0.2, 0.05, 0.0, 2.0, 0.0):
        errors.append(entropy - 0.1)
        state = control.next_state(state, entropy, 0.5)
        assert state["integral"] == pytest.approx(sum(errors))
        assert state["alpha"] == pytest.approx(min(max(2 * errors[-1] + 0.1 * sum(errors), -1), 1))
    assert control.next_state({"alpha": 0.0, "integral": -100.0}, 0.1, 0.5)["alpha"] == -1
    assert control.next_state({"alpha": 0.0, "integral": 0.0}, 1.0, 0.5)["alpha"] == 1


# What holds for all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [-INF, INF, float("nan"), 1e30])
def test_garbage_at_padding_changes_nothing(loss_of, loss_inputs, name, garbage):
    logps, inputs = loss_inputs(drift=0.5)
    entropies, valid = entropies_like(logps), inputs["completion_mask"].bool()
    clean, _ = loss_of(name, logps, inputs, entropies)
    dirty = torch.where(valid, logps.detach(), garbage).requires_grad_()
    inputs = inputs | {"old_per_token_logps": torch.where(valid, inputs["old_per_token_logps"], garbage)}
    actual, _ = loss_of(name, dirty, inputs, torch.where(valid, entropies, garbage))
    assert all(torch.equal(a, c) for a, c in zip(actual, clean, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_token", [False, True], ids=["per-row", "per-token"])
def test_order_of_the_rows_does_not_matter(loss_of, loss_inputs, name, per_token):
    logps, inputs = loss_inputs(drift=0.5, per_token=per_token)
    entropies, order = entropies_like(logps), torch.tensor([2, 0, 3, 1])
    (loss, gradient), _ = loss_of(name, logps, inputs, entropies)
    moved = {k: v[order] if v.ndim else v for k, v in inputs.items()}
    (other, moved_gradient), _ = loss_of(name, logps.detach()[order].requires_grad_(), moved, entropies[order])
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved_gradient, gradient[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["targeted_clip_higher", "ce_gppo"])
def test_tokens_inside_the_range_stay_as_they_are(loss_of, loss_inputs, name):
    logps, inputs = loss_inputs(rows=8, length=20, drift=0.3)
    entropies = entropies_like(logps)
    (_, gradient), _ = loss_of(name, logps, inputs, entropies)
    (_, unclipped), _ = loss_of(None, logps, inputs, entropies)
    low, high = {"targeted_clip_higher": (0.9, 1 / 0.9 + 0.5), "ce_gppo": (0.9, 1.15)}[name]
    r, a = (logps - inputs["old_per_token_logps"]).detach().exp(), inputs["advantages"][:, None]
    outside = ((a > 0) & (r > high) | (a < 0) & (r < low)) & inputs["completion_mask"].bool()
    assert 0 < outside.sum() < inputs["completion_mask"].sum() / 2
    assert torch.equal(gradient[~outside], unclipped[~outside])
    assert (gradient[outside] != unclipped[outside]).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("targeted_clip_higher", {"epsilon": 0}, ["epsilon", "(0, 1]"]),
        ("targeted_clip_higher", {"epsilon": 1}, ["epsilon", "infinite", "0.6"]),
        ("targeted_clip_higher", {"delta": -0.1}, ["delta", "-0.1"]),
        ("targeted_clip_higher", {"k_max": -1}, ["k_max", "-1"]),
        ("targeted_clip_higher", {"k_max": INF}, ["k_max", "inf"]),
        ("targeted_clip_higher", {"entropy_target": math.nan}, ["entropy_target", "nan"]),
        ("steer", {"weight_min": 0}, ["weight_min", "(0, 1]"]),
        ("steer", {"weight_min": 1.1}, ["weight_min", "1.1"]),
        ("steer", {"omega_floor": 0}, ["omega_floor"]),
        ("ce_gppo", {"beta_low": -0.5}, ["beta_low", "-0.5"]),
        ("ce_gppo", {"epsilon_low": 1.5}, ["epsilon_low", "[0, 1]"]),
        ("ce_gppo", {"epsilon_high": INF}, ["epsilon_high", "inf"]),
        ("ce_gppo", {"beta_hihg": 1}, ["'beta_hihg'", "did you mean 'beta_high'"]),
        ("entropic", {"k_p": -1}, ["k_p", "-1"]),
        ("entropic", {"min_probability": 1.5}, ["min_probability", "[0, 1]"]),
        ("entropic", {"entropy_target": "low"}, ["entropy_target", "'low'"]),
    ],
)
def test_bad_values(name, kwargs, words):
    with pytest.raises(ValueError) as error:
        build_control(name, kwargs)
    for word in words:
        assert word in str(error.value)


def test_published_constants():
    assert TargetedClipHigher() == TargetedClipHigher(epsilon=0.6, delta=0.25, k_max=2.5, entropy_target=0.3)
    assert Steer() == Steer(weight_min=0.8, omega_floor=0.02)
    assert CEGPPO() == CEGPPO(beta_low=0.75, beta_high=1.0, epsilon_low=0.2, epsilon_high=0.2)
    assert EntroPIC() == EntroPIC(entropy_target=0.1, k_p=1.0, k_i=0.01, min_probability=0.95)


@pytest.mark.parametrize(
    ("name", "clip"),
    [("targeted_clip_higher", (INF, INF)), ("steer", (0.2, 0.28)), ("ce_gppo", (INF, INF)), ("entropic", (0.2, 0.2))],
)
def test_ratio_clip_is_the_published_one(make_config, name, clip):
    assert make_config(entropy_control=name).ratio_clip() == clip


@pytest.mark.parametrize("name", NAMES)
def test_losses_that_they_do_not_fit(make_config, name):
    if name == "entropic":  # its term is a token's own
        make_config(entropy_control=name, importance_sampling_level="sequence")
    else:
        with pytest.raises(ValueError, match="importance_sampling_level"):
            make_config(entropy_control=name, importance_sampling_level="sequence")
    for loss_type in ("cispo", "sapo", "vespo"):
        if name in ("steer", "entropic"):
            make_config(entropy_control=name, loss_type=loss_type)
        else:
            with pytest.raises(ValueError, match="moves the ratio clip"):
                make_config(entropy_control=name, loss_type=loss_type)


def test_on_policy_there_is_nothing_to_clip(make_config):
    for name in ("targeted_clip_higher", "ce_gppo"):
        with pytest.raises(ValueError, match="every ratio is 1: there is nothing to clip"):
            make_config(entropy_control=name, steps_per_generation=1)
    for name in ("steer", "entropic"):
        make_config(entropy_control=name, steps_per_generation=1)


# The shipped configurations

OFF = {"entropy_control": None}
QUICKSTART = {  # what differs from grpo.yaml: published constants, or those that the file has a comment on
    "targeted_clip_higher": {
        "entropy_control": "targeted_clip_higher",
        "entropy_control_kwargs": {"epsilon": 0.2, "delta": 0.25, "k_max": 2.5, "entropy_target": 0.3},
    },
    "steer": {"entropy_control": "steer", "entropy_control_kwargs": {"weight_min": 0.8, "omega_floor": 0.02}},
    "ce_gppo": {
        "entropy_control": "ce_gppo",
        "entropy_control_kwargs": {"beta_low": 0.25, "beta_high": 1.0, "epsilon_low": 0.2, "epsilon_high": 0.2},
    },
    "entropic": {
        "entropy_control": "entropic",
        "entropy_control_kwargs": {"entropy_target": 0.3, "k_p": 1.0, "k_i": 0.01, "min_probability": 0.95},
        "epsilon": 0.2,
    },
    "qae": OFF | {"epsilon": 0.2, "advantage_estimator": "quantile", "advantage_quantile": 0.4},
    "high_entropy_mask": OFF | {"epsilon": 0.2, "top_entropy_quantile": 0.2},
    "kl_reference": OFF | {"epsilon": 0.2, "beta": 0.1},
    "entropy_bonus": OFF | {"epsilon": 0.2, "entropy_coef": 0.005},
    "adaptive_entropy": OFF
    | {"epsilon": 0.2, "use_adaptive_entropy": True, "entropy_target": 0.3}
    | {"entropy_coef_delta": 1e-4, "entropy_coef_max": 0.05},
    "cispo": OFF | {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": OFF | {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "gspo": OFF | {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.1},
}


@pytest.mark.parametrize("name", QUICKSTART)
def test_quickstart_files_differ_from_grpo_in_the_method_only(request, name):
    folder = request.config.rootpath / "configs" / "quickstart"
    grpo, settings = (yaml.safe_load((folder / f"{stem}.yaml").read_text()) for stem in ("grpo", name))
    common = {key: value for key, value in grpo.items() if key not in ("entropy_control", "epsilon")}
    assert settings == common | {"output_dir": f"runs/quickstart/train/{name}"} | QUICKSTART[name]
    _, args, _, _ = parse_train_args(["--config", str(folder / f"{name}.yaml")])
    for key, value in QUICKSTART[name].items():
        assert getattr(args, key) == value
    docs = (request.config.rootpath / "docs" / "methods.md").read_text()
    assert f"### `{name}`" in docs or f"{name}.yaml`" in docs


# In real training


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


def train(make_trainer, name, **overrides):
    gradients = Gradients()
    trainer = make_trainer(**{"entropy_control": name, "entropy_control_kwargs": TRAINED.get(name)} | overrides)
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.steps


def logged(trainer):
    timing = ("time", "per_second", "runtime")
    return [
        {k: v for k, v in log.items() if not any(t in k for t in timing)}
        for log in trainer.state.log_history
        if "loss" in log
    ]


@pytest.mark.parametrize("name", NAMES)
def test_trains_whatever_the_cut_of_a_step(make_trainer, name):
    """8 rows a step in 1, 2, 4 and 8 micro-batches: the same gradients and metrics, and not those without control."""
    runs = {}
    for batch in (8, 4, 2, 1):
        overrides = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 8 // batch,
            "steps_per_generation": 16 // batch,
            "learning_rate": 0.02,
        }
        runs[batch] = train(make_trainer, name, loss_type="dapo", **overrides)
    reference, gradients = runs[8]
    spread = [
        float((g - r).norm() / r.norm()) for _, steps in runs.values() for g, r in zip(steps, gradients, strict=True)
    ]
    assert max(spread) < 1e-4
    for trainer, _ in runs.values():
        for log, wanted in zip(logged(trainer), logged(reference), strict=True):
            for key in (k for k in wanted if k.startswith("entropy_control/")):
                assert log[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key
    clip = dict(zip(("epsilon", "epsilon_high"), reference.args.ratio_clip(), strict=True))
    _, without = train(make_trainer, None, loss_type="dapo", learning_rate=0.02, **clip)
    moved = [float((g - w).norm() / w.norm()) for g, w in zip(gradients, without, strict=True)]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("name", WITH_STATE)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_states_follow_the_entropy_of_the_step_before(make_trainer, name, accumulation):
    trainer, _ = train(
        make_trainer,
        name,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=2 * accumulation,
        max_steps=6,
        learning_rate=0.03,
    )
    control = trainer.entropy_control
    state, visited = control.initial_state(), []
    for log in logged(trainer):
        assert {key: log[f"entropy_control/{key}"] for key in state} == pytest.approx(state, abs=1e-6)
        if accumulation == 1:
            assert log["entropy_control/step_entropy"] == pytest.approx(log["entropy"], abs=1e-4)
        state = control.next_state(state, log["entropy_control/step_entropy"], 0.5)
        visited.append(state)
    assert trainer._control_state.values == pytest.approx(state, abs=1e-6)
    name, low = ("k", 0.0) if "k" in state else ("alpha", 0.1)
    assert visited[0][name] <= low < visited[-1][name] or visited[0][name] > low > visited[-1][name]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_run(make_trainer, tmp_path, name):
    # A rollout lasts two steps of two micro-batches each: checkpoints 1 and 3 lie inside one.
    overrides = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "learning_rate": 0.02}
    overrides |= {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}
    through, _ = train(make_trainer, name, **overrides)
    for checkpoint in (1, 2, 3):
        resumed = make_trainer(entropy_control=name, entropy_control_kwargs=TRAINED[name], **overrides)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        weights = zip(through.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights), checkpoint
        assert logged(through)[checkpoint:] == logged(resumed)[checkpoint:]
        assert through._control_state.values == resumed._control_state.values


def test_steers_maximum_is_that_of_the_pool(make_trainer):
    # Per micro-batch, as in the authors' code, another number in each; over the step one for all.
    overrides = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    maxima = {}
    for pool in ("step", "micro_batch"):
        trainer = make_trainer(entropy_control="steer", entropy_control_pool=pool, max_steps=1, **overrides)
        seen, edit = [], Steer.edit

        def record(self, batch, selected, seen=seen, edit=edit):
            seen.append(float(batch.shared["omega_max"]))
            return edit(self, batch, selected)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Steer, "edit", record)
            trainer.train()
        maxima[pool] = seen
    assert len(set(maxima["step"])) == 1 and len(maxima["step"]) == 4
    assert len(set(maxima["micro_batch"])) == 4
    assert max(maxima["micro_batch"]) == pytest.approx(maxima["step"][0], rel=1e-5)


def test_steers_scoring_pass_is_made_where_a_step_has_several_micro_batches(make_trainer, monkeypatch):
    calls = []
    score = TokenBatches.score
    monkeypatch.setattr(TokenBatches, "score", lambda self, *args: calls.append(args[-1]) or score(self, *args))
    train(make_trainer, "steer", max_steps=2)
    assert calls == []
    overrides = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    train(make_trainer, "steer", max_steps=2, **overrides)
    assert calls == [True] * 4  # with entropies
