"""Pushing to the Hub: the real `huggingface_hub` against a Hub on a loopback port (`hub_server.py`)."""

import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from conftest import PYTHONPATH
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

import entropy_trl.saving.hub
from entropy_trl import CovGRPOTrainer, __version__, cli
from entropy_trl.analysis.law import fit_law
from entropy_trl.cli.train import NOT_PUSHED
from entropy_trl.quickstart.task import build_model
from entropy_trl.saving.hub import PushMistake, Uploads
from entropy_trl.saving.manifest import why_incomplete
from entropy_trl.saving.model_card import FIGURE, extend_card


ROOT = Path(__file__).parents[2]
REPO = "tester/model"
UPLOAD = "preupload|commit"  # the requests of an upload, as opposed to those that make the repository
#: A run that is over in half a second. `hub_model_id` without a namespace: it is the token's.
PUSHED = {"push_to_hub": True, "hub_model_id": "model", "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and this process set to it: its settings are read when `huggingface_hub` is imported."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(entropy_trl.saving.hub, "TIME_LIMIT", httpx.Timeout(0.25))
        monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))  # between its 5 retries
        huggingface_hub.set_client_factory(_http.default_client_factory)
        yield server
        huggingface_hub.set_client_factory(_http.default_client_factory)
        assert server.unknown == []


def warnings_of(caplog):
    return [
        r.getMessage() for r in caplog.records if r.name == "entropy_trl.saving.hub" and r.levelno == logging.WARNING
    ]


def is_whole(folder):
    """Whether a folder has a model that loads, and its tokenizer and card."""
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


def settings_of(card):
    """The table of settings in a card."""
    lines = card.split("| Setting | Value |\n| --- | --- |\n")[1].split("\n\n")[0].splitlines()
    return dict(line.strip("| ").split(" | ") for line in lines)


# What is pushed


def test_push_after_training(hub, make_trainer):
    trainer = make_trainer(
        push_to_hub=True, hub_model_id="model", hub_private_repo=True, entropy_control="kl_cov", max_steps=8
    )
    trainer.train()
    commit = trainer.push_to_hub(dataset_name="someone/problems")

    repository = hub.repositories[REPO]
    assert commit.oid == repository.sha
    assert repository.private
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", FIGURE} <= set(repository.files)
    run = Path(trainer.args.output_dir)
    for name, content in repository.files.items():
        assert content == (run / name).read_bytes(), name
    assert repository.files[FIGURE].startswith(b"\x89PNG")
    assert repository.metadata["tags"] == ["entropy-trl", "generated_from_trainer", "grpo", "kl_cov", "trl"]
    assert repository.metadata["datasets"] == "someone/problems"
    assert f'model="{REPO}"' in repository.card
    assert "None" not in repository.card
    assert trainer.hub_failures == []


@pytest.mark.parametrize(("strategy", "folders"), [("every_save", set()), ("checkpoint", {"last-checkpoint"}),
                                                   ("all_checkpoints", {"checkpoint-2", "checkpoint-4"})])  # fmt: skip
def test_strategies(hub, make_trainer, monkeypatch, tmp_path, strategy, folders):
    whole = []

    def watch(uploads, repo_id, path_in_repo, folder, job, follow=Uploads.watch):
        if path_in_repo:
            whole.append(why_incomplete(folder) is None)
        follow(uploads, repo_id, path_in_repo, folder, job)

    monkeypatch.setattr(Uploads, "watch", watch)
    trainer = make_trainer(**PUSHED, hub_strategy=strategy, hub_always_push=True)
    trainer.train()

    files = hub.repositories[REPO].files
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    assert {"model.safetensors", "README.md"} <= set(files)
    for name, content in files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for folder in folders:  # with the manifest and the rollout, which are written last
        assert why_incomplete(tmp_path / "downloaded" / folder) is None
    assert whole == ([True, True] if folders else [])  # each is uploaded once, when all of it is there
    assert trainer.hub_failures == []


def test_a_pushed_checkpoint_resumes(hub, make_trainer, tmp_path):
    trainer = make_trainer(**PUSHED | {"save_steps": 3}, hub_strategy="checkpoint", entropy_control="kl_cov")
    trainer.train()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    checkpoint = tmp_path / "downloaded"
    checkpoint.mkdir()
    for name, content in hub.repositories[REPO].files.items():
        if name.startswith("last-checkpoint/"):
            (checkpoint / Path(name).name).write_bytes(content)
    assert (checkpoint / "rollout_rank0.safetensors").exists()  # step 3 lies inside a rollout

    resumed = make_trainer(entropy_control="kl_cov", output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_checkpoint_stays_while_it_is_uploaded(hub, make_trainer, monkeypatch):
    monkeypatch.setattr(entropy_trl.saving.hub, "TIME_LIMIT", httpx.Timeout(20))
    hub.fail("preupload", "slow")
    trainer = make_trainer(**PUSHED, hub_strategy="all_checkpoints", save_total_limit=1, max_steps=6)
    trainer.train()
    assert trainer.hub_failures == []
    assert "checkpoint-2/model.safetensors" in hub.repositories[REPO].files


class Release(TrainerCallback):
    """Lets the Hub go on when a step has been saved; the first save waits until the upload has hashed the files."""

    def __init__(self, hub, step):
        self.hub, self.step = hub, step

    def on_save(self, args, state, control, **kwargs):
        while state.global_step == 2 and not any("preupload" in line for line in self.hub.requests):
            time.sleep(0.01)
        if state.global_step == self.step:
            self.hub.released.set()


def logs_in(hub):
    """Which logs that grow while the run goes on are on the Hub."""
    return {name.split("/")[0] for name in hub.repositories[REPO].files if "/" in name}


@pytest.mark.parametrize("always", [False, True])
def test_no_file_changes_while_an_upload_reads_the_folder(hub, make_trainer, monkeypatch, caplog, always):
    """An upload hashes the files, asks the Hub what to send (here slowly), and reads them again to send them."""
    monkeypatch.setattr(entropy_trl.saving.hub, "TIME_LIMIT", httpx.Timeout(20))
    hub.fail("preupload", "slow" if always else "hold")
    options = {"hub_strategy": "every_save", "hub_always_push": always, "report_to": "tensorboard"}
    trainer = make_trainer(**PUSHED, **options, max_steps=8, logging_steps=1, log_completions=True)
    trainer.add_callback(Release(hub, step=6))
    trainer.train()
    assert warnings_of(caplog) == []
    assert not logs_in(hub)
    if always:
        assert len(hub.repositories[REPO].commits) == 4
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert settings_of(card)["Updates made"] == "8"  # written when the upload had ended

    trainer.push_to_hub(blocking=False)
    trainer.create_model_card("again")
    trainer.save_state()
    assert logs_in(hub) == {"runs", "completions"}
    trainer.save_model()
    assert trainer.push_in_progress.is_done()
    assert warnings_of(caplog) == []
    assert settings_of(hub.repositories[REPO].card)["Updates made"] == "8"


def test_a_card_is_whole_at_every_moment(make_trainer):
    trainer = make_trainer(logging_steps=1, max_steps=2)
    trainer.train()
    card = Path(trainer.args.output_dir, "README.md")
    trainer.create_model_card("model")
    whole, seen, ended = card.read_text(), set(), threading.Event()

    def read():
        while not ended.is_set():
            seen.add(card.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        trainer.create_model_card("model")
    ended.set()
    reader.join()
    assert seen == {whole}
    assert not list(card.parent.glob("_card_*"))
    (card.parent / FIGURE).touch()
    trainer.state.log_history = []
    trainer.create_model_card("model")
    assert not (card.parent / FIGURE).exists()  # of a run that logged steps


def test_lora_adapter(hub, make_trainer, tmp_path):
    build_model(seed=0).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.config._name_or_path = "someone/base"  # as if it came from the Hub
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(
        model=model, trainer_kwargs={"peft_config": peft_config}, **PUSHED, hub_strategy="checkpoint"
    )
    trainer.train()
    trainer.push_to_hub()

    repository = hub.repositories[REPO]
    assert {"adapter_model.safetensors", "last-checkpoint/adapter_model.safetensors"} <= set(repository.files)
    assert "model.safetensors" not in repository.files
    assert repository.metadata["base_model"] == "someone/base"
    assert repository.metadata["library_name"] == "peft"
    assert "lora" in repository.metadata["tags"]
    assert settings_of(repository.card)["Weights in this repository"].startswith("an adapter (LORA, rank 4, alpha 8)")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).write_bytes(repository.files[name])
    PeftModel.from_pretrained(build_model(seed=0), tmp_path / "adapter")


def test_from_a_notebook(hub, make_trainer):
    """Without `push_to_hub` in the configuration, and in the background."""
    trainer = make_trainer()
    trainer.train()
    assert hub.requests == []
    commit = trainer.push_to_hub(blocking=False).result()
    assert commit.oid == hub.repositories["tester/out"].sha
    assert trainer.hub_failures == []


def test_the_token_is_not_uploaded(hub, make_trainer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trainer = make_trainer(**PUSHED, hub_token=hub.token, hub_strategy="checkpoint")
    trainer.train()
    trainer.push_to_hub()
    files = hub.repositories[REPO].files
    assert {"training_args.bin", "last-checkpoint/training_args.bin"} <= set(files)
    assert not [name for name, content in files.items() if hub.token.encode() in content]


def test_a_token_without_push_to_hub_stays_out_of_the_folder(hub, make_trainer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trainer = make_trainer(hub_token=hub.token, save_strategy="steps", save_steps=2)
    trainer.train()
    files = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    assert "training_args.bin" in {path.name for path in files}
    assert not [path for path in files if hub.token.encode() in path.read_bytes()]
    assert trainer.push_to_hub() is not None  # with the token all the same


# Failures


@pytest.mark.parametrize(
    ("request_line", "how", "told"),
    [
        (UPLOAD, 401, "HTTP 401: this server was told to answer 401"),
        ("PUT /storage", 503, "Error while uploading '.*' to the Hub. HTTP 503: this server was told to answer 503"),
        ("preupload", "drop", "RemoteProtocolError: Server disconnected without sending a response."),
        ("commit", "hang", "ReadTimeout: timed out"),
    ],
)
def test_failing_uploads_cost_nothing(hub, make_trainer, monkeypatch, caplog, request_line, how, told):
    watched = []
    monkeypatch.setattr(Uploads, "watch", lambda *args, watch=Uploads.watch: (watched.append(args), watch(*args)))
    trainer = make_trainer(**PUSHED, hub_strategy="checkpoint")
    hub.fail(request_line, how)
    trainer.train()
    assert trainer.push_to_hub() is None

    assert trainer.state.global_step == 4
    run = Path(trainer.args.output_dir)
    assert is_whole(run)
    assert why_incomplete(run / "checkpoint-4") is None
    assert hub.repositories[REPO].commits == []
    assert len(trainer.hub_failures) == 2  # the model, the checkpoint
    for failure, folder in zip(trainer.hub_failures, (run, run / "checkpoint-"), strict=True):
        assert failure in warnings_of(caplog)
        assert failure.startswith(str(folder))
        assert re.search(told, failure)
        assert "Nothing is lost" in failure
    assert len(warnings_of(caplog)) == len(watched)


def test_a_card_that_the_hub_does_not_take(hub, make_trainer, monkeypatch):
    """The Hub looks at the card first, and nothing is uploaded if it is not well-formed."""
    trainer = make_trainer()
    monkeypatch.setattr(trainer.model.config, "_name_or_path", "not an id of a model")
    assert trainer.push_to_hub() is None
    (failure,) = trainer.hub_failures
    assert 'Invalid metadata in README.md. - "base_model" must be a model id' in failure


def test_the_command_that_is_told_uploads_the_model(hub, make_trainer):
    trainer = make_trainer(**PUSHED, hub_strategy="all_checkpoints", hub_private_repo=True, hub_always_push=True)
    hub.fail(UPLOAD, 401)
    trainer.train()
    trainer.push_to_hub()
    hub.heal()
    commands = [failure.split("To upload it later: ")[1] for failure in trainer.hub_failures]
    assert len(commands) == 3  # the model, two checkpoints
    for command in commands[:2]:
        program, *arguments = shlex.split(command)
        assert program == "hf"
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
        subprocess.run(command, env=client_environment(hub), check=True, capture_output=True, timeout=60)
    names = set(hub.repositories[REPO].files)
    assert {"model.safetensors", "README.md", "checkpoint-2/manifest.json"} <= names
    assert not [name for name in names if name.startswith("checkpoint-4")]


def test_a_later_upload_makes_up_for_a_failed_one(hub, make_trainer, caplog):
    trainer = make_trainer(**PUSHED, hub_strategy="every_save")
    hub.fail(UPLOAD, 503)
    trainer.train()
    assert len(trainer.hub_failures) == 1
    hub.heal()
    assert trainer.push_to_hub() is not None
    assert trainer.hub_failures == []
    assert any("HTTP 503" in warning for warning in warnings_of(caplog))


@pytest.mark.parametrize("how", [503, 429, "hang"])
def test_a_hub_that_cannot_be_reached_at_the_start(hub, make_trainer, caplog, how):
    """The run begins: it may have waited for its machines for days, and the Hub may be back when there is a model."""
    hub.fail("repos/create", how)
    trainer = make_trainer(**PUSHED, hub_strategy="checkpoint")
    assert "Training goes on, and pushing is tried again later" in caplog.text
    assert trainer.hub_model_id is None
    trainer.train()
    assert trainer.push_to_hub() is None
    (failure,) = trainer.hub_failures
    run = Path(trainer.args.output_dir)
    assert f"hf upload model {run} ." in failure  # without a namespace, as in the configuration
    assert is_whole(run)
    assert 'model="model"' in (run / "README.md").read_text()

    hub.heal()
    assert trainer.push_to_hub() is not None
    assert trainer.hub_failures == []
    assert f'model="{REPO}"' in hub.repositories[REPO].card


def test_a_hub_that_comes_back_during_training(hub, make_trainer):
    hub.fail("repos/create", "drop")
    trainer = make_trainer(**PUSHED, hub_strategy="checkpoint")
    hub.heal()
    trainer.train()
    assert trainer.hub_failures == []
    assert "last-checkpoint/manifest.json" in hub.repositories[REPO].files


def test_mistakes_are_told_before_training(hub, make_trainer, monkeypatch):
    with pytest.raises(PushMistake, match=r"does not let this token write to 'other/model' \(HTTP 403"):
        hub.fail("repos/create", 403)
        make_trainer(**PUSHED | {"hub_model_id": "other/model"})
    hub.heal()
    with pytest.raises(PushMistake, match="'a model'"):
        make_trainer(**PUSHED | {"hub_model_id": "a model"})
    make_trainer(**PUSHED | {"hub_model_id": REPO})  # now it is there
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    with pytest.raises(PushMistake, match="HTTP 403: you don't have the rights to write here"):
        make_trainer(**PUSHED | {"hub_model_id": REPO})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PushMistake, match="HTTP 401: Invalid username or password"):
        make_trainer(**PUSHED)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    with pytest.raises(PushMistake, match="needs a token, and there is none"):
        make_trainer(**PUSHED)
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushMistake, match="HF_HUB_OFFLINE"):
        make_trainer(**PUSHED)


def test_a_failure_to_save_is_not_taken_for_one_of_the_hub(hub, make_trainer, monkeypatch):
    trainer = make_trainer(**PUSHED)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.push_to_hub()


def test_time_limit():
    """`huggingface_hub` has none. One that the user has set stays, and so does the user's client."""
    default = _http.default_client_factory
    assert default().timeout == httpx.Timeout(None)
    proxied = httpx.Client(timeout=7, headers={"X-Proxy": "mine"})
    try:
        for make_client, limit in ((default, entropy_trl.saving.hub.TIME_LIMIT), (lambda: proxied, httpx.Timeout(7))):
            huggingface_hub.set_client_factory(make_client)
            entropy_trl.saving.hub.limit_waiting()
            entropy_trl.saving.hub.limit_waiting()
            assert huggingface_hub.get_session().timeout == limit
        assert huggingface_hub.get_session().headers["X-Proxy"] == "mine"
    finally:
        huggingface_hub.set_client_factory(default)


# The card


@pytest.fixture
def card(tmp_path, make_config):
    """The card of a run with a given log; keyword arguments go to the configuration."""

    def write(log, config_class=None, **overrides):
        args = make_config(**({} if config_class is None else {"config_class": config_class}), **overrides)
        folder = tmp_path / "card"
        folder.mkdir(exist_ok=True)
        text = "---\ntags:\n- trl\n---\n\n# Model Card\n\nOf [None](https://huggingface.co/None).\n\n"
        text += "### Framework versions\n\n- TRL: 1\n\n## Citations\n"
        (folder / "README.md").write_text(text)
        state = TrainerState(log_history=log, global_step=len(log))
        extend_card(folder, args, state, "tester/model", build_model(seed=0))
        return (folder / "README.md").read_text()

    return write


def law_log(a=0.2, b=1.1, steps=40, name="reward"):
    """A run on the law, with the entropy falling from 1.5 nats."""
    entropies = [1.5 * 0.93**i for i in range(steps)]
    return [{"step": i + 1, "entropy": h, name: b - a * math.exp(h)} for i, h in enumerate(entropies)]


def test_card_says_the_settings(card):
    settings = settings_of(
        card(
            law_log(),
            entropy_control="clip_cov",
            entropy_control_kwargs={"fraction": 0.01, "cov_low": 2.0},
            entropy_control_pool="micro_batch",
            advantage_estimator="rloo",
            epsilon=0.2,
            epsilon_high=0.28,
            dynamic_sampling=True,
            max_generation_rounds=5,
            steps_per_generation=4,
            num_iterations=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-6,
        )
    )
    assert settings == {
        "Entropy control": "`clip_cov`",
        "`fraction` of the control": "0.01",
        "`cov_low` of the control": "2",
        "`cov_high` of the control": "5",
        "`selection` of the control": "covariance",
        "Pool that the control selects in": "the tokens of a micro-batch",
        "Advantages": "`rloo`",
        "Dynamic sampling": "up to 5 rounds of generation",
        "Ratio clip": "0.2 below 1, 0.28 above 1",
        "Loss": "`dapo`",
        "KL penalty to the reference policy": "off",
        "Learning rate": "3e-06, schedule `linear`",
        "Updates a rollout": "4",
        "Completions an update": "16",
        "Completions a rollout": "32 (4 a prompt)",
        "Longest completion": "6 tokens",
        "Sampling": "temperature 1, top-p 1",
        "Updates made": "40",
        "Seed": "0",
    }


def test_card_says_what_is_off(card):
    text = card(law_log(), entropy_control=None)
    assert "Off: this is plain GRPO." in text
    settings = settings_of(text)
    assert settings["Entropy control"] == settings["Dynamic sampling"] == "off"
    assert settings["Ratio clip"] == "0.2 below 1, 0.2 above 1"
    assert "cov" not in text.lower().replace("covgrpo", "")
    assert settings_of(card(law_log(), entropy_control="kl_cov"))["Ratio clip"] == "off"


def test_card_says_the_versions_and_papers(card):
    text = card(law_log(), entropy_control="kl_cov")
    for line in (f"- Entropy-TRL: {__version__}", f"- Python: {sys.version.split()[0]}", "- TRL: 1"):
        assert line in text.split("### Framework versions")[1].split("## Citations")[0]
    assert "shao2024deepseekmath" in text
    assert CovGRPOTrainer._paper["id"] == "2505.22617"  # TRL's part of the card cites it


def test_card_of_a_chain(card):
    text = card(
        law_log(),
        entropy_control="clip_cov+steer",
        entropy_control_kwargs={"clip_cov": {"fraction": 0.01}, "steer": {"weight_min": 0.7}},
    )
    settings = settings_of(text)
    assert settings["Entropy control"] == "`clip_cov+steer`"
    assert settings["`fraction` of clip_cov"] == "0.01" and settings["`weight_min` of steer"] == "0.7"
    assert {"clip_cov", "steer"} <= set(ModelCard(text).data.tags)


def test_a_card_cites_the_paper_of_covariance_for_its_controls_only(make_trainer, tmp_path):
    for control, cites in (("kl_cov", True), ("steer", False)):
        trainer = make_trainer(entropy_control=control, output_dir=str(tmp_path / control))
        trainer.create_model_card(model_name="run")
        text = (tmp_path / control / "README.md").read_text()
        assert ("cui2025entropy" in text) == cites
        assert text.count("shao2024deepseekmath") == 1
        assert "entropy-trl" in ModelCard(text).data.tags


def test_card_says_the_curve_without_the_figure(card, tmp_path, monkeypatch):
    log = law_log()
    with_figure = card(log)
    summary = "Policy entropy went from 1.5 to 0.0885 nats a token"
    assert f"![{summary}" in with_figure
    assert (tmp_path / "card" / FIGURE).read_bytes().startswith(b"\x89PNG")
    rows = with_figure.split("| Reward |\n| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) == 8
    assert rows[0] == "| 1 | 1.5 | 0.2037 |"  # 1.1 - 0.2 e^1.5
    assert rows[-1].startswith("| 40 | 0.0885 |")  # 1.5 * 0.93^39

    monkeypatch.setattr("entropy_trl.saving.model_card.find_spec", lambda name: None)
    without = card(log)
    assert FIGURE not in without
    assert not (tmp_path / "card" / FIGURE).exists()
    assert rows[0] in without


def test_card_has_the_law(card):
    text = card(law_log(a=0.2, b=1.1))
    assert "a = 0.2, b = 1.1 (40 logged steps, R² = 1.00)" in text
    assert "a reward of 0.9 (95% interval 0.9 to 0.9" in text  # b - a

    noisy = law_log()
    for i, entry in enumerate(noisy):
        entry["reward"] += 0.02 * (-1) ** i
    ceiling = fit_law([e["entropy"] for e in noisy], [e["reward"] for e in noisy]).inference().ceiling
    assert f"a reward of {ceiling.value:.4g} (95% interval {ceiling.low:.4g} to {ceiling.high:.4g}" in card(noisy)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ([], "0 points are too few"),
        (law_log(steps=2), "2 points are too few"),
        ([{"step": i, "entropy": 0.5, "reward": 0.1 * i} for i in range(5)], "The entropy is constant"),
        ([{"step": i, "loss": 0.5} for i in range(5)], "0 points are too few"),
    ],
)
def test_card_says_why_there_is_no_law(card, log, why):
    text = card(log)
    assert f"`R = -a exp(H) + b` is not fitted to this run: {why}" in text
    assert ("has logged no step" in text) == why.startswith("0")


def test_card_with_dynamic_sampling_has_the_reward_of_all_completions(card):
    """That of the kept groups tends to one half, whatever the policy can do."""
    log = [entry | {"reward": 0.5} for entry in law_log(name="dynamic_sampling/reward")]
    assert "a = 0.2, b = 1.1" in card(log, dynamic_sampling=True)


def test_card_of_a_plain_grpo_config_is_trls(make_trainer, tmp_path):
    with pytest.warns(UserWarning, match="entropy control is off"):
        ours = make_trainer(config_class=GRPOConfig, output_dir=str(tmp_path / "run"))
    ours.create_model_card(model_name="run")
    card = (tmp_path / "run" / "README.md").read_text()
    stock = make_trainer(trainer_class=GRPOTrainer, config_class=GRPOConfig, output_dir=str(tmp_path / "run"))
    stock.create_model_card(model_name="run")
    expected = (tmp_path / "run" / "README.md").read_text()
    body = expected.split("\n# Model Card")[1].replace("[None](https://huggingface.co/None)", "a local model")
    assert card.split("\n# Model Card")[1] == body.replace('model="None"', 'model="run"')


# The command line


def client_environment(hub, **variables):
    removed = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return {name: value for name, value in os.environ.items() if name not in removed} | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PYTHONPATH,
        **variables,
    }


def train_arguments(out):
    arguments = ["--model_factory", "conftest.untrained_policy", "--reward_funcs", "conftest.digit_reward"]
    arguments += ["--dataset_factory", "entropy_trl.quickstart.task.build_dataset", "--output_dir", str(out)]
    arguments += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_completion_length", "6"]
    arguments += ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--report_to", "none"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false"]
    return [*arguments, "--push_to_hub", "true", "--hub_model_id", "model", "--hub_strategy", "checkpoint"]


def launch_two(hub, out):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "train.py", *train_arguments(out)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=client_environment(hub),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_several_processes(tmp_path):
    """The first one alone speaks to the Hub, and when that fails nobody waits for it."""
    with HubServer() as hub:
        hub.fail(UPLOAD, 401)
        done = launch_two(hub, tmp_path / "run")
        assert "exitcode  : 3" in done.stderr
        assert "Training completed." in done.stdout
        assert f"Model saved to {tmp_path / 'run'}." in done.stdout
        assert "Model pushed" not in done.stdout
        assert hub.requests.count("POST /api/repos/create") == 1
        assert is_whole(tmp_path / "run")
        assert "To upload it later: hf upload tester/model" in done.stderr


@pytest.mark.slow
def test_a_mistake_ends_all_processes(tmp_path):
    with HubServer() as hub:
        hub.fail("repos/create", 401)
        done = launch_two(hub, tmp_path / "run")
        assert done.returncode != 0
        assert done.stderr.count("train.py: error: The Hub does not let this token write to 'model'") == 1
        assert "exitcode  : 2" in done.stderr
        assert not (tmp_path / "run" / "model.safetensors").exists()


def test_train_command(hub, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert cli.train_main(train_arguments(run)) == 0
    assert f"Model saved to {run}.\nModel pushed to {hub.url}/{REPO}.\n" in capsys.readouterr().out
    repository = hub.repositories[REPO]
    assert json.loads(repository.files["trainer_state.json"])["global_step"] == 2
    assert {"model.safetensors", "last-checkpoint/manifest.json"} <= set(repository.files)
    assert [message for message, _ in repository.commits].count("End of training") == 1

    hub.fail(UPLOAD, 401)
    assert cli.train_main(train_arguments(tmp_path / "failed")) == NOT_PUSHED == 3
    out = capsys.readouterr().out
    assert f"Model saved to {tmp_path / 'failed'}." in out
    assert "Model pushed" not in out
    assert is_whole(tmp_path / "failed")

    monkeypatch.delenv("HF_TOKEN")
    assert cli.train_main(train_arguments(tmp_path / "mistake")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: Pushing to the Hub needs a token")
    assert not (tmp_path / "mistake" / "config.json").exists()
