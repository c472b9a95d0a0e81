"""What `entropy-trl train` prints while it trains."""

import io
import json
import logging
import math
import re
import sys
from types import SimpleNamespace

import pytest
from test_cli import smoke
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from entropy_trl.cli import train_main
from entropy_trl.cli.progress import TextLines, duration, entropy_trend, number, show_progress, whole_bar


def test_a_line_a_log(make_trainer, capsys):
    """One line for each step with the numbers of the log, no dictionary, and nothing coloured."""
    trainer = make_trainer(entropy_control="clip_cov", entropy_control_kwargs={"fraction": 0.2, "cov_low": 0.0})
    show_progress(trainer, "text", sys.stdout)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "get_accelerator" not in line]  # DeepSpeed's
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == len(logs) == 4
    reward = None
    for line, log in zip(lines, logs, strict=True):
        reward = log.get("reward", reward)  # a rollout has two steps here, and is logged at the first
        assert line.startswith(f"step {log['step']}/4 | reward {number(reward)} | entropy {number(log['entropy'])}")
        assert f"selected {100 * log['entropy_control/selected_fraction']:.3g}%" in line
        assert re.search(r"\| length \d+ \|.*\| [\d,]+ tokens/s \| ETA \d+ s$", line)
        assert len(line) < 120 and "\033" not in line and "{" not in line


def test_json_for_machines(tmp_path, capsys):
    """All of stdout is JSON: a line a log, with every metric."""
    assert train_main(smoke(tmp_path, "--max_steps", "1", "--log_format", "json")) == 0
    output = capsys.readouterr()
    step, end = map(json.loads, output.out.splitlines())
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [step, end] == history
    assert step["step"] == 1 and "entropy_control/selected_fraction" in step
    assert "Model saved to" in output.err


def said(logs, *, history=(), log_format="text", capsys):
    trainer = SimpleNamespace(args=SimpleNamespace(disable_tqdm=True), callbacks=[])
    trainer.remove_callback = lambda kind: None
    trainer.add_callback = trainer.callbacks.append
    show_progress(trainer, log_format, sys.stdout)
    (callback,) = trainer.callbacks
    state = TrainerState(global_step=3, max_steps=10, is_world_process_zero=True, log_history=[*history, logs])
    callback.on_train_begin(None, state, TrainerControl())
    callback.on_log(None, state, TrainerControl(), logs=logs)
    return capsys.readouterr().out


def test_values_that_json_lacks_are_null(capsys):
    line = said({"loss": math.nan, "reward": math.inf, "kl": None}, log_format="json", capsys=capsys)
    assert json.loads(line) == {"step": 3, "loss": None, "reward": None, "kl": None}


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"eval_reward": 0.5, "eval_entropy": 0.25}, ["evaluation | reward 0.500 | entropy 0.250"]),
        (
            {"eval_aime24_reward": 0.5, "eval_math500_reward": 1, "eval_rewards/r/mean": 1},
            ["evaluation on aime24 | reward 0.500", "evaluation on math500 | reward 1.000"],
        ),
        ({"loss": 0.1, "reward": None, "entropy": math.nan}, ["entropy nan"]),
        ({"loss": 0.1, "entropy_control/kl_cov/selected_fraction": 0.002}, ["selected kl_cov 0.2%"]),
        ({"train_runtime": 3.0, "train_loss": 0.1}, []),
    ],
)
def test_other_logs(capsys, logs, expected):
    assert said(logs, capsys=capsys).splitlines() == [f"step  3/10 | {text}" for text in expected]


@pytest.mark.parametrize(
    ("entropies", "expected"),
    [
        ([2.0], ("", 1.0)),
        ([2.0, 1.5, 1.0], ("", 0.5)),
        ([2.0, 1.5, 1.0, 0.5], ("falling", 0.25)),
        ([1.0, 1.01, 1.0, 1.02], ("steady", 1.02)),
        ([*[1.0] * 20, *[0.1] * 10, 0.1], ("steady", 0.1)),  # it has collapsed, and is where it was ten logs ago
        ([0.2] * 5 + [0.4] * 5, ("rising", 2.0)),
    ],
)
def test_trend_of_entropy(entropies, expected):
    trend, share = entropy_trend(entropies)
    assert (trend, share) == (expected[0], pytest.approx(expected[1]))
    assert math.isnan(entropy_trend([0.0] * 5)[1])


def test_colour_needs_a_terminal(monkeypatch, capsys):
    history = [{"entropy": value} for value in (1.0, 1.0, 0.2, 0.2)]
    logs = {"loss": 0.0, "entropy": 0.2}
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert said(logs, history=history, capsys=capsys) == "step  3/10 | entropy 0.200 falling, 20% of start\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[31m falling, 20% of start\033[0m" in said(logs, history=history, capsys=capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in said(logs, history=history, capsys=capsys)


def test_pace_is_that_of_this_process(capsys):
    """A resumed run counts from where it resumed."""
    now = [100.0]
    lines = TextLines(sys.stdout, clock=lambda: now[0])
    state = TrainerState(global_step=50, max_steps=100, num_input_tokens_seen=9000, is_world_process_zero=True)
    lines.on_train_begin(None, state, TrainerControl())
    now[0], state.global_step, state.num_input_tokens_seen = 110.0, 60, 10000
    lines.on_log(None, state, TrainerControl(), logs={"loss": 0.0})
    assert capsys.readouterr().out == "step  60/100 | 100 tokens/s | ETA 40 s\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273600, "3 d 04 h")],
)
def test_duration(seconds, expected):
    assert duration(seconds) == expected


def test_the_bar_stays_whole(make_trainer, capsys, monkeypatch):
    """Lines and log messages go above the bar: each begins and ends its own line."""

    class Warns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            logging.getLogger("entropy_trl.test").warning("A warning in between.")

    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(logging.getLogger("entropy_trl"), "propagate", True)
    trainer = make_trainer(max_steps=2, disable_tqdm=False)
    show_progress(trainer, "text", screen)
    trainer.add_callback(Warns())
    with whole_bar(trainer):
        trainer.train()
    assert not tqdm._instances
    lines = [line.split("\r")[-1] for line in screen.getvalue().split("\n")]
    assert lines.count("A warning in between.") == 2
    assert sum(line.startswith("step ") for line in lines) == 2
    assert "{'loss'" not in screen.getvalue()
    assert "2/2" in screen.getvalue()
