"""The controller of the entropy target: against plain Python, in closed loop, in the loss and in real training."""

import json
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from entropy_trl import ClipCov, EntropyTarget, KLCov, TokenBatch, build_control
from entropy_trl.controls import Chain, describe_control
from entropy_trl.tokens.covariance import token_covariance


TARGET = {"fraction": 0.05, "entropy_target": 2.0, "entropy_controller": {"max_rate": 0.5, "dead_band": 0.0}}


def oracle(entropies, target, unit, k_p, k_i, smoothing, dead_band, max_error, max_rate, max_fraction):
    """The docstring's rule, all steps from the first: (m, r, I, fraction) after each."""
    highest = math.log(max_fraction / unit + math.sqrt((max_fraction / unit) ** 2 + 1))
    m = r = None
    integral, rows = 0.0, []
    for h in entropies:
        if m is None:
            m = r = math.log(h)
        else:
            m = (1 - smoothing) * m + smoothing * math.log(h)
            step = math.log(target) - r
            r += step if abs(step) <= max_rate else max_rate * (1 if step > 0 else -1)
        e = r - m
        e = 0.0 if abs(e) <= dead_band else (e - dead_band if e > 0 else e + dead_band)
        e = max(-max_error, min(max_error, e))
        free = k_p * e + integral + k_i * e
        winds_up = (free >= highest and e > 0) or (free <= -highest and e < 0)
        if not winds_up:
            integral = max(-highest, min(highest, integral + k_i * e))
        u = max(-highest, min(highest, k_p * e + integral))
        rows.append((m, r, integral, unit * (math.exp(u) - math.exp(-u)) / 2))
    return rows


GAINS = {"k_p": 20.0, "k_i": 0.3, "smoothing": 0.5, "dead_band": 0.02, "max_error": 0.6, "max_rate": 0.1}
GAINS |= {"max_fraction": 0.2}


def test_the_controller_is_the_rule():
    entropies = [0.7, 0.6, 0.5, 0.31, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.01, 0.4, 0.9, 1.5, 2.0, 2.0, 2.0, 0.3, 0.3]
    controller = EntropyTarget(0.3, 0.01, **GAINS)
    state, saturated = controller.initial_state(), []
    assert state["actuator"] == 0.0
    for h, (m, r, integral, fraction) in zip(entropies, oracle(entropies, 0.3, 0.01, **GAINS), strict=True):
        state = controller.next_state(state, h)
        found = [state[k] for k in ("smoothed_entropy", "target_reference", "target_integral", "actuator")]
        assert found == pytest.approx([math.exp(m), math.exp(r), integral, fraction], rel=1e-9, abs=1e-12)
        assert state["target_error"] == pytest.approx(math.exp(m) / 0.3 - 1)
        assert abs(state["actuator"]) <= 0.2
        saturated.append((state["saturated"], abs(state["actuator"]) == pytest.approx(0.2)))
    assert all(bool(told) == at_bound for told, at_bound in saturated)
    assert 0 < sum(told for told, _ in saturated) < len(saturated)  # both bounds and neither


def test_inside_the_dead_band_nothing_moves():
    controller = EntropyTarget(0.3, 0.01, dead_band=0.1)
    state = controller.initial_state()
    for h in (0.3, 0.31, 0.29, 0.32, 0.3):
        state = controller.next_state(state, h)
        assert state["actuator"] == state["target_integral"] == 0.0


def test_a_share_is_of_the_first_step():
    controller = EntropyTarget(0.5, 0.01, of_start=True)
    state = controller.initial_state()
    assert math.isnan(state["target"])
    for h in (0.8, 0.6, 0.2):
        state = controller.next_state(state, h)
        assert (state["target"], state["initial_entropy"]) == (0.4, 0.8)


def plant(controller, entropy, drift, strength, steps, largest=1.0):
    """A policy whose log-entropy drifts, and which the restrained fraction pushes up by `strength` a unit of u."""
    state, seen = controller.initial_state(), []
    for _ in range(steps):
        state = controller.next_state(state, entropy)
        fraction = max(-largest, min(largest, state["actuator"]))
        entropy *= math.exp(drift + strength * math.asinh(fraction / controller.unit))
        seen.append(entropy)
    return seen


@pytest.mark.parametrize("entropy", [0.7, 0.3, 0.05], ids="from {}".format)
@pytest.mark.parametrize("drift", [-0.01, 0.0, 0.01], ids="drift {}".format)
@pytest.mark.parametrize("strength", [0.003, 0.01], ids="strength {}".format)
def test_a_simple_policy_follows_the_target_from_both_sides(entropy, drift, strength):
    """Also where the entropy would rise with the control off: the fraction is then negative."""
    seen = plant(EntropyTarget(0.3, 1e-3), entropy, drift, strength, 800)
    assert max(abs(h / 0.3 - 1) for h in seen[400:]) < 0.1
    assert min(seen) > 0.65 * min(entropy, 0.3) and max(seen) < 1.5 * max(entropy, 0.3)


def test_no_windup():
    """While the entropy cannot follow, the integral does not grow; once it can, it does not overshoot for long."""
    controller = EntropyTarget(0.3, 0.01)
    state = controller.initial_state()
    for _ in range(2000):
        state = controller.next_state(state, 0.05)
    assert state["saturated"] == 1.0
    before = state["target_integral"]
    for steps in range(1, 200):  # noqa: B007
        state = controller.next_state(state, 0.4)
        if state["actuator"] <= 0:
            break
    assert steps < 60 and before <= math.asinh(0.3 / 0.01)


def pool(seed=0, rows=16, length=12, actuator=0.0, **more):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    return TokenBatch(
        logps=logps,
        old_logps=logps,
        advantages=torch.randn(rows, generator=generator, dtype=torch.float64),
        mask=torch.rand(rows, length, generator=generator) > 0.2,
        state={"actuator": actuator},
        seed=seed,
        **more,
    )


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("actuator", [0.1, -0.1])
def test_the_sign_says_which_end_of_the_covariance(name, actuator):
    batch = pool(actuator=actuator)
    selection = build_control(name, TARGET).select(batch)
    covariance = token_covariance(batch.logps, batch.advantages, batch.mask)
    pairs = sorted(zip(covariance[batch.mask].tolist(), selection.selected[batch.mask].tolist(), strict=True))
    tokens, count = len(pairs), int(selection.selected.sum())
    assert count in (math.floor(0.1 * tokens), math.ceil(0.1 * tokens)) and not selection.selected[~batch.mask].any()
    marked = [chosen for _, chosen in pairs]
    assert marked == ([False] * (tokens - count) + [True] * count if actuator > 0 else sorted(marked)[::-1])


@pytest.mark.parametrize(
    ("name", "actuator", "penalised"), [("clip_cov", 0.2, False), ("kl_cov", 0.2, True), ("kl_cov", -0.2, False)]
)
def test_what_is_done_to_the_selected(name, actuator, penalised):
    batch = pool(actuator=actuator)
    batch = replace(batch, old_logps=batch.logps - 0.1)
    control = build_control(name, TARGET)
    selected = control.select(batch).selected
    edit = control.edit(batch, selected)
    if penalised:
        torch.testing.assert_close(edit.penalty, torch.where(selected, 0.1, 0.0).double())
    else:
        assert edit.penalty is None
    assert torch.equal(edit.advantages == 0, selected)
    assert control.drops_tokens and not KLCov().drops_tokens


def test_parts_of_a_token_add_up_over_the_steps():
    control = build_control("clip_cov", TARGET)
    counts = [int(control.select(pool(seed, actuator=1e-3)).selected.sum()) for seed in range(400)]
    tokens = fmean(int(pool(seed).mask.sum()) for seed in range(400))
    assert set(counts) == {0, 1} and fmean(counts) == pytest.approx(1e-3 * tokens, rel=0.35)
    assert not control.select(pool(actuator=0.0)).selected.any()
    # Never a token whose covariance has the other sign.
    everything = pool(actuator=-1.0)
    chosen = control.select(everything)
    assert torch.equal(chosen.selected, chosen.covariance < 0)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_training_resumes_and_does_not_depend_on_the_cut(make_trainer, tmp_path, name):
    method = {"entropy_control": name, "entropy_control_kwargs": TARGET, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**method)
    whole.train()
    log = [entry for entry in whole.state.log_history if "loss" in entry]
    actuators = [entry["entropy_control/actuator"] for entry in log]
    # The first step is measured, the second has the reference there; then the lowest covariances are restrained.
    assert actuators[:2] == [0.0, 0.0] and all(a < 0 for a in actuators[2:])
    assert all(e["entropy_control/selected_fraction"] > 0 > e["entropy_control/cov_selected_mean"] for e in log[2:])
    expected = whole._control_state.values
    assert log[-1]["entropy_control/target"] == 2.0 and log[-1]["entropy_control/target_error"] > 0

    resumed = make_trainer(**method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed._control_state.values == expected
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key

    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    in_parts = make_trainer(**method, **cut)
    in_parts.train()
    assert in_parts._control_state.values == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "kwargs",
    [{"entropy_target": {"share": 0.5}}, {"entropy_target": {"start": 0.5, "end": "2e-1", "over": 0.5}}, TARGET, {}],
    ids=["share", "schedule", "number", "off"],
)
def test_a_target_can_be_stored_and_read(kwargs):
    for name, cls in (("clip_cov", ClipCov), ("kl_cov", KLCov)):
        control = build_control(name, kwargs)
        stored_name, stored = describe_control(control)
        assert build_control(stored_name, json.loads(json.dumps(stored))) == control
        assert isinstance(control.at(0.0), cls)
        assert bool(control.initial_state()) == bool(kwargs)


def test_a_target_follows_a_schedule():
    control = build_control("kl_cov", {"entropy_target": {"start": 0.5, "end": 0.2, "over": 0.5}})
    state, targets = control.initial_state(), []
    for progress in (0.25, 0.5, 0.75, 1.0):
        state = control.next_state(state, 0.4, progress)
        targets.append(state["target"])
    assert targets == pytest.approx([0.35, 0.2, 0.2, 0.2])


def test_two_targets_are_refused_and_one_is_not():
    kwargs = {"clip_cov": {"entropy_target": 0.3}}
    with pytest.raises(ValueError, match="target of the entropy"):
        build_control("clip_cov+targeted_clip_higher", kwargs)
    chain = build_control("clip_cov+steer", kwargs)
    assert isinstance(chain, Chain) and chain.initial_state()["clip_cov/target"] == 0.3


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"entropy_target": 0}, ["`entropy_target`", "(0, inf)", "got 0"]),
        ({"entropy_target": "low"}, ["'entropy_target'", "'low'"]),
        ({"entropy_target": True}, ["`entropy_target`", "True"]),
        ({"entropy_target": {"share": -0.5}}, ["entropy_target.share", "-0.5"]),
        ({"entropy_target": {"part": 0.5}}, ["`entropy_target`", "part", "share: 0.5"]),
        ({"entropy_target": {"start": 0.5, "end": 0.0}}, ["entropy_target 0", "(0, inf)"]),
        ({"entropy_target": 0.3, "selection": "random"}, ["`entropy_target`", "'random'"]),
        ({"entropy_target": 0.3, "fraction": 0.5}, ["`fraction` 0.5", "max_fraction"]),
        ({"entropy_target": 0.3, "entropy_controller": {"k_d": 1}}, ["`entropy_controller`", "k_d", "'k_p'"]),
        ({"entropy_target": 0.3, "entropy_controller": {"k_p": -1}}, ["`k_p`", "-1"]),
        ({"entropy_controller": {"k_p": 1}}, ["`entropy_controller`", "without `entropy_target`"]),
    ],
)
def test_what_is_refused(make_config, kwargs, words):
    for name in ("clip_cov", "kl_cov"):
        with pytest.raises(ValueError) as error:
            make_config(entropy_control=name, entropy_control_kwargs=kwargs)
        assert all(word in str(error.value) for word in words), error.value
