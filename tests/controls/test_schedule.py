"""Hyper-parameters on a schedule: the values, what they do in real training, and what is refused."""

import json

import pytest
import torch

from entropy_trl import Chain, ClipCov, FlexibleClip, KLCov, Schedule, Scheduled, build_control
from entropy_trl.controls import describe_control


COEF = {"start": 1.0, "end": 0.1, "over": 0.5}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2, "coef": COEF}}
CLIP_COV = {
    "entropy_control": "clip_cov",
    "entropy_control_kwargs": {"cov_low": 0.05, "cov_high": 9.0, "fraction": {"start": 0.3, "end": 0.1}},
}


def test_values_of_a_schedule():
    schedule = Schedule(1.0, 0.1, 0.5)
    assert [schedule.at(p) for p in (0.0, 0.5, 0.75, 1.0)] == [1.0, 0.1, 0.1, 0.1]
    assert [schedule.at(p) for p in (0.125, 0.25, 0.375)] == pytest.approx([0.775, 0.55, 0.325])
    assert Schedule(0.3, 0.7).at(1.0) == 0.7


def logged(trainer, name):
    return [log[f"entropy_control/{name}"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("method", "name", "expected"),
    [(KL_COV, "coef", [1.0, 0.55, 0.1, 0.1]), (CLIP_COV, "fraction", [0.3, 0.25, 0.2, 0.15])],
    ids=["kl_cov", "clip_cov"],
)
def test_a_training_follows_the_schedule_and_resumes_it(make_trainer, tmp_path, method, name, expected):
    """In one micro-batch a step or several, and exactly so after a resume."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**method, **saving)
    whole.train()
    assert logged(whole, name) == pytest.approx(expected)
    resumed = make_trainer(**method, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(resumed, name)[-2:] == logged(whole, name)[-2:]
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    in_parts = make_trainer(**method, **cut)
    in_parts.train()
    assert logged(in_parts, name) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "coef"), [(0, 1.0), (1, 0.55), (2, 0.1), (3, 0.1)])
def test_the_loss_has_the_value_of_the_step(make_trainer, set_forward, loss_inputs, step, coef):
    logps, inputs = loss_inputs(rows=8, length=12, drift=0.5)
    gradients = []
    for value in (COEF, coef):
        trainer = make_trainer(entropy_control="kl_cov", entropy_control_kwargs={"fraction": 0.2, "coef": value})
        trainer.state.global_step, trainer.state.max_steps = step, 4
        set_forward(logps)
        trainer.model.train()
        gradients.append(torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_a_target_of_another_control_moves_too():
    control = build_control(
        "flexible_clip", {"strategy": "target", "entropy_target": {"start": 0.5, "end": 0.1}, "entropy_band": 0.0}
    )
    state = control.initial_state()
    # The entropy stays at 0.3, which is below the target at first and above it later.
    raising = [control.next_state(state, 0.3, progress)["raising"] for progress in (0.1, 0.4, 0.6, 1.0)]
    assert raising == [1.0, 1.0, 0.0, 0.0]
    assert isinstance(control.at(0.5), FlexibleClip) and control.at(0.5).entropy_target == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("kl_cov", {"coef": {"start": "1e0", "end": 0}}),
        ("kl_cov+targeted_clip_higher", {"kl_cov": {"coef": COEF}, "targeted_clip_higher": {"epsilon": 0.4}}),
        ("flexible_clip", {"epsilon_std_lower": {"start": 0.02, "end": 0.2}}),
    ],
)
def test_a_schedule_can_be_stored_and_read(name, kwargs):
    control = build_control(name, kwargs)
    stored_name, stored = describe_control(control)
    assert build_control(stored_name, json.loads(json.dumps(stored))) == control
    part = control.controls["kl_cov"] if isinstance(control, Chain) else control
    assert isinstance(part, Scheduled)


def test_without_a_schedule_nothing_is_wrapped():
    assert build_control("kl_cov", {"coef": 0.5}) == KLCov(coef=0.5)
    assert KLCov().at(0.5) == KLCov()


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("kl_cov", {"coef": {"start": 1.0}}, ["'coef'", "`end`", "over: 0.5"]),
        ("kl_cov", {"coef": {"start": 1.0, "end": 0.1, "steps": 5}}, ["'coef'", "steps", "`over`"]),
        ("kl_cov", {"coef": {"start": 1.0, "end": 0.1, "over": 0}}, ["'coef'", "`over`", "(0, 1]"]),
        ("kl_cov", {"coef": {"start": 1.0, "end": 0.1, "over": 1.5}}, ["`over`", "1.5"]),
        ("kl_cov", {"coef": {"start": "high", "end": 0.1}}, ["coef.start", "'high'"]),
        ("kl_cov", {"coef": {"start": float("nan"), "end": 0.1}}, ["`start`", "nan"]),
        ("kl_cov", {"coef": {"start": 1.0, "end": -0.1}}, ["coef -0.1", "not negative"]),
        ("kl_cov", {"fraction": {"start": 1e-3, "end": 2}}, ["fraction 2", "(0, 1]"]),
        ("clip_cov", {"cov_low": {"start": 1, "end": 6}}, ["cov_low 6", "band"]),
        ("clip_cov", {"selection": {"start": 1, "end": 6}}, ["'selection'", "only numbers"]),
        ("clip_cov+steer", {"clip_cov": {"fraction": {"end": 1}}}, ["'fraction'", "`start`"]),
    ],
)
def test_schedules_that_are_refused(make_config, name, kwargs, words):
    """Before any work starts: when the configuration is made."""
    with pytest.raises(ValueError) as error:
        make_config(entropy_control=name, entropy_control_kwargs=kwargs)
    assert all(word in str(error.value) for word in words), error.value


def test_the_watch_sees_the_control(make_trainer):
    assert isinstance(make_trainer(**CLIP_COV)._watch.clip_cov, ClipCov)


def test_a_large_fraction_at_the_end_is_told(make_config):
    options = CLIP_COV | {"max_completion_length": 4000}
    with pytest.warns(UserWarning, match="percentages"):
        make_config(**options)
