"""Several real processes (gloo): the step pool selects the same tokens, and trains the same weights, as one process."""

import json
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import JOBS
from launching import accelerate_launch

from entropy_trl.analysis.covariance.records import read_records


#: Processes, and micro-batches of a step on each of them.
CUTS = {"one": (1, 1), "one, cut": (1, 4), "two": (2, 1), "two, cut": (2, 2)}
METHODS = {
    "kl_cov": {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}},
    "clip_cov": {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.02}},
}


def run(out: Path, processes: int, accelerate_config="ddp", **job):
    """Launch distributed_job.py with configs/accelerate/*.yaml; returns what each of the processes dumped."""
    out.mkdir()
    name = accelerate_config if processes > 1 else "single_gpu"
    script = [str(JOBS / "distributed_job.py"), str(out), json.dumps(job)]
    accelerate_launch(name, processes, "--dynamo_backend", "no", *script)
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


@pytest.mark.parametrize(
    ("method", "updates"), [("kl_cov", 2), pytest.param("clip_cov", 2, marks=pytest.mark.slow), ("clip_cov", 1)]
)
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
        micro_batches = CUTS[name][1]
        scored = 3 * micro_batches if updates == 1 and micro_batches > 1 else 0
        assert [rank["scored"] for rank in ranks] == [scored] * len(ranks)
        if len(ranks) == 2:
            assert ranks[0]["distributed_type"] == "MULTI_CPU"
            assert distance(*ranks) == 0
        assert merged(ranks) == merged(reference), name
        assert distance(ranks[0], reference[0]) < 1e-6, name
        for log, expected in zip(ranks[0]["logs"], reference[0]["logs"], strict=True):
            for key in [k for k in expected if k.startswith("entropy_control/")]:
                assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (name, key)


#: STEER needs the maximum over the pool, of entropies too; entropy-targeted clip-higher a state from all tokens.
RIVALS = {
    "steer": {"entropy_control": "steer", "entropy_control_kwargs": {"weight_min": 0.3}},
    "targeted_clip_higher": {
        "entropy_control": "targeted_clip_higher",
        "entropy_control_kwargs": {"epsilon": 0.01, "delta": 0.005, "k_max": 0.02, "entropy_target": 2.9},
    },
}


@pytest.mark.parametrize("method", ["steer", pytest.param("targeted_clip_higher", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_pool_numbers_and_states(tmp_path, method):
    job = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "save_strategy": "no"} | RIVALS[method]
    job |= {"max_steps": 4}
    one = run(tmp_path / "one", 1, spread=2, per_device_train_batch_size=8, **job)
    two = run(tmp_path / "two", 2, spread=2, per_device_train_batch_size=4, **job)
    assert distance(*two) == 0
    assert distance(one[0], two[0]) < 1e-6
    keys = {"steer": ("omega_max", "weight_mean"), "targeted_clip_higher": ("step_entropy", "k", "clipped_low")}[method]
    for log, expected in zip(two[0]["logs"], one[0]["logs"], strict=True):
        for key in keys:
            name = f"entropy_control/{key}"
            assert log[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), key
    assert len({round(log[f"entropy_control/{keys[1]}"], 6) for log in one[0]["logs"]}) > 1


@pytest.mark.parametrize("method", [pytest.param("kl_cov", marks=pytest.mark.slow), "clip_cov"])
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


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_group_that_spans_processes(tmp_path, processes):
    # Groups of 4 rows, 6 or 3 of them on each process; 10 prompts, of which each epoch leaves the last one out.
    job = {"rows": 12, "prompts": 10, "steps_per_generation": 1, "max_steps": 5, "save_strategy": "no"}
    job |= METHODS["clip_cov"] | {"token_records": {"every": 1, "entropy_change": True}}
    one = run(tmp_path / "one", 1, spread=1, per_device_train_batch_size=12, **job)
    several = run(tmp_path / "several", processes, spread=processes, per_device_train_batch_size=12 // processes, **job)
    assert [step for step, _ in merged(one)] == [0, 1, 2, 3, 4]
    assert one[0]["logs"][-1]["epoch"] > 1
    assert all(any(positions for positions in rows.values()) for _, rows in merged(one))
    assert merged(several) == merged(one)
    assert all(distance(rank, one[0]) < 1e-6 for rank in several)
    for log, expected in zip(several[0]["logs"], one[0]["logs"], strict=True):
        assert expected["diversity/distinct_completions"] > 1
        assert {k: v for k, v in log.items() if "diversity" in k} == {
            k: v for k, v in expected.items() if "diversity" in k
        }

    # Every process records its rows, with the covariance and the groups of all of them.
    recorded = [read_records(tmp_path / name / "run") for name in ("one", "several")]
    for whole, parts in zip(*recorded, strict=True):
        assert len(parts.files) == processes
        assert whole.tokens == parts.tokens == parts.tokens_recorded
        a, b = (step.table().sort_values(["row_id", "position"], ignore_index=True) for step in (whole, parts))
        assert a["token_id"].equals(b["token_id"]) and a["selected"].equals(b["selected"])
        for column in ("covariance", "entropy", "entropy_after", "reward", "group_accuracy"):
            np.testing.assert_allclose(a[column], b[column], atol=1e-5)
        assert whole.mean_covariance == pytest.approx(parts.mean_covariance, abs=1e-6)
        assert whole.mean_entropy_after == pytest.approx(parts.mean_entropy_after, abs=1e-6)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    # Checkpoint 2 lies between two rollouts, checkpoint 1 inside one.
    job = {"steps_per_generation": 2, **METHODS["kl_cov"]}
    two = run(tmp_path / "two", 2, spread=2, per_device_train_batch_size=8, **job)
    checkpoint = tmp_path / "two" / "run" / "checkpoint-2"
    one = run(tmp_path / "one", 1, spread=2, per_device_train_batch_size=16, resume=str(checkpoint), **job)
    assert merged(one) == merged(two)[2:]
    assert distance(one[0], two[0]) < 1e-6


def test_dynamic_sampling_keeps_the_same_prompts_on_two_processes(tmp_path):
    # Completions are made of the prompt, so that a prompt has a signal or not whatever process it is on.
    job = {"steps_per_generation": 2, "max_steps": 4, "dynamic_sampling": True, "from_prompt": True}
    job |= METHODS["kl_cov"] | {"save_strategy": "no"}
    one = run(tmp_path / "one", 1, spread=1, per_device_train_batch_size=16, **job)
    two = run(tmp_path / "two", 2, spread=2, per_device_train_batch_size=8, **job)
    kept = [
        [sorted(chain(*parts)) for parts in zip(*(rank["prompts"] for rank in ranks), strict=True)]
        for ranks in (one, two)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    assert all(len(prompts) == 32 for prompts in kept[0])
    assert two[0]["position"] == two[1]["position"] == one[0]["position"]
    for log in (log for rank in two for log in rank["logs"] if "dynamic_sampling/rounds" in log):
        assert log["dynamic_sampling/rounds"] > 1
        assert log["frac_reward_zero_std"] == 0
    assert distance(*two) == 0


# Sharded models, launched with the files of configs/accelerate


def skip_without_deepspeed():
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-distributed")
    if shutil.which("g++") is None:
        pytest.skip("needs g++, with which DeepSpeed builds its communication for CPUs")


SHARDED = ["fsdp2", *(pytest.param(name, marks=pytest.mark.deepspeed) for name in ("zero2", "zero3"))]
#: What accelerate must say and wrap, and on how many of 2 processes each holds all parameters.
KINDS = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel", 1),
    "fsdp2": ("FSDP", "FSDPQwen2ForCausalLM", 2),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine", 1),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine", 2),
    "zero3_offload": ("DEEPSPEED", "DeepSpeedEngine", 2),
}
UPDATES = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "save_strategy": "no"}


def check_kind(name, ranks, parameters):
    """accelerate trains something simpler without a word where it cannot do what its file says."""
    distributed_type, wrapped, shards = KINDS[name]
    for rank in ranks:
        assert (rank["distributed_type"], rank["wrapped"]) == (distributed_type, wrapped)
        assert rank["held"] == parameters // shards
        if name == "zero2":  # its optimizer has this process's half
            assert rank["optimized"] == parameters // 2


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A function that runs a job in one process, once."""
    made = {}

    def reference(**job):
        key = json.dumps(job, sort_keys=True)
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("one") / "out", 1, spread=2, **job)[0]
        return made[key]

    return reference


# KL-Cov with two updates a rollout; Clip-Cov strictly on-policy in two micro-batches, which needs the scoring pass.
@pytest.mark.parametrize(
    ("method", "micro_batches"), [pytest.param("kl_cov", 1, marks=pytest.mark.slow), ("clip_cov", 2)]
)
@pytest.mark.parametrize("sharding", SHARDED)
def test_sharded_models_select_and_train_as_one_process(tmp_path, references, sharding, method, micro_batches):
    if sharding.startswith("zero"):
        skip_without_deepspeed()
    job = METHODS[method] | UPDATES | {"gradient_accumulation_steps": micro_batches}
    one = references(**job | {"per_device_train_batch_size": 16})
    ranks = run(tmp_path / "out", 2, sharding, spread=2, **job)
    check_kind(sharding, ranks, one["held"])
    assert merged(ranks) == merged([one])
    assert distance(ranks[0], one) < 1e-6


@pytest.mark.deepspeed
def test_offloaded_shards_train_as_one_process(tmp_path, references):
    # On the host DeepSpeed has an Adam of its own: accelerate replaces any other optimizer by it.
    skip_without_deepspeed()
    job = METHODS["kl_cov"] | UPDATES | {"optim": "adamw_torch", "learning_rate": 1e-3}
    one = references(**job | {"per_device_train_batch_size": 16})
    ranks = run(tmp_path / "out", 2, "zero3_offload", spread=2, **job)
    check_kind("zero3_offload", ranks, one["held"])
    assert merged(ranks) == merged([one])
    assert distance(ranks[0], one) < 2e-5  # of 3 steps of 1e-3


@pytest.mark.parametrize(
    "sharding",
    [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)],
)
def test_lora_with_checkpointed_activations_and_a_reference(tmp_path, references, sharding):
    # beta > 0: the reference is the model without its adapter.
    if sharding.startswith("zero"):
        skip_without_deepspeed()
    job = METHODS["clip_cov"] | UPDATES | {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    job |= {"beta": 0.04, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    one = references(**job | {"per_device_train_batch_size": 16})
    assert one["logs"][-1]["kl"] > 0
    ranks = run(tmp_path / "out", 2, sharding, spread=2, **job)
    distributed_type, _, shards = KINDS[sharding]
    assert ranks[0]["distributed_type"] == distributed_type
    assert ranks[0]["held"] == pytest.approx(one["held"] / shards, rel=1e-3)
    assert merged(ranks) == merged([one])
    trained = {name for name in one["weights"] if "lora" in name}
    assert trained and trained <= ranks[0]["weights"].keys()
    assert all(one["weights"][name].abs().max() > 1e-3 for name in trained if "lora_B" in name)  # 0 before training
    assert distance(one, ranks[0]) < 1e-6
