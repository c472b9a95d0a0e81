"""The command line: how it and its file are read, and mistakes told in one line."""

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from prepared_python import prepared_python

from entropy_trl import __version__
from entropy_trl.cli import COMMANDS, main, parse_train_args, train_main
from entropy_trl.cli.parser import one_spelling
from entropy_trl.saving.manifest import Layout, write_manifest


REPOSITORY = Path(__file__).parents[2]
SMOKE = str(REPOSITORY / "configs" / "smoke" / "dapo_math.yaml")
PLANNED = REPOSITORY / "tests" / "plan" / "plan_data" / "qwen2.5-0.5b.json"
SAMPLE = str(REPOSITORY / "src" / "entropy_trl" / "sample_data" / "dapo_math_sample.jsonl")


def run_python(*arguments, cwd=REPOSITORY):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [prepared_python(), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def smoke(tmp_path, *arguments, config=SMOKE):
    return ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true", *arguments]


def mistake(capsys, *argv):
    """The one line that a command line with a mistake in it leaves on stderr, after any progress bars."""
    capsys.readouterr()
    assert train_main(argv) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("train.py: error: ")
    assert all(not line or "examples/s" in line for line in before)
    return last


# Reading the command line and the file


def test_command_line_goes_before_the_file():
    _, training_args, _, _ = parse_train_args(["--config", SMOKE, "--max_steps", "3", "--beta", "0.25"])
    assert (training_args.max_steps, training_args.beta, training_args.num_generations) == (3, 0.25, 8)
    assert training_args.entropy_control_kwargs == {"fraction": 0.1, "coef": 1.0}


@pytest.mark.parametrize("off", ["none", "null", "None"])
def test_control_off(caplog, off):
    """The file's hyper-parameters go with the file's control, and that is said."""
    _, training_args, _, _ = parse_train_args([f"--config={SMOKE}", "--entropy_control", off])
    assert f"--entropy_control {off} replaces the config file's kl_cov" in caplog.text
    assert training_args.entropy_control is None
    assert training_args.entropy_control_kwargs is None


def test_another_control_comes_with_its_own_hyper_parameters():
    _, training_args, _, _ = parse_train_args(["--config", SMOKE, "--entropy-control=clip_cov"])
    assert training_args.entropy_control == "clip_cov"
    assert training_args.entropy_control_kwargs is None
    _, training_args, _, _ = parse_train_args(["--config", SMOKE, "--entropy_control", "kl_cov"])
    assert training_args.entropy_control_kwargs == {"fraction": 0.1, "coef": 1.0}


def test_hyper_parameters_of_the_default_control_stay(tmp_path):
    config = yaml.safe_load(Path(SMOKE).read_text())
    del config["entropy_control"]
    config["entropy_control_kwargs"] = {"fraction": 0.05}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--entropy_control", "clip_cov"]
    _, training_args, _, _ = parse_train_args(arguments)
    assert training_args.entropy_control_kwargs == {"fraction": 0.05}


def test_values_of_the_file_are_read_as_on_the_command_line(tmp_path):
    """YAML 1.1 takes 1e-3 for a string; a single name is a list of one; `none` is None."""
    config = yaml.safe_load(Path(SMOKE).read_text())
    config |= {
        "learning_rate": "1e-3",
        "reward_funcs": "math_reward",
        "epsilon": "none",
        "resume_from_checkpoint": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    script_args, training_args, _, _ = parse_train_args(["--config", str(tmp_path / "config.yaml")])
    assert training_args.learning_rate == 1e-3
    assert script_args.reward_funcs == ["math_reward"]
    assert training_args.epsilon is None
    assert training_args.resume_from_checkpoint == "False"


# Mistakes


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rat", "1"], "Unknown argument: --learning_rat 1 (the nearest valid one is --learning_rate)."),
        (["--max_step", "1"], "(the nearest valid one is --max_steps)"),  # no abbreviations
        (["--max_steps", "two"], "invalid int value: 'two'"),
        (["--lr_scheduler_type", "consine"], "invalid choice: 'consine'"),
        (["--entropy_control", "kl_covv"], "'kl_cov'"),
        (["--entropy_control_kwargs", '{"fractoin": 0.1}'], "fraction"),
        (["--entropy_control_kwargs", '{"fraction": 0.1'], "is not valid JSON"),
        (["--steps_per_generation", "1"], "can never act"),
        (["--num_generations", "7"], "must be divisible by num_generations (7)"),
        (["--dataset_name", "no/rows.jsonl"], "Data file 'no/rows.jsonl' does not exist"),
        (["--dataset_name", SAMPLE, "--dataset_train_split", "dev"], "has no split 'dev': it has 'train'"),
        (["--dataset_name", SAMPLE, "--eval_strategy", "epoch"], "has no split 'test'"),
        (["--eval_strategy", "epoch"], "set eval_strategy to 'no', or give --dataset_name"),
        (
            ["--reward_funcs", "math_rewards"],
            "Unknown reward function 'math_rewards' in reward_funcs: use one of math_r",
        ),
        (["--reward_funcs", "no_such_module.f"], "there is no module 'no_such_module'"),
        (["--reward_funcs", "entropy_trl.rewards.f"], "module 'entropy_trl.rewards' has no function 'f'"),
        (["--reward_funcs", "json.dumps"], "needs a column 'obj'"),
        (["--model_factory", "tiny"], "'tiny' is not a dotted path"),
        (["--rollout_func", "json.no_such"], "rollout_func: 'json.no_such': module 'json' has no function 'no_such'"),
        (["--beta", "0.1"], "`beta` is 0.1, which needs a reference model. TRL loads it from the folder"),
        (["--model_name_or_path", "./no/model"], "there is no folder './no/model'"),
        (["--resume_from_checkpoint", "true", "--output_dir", "no/run"], "there is no complete checkpoint in 'no/run'"),
        (["--resume_from_checkpoint", "no/run"], "'no/run' is not a checkpoint"),
        (["--prompt_template", "Solve!", "--dataset_name", SAMPLE], "has no '{problem}'"),
        (["--learning_rate", "-1e-6"], "`learning_rate` must be at least 0, got -1e-06"),
        (["--learning_rate", "nan"], "`learning_rate` must be at least 0 and finite, got nan"),
        (["--temperature", "-0.5"], "`temperature` must be above 0, got -0.5"),
        (["--temperature", "0"], "`temperature` must be above 0, got 0"),
        (["--top_p", "1.5"], "`top_p` must lie in (0, 1], got 1.5"),
        (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size` must be at least 1, got 0"),
        (["--gradient-accumulation-steps", "0"], "`gradient_accumulation_steps` must be at least 1, got 0"),
        (["--max_steps", "-5"], "`max_steps` must be at least 1, got -5: training would go by num_train_epochs"),
        (["--max_steps", "0"], "`max_steps` must be at least 1, got 0"),
        (["--output_dir", "a_file"], "--output_dir 'a_file': nothing can be written there ('a_file' is a file)"),
        (["--output_dir", "a_file/run"], "--output_dir 'a_file/run': nothing can be written there ("),
        (["--model_name_or_path", "models/qwn"], "there is no folder 'models/qwn'. Give"),
        (["--model_name_or_path", "models/deep/qwn"], "there is no folder 'models/deep/qwn'. Give"),
        (["--model_name_or_path", "models"], "the folder 'models' has no config.json"),
        (["--model_name_or_path", "a_file"], "'a_file' is a file"),
        (["--model_name_or_path", "nobody/nothing"], "there is no folder 'nobody/nothing', and no model of this name"),
        (["--reward_funcs", "bad_rewards.annotated"], "bad_rewards.annotated returns one float"),
        (
            ["--reward_funcs", "bad_rewards.one_float", "--disable_tqdm", "true"],
            "bad_rewards.one_float returns 0.5 (float)",
        ),
        (
            ["--reward_funcs", "bad_rewards.too_few", "--disable_tqdm", "true"],
            "bad_rewards.too_few returns 1 rewards for",
        ),
    ],
)
def test_mistake_on_the_command_line(capsys, monkeypatch, tmp_path, argv, expected):
    (tmp_path / "a_file").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "bad_rewards.py").write_text(
        "def annotated(completions, **kwargs) -> float: return 0.5\n"
        "def one_float(completions, **kwargs): return 0.5\n"
        "def too_few(completions, **kwargs): return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert expected in mistake(capsys, "--config", SMOKE, *argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1", "Unknown key in the config file: learning_rat (the nearest valid one is learning_rate)."),
        ("xyzzy: 1", "`--help` lists the valid ones"),
        ("help: 1", "Unknown key in the config file: help"),
        ("max_steps: two", "max_steps: 'two' is not a valid value"),
        ("max_steps: 2.5", "max_steps: 2.5 is not a valid value"),
        ("bf16: maybe", "bf16: 'maybe' is not a valid value"),
        ("entropy_control_pool: batch", "entropy_control_pool: 'batch' is not one of step, micro_batch"),
        ("- max_steps", "must contain a YAML mapping"),
        ("a: [1", "expected ',' or ']'"),
    ],
)
def test_mistake_in_the_file(capsys, tmp_path, text, expected):
    (tmp_path / "config.yaml").write_text(text)
    assert expected in mistake(capsys, "--config", str(tmp_path / "config.yaml"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_package_names_our_extra(capsys):
    assert "pip install 'entropy-trl[vllm]'" in mistake(capsys, "--config", SMOKE, "--use_vllm", "true")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--max-step", "1"], "the nearest valid one is --max_steps"),
        (["train"], "No model: give --model_name_or_path"),  # and not that a CPU has no bf16
        (["train", "--model_name_or_path", "nobody/nothing"], "No data: give --dataset_name"),
        (
            ["law", "runs", "--json", "no/results.json"],
            "--json 'no/results.json': nothing can be written there (there is no folder 'no')",
        ),
        (["law", "runs", "--json", "runs"], "--json 'runs': nothing can be written there (it is a folder)"),
        (
            ["covariance", "runs", "--html", "a_file/page.html"],
            "--html 'a_file/page.html': nothing can be written there",
        ),
        (["report", f"{REPOSITORY}/tests/analysis/law_data", "--output", "a_file"], "--output 'a_file': nothing"),
        (["law", "runs", "--json", "x\0.json"], "nothing can be written there (embedded null"),
        (["law"], "required: [NAME=]RUN"),
    ],
)
def test_a_mistake_in_a_command(capsys, monkeypatch, tmp_path, argv, expected):
    (tmp_path / "a_file").touch()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"entropy-trl {argv[0]}: error: ")
    assert expected in last
    assert "[Errno" not in last


def test_hyphens_and_underscores_are_one():
    options = ["--max_steps", "--entropy-unit", "-h"]
    argv = ["--max-steps", "-1e3", "--entropy_unit=bits", "--other-one", "a-b", "-2"]
    assert one_spelling(argv, options) == ["--max_steps=-1e3", "--entropy-unit=bits", "--other-one", "a-b", "-2"]
    _, training_args, _, _ = parse_train_args([f"--config={SMOKE}", "--learning-rate", "1e-3", "--num-iterations=2"])
    assert (training_args.learning_rate, training_args.num_iterations) == (1e-3, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--bf16 is on by default, and this machine has no GPU that supports it. Add `--bf16 false` to train in"),
        (["--bf16", "true"], "--bf16 is on, and this machine"),
        (["--bf16", "false", "--bf16_full_eval", "true"], "Add `--bf16_full_eval false`"),
    ],
)
def test_bf16_without_a_gpu(capsys, options, expected):
    argv = ["--model_factory", "a.b", "--dataset_factory", "a.b", *options]
    assert expected in mistake(capsys, *argv)
    _, training_args, _, _ = parse_train_args([*argv, "--use_cpu", "true"])  # CPUs have bf16
    assert training_args.bf16 is (options[:2] != ["--bf16", "false"])


def test_resuming_with_another_batch_size(capsys, tmp_path):
    arguments = smoke(tmp_path, "--resume_from_checkpoint", "true")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    assert "there is no complete checkpoint in" in mistake(capsys, *arguments)
    write_manifest(checkpoint, Layout(1, 4, 1, 4, 1, 8), inside_rollout=False)
    message = mistake(capsys, *arguments)
    assert "per_device_train_batch_size 4" in message and "per_device_train_batch_size 8" in message
    assert "differ in the completions of a step" in message


@pytest.mark.parametrize(
    ("key", "expected"),
    [("model_factory", "No model: give --model_name_or_path"), ("dataset_factory", "No data: give --dataset_name")],
)
def test_nothing_to_train_or_to_train_on(capsys, tmp_path, key, expected):
    config = yaml.safe_load(Path(SMOKE).read_text())
    del config[key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert expected in mistake(capsys, "--config", str(tmp_path / "config.yaml"))


def test_missing_config_file(capsys):
    assert "Config file 'no.yaml' does not exist" in mistake(capsys, "--config", "no.yaml")
    assert "--config needs the name of a file" in mistake(capsys, "--config")


def test_missing_columns(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "?", "label": "1"}\n')
    message = mistake(capsys, "--config", SMOKE, "--dataset_name", str(tmp_path / "rows.jsonl"))
    assert "no column 'prompt', 'problem' or 'question': its columns are 'text', 'label'" in message
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?"}\n')
    message = mistake(capsys, "--config", SMOKE, "--dataset_name", str(tmp_path / "rows.jsonl"))
    assert "math_reward needs a column 'solution', which the data does not have: its columns are 'prompt'" in message


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    package_logger = logging.getLogger("entropy_trl")
    level = package_logger.level
    try:
        assert train_main(["--config", "no.yaml"]) == 2
        assert not package_logger.isEnabledFor(logging.WARNING)
    finally:
        package_logger.setLevel(level)
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("ENTROPY_TRL_DEBUG", "1")
    assert train_main(["--config", "no.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_mistake_in_a_process_of_its_own():
    result = run_python("train.py", "--config", SMOKE, "--learning_rat", "1")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("train.py: error: Unknown argument: --learning_rat 1")
    assert "Traceback" not in result.stderr


def test_a_bug_in_the_users_code_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "my_buggy_factory.py").write_text("def make():\n    raise ValueError('a bug')\n")
    (tmp_path / "my_buggy_import.py").write_text("import no_such_module_either\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="a bug"):
        train_main(["--config", SMOKE, "--model_factory", "my_buggy_factory.make"])
    with pytest.raises(ValueError, match="a bug"):
        train_main(["--config", SMOKE, "--dataset_factory", "my_buggy_factory.make"])
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        train_main(["--config", SMOKE, "--reward_funcs", "my_buggy_import.reward"])


# The rest


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], "quickstart"),
        (["train", "--help"], "--entropy_control_kwargs"),
        (["train", "-h"], "--num_generations"),
        (["quickstart", "--help"], "entropy-trl quickstart"),
        (["plan", "--help"], "(default: h100)"),
        (["plan", "--help"], "in bf16 (default: the data sheet's)"),
        (["plan", "--help"], "(default: the data sheet's in a node, 50 across nodes)"),
        (["plan", "--help"], "its own memory (default: the data sheet's)"),
        (["--version"], __version__),
    ],
)
def test_help_and_version(capsys, argv, expected):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 0
    assert expected in " ".join(capsys.readouterr().out.split())


def test_env_says_what_is_installed(capsys):
    assert main(["env"]) == 0
    facts = dict(re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["entropy-trl"] == __version__
    assert torch.__version__.split("+")[0] == facts["torch"].split("+")[0]
    assert facts["GPU"] == "none" if not torch.cuda.is_available() else "GiB" in facts["GPU 0"]
    assert (facts["vllm (optional)"] == "not installed") == (find_spec("vllm") is None)
    assert facts["sandbox of programs"].startswith("works (")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_goes_one_way(capsys, command):
    """Its help says what it is for, and a mistake in it is one line with the command's name."""
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"entropy-trl {command}" in capsys.readouterr().out
    arguments = {
        "env": ["--all"],
        "train": [],
        "plan": ["--gpus", "1"],
        "quickstart": ["--rollouts", "0"],
        "evaluate": [],
    }
    assert main([command, *arguments.get(command, ["no/run"])]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"entropy-trl {command}: error: ")


def test_the_package_runs():
    result = run_python("-m", "entropy_trl", "--version")
    assert (result.returncode, result.stdout) == (0, f"entropy-trl {__version__}\n")


def test_a_reader_that_has_seen_enough():
    """The end of a pipe, such as that of `head`, is no error."""
    code = "import os, sys, entropy_trl.cli as c; os.close(0); r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    code += f"sys.exit(c.main(['plan', '--gpus', '1', '--config', {SMOKE!r}, '--model_config', sys.argv[1]]))"
    result = run_python("-c", code, str(REPOSITORY / "tests" / "plan" / "plan_data" / "qwen2.5-0.5b.json"))
    assert (result.returncode, result.stderr.strip()) == (141, "")


@pytest.mark.parametrize("argv", [[], ["trian"]])
def test_unknown_command(capsys, argv):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "entropy-trl: error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["law", "plan", "quickstart"])
def test_a_reader_that_stops_reading_ends_a_command_without_a_traceback(command, tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text("step,entropy,reward\n1,0.9,0.1\n2,0.5,0.3\n3,0.3,0.4\n")
    options = {
        "law": [str(tmp_path / "log.csv")],
        "plan": ["--model_config", str(PLANNED), "--gpus", "1", "--output_dir", str(tmp_path / "out")],
        "quickstart": ["--output_dir", str(tmp_path / "out")],
    }
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([command, *options[command]]) == 141
