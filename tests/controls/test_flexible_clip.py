"""Flexible clipping (arXiv 2602.09782): thresholds, schedules, modes, and real training."""

import copy
import json
import math
from dataclasses import replace

import oracle
import pytest
import torch
from benchmark_runs import run_benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import distance
from test_distributed import run as run_processes
from test_trainer import Gradients, logs, same_weights

from entropy_trl import FlexibleClip, build_control
from entropy_trl.controls.flexible_clip import STRATEGIES, Threshold, ratio_bounds
from entropy_trl.saving.manifest import main as accept_edited
from entropy_trl.tokens.types import TokenBatch


T = 100  # steps of the schedules below


def make(strategy="static", **kwargs):
    if strategy == "target":
        kwargs = {"entropy_target": 0.3} | kwargs
    return FlexibleClip(strategy=strategy, **kwargs)


def published(strategy, k, p, *, second="fade_out", raising=None):
    """(upper, lower) epsilon at step k of T for a token of current probability p, as the authors' page prints them."""
    lam = 1 - 2 * k / T
    dynamic_upper, dynamic_lower, std = -0.25 * p + 0.5, -0.13 * p + 0.3, 0.2
    fading = (1 + lam) * dynamic_lower - lam * std
    if second == "fade_in":  # the same line, from its end to its start
        fading = -lam * dynamic_lower + (1 + lam) * std
    if strategy == "increase_then_decrease":
        return (lam * dynamic_upper + (1 - lam) * std, std) if k <= T / 2 else (std, fading)
    if strategy == "decrease_increase_decrease":
        return (lam * std + (1 - lam) * dynamic_upper, std) if k <= T / 2 else (dynamic_upper, fading)
    if strategy == "static":
        return dynamic_upper, dynamic_lower
    return (dynamic_upper, std) if raising else (std, dynamic_lower)


def random_batch(seed=0, rows=8, length=10, per_token=False, drift=0.5, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -normal(rows, length).abs()
    return TokenBatch(
        logps=(old + drift * normal(rows, length)).clamp(max=0.0),
        old_logps=old,
        advantages=normal(rows, length if per_token else 1),
        mask=torch.rand(rows, length, generator=generator) < 0.8,
        entropies=normal(rows, length).abs(),
        **kwargs,
    )


def edited(control, batch):
    return control.edit(batch, torch.zeros_like(batch.mask))


def clipped_by(control, batch):
    """The tokens whose advantage the control has taken away."""
    return edited(control, batch).advantages.expand_as(batch.logps) != batch.advantages.expand_as(batch.logps)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    strategy=st.sampled_from(STRATEGIES),
    k=st.integers(0, T - 1),
    second=st.sampled_from(["fade_out", "fade_in"]),
    raising=st.booleans(),
    per_token=st.booleans(),
)
def test_flexible_clip_against_the_loop(seed, strategy, k, second, raising, per_token):
    """The implicit definition: epsilon at the current probability, PPO's minimum, one token at a time."""
    control = make(strategy, second_half_lower=second)
    batch = random_batch(seed, per_token=per_token, progress=k / T, state={"raising": float(raising)})
    expected = {}
    for b, t in oracle.tokens(batch.mask):
        logp = float(batch.logps[b, t])
        upper, lower = published(strategy, k, math.exp(logp), second=second, raising=raising)
        ratio = math.exp(logp - float(batch.old_logps[b, t]))
        advantage = oracle.advantage(batch.advantages.expand_as(batch.logps), b, t)
        # The clipped branch is the smaller one, and the bound does not move with the parameters: no gradient.
        stopped = min(max(ratio, 1 - lower), 1 + upper) * advantage < ratio * advantage
        expected[b, t] = 0.0 if stopped else advantage
    edit = edited(control, batch)
    for (b, t), value in expected.items():
        assert float(edit.advantages[b, t]) == value, (b, t)
    high = sum(
        oracle.advantage(batch.advantages.expand_as(batch.logps), b, t) > 0 == v for (b, t), v in expected.items()
    )
    assert int(edit.metrics["clipped_high"][0]) == high
    low = sum(v == 0 for v in expected.values()) - high
    assert int(edit.metrics["clipped_low"][0]) == low
    assert edit.penalty is None


def test_the_loop_sees_clipping_on_both_sides():
    # Or the test above would show nothing; and a threshold of the other sign, or side, clips other tokens.
    batch = random_batch(rows=40)
    clipped = clipped_by(make(), batch)
    for sign in (1, -1):
        share = float((clipped & (sign * batch.advantages > 0))[batch.mask].double().mean())
        assert 0.05 < share < 0.5
    for other in (make(upper_slope=0.25), make(lower_slope=0.13), make(upper_base=0.3), make(lower_base=0.5)):
        assert not torch.equal(clipped_by(other, batch), clipped)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 1), st.floats(0, 3), st.floats(-1, 0.99), st.floats(0, 1), st.floats(-0.99, 1), st.floats(-3, 3)
)  # fmt: skip
def test_closed_form_is_the_implicit_definition(p_old, upper_base, upper_slope, lower_base, lower_slope, log_ratio):
    upper = Threshold(max(upper_slope, -upper_base), upper_base)
    lower = Threshold(min(max(lower_slope, -lower_base), 1 - lower_base), lower_base)
    low, high = (float(x) for x in ratio_bounds(torch.tensor(p_old, dtype=torch.float64), upper, lower))
    assert 0 <= low <= 1 <= high
    r = min(math.exp(log_ratio), 1 / max(p_old, 1e-9))  # the current probability is at most 1
    p = r * p_old
    for exceeds, excess in (
        (r > high, r - 1 - upper.slope * p - upper.base),
        (r < low, 1 - lower.slope * p - lower.base - r),
    ):
        assert abs(excess) < 1e-9 * max(1.0, r) or exceeds == (excess > 0)


def test_published_bounds_at_the_ends():
    # Upper: (1 + .5) / (1 + .25 p): 1.5 at p = 0, 1.2 at 1. Lower: (1 - .3) / (1 - .13 p): .7 at 0, .7 / .87 at 1.
    low, high = ratio_bounds(torch.tensor([0.0, 1.0]), *make().thresholds(0.0, {}))
    torch.testing.assert_close(high, torch.tensor([1.5, 1.2]))
    torch.testing.assert_close(low, torch.tensor([0.7, 0.7 / 0.87]))


def test_constant_thresholds_are_ppos_clip():
    control = make(upper_slope=0.0, upper_base=0.28, lower_slope=0.0, lower_base=0.2)
    batch = random_batch(rows=40)
    args = (batch.logps, batch.old_logps, batch.advantages.expand_as(batch.logps), batch.mask)
    expected = oracle.ratio_clipped(*args, 0.2, 0.28)
    assert {tuple(i) for i in clipped_by(control, batch).nonzero().tolist()} == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("second", ["fade_out", "fade_in"])
@pytest.mark.parametrize("k", [0, 1, 25, 50, 51, 75, 99])
def test_schedules(strategy, second, k):
    control = make(strategy, second_half_lower=second)
    for raising in (0.0, 1.0):
        upper, lower = control.thresholds(k / T, {"raising": raising})
        for p in (0.0, 0.3, 1.0):
            expected = published(strategy, k, p, second=second, raising=raising)
            assert (upper.slope * p + upper.base, lower.slope * p + lower.base) == pytest.approx(expected)


def test_another_split_keeps_the_ends_of_the_phases():
    control = make("increase_then_decrease", phase_split=0.3)
    standard = Threshold(0.0, 0.2)
    dynamic_upper, dynamic_lower = make().thresholds(0.0, {})
    assert control.thresholds(0.0, {}) == (dynamic_upper, standard)
    for progress, expected in (
        (0.3, (standard, standard)),
        (0.3 + 1e-9, (standard, dynamic_lower)),
        (1.0, (standard,) * 2),
    ):
        for threshold, value in zip(control.thresholds(progress, {}), expected, strict=True):
            assert threshold == pytest.approx(value, abs=1e-6)


def test_oscillation():
    control = make("oscillatory_decay")  # low: 0.2 of the first entropy; high: from that entropy down to low
    state = control.initial_state()
    assert state["raising"] == 0 and math.isnan(state["initial_entropy"])
    modes = []
    # (entropy, progress after the step) -> the bound above is 0.2 + 0.8 (1 - progress)
    for entropy, progress in (
        (1.0, 0.1),
        (0.21, 0.2),
        (0.2, 0.3),
        (0.5, 0.4),
        (0.61, 0.5),
        (0.3, 0.6),
        (0.19, 0.7),
        (0.45, 0.8),
    ):
        state = control.next_state(state, entropy, progress)
        modes.append(state["raising"])
    assert modes == [0, 0, 1, 1, 0, 0, 1, 0]
    assert state["initial_entropy"] == 1.0


def test_the_first_step_only_says_what_is_high():
    control = make("oscillatory_decay", initial_mode="raise")
    state = control.next_state(control.initial_state(), 0.8, 0.01)
    assert state == {"raising": 1.0, "initial_entropy": 0.8}
    assert control.next_state(state, 0.8, 0.02)["raising"] == 0.0


def test_target_has_hysteresis():
    control = make("target", entropy_target=0.3, entropy_band=0.05)
    state, modes = control.initial_state(), []
    for entropy in (0.5, 0.3, 0.26, 0.24, 0.3, 0.34, 0.36, 0.3):
        state = control.next_state(state, entropy, 0.5)
        modes.append(state["raising"])
    assert modes == [0, 0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lower_standard_of_its_own(strategy):
    # It stands where the lower threshold is not dynamic, and mixes with it; the upper one stays.
    one, two = make(strategy), make(strategy, epsilon_std_lower=0.05)
    for progress in (0.0, 0.4, 0.6, 1.0):
        for raising in (0.0, 1.0):
            state = {"raising": raising}
            (upper, lower), (upper_of_two, lower_of_two) = (c.thresholds(progress, state) for c in (one, two))
            assert upper == upper_of_two
            # the share of the dynamic threshold, by its slope
            share = lower.slope / one.lower_slope
            assert lower_of_two == pytest.approx(Threshold(lower.slope, share * 0.3 + (1 - share) * 0.05))


@pytest.mark.parametrize("strategy", ["increase_then_decrease", "decrease_increase_decrease", "static"])
def test_schedules_have_no_state(strategy):
    assert make(strategy).initial_state() == {} == make(strategy).next_state({}, 0.5, 0.5)


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_row_order_and_untouched_tokens(per_token):
    batch, control = random_batch(5, per_token=per_token), make()
    clipped = clipped_by(control, batch)
    result = edited(control, batch).advantages
    untouched = batch.mask & ~clipped
    assert clipped.any() and untouched.any()
    assert torch.equal(result[untouched], batch.advantages.expand_as(result)[untouched])  # bitwise
    garbage = {name: getattr(batch, name).masked_fill(~batch.mask, math.nan) for name in ("logps", "old_logps")}
    assert torch.equal(edited(control, replace(batch, **garbage)).advantages, result)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    rows = (x[order] for x in (batch.logps, batch.old_logps, batch.advantages, batch.mask))
    shuffled = TokenBatch(*rows, entropies=batch.entropies[order])
    assert torch.equal(edited(control, shuffled).advantages, result[order])


def test_nothing_is_clipped_on_policy():
    batch = random_batch(drift=0.0)
    assert not clipped_by(
        make(epsilon_std=0.0, upper_base=0.0, upper_slope=0.0, lower_base=0.0, lower_slope=0.0), batch
    ).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strategy": "increase"}, "`strategy` must be one of 'increase_then_decrease'"),
        ({"second_half_lower": "out"}, "`second_half_lower` must be one of 'fade_out', 'fade_in'"),
        ({"initial_mode": "high"}, "`initial_mode` must be one of 'lower', 'raise'"),
        ({"upper_base": -0.1}, r"`upper_base` must be a number in \[0, inf\)"),
        ({"upper_slope": -0.6}, r"`upper_slope` must be in \[-upper_base, 1\) = \[-0.5, 1\), got -0.6: below, the"),
        ({"upper_slope": 1.0}, "no bound"),
        ({"lower_base": 1.1}, r"`lower_base` must be a number in \[0, 1\]"),
        ({"lower_slope": -0.4}, "`lower_slope` must be above -1"),
        ({"lower_slope": 0.8}, "ratio below 0"),
        ({"lower_base": 1.0, "lower_slope": -1.0}, "`lower_slope` must be above -1"),
        ({"epsilon_std": math.nan}, "`epsilon_std`"),
        ({"epsilon_std": 1.5}, r"`epsilon_std_lower` must be a number in \[0, 1\], got 1.5"),
        ({"epsilon_std_lower": -0.1}, "`epsilon_std_lower`"),
        ({"phase_split": 0.0}, "`phase_split`"),
        ({"phase_split": 1.0}, "`phase_split`"),
        ({"entropy_floor": 1.0}, "`entropy_floor`"),
        ({"entropy_band": -0.1}, "`entropy_band`"),
        ({"strategy": "target"}, "needs one, in nats"),
        ({"strategy": "static", "entropy_target": 0.3}, "the others have none"),
        ({"strategy": "target", "entropy_target": 0}, "`entropy_target`"),
    ],
)
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_control("flexible_clip", kwargs)


# --- through the trainer

#: The two-sided thresholds are narrow, so that the tiny steps of the tests meet them.
NARROW = {"upper_slope": -0.05, "upper_base": 0.06, "lower_slope": -0.02, "lower_base": 0.04, "epsilon_std": 0.01}


def config(strategy, **kwargs):
    return {
        "entropy_control": "flexible_clip",
        "entropy_control_kwargs": {"strategy": strategy}
        | NARROW
        | ({"entropy_target": 2.0} if strategy == "target" else {})
        | kwargs,
    }


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "grpo"])
def test_gradient_is_that_of_the_clipped_surrogate(make_trainer, set_forward, loss_inputs, loss_type):
    """TRL's loss with the edited advantages against autograd through min(r A, clip(r) A), written out."""
    trainer = make_trainer(
        entropy_control="flexible_clip", entropy_control_kwargs={"strategy": "static"}, loss_type=loss_type
    )
    logps, inputs = loss_inputs(rows=8, length=12, drift=0.5)
    with torch.no_grad():
        logps.clamp_(max=-1e-3)
    set_forward(logps)
    trainer.model.train()
    (actual,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)
    # As the oracle's, but for the bounds, which it knows as two constants only: so one token at a time.
    expected, clipped = torch.zeros_like(actual), 0
    for b, t in oracle.tokens(inputs["completion_mask"]):
        upper, lower = published("static", 0, math.exp(float(logps.detach()[b, t])))
        leaf = logps.detach().clone().requires_grad_()
        loss = oracle.loss(leaf, inputs, loss_type, low=lower, high=upper, max_completion_length=6)
        gradient = torch.autograd.grad(loss, leaf)[0][b, t]
        expected[b, t] = gradient
        clipped += int(gradient == 0)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert 5 < clipped < int(inputs["completion_mask"].sum()) - 5


def train(make_trainer, overrides, **more):
    gradients = Gradients()
    trainer = make_trainer(**overrides | {"steps_per_generation": 4, "max_steps": 8, "learning_rate": 3e-3} | more)
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.steps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_and_logs(make_trainer, strategy):
    trainer, _ = train(make_trainer, config(strategy))
    logged = [log for log in logs(trainer) if "loss" in log]
    assert len(logged) == 8
    for step, log in enumerate(logged):
        metrics = {k.removeprefix("entropy_control/"): v for k, v in log.items() if k.startswith("entropy_control/")}
        if step % 4 == 0:  # the first update of a rollout
            assert metrics["clipped_high"] == metrics["clipped_low"] == 0
        assert metrics["ratio_bound_low"] < 1 < metrics["ratio_bound_high"]
        assert ("raising" in metrics) == (strategy in ("oscillatory_decay", "target"))
        measured = metrics.get("initial_entropy") is not None
        assert measured == (strategy == "oscillatory_decay" and step > 0)
    assert sum(log["entropy_control/clipped_high"] for log in logged) > 0
    assert sum(log["entropy_control/clipped_low"] for log in logged) > 0


def test_the_entropy_is_that_of_the_whole_step(make_trainer):
    """The state after the first step is the mean over all tokens of all micro-batches, not over one micro-batch."""
    overrides = config("oscillatory_decay") | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer, _ = train(make_trainer, overrides, steps_per_generation=16, max_steps=2)
    first = next(log for log in logs(trainer) if "loss" in log)
    assert trainer._control_state.values["initial_entropy"] == pytest.approx(
        first["entropy_control/step_entropy"], rel=1e-6
    )


@pytest.mark.parametrize("strategy", ["increase_then_decrease", "oscillatory_decay", "target"])
def test_does_not_depend_on_the_cut(make_trainer, strategy):
    reference, spread = None, []
    for batch in (8, 4, 1):
        overrides = config(strategy) | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        trainer, gradients = train(make_trainer, overrides, steps_per_generation=32 // batch, max_steps=4, optim="sgd")
        state = trainer._control_state.values
        if reference is None:
            reference = gradients, state
        spread += [float((g - r).norm() / r.norm()) for g, r in zip(gradients, reference[0], strict=True)]
        assert state == pytest.approx(reference[1], rel=1e-5)
    assert max(spread) < 1e-4


@pytest.mark.parametrize(
    "strategy", [pytest.param("increase_then_decrease", marks=pytest.mark.slow), "oscillatory_decay"]
)
def test_two_processes_train_as_one(tmp_path, strategy):
    job = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "save_strategy": "no", "max_steps": 4}
    job |= config(strategy, entropy_floor=0.99) | {"entropy_regions": True}
    one = run_processes(tmp_path / "one", 1, spread=2, per_device_train_batch_size=8, **job)
    two = run_processes(tmp_path / "two", 2, spread=2, per_device_train_batch_size=4, **job)
    assert distance(*two) == 0
    assert distance(one[0], two[0]) < 1e-6
    keys = [key for key in one[0]["logs"][-1] if key.startswith(("entropy_control/", "entropy_regions/"))]
    assert sum(key.startswith("entropy_regions/") for key in keys) == 16
    assert ("entropy_control/raising" in keys) == (strategy == "oscillatory_decay")
    for log, expected in zip(two[0]["logs"], one[0]["logs"], strict=True):
        for key in keys:
            if expected[key] is None:  # not measured yet, or a region without tokens
                assert log[key] is None
            else:
                assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert one[0]["logs"][1]["entropy_control/clipped_low"] > 0


@pytest.mark.slow
def test_a_process_without_tokens_does_not_hang(tmp_path):
    job = {"empty_rank": 1, "per_device_train_batch_size": 8, "steps_per_generation": 2} | config("oscillatory_decay")
    ranks = run_processes(tmp_path / "out", 2, spread=2, **job)
    assert distance(*ranks) == 0
    assert all(log["entropy_control/step_entropy"] > 2 for log in ranks[0]["logs"])


@pytest.mark.parametrize("strategy", ["increase_then_decrease", "oscillatory_decay", "target"])
def test_a_resumed_run_is_the_same_run(make_trainer, tmp_path, strategy):
    overrides = config(strategy) | {"save_strategy": "steps", "save_steps": 1}
    through, _ = train(make_trainer, overrides)
    stored = tmp_path / "out" / "checkpoint-3" / "entropy_control_state.json"
    assert stored.exists() == (strategy != "increase_then_decrease")
    for checkpoint in (1, 3, 4, 6):
        resumed = make_trainer(**overrides, steps_per_generation=4, max_steps=8, learning_rate=3e-3)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        assert same_weights(through, resumed), checkpoint
        assert logs(through)[checkpoint:8] == logs(resumed)[checkpoint:8]


def test_the_state_of_a_checkpoint_matters(make_trainer, tmp_path):
    # The proof that the test above can fail: the same checkpoint with the other mode goes another way.
    overrides = config("target", upper_base=5.0) | {"save_strategy": "steps", "save_steps": 3}
    through, _ = train(make_trainer, overrides)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    stored = json.loads((checkpoint / "entropy_control_state.json").read_text())
    assert set(stored) == {"raising"}
    (checkpoint / "entropy_control_state.json").write_text(json.dumps({"raising": 1.0 - stored["raising"]}) + "\n")
    accept_edited([str(checkpoint)])
    resumed = make_trainer(**overrides, steps_per_generation=4, max_steps=8, learning_rate=3e-3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not same_weights(through, resumed)


def test_acts_beside_a_covariance_control(make_trainer):
    trainer, _ = train(
        make_trainer,
        {
            "entropy_control": "kl_cov+flexible_clip",
            "entropy_control_kwargs": {
                "kl_cov": {"fraction": 0.2},
                "flexible_clip": config("target")["entropy_control_kwargs"],
            },
        },
    )
    last = [log for log in logs(trainer) if "loss" in log][-1]
    assert trainer._control_state.values.keys() == {"flexible_clip/raising"}
    assert last["entropy_control/penalty"] > 0
    assert {"entropy_control/flexible_clip/clipped_low", "entropy_control/flexible_clip/clipped_high"} <= last.keys()


def test_refused_where_it_cannot_act(make_config):
    for bad, message in (
        ({"loss_type": "cispo"}, "ratio clip"),
        ({"importance_sampling_level": "sequence"}, "sequence"),
        ({"steps_per_generation": 1}, "can never act"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**config("static") | bad)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_second_control_of_the_clip_range_or_of_the_entropy(strategy):
    kwargs = config(strategy)["entropy_control_kwargs"]
    with pytest.raises(ValueError, match="both want the clip range"):
        build_control("flexible_clip+targeted_clip_higher", {"flexible_clip": kwargs})
    if strategy in ("oscillatory_decay", "target"):
        with pytest.raises(ValueError, match="both want the target of the entropy"):
            build_control("flexible_clip+entropic", {"flexible_clip": kwargs})
    else:
        build_control("flexible_clip+entropic", {"flexible_clip": kwargs})


def test_controls_are_values():
    assert make() == copy.deepcopy(make()) and hash(make()) == hash(make())
    assert build_control("flexible_clip", {"epsilon_std": "2e-1"}).epsilon_std == 0.2


@pytest.mark.filterwarnings("ignore")
def test_benchmark(monkeypatch, tmp_path, capsys):
    argv = ["--methods", "grpo", "target", "--seeds", "0", "--rollouts", "2", "--eval_prompts", "16"]
    argv += ["--warm_start_steps", "20", "--warm_start_dir", str(tmp_path)]
    argv += ["--folder", str(tmp_path / "runs"), "--figure", str(tmp_path / "figure.png")]
    first = run_benchmark(monkeypatch, "flexible_clip", argv, tmp_path / "report.json")
    assert [(run["case"], len(run["curve"]), len(run["raising"])) for run in first] == [
        ("grpo", 2, 0),
        ("target", 2, 2),
    ]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    # What is there is not trained again.
    (tmp_path / "runs" / "target-seed0.json").write_text(json.dumps(first[1] | {"greedy": 0.5}))
    again = run_benchmark(monkeypatch, "flexible_clip", argv, tmp_path / "report.json")
    assert again == [first[0], first[1] | {"greedy": 0.5}]
    assert capsys.readouterr().out.count("entropy by quarter") == 4
