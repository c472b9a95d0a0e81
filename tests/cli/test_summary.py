"""What `entropy-trl train` says before and after a training, and what it does instead of one."""

import re
from dataclasses import asdict

import pytest
import yaml
from test_cli import REPOSITORY, smoke
from trl import GRPOConfig

from entropy_trl import CovGRPOConfig
from entropy_trl.cli import main, parse_train_args, train_main
from entropy_trl.cli.summary import end_summary, next_command, start_summary
from entropy_trl.cli.train import make_parser
from entropy_trl.cli.train_arguments import CovGRPOScriptArguments
from entropy_trl.cli.train_help import GROUPS


def summary(trainer, **script):
    lines = start_summary(trainer, "tiny", CovGRPOScriptArguments(dataset_name="rows.jsonl", **script), trainer.args)
    return dict(re.split(" {2,}", line, maxsplit=1) for line in lines)


def test_summary_before_training(make_trainer):
    """The numbers are worked out by hand: 8 completions a process and micro-batch, 2 of them a step, 4 a rollout."""
    said = summary(
        make_trainer(
            entropy_control="kl_cov",
            entropy_control_kwargs={"fraction": 0.01, "coef": 0.5},
            steps_per_generation=4,
            gradient_accumulation_steps=2,
            num_iterations=3,
            max_steps=-1,
            num_train_epochs=2,
            learning_rate=1e-6,
            save_strategy="steps",
            save_steps=20,
            temperature=0.9,
        )
    )
    assert re.fullmatch(r"tiny: [\d.]+k parameters, float32", said["model"])
    assert said["data"] == "rows.jsonl (train): 64 rows kept"
    assert said["rewards"] == "digit_reward"
    assert said["control"].startswith("kl_cov (fraction 0.01, coef 0.5, selection covariance); ratio clip none")
    assert said["restrains"] == "kl_cov: up to 1% of the tokens of a step, at most 0 of 96"  # 2 x 8 x 6 tokens
    assert said["rollout"] == "8 prompts x 4 completions = 32 completions of at most 6 tokens, temperature 0.9"
    assert said["training"].startswith(
        "6 updates a rollout, each of 16 completions (at most 96 tokens); 2 epochs, about 96 steps; learning rate 1e-06"
    )
    assert said["devices"] == "1 process on CPU, float32, transformers generates"
    assert said["output"].endswith("/out, a log every step, a checkpoint every 20 steps")
    assert said["unusual"].split("; ") == [
        "kl_cov restrains less than one token of a step (raise fraction)",
        "temperature 0.9 (1 samples from the policy that is trained)",
        "training on a CPU",
    ]


def test_summary_of_a_rollout_function(make_trainer):
    trainer = make_trainer(trainer_kwargs={"rollout_func": lambda prompts, trainer: {}})
    assert summary(trainer)["devices"] == "1 process on CPU, float32, rollout_func generates"


@pytest.mark.parametrize(
    ("options", "control", "restrains"),
    [
        ({"entropy_control": None}, "none: plain GRPO, ratio clip 0.2 below, 0.2 above", None),
        (
            {"entropy_control": "clip_cov", "entropy_control_pool": "micro_batch", "epsilon_high": 0.28},
            "clip_cov (fraction 0.0002, ",
            "clip_cov: up to 0.02% of the tokens of a micro-batch, at most 0 of 48",
        ),
        (
            {
                "entropy_control": "kl_cov+targeted_clip_higher",
                "entropy_control_kwargs": {
                    "kl_cov": {"fraction": 0.25},
                    "targeted_clip_higher": {"entropy_target": 0.2},
                },
            },
            "kl_cov (fraction 0.25, ",
            "kl_cov: up to 25% of the tokens of a step, at most 12 of 48; targeted_clip_higher: all tokens",
        ),
        (
            {
                "entropy_control": "kl_cov",
                "entropy_control_kwargs": {
                    "coef": {"start": 1, "end": 0.1, "over": 0.5},
                    "fraction": {"start": 0.1, "end": 0.25},
                },
            },
            "kl_cov (fraction from 0.1 to 0.25 over 100% of the training, coef from 1 to 0.1 over 50% of ",
            "kl_cov: up to 25% of the tokens of a step, at most 12 of 48",
        ),
        (
            {"entropy_control": "clip_cov", "entropy_control_kwargs": {"entropy_target": {"share": 0.5}}},
            "clip_cov (fraction 0.0002, cov_low 1, cov_high 5, selection covariance, entropy_target 0.5 of the entropy",
            "clip_cov moves its fraction between -0.3 and 0.3 once a step, so that the entropy follows its target, 0.5 "
            "of the entropy at the start",
        ),
    ],
    ids=["off", "micro_batch", "chain", "schedule", "target"],
)
def test_summary_of_the_control(make_trainer, options, control, restrains):
    said = summary(make_trainer(**options))
    assert said["control"].startswith(control)
    assert said.get("restrains", "").startswith(restrains or "")
    assert ("restrains" in said) == (restrains is not None)
    assert "no checkpoints (an interrupted run starts again)" in said["unusual"]


def test_summary_after_training(make_trainer):
    trainer = make_trainer()
    entropies = [1.0, 0.9, 0.8, 0.6, 0.5, 0.4]
    trainer.state.log_history = [
        {"step": step, "entropy": entropy, "reward": step / 10} for step, entropy in enumerate(entropies, start=1)
    ]
    trainer.state.log_history.append({"step": 6, "train_runtime": 75.0})
    trainer.state.global_step, trainer.state.max_steps, trainer.state.num_input_tokens_seen = 6, 6, 12345
    steps, reward, entropy = end_summary(trainer)
    assert steps == "Trained to step 6 of 6 in 1 min 15 s, on 12,345 tokens of prompts and completions."
    assert reward == "Reward: 0.100 at the start, 0.600 at the end, 0.600 at most."
    assert entropy.startswith("Entropy: 1.000 nats a token at the first log, 0.400 at the last. Entropy is collapsing.")
    assert "`cov_low`" in entropy  # advice for the control that ran
    for entry in trainer.state.log_history[:6]:
        entry |= {"entropy_control/target": 0.5, "entropy_control/saturated": float(entry["step"] == 6)}
    assert end_summary(trainer)[3] == (
        "Entropy target: 0.500 nats a token; over the second half the entropy was 13% off on average, and the control "
        "at its bound in 33% of the steps."
    )
    for entry in trainer.state.log_history:
        entry.pop("entropy_control/target", None)
    assert next_command("my runs/a") == "entropy-trl report 'my runs/a'"
    for entry in trainer.state.log_history:
        entry.pop("entropy", None)
    assert len(end_summary(trainer)) == 2


def test_a_training_says_both(tmp_path, capsys):
    assert train_main(smoke(tmp_path, "--max_steps", "1")) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert len(lines[begin:]) <= 18
    assert lines[begin + 1].startswith("data ") and "64 rows kept" in lines[begin + 1]
    assert lines[-1] == f"Next: entropy-trl report {tmp_path / 'out'}"
    settings = yaml.safe_load((tmp_path / "out" / "settings.json").read_text())
    assert settings["command"].startswith("train.py --config ")
    assert settings["data"]["reward_funcs"] == ["math_reward"] and settings["model"]["use_peft"] is False


def test_dry_run_leaves_nothing(tmp_path, capsys):
    """It makes one step of a run that would save, and the summary is that of the run."""
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--dry-run"]
    assert main(["train", *smoke(tmp_path, *saving)]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'out'}, a log every step, a checkpoint every step" in out
    assert len(re.findall(r"^step ", out, re.MULTILINE)) == 1
    assert re.search(r"Dry run: model, .* are fine. Peak memory: [\d.]+ GiB of this process. Nothing was saved.", out)
    assert "entropy-trl-dry-run" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["smoke/dapo_math", "quickstart/grpo", "quickstart/clip_cov", "qwen2.5-7b/kl_cov"])
def test_print_config_is_yaml_that_gives_the_same_run(tmp_path, capsys, recipe):
    argv = ["--config", str(REPOSITORY / "configs" / f"{recipe}.yaml"), "--use_cpu", "true", "--bf16", "false"]
    argv += ["--learning-rate", "3e-7", "--hub_token", "hf_abcdefghijklmnop"]
    script, training, *_ = parse_train_args(argv)
    if not (script.dataset_name or script.dataset_factory):
        argv += ["--dataset_name", "rows.jsonl"]
    assert main(["train", *argv, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "hf_abcdef" not in text and "# hub_token was given and is left out" in text
    file = tmp_path / "resolved.yaml"
    file.write_text(text)
    stored = yaml.safe_load(text)
    assert stored["learning_rate"] == 3e-7
    if training.entropy_control is not None:
        assert {"fraction", "selection"} <= stored["entropy_control_kwargs"].keys()
    before, after = (parse_train_args(arguments) for arguments in (argv, ["--config", str(file)]))
    assert after[1].make_entropy_control() == before[1].make_entropy_control()
    different = {"hub_token", "entropy_control_kwargs"}  # left out, and written out
    for part, again in zip(before, after, strict=True):
        assert without(asdict(part), different) == without(asdict(again), different)


def without(options, names):
    return {name: value for name, value in options.items() if name not in names}


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        train_main(argv)
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_help_has_our_options_first(capsys):
    short, whole = help_of(capsys, "--help"), help_of(capsys, "--help-all")
    parser = make_parser("train.py")
    inherited = GRPOConfig.__dataclass_fields__.keys() | CovGRPOScriptArguments.__mro__[1].__dataclass_fields__.keys()
    ours = {"epsilon"} | (CovGRPOConfig.__dataclass_fields__.keys() - inherited)
    ours |= CovGRPOScriptArguments.__dataclass_fields__.keys() - inherited
    listed = {name for names in GROUPS.values() for name in names}
    assert ours <= listed
    *own, last = GROUPS
    assert all(
        short.index(f"--{name}") < short.index(f"\n{last}:") for name in ours if name in sum(map(GROUPS.get, own), ())
    )
    for name in parser.defaults:
        assert re.search(rf"^  --{name}\b", whole, re.MULTILINE), name
        assert bool(re.search(rf"^  --{name}\b", short, re.MULTILINE)) == (name in listed), name
    assert "--help_all" in short and len(short.splitlines()) < 400 < len(whole.splitlines())


def test_every_help_text_has_a_default(capsys):
    entries = re.split(r"\n(?=  --)", help_of(capsys, "--help_all"))[1:]
    flags = ("--print_config", "--dry_run", "--help_all")
    silent = [entry for entry in entries if "default" not in entry.lower() and not entry.strip().startswith(flags)]
    assert not silent
