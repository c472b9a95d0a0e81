"""The warnings of a control that does nothing: when they come, and that what they advise would have acted."""

import copy
import logging
import re

import pytest

from entropy_trl import ClipCov
from entropy_trl.loss.watch import ControlWatch, _below
from entropy_trl.tokens.selection import selection_count


TWO_MICRO_BATCHES = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
}
CHAIN = {"entropy_control": "clip_cov+steer", "entropy_control_kwargs": {"clip_cov": {"fraction": 0.1}}}
CLIP_COV = {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.1}}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}}
CALM = {"learning_rate": 1e-5, "max_steps": 14}


@pytest.fixture
def pools(monkeypatch):
    """(step, pool, selection) of all that the watch sees."""
    pools, see = [], ControlWatch.see

    def record(watch, pool, selection):
        pools.append((watch.trainer.state.global_step + 1, pool, selection))
        see(watch, pool, selection)

    monkeypatch.setattr(ControlWatch, "see", record)
    return pools


def told(caplog, control="Clip-Cov"):
    return [record.getMessage() for record in caplog.records if f"{control} " in record.getMessage()]


@pytest.mark.parametrize(
    "options",
    [
        CLIP_COV,
        CLIP_COV | TWO_MICRO_BATCHES,
        CLIP_COV | TWO_MICRO_BATCHES | {"entropy_control_pool": "micro_batch"},
        CHAIN,
        {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.1, "cov_low": -9.0, "cov_high": -8.0}},
    ],
)
def test_an_empty_band_is_told_with_one_that_would_have_acted(make_trainer, pools, caplog, options):
    trainer = make_trainer(**CALM | options)
    trainer.train()
    (message,) = told(caplog)
    step = int(re.match(r"Step (\d+): in (\d+) of the last 10 steps", message)[1])
    assert step == 10
    low, high = (float(re.search(rf"`{name}=(\S+)`", message)[1]) for name in ("cov_low", "cov_high"))
    empty = [pool for at, pool, selection in pools if at <= step and selection.candidates == 0]
    assert len(empty) > 5
    for pool in empty:
        selected = ClipCov(fraction=0.1, cov_low=low, cov_high=high).select(pool).selected
        assert int(selected.sum()) == selection_count(0.1, int(pool.mask.sum()))


def constant_reward(completions, **kwargs):
    return [0.5] * len(completions)


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.1, "cov_low": 0.001}},
        CLIP_COV | {"reward_funcs": constant_reward},  # there is nothing to restrain
        CLIP_COV | {"max_steps": 9},
        KL_COV | {"learning_rate": 1e-2},
        {"entropy_control": "steer"},
    ],
)
def test_a_control_that_acts_is_not_told_of(make_trainer, caplog, options):
    make_trainer(**CALM | options).train()
    assert not told(caplog) and not told(caplog, "KL-Cov")


@pytest.mark.parametrize(
    ("options", "step", "words"),
    [
        ({"learning_rate": 0.0}, 10, r"KL-Cov did nothing.*the weights did not change"),
        ({"learning_rate": 1e-9}, 10, r"by no more than noise \(now .* nats\)"),
        ({"learning_rate": 1e-9, "steps_per_generation": 6, "max_steps": 12}, 12, "by no more than noise"),
    ],
)
def test_a_penalty_of_noise_is_told(make_trainer, tiny_model, caplog, options, step, words):
    model = copy.deepcopy(tiny_model)
    if options["learning_rate"]:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
    make_trainer(**CALM | KL_COV | options, model=model).train()
    (message,) = told(caplog, "KL-Cov")
    assert message.startswith(f"Step {step}: ") and re.search(words, message)


@pytest.mark.parametrize(("options", "control"), [(CLIP_COV, "Clip-Cov"), (KL_COV | {"learning_rate": 0.0}, "KL-Cov")])
def test_a_resumed_run_warns_when_the_uninterrupted_one_does(make_trainer, tmp_path, caplog, options, control):
    messages = []
    for checkpoint in (None, "6", "12"):
        caplog.clear()
        trainer = make_trainer(**CALM | options, save_strategy="steps", save_steps=6)
        folder = checkpoint and str(tmp_path / "out" / f"checkpoint-{checkpoint}")
        with caplog.at_level(logging.WARNING, "entropy_trl"):
            trainer.train(resume_from_checkpoint=folder)
        messages.append(told(caplog, control))
    assert len(messages[0]) == 1 and messages[1] == messages[0] and messages[2] == []


@pytest.mark.parametrize(
    "damage",
    [{"bands": 3}, {"bands": [[1.0]]}, {"bands": [["a"] * 4]}, {"noise": 1.5}, {"noise": ["a"]}, {"told": None}],
)
def test_a_damaged_state_is_refused(make_trainer, tmp_path, damage):
    watch = make_trainer(**CLIP_COV)._watch
    with pytest.raises(ValueError, match=r"entropy_control_watch\.json holds"):
        watch.load(watch.state() | damage, tmp_path)


@pytest.mark.parametrize("value", [0.31, 0.314, 1.0, 9.96, 100.0, 1e-7, 0.0, -0.31, -1.0, -9.99, 3.0000001])
def test_the_number_below(value):
    assert _below(value) < value and _below(value) == float(f"{_below(value):.2g}")
    assert value - _below(value) <= 0.11 * abs(value) + 1e-9
