"""`settings.json` of a run: everything that it was made with, and no secret."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from entropy_trl import __version__
from entropy_trl.analysis.logs.formats import read_settings
from entropy_trl.saving import run_settings as module
from entropy_trl.saving.run_settings import RunSettings, run_settings


def test_every_training_writes_it(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my_script.py", "--hub-token", "abc", "--lr=1"])
    trainer = make_trainer(max_steps=1, seed=3, learning_rate=0.02, entropy_control="kl_cov", epsilon_high=0.3)
    trainer.train()
    stored = read_settings(tmp_path / "out")
    assert (stored["seed"], stored["learning_rate"], stored["entropy_control"]) == (3, 0.02, "kl_cov")
    assert stored["versions"]["entropy_trl"] == __version__
    assert stored["versions"]["transformers"] == transformers.__version__
    assert stored["command"] == "my_script.py --hub-token '*** (masked)' --lr=1"
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".part"]
    trainer.remove_callback(RunSettings)
    (tmp_path / "out" / "settings.json").unlink()
    trainer.train()
    assert not (tmp_path / "out" / "settings.json").exists()


SECRETS = ("hf_abcdefghijklmnop", "sk-0123456789abcdefgh", "hunter2")


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"hub_token": SECRETS[2]}, []),
        ({"model_init_kwargs": {"token": SECRETS[2], "nested": [{"api_key": SECRETS[2]}]}}, []),
        ({"run_name": f"by {SECRETS[0]}"}, []),
        ({}, ["--hub_token", SECRETS[2]]),
        ({}, [f"--hub-token={SECRETS[2]}"]),
        ({}, ["--model_init_kwargs", json.dumps({"token": SECRETS[2]})]),
        ({}, ["--run_name", SECRETS[1]]),
        ({}, [f"OPENAI={SECRETS[1]}"]),
    ],
)
def test_no_secret_is_stored(options, command):
    text = json.dumps(run_settings(options, ["train.py", *command]))
    assert not any(secret in text for secret in SECRETS)
    assert "masked" in text


def test_values_that_json_lacks_and_the_home_folder(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    settings = run_settings({"dtype": torch.bfloat16, "paths": ["/home/ada/x", "/home/adam/x"], "eos_token": "<e>"}, [])
    assert settings["dtype"] == "torch.bfloat16"
    assert settings["paths"] == ["~/x", "/home/adam/x"]
    assert settings["eos_token"] == "<e>"


def test_commit(tmp_path, monkeypatch):
    """That of the folder that the command runs in, which need not be a repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_settings({}, [])["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", run_settings({}, [])["git_commit"])
    Path("file").touch()
    subprocess.run([*git, "add", "file"], check=True)
    assert run_settings({}, [])["git_commit"].endswith("-dirty")
    monkeypatch.setenv("PATH", "")
    assert run_settings({}, [])["git_commit"] is None
    assert module.SETTINGS == "settings.json"
