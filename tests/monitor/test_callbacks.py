"""EntropyLawCallback: what it logs is the fit to the log, where the trackers see it, and when it warns."""

import copy
import dataclasses
import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import PYTHONPATH, digit_reward
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from entropy_trl import CONTROLS, EntropyLawCallback
from entropy_trl.analysis import read_runs
from entropy_trl.analysis.law import fit_law
from entropy_trl.analysis.law import running as running_law
from entropy_trl.analysis.law.points import law_points
from entropy_trl.analysis.law.running import RunningLaw
from entropy_trl.analysis.logs.runs import Run
from entropy_trl.quickstart.task import build_dataset, build_tokenizer


class Settings(TrainingArguments):
    """The arguments of a run that has the settings of another configuration too."""

    def to_dict(self):
        return super().to_dict() | self.others


def play(entropies, rewards, callback=None, names=("entropy", "reward"), settings=None):
    """Logs the points one after the other, as a trainer does; returns the log."""
    callback = EntropyLawCallback() if callback is None else callback
    state, arguments, control = TrainerState(), Settings(report_to="none"), TrainerControl()
    arguments.others = settings or {}
    callback.on_train_begin(arguments, state, control)
    seen = []
    for step, values in enumerate(zip(entropies, rewards, strict=True), 1):
        state.global_step = step
        logs = dict(zip(names, values, strict=True))
        if names[0].startswith("eval"):
            logs["eval_runtime"] = 1.0
        state.log_history.append({**logs, "step": step})
        callback.on_log(arguments, state, control, logs=logs)
        assert logs.items() <= state.log_history[-1].items()
        seen.append(logs)
    return seen


def law(entropies, a=0.2, b=0.8):
    return [b - a * math.exp(h) for h in entropies]


def test_the_fit_is_that_of_the_points_so_far():
    entropies = np.linspace(1.2, 0.3, 40)
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    rewards = law(entropies) + noise
    logged = play(entropies, rewards)
    assert "entropy_law/a" not in logged[8]  # 9 points
    for n in (10, 25, 40):
        slope, intercept = np.polyfit(np.exp(entropies[:n]), rewards[:n], 1)
        values = logged[n - 1]
        assert values["entropy_law/a"] == pytest.approx(-slope) and values["entropy_law/b"] == pytest.approx(intercept)
        assert values["entropy_law/ceiling"] == pytest.approx(slope + intercept)
        ends = max(round(0.05 * n), 1)
        now = entropies[n - ends : n].mean()
        assert values["entropy_law/entropy_spent"] == pytest.approx(1 - now / entropies[:ends].mean())
        expected = slope + intercept - (slope * math.exp(now) + intercept)
        assert values["entropy_law/remaining"] == pytest.approx(expected)
    assert logged[-1]["entropy_law/ceiling"] == pytest.approx(0.6, abs=0.02)
    assert logged[-1]["entropy_law/r2"] > 0.95


LOGS = {
    "the same entries": lambda step: [{"entropy": True, "reward": True}],
    "other steps": lambda step: [{"entropy": True}, *([{"reward": True}] if step % 3 == 0 else [])],
    "evaluations": lambda step: [
        {"entropy": True, "reward": True, "loss": True},
        *([{"eval_entropy": True, "eval_reward": True, "eval_runtime": True}] if step % 7 == 0 else []),
    ],
    "a reward that is missing": lambda step: [{"entropy": True, **({} if step == 31 else {"reward": True})}],
    "bits": lambda step: [{"actor/entropy_bits": True, "reward": True}],
}


@pytest.mark.parametrize("kind", LOGS)
def test_the_running_fit_is_that_of_the_whole_log(kind):
    generator = np.random.default_rng(0)
    names = {"entropy": "actor/entropy_bits"} if kind == "bits" else {}
    running, log, checked = RunningLaw(**names), [], 0
    for step in range(1, 121):
        for entry in LOGS[kind](step):
            h = 0.1 + math.exp(-step / 30) + abs(generator.normal(0, 0.01))
            values = {"entropy": h, "reward": 0.8 - 0.2 * math.exp(h) + generator.normal(0, 0.01)}
            log.append({name: values.get(name.split("_")[-1].split("/")[-1], h) for name in entry} | {"step": step})
            entropies = running.read(log)
            if entropies is None:
                continue
            points = law_points(Run("run", log=log), **names)
            np.testing.assert_allclose(entropies, points.entropy, rtol=1e-12)
            if len(entropies) >= 3:
                expected, fit = fit_law(points.entropy, points.reward), running.fit()
                found = [fit.a, fit.b, fit.r2, fit.ceiling, fit.predict(0.2), fit.points]
                wanted = [expected.a, expected.b, expected.r2, expected.ceiling, expected.predict(0.2), expected.points]
                np.testing.assert_allclose(found, wanted, rtol=1e-8)
                assert running.reward_metric == points.reward_metric
                checked += 1
    assert checked > 35


def test_the_cost_of_a_log_does_not_grow(monkeypatch):
    """The whole log is read for the first entry only, or twenty thousand logs would take an hour."""
    reads = []
    monkeypatch.setattr(running_law, "law_points", lambda *a, **k: reads.append(1) or law_points(*a, **k))
    entropies = np.linspace(1.2, 0.3, 20_000)
    logged = play(entropies, law(entropies))
    assert len(reads) == 1
    assert logged[-1]["entropy_law/a"] == pytest.approx(0.2) and logged[-1]["entropy_law/r2"] == pytest.approx(1)


def test_evaluations_are_preferred(caplog):
    """Training rewards that lie about the law do not matter once there are evaluations."""
    callback, state = EntropyLawCallback(), TrainerState()
    arguments, control = TrainingArguments(report_to="none"), TrainerControl()
    entropies = np.linspace(1.2, 0.3, 12)
    for step, (entropy, reward) in enumerate(zip(entropies, law(entropies), strict=True), 1):
        state.global_step = step
        for logs in (
            {"entropy": entropy, "reward": 0.9 - 0.1 * step % 3},
            {"eval_entropy": entropy, "eval_reward": reward, "eval_runtime": 1.0},
        ):
            state.log_history.append({**logs, "step": step})
            callback.on_log(arguments, state, control, logs=logs)
    assert logs["entropy_law/a"] == pytest.approx(0.2) and logs["entropy_law/b"] == pytest.approx(0.8)


def warnings_of(caplog, entropies, **settings):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "entropy_trl"):
        play(entropies, law(entropies), settings=settings)
    return [record.getMessage() for record in caplog.records]


def test_a_collapse_is_told_early_and_once(caplog):
    entropies = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.09, 0.6, 0.8, 0.7, 0.08]
    first, second = warnings_of(caplog, entropies)
    assert first.startswith("Step 6: Entropy is collapsing. It is 0.5 nats a token, 50% of the 1 that the run")
    assert second.startswith("Step 14: Entropy has collapsed. It is 0.08 nats")  # after it had recovered
    assert "nearly all the same" in second
    remaining = 0.6 - law([0.08])[0]
    assert f"the reward can still rise by {remaining:.3g}, to 0.6" in second


def test_a_surge_is_told_early_and_once(caplog):
    first, second, third = warnings_of(caplog, [0.4, 0.4, 0.5, 0.5, 0.55, 0.62, 0.8, 2.0, 0.45, 0.7, 0.2])
    assert first.startswith("Step 6: Entropy is surging. It is 0.62 nats a token, 155% of the 0.4 that the run")
    assert second.startswith("Step 10: Entropy is surging") and third.startswith("Step 11: Entropy is collapsing")
    assert "the reward can still rise" not in first


@pytest.mark.parametrize("entropies", [[1.0, 0.2, 1.0, 2.0, 1.0, 1.0], [1.0, 0.8, 0.6, 0.55, 0.51, 0.6, 1.2, 1.4]])
def test_no_alarm_for_single_steps_at_the_start_nor_within_the_bounds(caplog, entropies):
    assert warnings_of(caplog, entropies) == []


ALARMS = [[1.0, 1.0, 1.0, 1.0, 0.4], [1.0, 1.0, 1.0, 1.0, 1.6]]


@pytest.mark.parametrize(
    "control", [None, *CONTROLS, "kl_cov+targeted_clip_higher", "examples.own_control.SpareTheSure"]
)
def test_the_advice_fits_the_control(caplog, make_config, control):
    """It names options of the control that is running, and of no other."""
    options = make_config(entropy_control=control).to_dict()
    for entropies in ALARMS:
        (message,) = warnings_of(caplog, entropies, **options)
        assert ("No entropy control is on" in message) == (control is None)
        parts = (control or "").split("+")
        of = {"clip_cov": "Clip-Cov ", "kl_cov": "KL-Cov ", "steer": "STEER ", "entropic": "EntroPIC "}
        for name, words in of.items():
            assert (words in message) == (name in parts)
        for part in parts:
            if part in CONTROLS:  # an option of its own, or a ratio clip
                named = {field.name for field in dataclasses.fields(CONTROLS[part])} | {"epsilon_high"}
                assert any(f"`{option}" in message for option in named)
            elif part:
                assert part in message


def test_a_surge_with_an_entropy_bonus_starts_with_the_bonus(caplog):
    (message,) = warnings_of(caplog, ALARMS[1], entropy_coef=0.01, entropy_control="clip_cov")
    assert "Lower the entropy bonus" in message and message.index("bonus") < message.index("Clip-Cov")


@pytest.mark.parametrize("entropies", [[0.5] * 20, [0.0] * 20])
def test_constant_entropy_has_no_fit(entropies, caplog):
    with caplog.at_level(logging.WARNING, "entropy_trl"):
        logged = play(entropies, np.linspace(0, 1, 20))
    assert not any("entropy_law/a" in values for values in logged)
    assert not caplog.records


def test_a_log_without_entropy_or_reward_is_left_alone():
    for names in (("loss", "grad_norm"), ("entropy", "loss"), ("reward", "loss")):
        assert all(len(values) == 2 for values in play([1.0] * 12, [0.5] * 12, names=names))


def test_what_cannot_be_fitted_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, "entropy_trl"):
        logged = play([80.0] * 12, [0.5] * 12)  # the entropy of whole sequences
        assert len(caplog.records) == 1 and "more than a vocabulary allows" in caplog.text
        assert all(len(values) == 2 for values in logged)
        play(np.linspace(1.2, 0.8, 12), law(np.linspace(1.2, 0.8, 12)))
    assert len(caplog.records) == 1


def test_other_metrics_can_be_named():
    entropies = np.linspace(1.2, 0.3, 12)
    callback = EntropyLawCallback(reward="score", entropy="actor/entropy")
    logged = play(entropies, law(entropies), callback, names=("actor/entropy", "score"))
    assert logged[-1]["entropy_law/a"] == pytest.approx(0.2)


@pytest.mark.parametrize("collapse", [0, 1, -0.5])
def test_a_bad_share_is_refused(collapse):
    with pytest.raises(ValueError, match="share of the entropy at the start"):
        EntropyLawCallback(collapse=collapse)


@pytest.mark.parametrize("surge", [1, 0.5, math.inf, math.nan])
def test_a_bad_multiple_is_refused(surge):
    with pytest.raises(ValueError, match="multiple of the entropy at the start"):
        EntropyLawCallback(surge=surge)


def test_in_training_the_trackers_see_it(make_trainer, tmp_path):
    """TensorBoard's events have the fit, at the step whose points it is fitted to; and training is the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"max_steps": 24, "report_to": "tensorboard", "entropy_control": "clip_cov"}
    trainer = make_trainer(entropy_law=True, output_dir=str(tmp_path / "run"), **options)
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/entropy_law/ceiling")}
    logged = {e["step"]: e["entropy_law/ceiling"] for e in trainer.state.log_history if "entropy_law/ceiling" in e}
    assert scalars.keys() == logged.keys() and max(logged) == 24
    assert [scalars[step] for step in logged] == pytest.approx(list(logged.values()))
    plain = make_trainer(**options | {"report_to": "none"})
    plain.train()
    assert all((p == q).all() for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))


TRACKED = """
import json
from conftest import digit_reward
from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.quickstart.task import build_dataset, build_model, build_tokenizer
trainer = CovGRPOTrainer(
    model=build_model(seed=0),
    reward_funcs=digit_reward,
    args=CovGRPOConfig(
        "run", entropy_law=True, report_to=["trackio", "wandb"], max_steps=24, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=6, steps_per_generation=2,
        gradient_accumulation_steps=1, save_strategy="no", bf16=False, use_cpu=True, gradient_checkpointing=False,
        disable_tqdm=True, entropy_control="clip_cov",
    ),
    train_dataset=build_dataset(64),
    processing_class=build_tokenizer(),
)
trainer.train()
json.dump(trainer.state.log_history, open("log.json", "w"))
"""


def test_trackers_get_the_figures(tmp_path):
    """With the real packages, which write to local folders: the pictures of the report, and the fit."""
    (tmp_path / "trackio").mkdir()
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
    }
    done = subprocess.run(
        [sys.executable, "-c", TRACKED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "log.json").read_text())
    logged = {entry["step"]: entry["entropy_law/ceiling"] for entry in log if "entropy_law/ceiling" in entry}
    assert max(logged) == 24
    assert {"entropy", "law"} <= {p.stem.split("_")[0].split("-")[0] for p in tmp_path.glob("wandb/**/report/*.png")}
    for tracker in ("trackio", "wandb"):
        assert len({picture.read_bytes() for picture in (tmp_path / tracker).rglob("*.png")}) > 5
    (run,) = read_runs([str(tmp_path / "trackio")])  # W&B's record of an offline run is not read
    (metric,) = [name for name in run.metrics if name.endswith("entropy_law/ceiling")]
    series = run.series(metric)
    assert dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == pytest.approx(logged)
    # The curves of the report, in the tracker's dashboard as in its store.
    for kind in ("entropy", "reward", "length", "clip_fraction", "grad_norm", "covariance", "selected_fraction"):
        metric = run.find(kind)
        name = metric.removeprefix("train/")
        series = run.series(metric)
        curve = {entry["step"]: entry[name] for entry in log if name in entry}
        assert len(curve) >= 12  # some are logged with every second update
        assert dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == pytest.approx(curve), kind


@pytest.mark.parametrize("failing", ["tracker", "log"])
def test_figures_that_fail_do_not_end_a_training(tmp_path, caplog, failing):
    """The model is saved after `on_train_end`. W&B without a run refuses a picture; a text is no step."""
    state = TrainerState(is_world_process_zero=True)
    state.log_history = [{"step": 1, "entropy": 0.5, "reward": 0.1}]
    if failing == "log":
        state.log_history.append({"step": "one", "entropy": 0.5})
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=["wandb"])
    with caplog.at_level(logging.WARNING, "entropy_trl"):
        EntropyLawCallback(figures=True).on_train_end(arguments, state, TrainerControl())
    assert "wandb get no figures of this run" in caplog.text
    assert "The training is complete." in caplog.text
    assert "wandb.init" in caplog.text if failing == "tracker" else "ValueError" in caplog.text


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, 1e308])
def test_odd_values_do_not_end_a_training(odd, caplog):
    entropies, rewards = np.linspace(1.2, 0.3, 24), np.linspace(0.1, 0.9, 24)
    for changed in (entropies, rewards):
        before, changed[12] = changed[12], odd
        with caplog.at_level(logging.WARNING, "entropy_trl"):
            logged = play(entropies, rewards)
        changed[12] = before
        values = [value for logs in logged for name, value in logs.items() if name.startswith("entropy_law/")]
        assert values and all(map(math.isfinite, values))
    assert caplog.text.count("rewards are infinite") == math.isinf(odd)


def test_with_trls_own_trainer(tiny_model, make_config):
    trainer = GRPOTrainer(
        model=copy.deepcopy(tiny_model),
        reward_funcs=digit_reward,
        args=make_config(GRPOConfig, max_steps=24),
        train_dataset=build_dataset(64),
        processing_class=build_tokenizer(),
        callbacks=[EntropyLawCallback()],
    )
    trainer.train()
    assert "entropy_law/ceiling" in trainer.state.log_history[-2]
