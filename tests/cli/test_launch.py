"""`accelerate launch --config_file configs/accelerate/*.yaml train.py --config ...`, for every file there, on CPUs."""

import os
import shutil
import subprocess

import pytest
from conftest import JOBS, ROOT
from launching import accelerate_launch, environment
from safetensors.torch import load_file
from test_distributed import skip_without_deepspeed

from entropy_trl.saving.manifest import why_incomplete
from entropy_trl.smoke import tiny_math_policy


CONFIGS = ROOT / "configs"
#: Files of a checkpoint of 2 processes that show how the run was sharded.
SHARDS = {
    "single_gpu": ["rng_state.pth", "optimizer.pt"],
    "ddp": ["rng_state_1.pth", "optimizer.pt"],
    "zero2": ["global_step3/mp_rank_00_model_states.pt", "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"],
    "zero3": ["global_step3/zero_pp_rank_1_mp_rank_00_model_states.pt"],
    "zero3_offload": ["global_step3/zero_pp_rank_1_mp_rank_00_model_states.pt"],
    "fsdp2": ["pytorch_model_fsdp_0/__1_0.distcp", "optimizer_0/__1_0.distcp"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model, so that it is loaded as a downloaded one is."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_math_policy():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ddp(model, tmp_path_factory):
    """The final weights of two processes without sharding."""
    out = tmp_path_factory.mktemp("ddp") / "run"
    launch("ddp", model, out)
    return load_file(out / "model.safetensors")


def training_arguments(name, model, out):
    arguments = ["--config", str(CONFIGS / "smoke" / "dapo_math.yaml"), "--model_name_or_path", str(model)]
    arguments += ["--output_dir", str(out), "--max_steps", "5", "--per_device_train_batch_size", "4"]
    arguments += ["--save_strategy", "steps", "--save_steps", "3", "--dtype", "float32", "--disable_tqdm", "true"]
    arguments += ["--use_cpu", "false" if name == "fsdp2" else "true"]
    # Offload has DeepSpeed's own Adam. Elsewhere SGD, which does not turn the rounding of a tiny gradient into a step.
    arguments += ["--optim", "adamw_torch" if name == "zero3_offload" else "sgd", "--learning_rate", "1e-2"]
    return arguments


def launch(name, model, out, *arguments):
    script = str(JOBS / "launched_train.py") if name == "fsdp2" else "train.py"
    given = [script, *training_arguments(name, model, out), *arguments]
    done = accelerate_launch(name, 1 if name == "single_gpu" else 2, *given, timeout=400)
    assert "Training completed." in done.stdout
    return done


def difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_every_file_is_launched():
    assert SHARDS.keys() == {path.stem for path in (CONFIGS / "accelerate").glob("*.yaml")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.deepspeed if n.startswith("zero") else () if n == "fsdp2" else pytest.mark.slow
        )
        for n in SHARDS
    ],
)
def test_train_and_resume(name, model, ddp, tmp_path):
    """Sharded as the file says, the same weights as without shards, and a resume inside a rollout changes nothing."""
    if name.startswith("zero"):
        skip_without_deepspeed()
    out = tmp_path / "run"
    launch(name, model, out)
    checkpoint = out / "checkpoint-3"
    assert why_incomplete(checkpoint) is None
    for file in SHARDS[name]:
        assert (checkpoint / file).is_file(), sorted(path.name for path in checkpoint.rglob("*"))
    weights = load_file(out / "model.safetensors")
    assert difference(weights, load_file(model / "model.safetensors")) > 1e-4
    if name not in ("single_gpu", "zero3_offload"):  # one process deals the rows to its steps by another shuffle
        assert difference(weights, ddp) < 1e-6
    shutil.rmtree(out / "checkpoint-5")
    (out / "model.safetensors").unlink()
    done = launch(name, model, out, "--resume_from_checkpoint", "true")
    assert done.stdout.count(f"Resuming from {checkpoint}.") == 1
    assert (checkpoint / "weights_rank0.json").is_file() == (name not in ("single_gpu", "ddp"))
    assert "were not compared" not in done.stderr and "other options" not in done.stderr
    assert difference(weights, load_file(out / "model.safetensors")) == 0


def test_two_nodes_under_slurm(model, ddp, tmp_path):
    """examples/slurm.sh as it is, on two loopback nodes: srun and scontrol are stood in for by a few lines of shell."""
    commands = tmp_path / "bin"
    commands.mkdir()
    srun = 'shift; SLURM_PROCID=0 "$@" & first=$!; SLURM_PROCID=1 "$@" & second=$!; wait $first && wait $second'
    for name, script in {"srun": srun, "scontrol": "echo 127.0.0.1; echo 127.0.0.2"}.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)
    out = tmp_path / "run"
    variables = environment(
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_NNODES="2",
        GPUS_PER_NODE="1",
        ACCELERATE_CONFIG="configs/accelerate/ddp.yaml",
    )
    variables["PATH"] = os.pathsep.join([str(commands), variables["PATH"]])
    for steps in (3, 5):  # the second time as a job that was requeued
        command = ["bash", "examples/slurm.sh", *training_arguments("ddp", model, out), "--max_steps", str(steps)]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
    assert f"Resuming from {out / 'checkpoint-3'}." in done.stdout
    assert (out / "checkpoint-3" / "rollout_rank1.safetensors").is_file()
    assert difference(load_file(out / "model.safetensors"), ddp) == 0
