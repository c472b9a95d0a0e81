"""The plan of a run: each formula against what a real model, trainer or group of processes does, and the command."""

import copy
import gc
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl.kernels.chunked_logprob as chunked
from accelerate.commands.estimate import estimate_training_usage
from conftest import JOBS
from launching import accelerate_launch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from entropy_trl import KLCov, config_checks
from entropy_trl.cli import main, parse_train_args
from entropy_trl.controls import CONTROLS
from entropy_trl.plan.inputs import Hardware, Sharding, load_sharding, read_run
from entropy_trl.plan.memory import (
    GIB,
    PHASES,
    POOL_BYTES,
    head_memory,
    memory,
    model_states,
    optimizer_bytes,
    rollout_bytes,
    vllm_kv_tokens,
)
from entropy_trl.plan.model import activations, load_config, model_facts
from entropy_trl.plan.traffic import (
    communication,
    control_messages,
    forward_flops,
    generation_seconds,
    latency,
    loss_flops,
    scoring_flops,
    selection_messages,
    trl_messages,
)
from entropy_trl.plan.verdict import Plan, suggest
from entropy_trl.tokens.covariance import covariance_metrics
from entropy_trl.tokens.types import TokenBatch


REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
DATA = Path(__file__).parent / "plan_data"
#: The sizes that the model cards give; 0.5B counts its tied embedding once.
PUBLISHED = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen2.5-32b": 32_763_876_352}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
#: For real processes: with these a rank's shares have no padding.
TINY = SMALL | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
BF16 = {"bf16": True, "entropy_control": None, "max_steps": 2}
HARDWARE = Hardware(2, GIB, 1.0, 1.0, 1.0, 0.0)
CASE = {"per_device_train_batch_size": 8, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
ZERO3 = str(CONFIGS / "accelerate" / "zero3.yaml")


def facts(config, **kwargs):
    return model_facts("small", config if isinstance(config, Qwen2Config) else Qwen2Config(**config), **kwargs)


def run_of(tmp_path, *arguments, processes=1, prompt=None, mean=None):
    argv = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--report_to", "none", *map(str, arguments)]
    _, training_args, model_args, _ = parse_train_args(argv, processes=processes)
    return read_run(training_args, model_args, prompt, mean)


def shipped(model, gpus, *arguments, memory_gib=80, sharding=ZERO3):
    config = CONFIGS / model / "kl_cov.yaml"
    _, training_args, model_args, _ = parse_train_args(
        ["--config", str(config), "--use_cpu", "true", *arguments], processes=gpus
    )
    hardware = Hardware(gpus, memory_gib * GIB, 4e14, 50e9 if gpus > 8 else 450e9, 3.35e12, 1e-5)
    loaded = load_config(model, str(DATA / f"{model}.json"))
    run = read_run(training_args, model_args, None, None)
    return Plan(model_facts(model, loaded), run, load_sharding(sharding, None, gpus), hardware)


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(function):
    """The highest sum of what torch's allocator hands out while `function` runs, bytes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def fold_nothing(monkeypatch):
    """The Triton kernels of a GPU fold a tile of logits in place. TRL's code for a CPU makes several copies of it."""

    def fold(tile, stride, targets, running_max, sum_exp, *args, **kwargs):
        running_max.zero_(), sum_exp.fill_(1.0)  # finite

    monkeypatch.setattr(chunked, "_forward_tile", fold)
    monkeypatch.setattr(chunked, "_backward_tile", lambda *args, **kwargs: None)


# Models


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model_card(name):
    model = facts(load_config(name, str(DATA / f"{name}.json")))
    assert model.params == model.trainable == PUBLISHED[name]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_a_real_model(tied):
    config = Qwen2Config(**SMALL | {"tie_word_embeddings": tied})
    real, model = Qwen2ForCausalLM(config), facts(config)
    linear = [m.weight.numel() for m in real.model.modules() if isinstance(m, torch.nn.Linear)]
    assert model.params == sum(p.numel() for p in real.parameters())
    assert (model.body, model.head) == (sum(linear), real.lm_head.weight.numel())
    cache = real(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert model.kv_token * 5 == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_an_adapter_trains_what_peft_says():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    real = peft.get_peft_model(Qwen2ForCausalLM(Qwen2Config(**SMALL)), copy.deepcopy(lora))
    model = facts(SMALL, peft_config=lora)
    assert (model.trainable, model.params) == real.get_nb_trainable_parameters()


# Memory


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_model_states_are_those_of_a_trainer_after_a_step(make_trainer, tmp_path, optim):
    run = run_of(tmp_path, "--optim", optim, "--bf16", "false", "--max_completion_length", 6)
    trainer = make_trainer(optim=optim, max_steps=1)
    gradients = []
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    trainer.train()
    states = [x for state in trainer.optimizer.optimizer.state.values() for x in state.values() if x.ndim]
    expected = model_states(facts(trainer.model.config), run, Sharding("none"), 1)
    assert expected["parameters"] == size(trainer.model.parameters())
    assert expected["gradients"] == size(gradients)
    assert expected["optimizer"] == size(states)
    assert expected["master"] == expected["host"] == 0


def test_zero_agrees_with_deepspeeds_estimators(tmp_path):
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    model = facts(load_config("7b", str(DATA / "qwen2.5-7b.json")))
    run = run_of(tmp_path, "--bf16", "true", "--optim", "adamw_torch_fused")
    for nodes in (1, 4):
        gpus = 8 * nodes
        _, theirs, live = stage3.estimate_zero3_model_states_mem_needs(
            model.params, model.layer, 8, nodes, False, False
        )
        states = model_states(model, run, Sharding("zero3"), gpus)
        # Theirs keep a float32 gradient of the whole share (ours: of a sub-group, in the update) and no 16-bit weight.
        ours = sum(states.values()) + (4 - 2) * model.params / gpus
        assert ours == pytest.approx(theirs - live, rel=1e-3)
        _, theirs = stage2.estimate_zero2_model_states_mem_needs(model.params, 8, nodes, False)
        states = model_states(model, run, Sharding("zero2"), gpus)
        assert sum(states.values()) + 4 * model.params / gpus == pytest.approx(theirs, rel=1e-6)


def test_ddp_agrees_with_accelerates_estimator(tmp_path):
    model = facts(SMALL)
    theirs = estimate_training_usage(4 * model.params, "float32")
    states = model_states(model, run_of(tmp_path, "--bf16", "false"), Sharding("ddp"), 8)
    assert {k: int(states[{"model": "parameters"}.get(k, k)]) for k in ("model", "gradients", "optimizer")} == {
        k: v for k, v in theirs.items() if k != "step"
    }


def test_offloading_moves_the_states_to_the_host(tmp_path):
    model, run = facts(SMALL), run_of(tmp_path, "--bf16", "true")
    whole = model_states(model, run, Sharding("zero3"), 4)
    offloaded = model_states(model, run, Sharding("zero3", True, True), 4)
    assert offloaded["host"] == sum(whole.values()) + 4 * model.trainable / 4
    assert sum(offloaded.values()) == offloaded["host"]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("types", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_activations_are_what_the_profiler_sees(types, checkpointing):
    dtype, autocast = types
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL)).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(backward=True):
        states = torch.randn(2, 256, SMALL["hidden_size"], dtype=dtype, requires_grad=backward)
        mask = torch.ones(2, 256, dtype=torch.long)
        mask[0, :5] = 0
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model.model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
        if backward:
            out.backward(torch.ones_like(out))

    step()
    expected = activations(model.config, 2, 256, dtype=dtype, autocast=autocast, checkpointing=checkpointing)
    assert expected.peak == pytest.approx(peak(step), rel=0.02)
    model.gradient_checkpointing_disable()
    with torch.no_grad():
        assert expected.scoring == pytest.approx(peak(lambda: step(backward=False)), rel=0.02)


def test_activations_of_the_published_formula():
    # arXiv 2205.05198, equation 2 less its attention matrix and dropout: s b h (34 - 3) for a layer of GPT's shape,
    # whose GELU is a SiLU with a gate here, and whose norms work in float32: the same order, larger.
    config = Qwen2Config(**SMALL | {"num_key_value_heads": 4})
    one = activations(config, 4, 256, flash=True).kept / config.num_hidden_layers
    assert 31 < one / (4 * 256 * config.hidden_size) < 62


@pytest.mark.parametrize("gradient", [True, False])
def test_lm_head(tmp_path, monkeypatch, gradient):
    fold_nothing(monkeypatch)
    config = Qwen2Config(**SMALL | {"vocab_size": 5000, "hidden_size": 256, "num_hidden_layers": 1})
    run = run_of(tmp_path, "--bf16", "false", "--max_completion_length", 300)
    weight = torch.zeros(5000, 256, requires_grad=gradient)
    targets = torch.zeros(8 * 300, dtype=torch.long)

    def head():
        hidden = torch.zeros(8 * 300, 256, requires_grad=gradient)
        logps, *_ = chunked.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",)
        )
        if gradient:
            logps.sum().backward()
            weight.grad = None

    measured = peak(head)
    assert head_memory(facts(config), run, 8, gradient) == pytest.approx(measured, rel=0.01)


def test_the_whole_loss(make_trainer, tmp_path, monkeypatch):
    """The peak of TRL's loss and its backward pass, with everything that exists then."""
    length = 64
    config = Qwen2Config(**SMALL, pad_token_id=0)
    rows = {"per_device_train_batch_size": 8, "steps_per_generation": 1, "num_generations": 4}
    arguments = [x for key, value in rows.items() for x in (f"--{key}", value)]
    arguments += ["--max_completion_length", length, "--bf16", "false", "--gradient_checkpointing", "false"]
    run = run_of(tmp_path, *arguments, prompt=16)
    trainer = make_trainer(
        model=Qwen2ForCausalLM(config), max_completion_length=length, entropy_control="clip_cov", **rows
    )
    trainer.model.train()
    tokens = torch.randint(2, 500, (8, length))
    inputs = {
        "prompt_ids": tokens[:, :16],
        "prompt_mask": torch.ones(8, 16, dtype=torch.long),
        "completion_ids": tokens,
        "completion_mask": torch.ones(8, length, dtype=torch.long),
        "advantages": torch.randn(8),
        "num_items_in_batch": torch.tensor(8 * length),
        "row_ids": torch.arange(8),
    }
    inputs["completion_mask"][0, -3:] = 0

    def step():
        trainer._compute_loss(trainer.model, inputs).backward()
        trainer.model.zero_grad()
        trainer._step_window = None

    fold_nothing(monkeypatch)
    step()
    measured = peak(step)
    items = memory(facts(config), run, Sharding("none"), Hardware(1, GIB, 1.0, 1.0, 1.0, 0.0))
    names = ("gradients", "activations kept", "one layer at work", "entropy control")
    expected = sum(item.size for item in items if item.name.startswith(names))
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("vllm", [True, False])
def test_rollout_buffer(make_trainer, tmp_path, vllm):
    trainer = make_trainer(steps_per_generation=4, num_generations=4, max_completion_length=6)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer._prepare_inputs(batch)
    rollout = trainer._buffered_inputs
    length = rollout[0]["prompt_ids"].shape[1]
    got = rollout[0]["completion_ids"].shape[1]
    tensors = [t for part in rollout for t in part.values() if isinstance(t, torch.Tensor)]
    arguments = ["--per_device_train_batch_size", 8, "--steps_per_generation", 4, "--max_completion_length", got]
    run = run_of(tmp_path, *arguments, "--bf16", "false", prompt=length)
    if vllm:  # keeps two more numbers of four bytes for a completion token, at most: vLLM's own, and their ratio
        more = replace(run, use_vllm=True, vllm_correction=True)
        assert rollout_bytes(more) - rollout_bytes(run) == 4 * 32 * got
    else:
        assert rollout_bytes(run) == pytest.approx(size(tensors), abs=64)  # the count of tokens, once a part


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.needs_pool])
def test_entropy_controls_memory(name):
    rows, length = 64, 512
    pool = TokenBatch(
        logps=-3 * torch.rand(rows, length),
        old_logps=torch.zeros(rows, length),
        advantages=torch.randn(rows, 1),
        mask=torch.ones(rows, length, dtype=torch.bool),
        row_ids=torch.arange(rows),
        clipped=None,
        seed=0,
        rounding=0.0,
        ranks=_Alone(),
        entropies=torch.rand(rows, length),
    )
    control = CONTROLS[name]()

    def select():
        selection = control.select(pool)
        if selection.covariance is not None:
            covariance_metrics(selection.covariance, pool.mask, selection.selected, pool.ranks)

    select()
    measured = peak(select) / (rows * length)
    assert measured < POOL_BYTES
    assert measured > POOL_BYTES / 2 or name == "steer"  # which makes no table of quantiles


class _Alone:
    several = True

    def sum(self, value):
        return value

    min = sum


def test_adams_temporaries():
    parameters = [torch.zeros(100_000, requires_grad=True) for _ in range(4)]
    optimizer = torch.optim.AdamW(parameters, foreach=True)  # what a GPU gets with adamw_torch
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert peak(optimizer.step) == pytest.approx(4 * 400_000, rel=0.05)


def test_optimizers_of_transformers():
    assert optimizer_bytes("adamw_torch_fused", 4) == 8
    assert optimizer_bytes("adamw_bnb_8bit", 4) == optimizer_bytes("paged_adamw_8bit", 4) == 2
    assert optimizer_bytes("sgd", 4) == 0
    assert optimizer_bytes("unheard_of", 4) == 8


def test_vllms_cache():
    # As reported in vllm-project/vllm issue 17117: of 0.25 x 79.14 GiB, 8.64 are weights and 10.74 are for the cache.
    plan = shipped("qwen2.5-7b", 8)
    run = replace(plan.run, vllm_gpu_memory_utilization=0.25)
    model = replace(plan.model, params=int(8.64 * GIB / 2))
    tokens = vllm_kv_tokens(model, run, replace(plan.hardware, gpu_memory=int(79.14 * GIB)))
    assert tokens * 2 * model.kv_token == pytest.approx(10.74 * GIB, rel=0.1)


# Time


@pytest.mark.parametrize("checkpointing", [True, False])
def test_flops(make_trainer, tmp_path, checkpointing):
    length, rows = 60, {"per_device_train_batch_size": 8, "steps_per_generation": 1, "num_generations": 4}
    config = Qwen2Config(**SMALL, pad_token_id=0)
    arguments = [x for key, value in rows.items() for x in (f"--{key}", value)]
    arguments += ["--max_completion_length", length, "--bf16", "false", "--gradient_checkpointing", checkpointing]
    run = run_of(tmp_path, *arguments, prompt=1)
    trainer = make_trainer(
        model=Qwen2ForCausalLM(config),
        max_completion_length=length,
        gradient_checkpointing=checkpointing,
        entropy_control=None,
        **rows,
    )
    model = trainer.model.train()
    model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(2, 500, (8, length))
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": tokens,
        "completion_mask": torch.ones(8, length, dtype=torch.long),
        "advantages": torch.randn(8),
        "num_items_in_batch": torch.tensor(8 * length),
    }
    with FlopCounterMode(display=False) as counter:
        loss = trainer._compute_loss(model, inputs)
    small = facts(config)
    assert scoring_flops(small, run) == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
    # Attention in pieces, which the counter knows, keeps the scores that a fused kernel makes again. The counter does
    # not see the two products that the head's backward pass adds in place, and recomputation stops before the last
    # product of a layer, whose result nobody needs.
    tokens = 8 * run.length
    expected = loss_flops(small, run) - 0.5 * forward_flops(replace(small, body=0), tokens, run.length)
    expected -= 2 * 2 * 8 * length * small.head
    if checkpointing:
        expected -= 2 * tokens * config.num_hidden_layers * config.hidden_size * config.intermediate_size
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_rule_of_six():
    # 6 P for a token of training, 8 P with recomputation (arXiv 2001.08361, 2205.05198), at 7B and without attention.
    plan = shipped("qwen2.5-7b", 8)
    tokens = plan.run.per_device_train_batch_size * plan.run.length
    attention = forward_flops(replace(plan.model, body=0), tokens, plan.run.length)
    per_token = (loss_flops(plan.model, plan.run) - 4.5 * attention) / tokens
    assert per_token / plan.model.params == pytest.approx(8, rel=0.1)


def test_generation_reads_weights_and_cache():
    plan = shipped("qwen2.5-7b", 8)
    twice = replace(plan.hardware, hbm_bandwidth=2 * plan.hardware.hbm_bandwidth, flops=2 * plan.hardware.flops)
    seconds = generation_seconds(plan.model, plan.run, plan.hardware)
    assert generation_seconds(plan.model, plan.run, twice) == pytest.approx(seconds / 2)
    weights = 2 * (plan.model.params - plan.model.head) * plan.run.max_completion_length / plan.hardware.hbm_bandwidth
    assert seconds > weights


# Communication


def launch(out, sharding, **job):
    """Two real processes of tests/jobs/plan_job.py; what the first of them sent and holds."""
    out.mkdir()
    script = [str(JOBS / "plan_job.py"), str(out), json.dumps({"model": TINY, **CASE, **job})]
    accelerate_launch(sharding, 2, "--dynamo_backend", "no", *script)
    return json.loads((out / "rank0.json").read_text())


def case(tmp_path, *arguments):
    values = [x for key, value in CASE.items() for x in (f"--{key}", value)]
    return run_of(tmp_path, *values, "--num_generations", 4, "--max_completion_length", 6, *arguments, processes=2)


@pytest.mark.parametrize("name", [pytest.param("kl_cov", marks=pytest.mark.slow), "clip_cov"])
def test_messages_of_two_processes(tmp_path, name):
    kwargs = {"cov_low": 1e-9} if name == "clip_cov" else {}  # so that there is something to draw from
    got = launch(tmp_path / "out", "ddp", max_steps=2, entropy_control=name, entropy_control_kwargs=kwargs, bf16=False)
    run = case(tmp_path, "--entropy_control", name, "--bf16", "false")
    ours = [(size, number) for caller, n, size, number in got["calls"] if (caller, n) == ("entropy_trl", "all_reduce")]
    calls, most = control_messages(run)
    ties = 6 if name == "kl_cov" else 0  # histograms that only equal covariances need
    assert sum(number for _, number in ours) == run.updates * (calls - ties)
    assert sum(size * number for size, number in ours) == pytest.approx(run.updates * (most - ties * 16384), abs=300)
    theirs = Counter()
    for caller, n, _, number in got["calls"]:
        if caller == "trl" or n == "all_gather":
            theirs[n] += number
    theirs["all_gather"] -= 1  # transformers', of the loss that it logs
    reductions, gathers = trl_messages(run)
    assert theirs["all_reduce"] == reductions
    # torch gathers objects in two messages: their sizes, and the bytes.
    assert theirs["all_gather"] + 2 * theirs["all_gather_object"] == gathers + 1  # ours, of the completions' digests
    model = facts(TINY)
    states = model_states(model, run, Sharding("ddp"), 2)
    assert got["held"] == {"parameters": states["parameters"], "optimizer": states["optimizer"]}
    # DDP's buckets are copies of the gradients, and go round once a step.
    assert moved(got, "copies", "ddp") == sent(model, run, "ddp", "gradients") == run.updates * states["gradients"]
    buckets = [item for item in memory(model, run, Sharding("ddp"), HARDWARE) if item.name.startswith("DDP")]
    assert buckets[0].size == states["gradients"]


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fsdp2(tmp_path, checkpointing):
    got = launch(tmp_path / "out", "fsdp2", gradient_checkpointing=checkpointing, **BF16)
    run = case(tmp_path, "--bf16", "true", "--gradient_checkpointing", checkpointing)
    model = facts(TINY)
    states = model_states(model, run, Sharding("fsdp"), 2)
    assert got["held"] == {key: states[key] for key in got["held"]}
    unreduced = [item for item in memory(model, run, Sharding("fsdp"), HARDWARE) if "not yet reduced" in item.name]
    assert unreduced[0].size == got["unreduced"]
    # What comes after the last layer stays gathered between two passes.
    gathered, reduced = (moved(got, name, "_fully_shard") for name in ("all_gather_single", "reduce_scatter_single"))
    assert sent(model, run, "fsdp", "parameters") == pytest.approx(gathered, rel=0.05)
    assert sent(model, run, "fsdp", "gradients") == reduced


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("checkpointing", [True, False])
def test_zero3(tmp_path, checkpointing):
    skip_without_deepspeed()
    keys = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    zero = deepspeed(3, **{f"stage3_{key}": 0 for key in keys})
    got = launch(tmp_path / "out", "ddp", deepspeed=zero, gradient_checkpointing=checkpointing, **BF16)
    run = case(tmp_path, "--bf16", "true", "--gradient_checkpointing", checkpointing)
    model = replace(facts(TINY), persistent=0, modules=1)
    states = model_states(model, run, Sharding("zero3"), 2)
    assert got["held"] == {key: states[key] for key in got["held"]}
    gathered, reduced = (moved(got, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor"))
    assert sent(model, run, "zero3", "parameters") == pytest.approx(gathered, rel=0.1)
    assert sent(model, run, "zero3", "gradients") == reduced


@pytest.mark.slow
@pytest.mark.deepspeed
def test_zero2(tmp_path):
    skip_without_deepspeed()
    got = launch(tmp_path / "out", "ddp", deepspeed=deepspeed(2), gradient_checkpointing=True, **BF16)
    run = case(tmp_path, "--bf16", "true")
    model = facts(TINY)
    states = model_states(model, run, Sharding("zero2"), 2)
    assert got["held"] == {key: states[key] for key in got["held"]}
    assert sent(model, run, "zero2", "gradients") == pytest.approx(moved(got, "all_reduce"), rel=1e-3)
    assert sent(model, run, "zero2", "updated parameters") == moved(got, "all_gather_into_tensor")


def skip_without_deepspeed():
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-distributed")
    if shutil.which("g++") is None:
        pytest.skip("needs g++, with which DeepSpeed builds its communication for CPUs")


def deepspeed(stage, **zero):
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return dict.fromkeys(auto, "auto") | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage, **zero}}


def moved(got, name, by="deepspeed"):
    """Bytes of the tensors of these collectives, in all."""
    return sum(size * number for caller, n, size, number in got["calls"] if (caller, n) == (by, name))


def sent(model, run, kind, name):
    line = next(line for line in communication(model, run, Sharding(kind), 2) if line.name == name)
    return line.size * line.calls


def test_a_selection_moves_the_same_whatever_the_pool():
    assert selection_messages(KLCov()) == (10, 32 + 16 + 3 * 16384 + 5 * 3 * 16384)
    assert selection_messages(KLCov(), ties=True)[1] - selection_messages(KLCov())[1] == 96 * 1024
    clip = selection_messages(CONTROLS["clip_cov"]())
    assert clip[1] == pytest.approx((96 + 240) * 1024, abs=64)


def test_latency():
    assert latency("all_reduce", 2, 1.0) == (2, 2)
    assert latency("all_reduce", 4096, 1.0) == (8190, 24)
    assert latency("all_gather", 4096, 1.0)[0] == 4095


# The plan and the command


def test_published_recipes_fit():
    recipe = ("--gradient_accumulation_steps", "4", "--steps_per_generation", "32")
    small, large = shipped("qwen2.5-7b", 8, *recipe), shipped("qwen2.5-32b", 32)
    for plan, low, high in ((small, 60, 75), (large, 60, 78)):
        assert plan.fits and suggest(plan) == []
        assert low < plan.peak / GIB < high
        assert max(plan.by_phase, key=plan.by_phase.get) == "loss"
        # The entropy control is nothing beside the model.
        control = next(item for item in plan.items if item.name == "entropy control")
        assert control.size < 0.001 * plan.peak
    assert shipped("qwen2.5-7b", 8, *recipe, memory_gib=40).fits is False


@pytest.mark.parametrize(
    ("arguments", "memory_gib", "names"),
    [
        (("--gradient_checkpointing", "false"), 80, {"gradient_checkpointing"}),
        ((), 48, {"per_device_train_batch_size"}),
        (("--vllm_enable_sleep_mode", "false", "--vllm_gpu_memory_utilization", "0.5"), 80, {"vllm_enable_sleep_mode"}),
        (("--vllm_max_model_length", "none", "--vllm_gpu_memory_utilization", "0.2"), 80, {"vllm_max_model_length"}),
        (("--vllm_gpu_memory_utilization", "0.9"), 80, {"vllm_gpu_memory_utilization"}),
        (("--vllm_gpu_memory_utilization", "0.18"), 80, {"vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"}),
    ],
)
def test_what_to_change(arguments, memory_gib, names):
    plan = shipped("qwen2.5-7b", 8, *arguments, memory_gib=memory_gib)
    assert not plan.fits
    changes = suggest(plan)
    assert names <= {change.text.split(":")[0] for change in changes}
    assert all(change.plan.fits for change in changes)
    rows = plan.run.per_device_train_batch_size * plan.run.gradient_accumulation_steps
    for change in changes:
        if change.plan.hardware == plan.hardware:
            run = change.plan.run
            assert run.per_device_train_batch_size * run.gradient_accumulation_steps == rows
            assert run.updates == plan.run.updates


def test_several_changes_and_more_gpus():
    plan = shipped("qwen2.5-32b", 8, memory_gib=80, sharding=str(CONFIGS / "accelerate" / "ddp.yaml"))
    changes = suggest(plan)
    assert changes and all(change.plan.fits for change in changes)
    assert "zero3" in changes[0].text


@pytest.mark.parametrize(
    ("name", "kind", "offload"),
    [
        ("zero2", "zero2", False),
        ("zero3", "zero3", False),
        ("zero3_offload", "zero3", True),
        ("fsdp2", "fsdp", False),
        ("ddp", "ddp", False),
    ],
)
def test_shipped_accelerate_configs(name, kind, offload):
    sharding = load_sharding(str(CONFIGS / "accelerate" / f"{name}.yaml"), None, 8)
    assert (sharding.kind, sharding.offload_optimizer, sharding.offload_params) == (kind, offload, offload)
    plan = shipped("qwen2.5-7b", 8, sharding=str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert set(plan.by_phase) == set(PHASES) and all(plan.by_phase.values())
    assert load_sharding(None, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 8).kind == "zero2"
    assert load_sharding(None, None, 8).source.startswith("assumed")


def command(*arguments):
    config = CONFIGS / "qwen2.5-7b" / "kl_cov.yaml"
    given = ["--config", str(config), "--gpus", "8", "--model_config", str(DATA / "qwen2.5-7b.json"), *arguments]
    return main(["plan", *given])


def test_command(capsys):
    assert command("--gpu_memory", "80", "--accelerate_config", ZERO3) == 0
    out = capsys.readouterr().out
    assert "7,615,616,512 parameters" in out and "Fits:" in out
    assert command("--gpu-memory", "40") == 1
    out = capsys.readouterr().out
    assert (
        "assumed: no --accelerate_config" in out
        and "Does not fit:" in out
        and "per_device_train_batch_size: 8 ->" in out
    )


def test_json(capsys):
    assert command("--json", "--gpu_memory", "40") == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False and plan["changes"] and plan["model"]["params"] == PUBLISHED["qwen2.5-7b"]
    assert plan["bytes_by_phase"]["loss"] == plan["peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu_memry", "80"), "--gpu_memry"),
        (("--model_config", "missing.json"), "missing.json"),
        (("--accelerate_config", "missing.yaml"), "missing.yaml"),
        (("--vllm_tensor_parallel_size", "3"), "must divide the GPUs"),
        (("--gpus", "0"), "--gpus"),
        (("--load_in_4bit", "true"), "load_in_4bit"),
        (("--accelerate_config", str(CONFIGS / "accelerate" / "single_gpu.yaml")), "one process"),
        *(
            (("--" + name, str(limits.low - 1)), f"`{name}` must be at least {limits.low}, got {limits.low - 1}")
            for name, limits in config_checks._RANGES.items()
            if limits.low > 0
        ),
        (("--num_iterations", "-3"), "`num_iterations` must be at least 1, got -3"),
        (("--max_completion_length", "1000000000000000"), "cannot be planned with these lengths"),
        (("--max_completion_length", "9" * 30), "cannot be planned with these lengths"),
        *(
            (("--vllm_gpu_memory_utilization", share), "must lie in (0, 1]")
            for share in ("nan", "-1", "0", "1.5", "inf")
        ),
        (("--vllm_mode", "none"), "Unknown `vllm_mode` 'none'"),
        *((("--beta", beta), "`beta` must be at least 0") for beta in ("nan", "-1", "inf")),
        *((("--temperature", value), "`temperature` must be above 0") for value in ("nan", "0")),
        (("--gpu_memory", "1e308"), "must lie between"),
        (("--hbm_bandwidth", "1e-320"), "must lie between"),
    ],
)
def test_mistakes(capsys, arguments, says):
    assert command(*arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("entropy-trl plan: error: ") and says in last


@pytest.mark.parametrize(
    ("option", "name", "text", "says"),
    [
        *(("--model_config", "config.json", text, "no model_type") for text in ("[]", "3", "{}", '{"model_type": 3}')),
        ("--model_config", "config.json", "[" * 100_000, "cannot be read"),
        ("--model_config", "config.json", '{"model_type": "qwen2", "num_hidden_layers": 1%s}' % ("0" * 400), "at most"),
        ("--model_config", "config.json", json.dumps({"model_type": "qwen2", "hidden_size": "x"}), "expected int"),
        *(("--model_config", "config.json", json.dumps({"model_type": "qwen2"} | SMALL | {key: value}), f"{key} of its")
          for key, value in (("hidden_size", 0), ("num_attention_heads", 0), ("vocab_size", 10**30))),
        ("--model_config", "config.json", json.dumps({"model_type": "qwen2"} | SMALL | {"hidden_act": "no"}), "'no'"),
        *(("--accelerate_config", "a.yaml", text, "cannot be read") for text in ("{", "- 1", "", "a: 3: 4")),
        ("--accelerate_config", "a.yaml", "distributed_type: DEEPSPEED\ndeepspeed_config: 3\n", "must be a mapping"),
        ("--accelerate_config", "a.yaml", "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 7}", "stage 7"),
        *(("--deepspeed", "ds.json", text, "DeepSpeed configuration")
          for text in ("{", "[]", "3", '{"zero_optimization": 3}', '{"zero_optimization": {"stage": 9}}',
                       '{"zero_optimization": {"stage": 3, "offload_param": 3}}', "[" * 100_000)),
    ],
)  # fmt: skip
def test_damaged_files(option, name, text, says, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    argv = [] if option == "--model_config" else ["--model_config", str(DATA / "qwen2.5-0.5b.json")]
    assert main(["plan", "--gpus", "2", *argv, option, str(tmp_path / name)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("entropy-trl plan: error: ") and says in last


def test_zero3_gathers_nothing_of_a_model_of_small_parameters(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(Qwen2Config(**SMALL).to_dict()))
    assert main(["plan", "--gpus", "3", "--model_config", str(tmp_path / "config.json"), "--json"]) == 0
    assert "parameters" not in [line["name"] for line in json.loads(capsys.readouterr().out)["communication"]]


@pytest.mark.parametrize("layers", [1, 2])
def test_small_models(layers, tmp_path, capsys):
    """Their activations are those of the model as it is; a third layer adds what a second one adds."""
    config = Qwen2Config(**SMALL | {"num_hidden_layers": layers})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    argv = ["--gpus", "1", "--model_config", str(tmp_path / "config.json"), "--output_dir", str(tmp_path / "out")]
    assert main(["plan", *argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["params"] == Qwen2ForCausalLM(config).num_parameters()
    one, two, three = (
        activations(Qwen2Config(**SMALL | {"num_hidden_layers": n}), 2, 64, checkpointing=False) for n in (1, 2, 3)
    )
    assert 0 < one.kept < two.kept
    assert three.kept - two.kept == two.kept - one.kept


@pytest.mark.parametrize(
    "option",
    ["gpus", "gpus_per_node", "gpu_memory", "flops", "bandwidth", "hbm_bandwidth", "prompt_length",
     "mean_completion_length", "mfu", "latency"],
)  # fmt: skip
def test_numbers_that_no_machine_has(option, capsys):
    whole = option in ("gpus", "gpus_per_node", "prompt_length", "mean_completion_length")
    for value in ["-1", *([] if option == "latency" else ["0"]), *([] if whole else ["nan", "inf"])]:
        assert command(f"--{option}", value) == 2, value
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"entropy-trl plan: error: --{option} must ") and f"got {value}" in last


def test_a_model_that_cannot_be_had(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--gpus", "1", "--model_name_or_path", "nobody/nothing", "--output_dir", "out"]) == 2
    assert "--model_config FILE" in capsys.readouterr().err


def test_the_documentation_says_what_the_command_says(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "docs" / "scaling.md").read_text()
    examples = re.findall(r"^```\n\$ entropy-trl (plan .*)\n([\s\S]*?)^```", text, re.MULTILINE)
    assert len(examples) == 2
    for line, output in examples:
        model = re.search(r"configs/(qwen2.5-\d+b)/", line)[1]
        main([*line.split(), "--model_config", str(DATA / f"{model}.json")])
        assert capsys.readouterr().out == output
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named and named <= {name for name in globals() if name.startswith("test_")}
    fits_not = re.search(r"^Does not fit: .*\n[\s\S]*?(?=^```)", text, re.MULTILINE)[0]
    main(
        [
            *examples[0][0].replace("--gpu_memory 80", "--gpu_memory 40").split(),
            "--model_config",
            str(DATA / "qwen2.5-7b.json"),
        ]
    )
    assert capsys.readouterr().out.endswith(fits_not)
