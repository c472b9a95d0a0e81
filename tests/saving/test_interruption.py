"""Runs that are killed (SIGKILL) and started again end as if nothing had happened, and no checkpoint is lost."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import JOBS, PYTHONPATH
from prepared_python import prepared_python
from safetensors.torch import load_file

from entropy_trl.saving.manifest import why_incomplete


ARGUMENTS = {
    "model_factory": "conftest.untrained_policy",
    "dataset_factory": "entropy_trl.quickstart.build_dataset",
    "reward_funcs": "conftest.digit_reward",
    "entropy_control": "clip_cov",
    "entropy_control_kwargs": '{"fraction": 0.2, "cov_low": 0.02}',
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # a rollout lasts two steps
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 5,
    "learning_rate": 0.01,
    "save_steps": 1,
    "save_total_limit": 1,
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "report_to": "none",
    "disable_tqdm": "true",
    "logging_steps": 1,
}


def start(out, place="never", step=0, rank=0, processes=1, python=None, **arguments):
    """Run tests/jobs/interrupted_job.py; returns the finished process."""
    command = [python or prepared_python()]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(JOBS / "interrupted_job.py"), place, str(step), str(rank), "--output_dir", str(out)]
    for name, value in (ARGUMENTS | arguments).items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PYTHONPATH,
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def finished(result):
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def same_model(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(out):
    """{step: complete or not}"""
    return {int(path.name.split("-")[1]): why_incomplete(path) is None for path in out.glob("checkpoint-*")}


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    out = tmp_path_factory.mktemp("through") / "run"
    finished(start(out))
    assert checkpoints(out) == {5: True}
    return out


@pytest.mark.parametrize(
    ("place", "step", "left", "resumed_from"),
    [
        pytest.param("step", 2, {2: True}, 2, marks=pytest.mark.slow),
        pytest.param("step", 3, {3: True}, 3, marks=pytest.mark.slow),  # inside a rollout
        ("save", 3, {2: True, 3: False}, 2),
        ("rollout", 3, {2: True, 3: False}, 2),
        ("manifest", 4, {3: True, 4: False}, 3),
        pytest.param("rotation", 3, {2: True, 3: True}, 3, marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(tmp_path, through, place, step, left, resumed_from):
    out = tmp_path / "run"
    assert start(out, place, step).returncode == -9
    assert checkpoints(out) == left
    result = finished(start(out, resume_from_checkpoint="true"))
    assert f"Resuming from {out / f'checkpoint-{resumed_from}'}." in result.stdout
    assert not re.search("other options|another run", result.stderr)
    assert ("is passed over" in result.stderr) == (not all(left.values()))
    assert same_model(out, through)
    assert checkpoints(out) == {5: True}


def test_a_truncated_checkpoint_is_never_loaded(tmp_path, through):
    out = tmp_path / "run"
    finished(start(out, save_total_limit=3))
    assert checkpoints(out) == {3: True, 4: True, 5: True}
    os.truncate(out / "checkpoint-5" / "optimizer.pt", 1000)
    os.truncate(out / "checkpoint-4" / "model.safetensors", 1000)
    result = start(out, resume_from_checkpoint=out / "checkpoint-4")
    assert result.returncode == 2
    assert "is not complete: model.safetensors has 1000 of" in result.stderr.splitlines()[-1]
    (out / "model.safetensors").unlink()
    result = finished(start(out, resume_from_checkpoint="true", save_total_limit=3))
    assert "checkpoint-5 is passed over: optimizer.pt has 1000 of" in result.stderr
    assert f"Resuming from {out / 'checkpoint-3'}." in result.stdout
    assert same_model(out, through)
    assert checkpoints(out) == {3: True, 4: True, 5: True}


@pytest.mark.parametrize(
    ("place", "step", "rank", "resumed_from"),
    [("save", 3, 1, 2), pytest.param("step", 3, 1, 3, marks=pytest.mark.slow)],
)
def test_one_of_two_processes_is_killed(tmp_path, place, step, rank, resumed_from):
    through, out = tmp_path / "through", tmp_path / "run"
    finished(start(through, processes=2))
    assert start(out, place, step, rank, processes=2).returncode != 0
    assert {step for step, complete in checkpoints(out).items() if complete} == {resumed_from}
    result = finished(start(out, processes=2, resume_from_checkpoint="true"))
    assert len(re.findall("Resuming from", result.stdout)) == 1
    assert same_model(out, through)


@pytest.mark.slow
def test_the_launcher_is_told_to_end(tmp_path):
    """Every rank ends without a traceback of its own, and the first says how to go on."""
    out = tmp_path / "run"
    result = start(out, "launcher", 1, processes=2, python=sys.executable)  # the parent of a prepared one is a server
    assert result.returncode != 0
    job = [line for line in result.stderr.splitlines() if "interrupted_job.py" in line or "entropy_trl" in line]
    assert not [line for line in job if line.lstrip().startswith("File ")]
    (line,) = [line for line in result.stderr.splitlines() if "interrupted by SIGTERM" in line]
    assert "in step 2 of 5. Resume from checkpoint-1 with the same launcher and: train.py " in line
