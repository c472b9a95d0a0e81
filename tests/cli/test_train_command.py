"""The train command: real runs, launched or in this process, the files they leave, and interruptions."""

import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import yaml
from conftest import untrained_policy
from safetensors.torch import load_file
from test_cli import REPOSITORY, mistake, run_python, smoke

from entropy_trl import CovGRPOTrainer
from entropy_trl.analysis import entropy_accuracy_pairs
from entropy_trl.cli import main, train_main


CLIP_COV = ["--entropy_control", "clip_cov", "--entropy_control_kwargs", '{"fraction": 0.05, "cov_low": 0.1}']
SAVED = {
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "trainer_state.json",
}


def logged_steps(output_dir):
    """The log of each optimizer step."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    "control", ["kl_cov", *(pytest.param(c, marks=pytest.mark.slow) for c in ("clip_cov", "none"))]
)
def test_launched_run(tmp_path, control):
    arguments = {"kl_cov": [], "clip_cov": CLIP_COV, "none": ["--entropy_control", "none"]}[control]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    result = run_python(*launcher, "train.py", *smoke(tmp_path, "--max_steps", "2", *arguments))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Training completed." in result.stdout

    assert {path.name for path in (tmp_path / "out").iterdir()} >= SAVED
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    steps = logged_steps(tmp_path / "out")
    assert len(steps) == 2
    assert "rewards/math_reward/mean" in steps[0]
    for step in steps:
        assert math.isfinite(step["loss"])
        if control == "none":
            assert not any(name.startswith("entropy_control/") for name in step)
    if control != "none":
        assert steps[1]["entropy_control/selected_fraction"] > 0
    if control == "kl_cov":
        assert steps[1]["entropy_control/penalty"] > 0  # the second update after the rollout: the penalty acts


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs" / "quickstart").glob("*.yaml")), ids=lambda p: p.stem)
def test_quickstart_configs_run(tmp_path, config):
    # A rollout of the real recipe, from an untrained model with a dense reward: the warm start takes 40 seconds.
    for part in untrained_policy():
        part.save_pretrained(tmp_path / "model")
    untrained = ["--model_name_or_path", str(tmp_path / "model"), "--reward_funcs", "conftest.digit_reward"]
    assert train_main(smoke(tmp_path, "--max_steps", "8", *untrained, config=config)) == 0
    logs = logged_steps(tmp_path / "out")
    assert [log["step"] for log in logs] == [8]
    control = yaml.safe_load(config.read_text())["entropy_control"]
    assert any(name.startswith("entropy_control/") for log in logs for name in log) == (control is not None)
    fraction = {"clip_cov": 0.01, "kl_cov": 0.1}.get(control)
    if config.stem == "entropy_target":  # the fraction begins at 0, where the reference is the entropy itself
        assert logs[-1]["entropy_control/target"] == 0.3 and abs(logs[-1]["entropy_control/actuator"]) < 0.3
    elif fraction is not None:  # Clip-Cov's band holds fewer tokens than its fraction at first
        assert all(0 < log["entropy_control/selected_fraction"] <= fraction for log in logs)


def test_the_sample_earns_rewards_and_the_controls_differ(tmp_path):
    """Some completions are right, so that there are advantages; and then a control changes what is learnt."""
    weights = {}
    for control, arguments in {"kl_cov": [], "none": ["--entropy_control", "none"]}.items():
        assert main(["train", *smoke(tmp_path / control, "--max_steps", "4", *arguments)]) == 0
        weights[control] = load_file(tmp_path / control / "out" / "model.safetensors")
        assert logged_steps(tmp_path / control / "out")[0]["reward"] > 0
    assert any(not tensor.equal(weights["none"][name]) for name, tensor in weights["kl_cov"].items())


def test_resume(tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    assert train_main(smoke(tmp_path, "--max_steps", "2", *saving)) == 0
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert train_main(smoke(tmp_path, "--max_steps", "4", *saving, "--resume_from_checkpoint", "true")) == 0
    assert [step["step"] for step in logged_steps(tmp_path / "out")] == [1, 2, 3, 4]

    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert train_main(smoke(tmp_path / "b", "--max_steps", "3", "--resume_from_checkpoint", checkpoint)) == 0
    assert [step["step"] for step in logged_steps(tmp_path / "b" / "out")] == [1, 2, 3]


def test_own_rows_own_reward_evaluation_and_lora(tmp_path, monkeypatch):
    """Files of problems and answers, a reward by dotted path from the current folder, a test split, and PEFT."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in {"train": 8, "test": 2}.items():
        rows = [{"question": f"{split} {n} + 1?", "answer": str(n + 1), "bonus": 0.5} for n in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards_for_cli.py").write_text(
        "def bonus_reward(completions, bonus, **kwargs):\n"
        "    return [b + len(str(c)) % 2 for b, c in zip(bonus, completions)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--dataset_name", str(data), "--reward_funcs", "math_reward", "my_rewards_for_cli.bonus_reward"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "8"]
    arguments += ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2"]
    assert train_main(smoke(tmp_path, *arguments)) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("rewards/bonus_reward/mean" in entry for entry in history)
    assert any("eval_reward" in entry for entry in history)


@pytest.mark.skipif("ENTROPY_TRL_DATA" not in os.environ, reason="ENTROPY_TRL_DATA is not set")
@pytest.mark.parametrize("arguments", [[], CLIP_COV, ["--entropy_control", "none"]], ids=["kl_cov", "clip_cov", "none"])
def test_whole_dapo_math(tmp_path, arguments):
    path = Path(os.environ["ENTROPY_TRL_DATA"]) / "dapo_math_17k" / "train.jsonl"
    assert train_main(smoke(tmp_path, "--dataset_name", str(path), "--max_steps", "2", *arguments)) == 0
    assert len(logged_steps(tmp_path / "out")) == 2


def test_benchmarks_are_evaluated_in_training(tmp_path, capsys):
    rows = [{"problem": f"How many are {n}?", "answer": str(n)} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2", "--num_generations_eval", "2"]
    arguments += ["--per_device_eval_batch_size", "20"]
    benchmark = ["--eval_benchmarks", f"math500={tmp_path / 'rows.jsonl'}"]
    assert train_main(smoke(tmp_path, *arguments, *benchmark)) == 0, capsys.readouterr().err
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    pairs = entropy_accuracy_pairs(history, "math500")
    assert [step for step, _, _ in pairs] == [1, 2]
    assert all(entropy > 0 and 0 <= accuracy <= 1 for _, entropy, accuracy in pairs)
    assert "nothing.jsonl" in mistake(
        capsys, *smoke(tmp_path, *arguments, "--eval_benchmarks", "math500=nothing.jsonl")
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed(tmp_path, capsys, monkeypatch, number, code):
    """One line says where the run stopped, and the command in it goes on from there."""
    compute_loss = CovGRPOTrainer._compute_loss

    def interrupted(trainer, *args):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), number)
        return compute_loss(trainer, *args)

    argv = smoke(tmp_path, "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "2")
    with monkeypatch.context() as patch:
        patch.setattr(CovGRPOTrainer, "_compute_loss", interrupted)
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        assert main(["train", *argv, "--resume-from-checkpoint=false"]) == code
        assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    start = f"entropy-trl train: interrupted by {number.name} in step 3 of 3. Resume from checkpoint-2 with: "
    command = err.splitlines()[-1].removeprefix(start)
    assert command == shlex.join(["entropy-trl", "train", *argv, "--resume_from_checkpoint", "true"])
    assert main(shlex.split(command)[1:]) == 0
    assert [step["step"] for step in logged_steps(tmp_path / "out")] == [1, 2, 3]


def test_interrupted_without_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CovGRPOTrainer, "_compute_loss", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    assert train_main(smoke(tmp_path, "--max_steps", "3")) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: interrupted by SIGINT in step 1 of 3. There is no complete checkpoint in")
