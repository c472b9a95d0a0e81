"""Several real processes (gloo): the step pool selects the same tokens, and trains the same weights, as one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


#: Processes, and micro-batches of a step on each of them.
CUTS = {"one": (1, 1), "one, cut": (1, 4), "two": (2, 1), "two, cut": (2, 2)}
METHODS = {
    "kl_cov": {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}},
    "clip_cov": {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.02}},
}


def run(out: Path, processes: int, **job):
    """Run tests/distributed_job.py in `processes` processes; returns what each of them dumped."""
    out.mkdir()
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(folder / "distributed_job.py"), str(out), json.dumps(job)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent / "src")]),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja, for DeepSpeed
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(out / f"rank{i}.pt") for i in range(processes)]
    assert all(rank["processes"] == processes for rank in ranks)
    return ranks


def merged(ranks):
    """The selections of all processes as one list of (step, {row: positions})."""
    steps = []
    for parts in zip(*(rank["selections"] for rank in ranks), strict=True):
        rows = {}
        for step, part in parts:
            assert step == parts[0][0] and not rows.keys() & part.keys()
            rows |= part
        steps.append((step, dict(sorted(rows.items()))))
    return steps


def distance(a, b):
    return max(float((a["weights"][n] - b["weights"][n]).abs().max()) for n in a["weights"])


@pytest.mark.parametrize(("method", "updates"), [("kl_cov", 2), ("clip_cov", 2), ("clip_cov", 1)])
def test_two_processes_select_and_train_as_one(tmp_path, method, updates):
    # 32 rows a rollout; on-policy (one update a rollout) a step of several micro-batches needs the scoring pass.
    runs = {}
    for name, (processes, micro_batches) in CUTS.items():
        job = {
            "per_device_train_batch_size": 32 // updates // processes // micro_batches,
            "gradient_accumulation_steps": micro_batches,
            "steps_per_generation": micro_batches * updates,
        }
        runs[name] = run(tmp_path / name.replace(", ", "-"), processes, spread=2, **METHODS[method], **job)
    reference = runs["one"]
    assert [step for step, _ in merged(reference)] == [0, 1, 2]
    assert all(sum(map(len, rows.values())) > 3 for _, rows in merged(reference))
    for name, ranks in runs.items():
        if len(ranks) == 2:
            assert ranks[0]["distributed_type"] == "MULTI_CPU"
            assert distance(*ranks) == 0
        assert merged(ranks) == merged(reference), name
        assert distance(ranks[0], reference[0]) < 1e-6, name
        for log, expected in zip(ranks[0]["logs"], reference[0]["logs"], strict=True):
            for key in [k for k in expected if k.startswith("entropy_control/")]:
                assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (name, key)


@pytest.mark.parametrize("method", METHODS)
def test_a_process_without_tokens_does_not_hang(tmp_path, method):
    ranks = run(
        tmp_path / "out",
        2,
        spread=2,
        empty_rank=1,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        **METHODS[method],
    )
    assert [n for _, n in ranks[1]["shapes"]] == [0, 0, 0]
    assert all(log["entropy_control/selected_fraction"] > 0.1 for log in ranks[0]["logs"])
    assert distance(*ranks) == 0


def test_equal_advantages_everywhere_do_not_hang(tmp_path):
    # Seed 99 gives every completion the same reward: no covariance, nothing in Clip-Cov's band.
    job = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "seed": 99, **METHODS["clip_cov"]}
    ranks = run(tmp_path / "out", 2, spread=2, **job)
    assert all(log["entropy_control/selected_fraction"] == 0 for log in ranks[0]["logs"])
    assert all(log["entropy_control/cov_top_0.0002"] == 0 for log in ranks[0]["logs"])


def test_the_micro_batch_pool_stays_on_each_process(tmp_path):
    job = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "entropy_control_pool": "micro_batch"}
    ranks = run(tmp_path / "out", 2, spread=2, **job, **METHODS["kl_cov"])
    for rank in ranks:
        for (_, rows), (_, tokens) in zip(rank["selections"], rank["shapes"], strict=True):
            assert sum(map(len, rows.values())) == int(0.2 * tokens)


def test_two_processes_resume_inside_a_rollout(tmp_path):
    job = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "generate": True, **METHODS["clip_cov"]}
    through = run(tmp_path / "through", 2, spread=2, **job)
    checkpoint = tmp_path / "through" / "run" / "checkpoint-1"
    assert {p.name for p in checkpoint.glob("rollout*")} == {"rollout_rank0.safetensors", "rollout_rank1.safetensors"}
    resumed = run(tmp_path / "resumed", 2, spread=2, resume=str(checkpoint), **job)
    assert distance(through[0], resumed[0]) == 0
    assert [s for s in merged(through) if s[0] >= 1] == merged(resumed)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_selects_and_trains_as_ddp(tmp_path, stage):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-distributed")
    if shutil.which("g++") is None:
        pytest.skip("needs g++, with which DeepSpeed builds its communication for CPUs")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    if stage == 2:
        zero = {"stage": 2}
    automatic = (
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    settings = dict.fromkeys(automatic, "auto") | {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    job = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "save_strategy": "no", **METHODS["kl_cov"]}
    ddp = run(tmp_path / "ddp", 2, spread=2, **job)
    sharded = run(tmp_path / "zero", 2, spread=2, deepspeed=str(tmp_path / "deepspeed.json"), **job)
    assert sharded[0]["distributed_type"] == "DEEPSPEED"
    assert sharded[0]["held"] == ddp[0]["held"] // (2 if stage == 3 else 1)
    assert merged(sharded) == merged(ddp)
    assert distance(ddp[0], sharded[0]) < 1e-6
