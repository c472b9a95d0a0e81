"""The command `entropy-trl plan`: its options, and what it prints."""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from entropy_trl.mistakes import told_of
from entropy_trl.plan.inputs import Hardware, load_sharding, read_run
from entropy_trl.plan.memory import GIB, PHASES, model_states
from entropy_trl.plan.model import load_config, model_facts
from entropy_trl.plan.verdict import Plan, suggest


if TYPE_CHECKING:
    from trl import ModelConfig

    from entropy_trl.config import CovGRPOConfig


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values of a GPU: GiB, dense bf16 TFLOP/s, memory GB/s, links within a node GB/s in one direction."""

    memory: float
    tflops: float
    hbm_bandwidth: float
    link: float


GPUS = {
    "h100": Gpu(80, 989, 3350, 450),  # H100 SXM
    "h200": Gpu(141, 989, 4800, 450),  # H200 SXM
    "a100": Gpu(80, 312, 2039, 300),  # A100 SXM 80 GB
}
#: Between nodes: one network card of 400 Gbit/s for each GPU, GB/s.
NETWORK = 50.0

#: Ranks at which the growth of the communication is shown.
SCALES = (8, 64, 512, 4096)


DESCRIPTION = (
    "Compute what a run takes of given hardware. The training configuration is given as to `entropy-trl train`: "
    "`--config FILE.yaml` and any of its options. Exit code 0: it fits, 1: it does not."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `entropy-trl plan`, beside those of `entropy-trl train`."""
    parser.add_argument("--gpus", type=int, required=True, help="GPUs, one process each")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="whose data sheet the defaults below are from")
    parser.add_argument(
        "--gpu_memory", "--gpu-memory", type=float, help="GiB of a GPU, as its name says (the data sheet's)"
    )
    parser.add_argument(
        "--accelerate_config", help="the file of `accelerate launch --config_file`: how the model is sharded"
    )
    parser.add_argument("--model_config", help="the model's config.json, if it is in no folder and there is no network")
    parser.add_argument("--prompt_length", type=int, help="longest prompt, tokens (what vllm_max_model_length leaves)")
    parser.add_argument("--mean_completion_length", type=int, help="mean completion, tokens (max_completion_length)")
    parser.add_argument("--flops", type=float, help="peak TFLOP/s of a GPU in bf16 (the data sheet's)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of it that is reached (0.4)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs that fast links connect (8)")
    parser.add_argument(
        "--bandwidth",
        type=float,
        help=f"GB/s of a GPU to the others, in one direction (the data sheet's in a node, {NETWORK:g} across nodes)",
    )
    parser.add_argument("--hbm_bandwidth", type=float, help="GB/s of a GPU to its own memory (the data sheet's)")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds of a message between two ranks (10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def prepare(options: argparse.Namespace) -> Plan:
    """Make the plan that the command line asks for.

    Args:
        options (`argparse.Namespace`): The options of [`add_arguments`]; and `training_args` (`CovGRPOConfig`) and
            `model_args` (`ModelConfig`), which the rest of the command line was parsed to as `entropy-trl train` does.

    Returns:
        [`Plan`]: The plan.

    Raises:
        ValueError: An input cannot be had or cannot be planned; in one line.
    """
    from trl import get_peft_config

    training: CovGRPOConfig = options.training_args
    model_args: ModelConfig = options.model_args
    _check_options(options)
    gpu = GPUS[options.gpu]
    link = gpu.link if options.gpus <= options.gpus_per_node else NETWORK
    hardware = Hardware(
        gpus=options.gpus,
        gpu_memory=int(_given(options.gpu_memory, gpu.memory) * GIB),
        flops=_given(options.flops, gpu.tflops) * 1e12 * options.mfu,
        bandwidth=_given(options.bandwidth, link) * 1e9,
        hbm_bandwidth=_given(options.hbm_bandwidth, gpu.hbm_bandwidth) * 1e9,
        latency=options.latency * 1e-6,
    )
    planned = read_run(training, model_args, options.prompt_length, options.mean_completion_length)
    if planned.vllm_colocate and hardware.gpus % planned.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size ({planned.vllm_tensor_parallel_size}) must divide the GPUs ({hardware.gpus})."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("Quantized weights (load_in_4bit, load_in_8bit) cannot be planned.")
    name = model_args.model_name_or_path or "the model of --model_config"
    if model_args.model_name_or_path is None and options.model_config is None:
        raise ValueError("No model: give --model_name_or_path (a hub id or a folder), or --model_config FILE.")
    config = load_config(name, options.model_config, model_args.model_revision)
    facts = model_facts(name, config, get_peft_config(model_args))
    plan = Plan(facts, planned, load_sharding(options.accelerate_config, training.deepspeed, options.gpus), hardware)
    with told_of(f"{name} cannot be planned with these lengths and batches"):
        _ = plan.items, plan.seconds()  # both are kept: what cannot be computed is told before the first line
    return plan


#: Options that must be above 0 and finite; the others are latency, which may be 0, and mfu, a share.
_POSITIVE = (
    "gpus",
    "gpus_per_node",
    "gpu_memory",
    "flops",
    "bandwidth",
    "hbm_bandwidth",
    "prompt_length",
    "mean_completion_length",
)


#: No number of a machine or a run is beyond it, or below its inverse, where sums overflow.
_MOST = 1e9


def _check_options(options: argparse.Namespace) -> None:
    """Raises ValueError unless each number can be one of a machine or a run."""
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and not (value > 0 and value < math.inf):
            raise ValueError(f"--{name} must be positive and finite, got {value:g}. Leave it out for the default.")
        if value is not None and not 1 / _MOST <= value <= _MOST:
            raise ValueError(f"--{name} must lie between {1 / _MOST:g} and {_MOST:g}, got {value:g}.")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu must lie in (0, 1], got {options.mfu:g}: it is the share of the peak that is reached.")
    if options.mfu < 1 / _MOST:
        raise ValueError(f"--mfu must be at least {1 / _MOST:g}, got {options.mfu:g}.")
    if not 0 <= options.latency < math.inf:
        raise ValueError(f"--latency must be finite and not negative, got {options.latency:g}.")
    if options.latency > _MOST:
        raise ValueError(f"--latency must be at most {_MOST:g}, got {options.latency:g}.")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def run(prepared: Plan, options: argparse.Namespace) -> int:
    """Print a plan. Returns the exit code: 0 if it fits, 1 if it does not."""
    print(json.dumps(as_dict(prepared), indent=2) if options.json else report(prepared))
    return 0 if prepared.fits else 1


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds, elements."""
    model = {k: v for k, v in asdict(replace(plan.model, config=None)).items() if k != "config"}
    return {
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "bytes_by_phase": plan.by_phase,
        "memory": [asdict(item) for item in plan.items],
        "vllm_kv_tokens": plan.kv_tokens,
        "seconds_per_rollout": plan.seconds(),
        "communication": [asdict(t) | {"sent_per_rollout": t.sent(plan.hardware.gpus)} for t in plan.traffic],
        "changes": [change.text for change in suggest(plan)],
        "model": model,
        "run": asdict(plan.run),
        "sharding": asdict(plan.sharding),
        "hardware": asdict(plan.hardware),
    }


def report(plan: Plan) -> str:
    """The plan for people."""
    parts = (_head(plan), _memory(plan), _time(plan), _growth(plan), _verdict(plan))
    return "\n\n".join(text for part in parts if (text := "\n".join(part)))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 200 else f"{size / GIB:.1e}"


def _head(plan: Plan) -> Iterator[str]:
    model, run, hardware = plan.model, plan.run, plan.hardware
    yield f"{model.name}: {model.params:,} parameters, {model.trainable:,} of them trained"
    yield f"{hardware.gpus} GPUs of {hardware.gpu_memory / GIB:g} GiB, {plan.sharding.kind} ({plan.sharding.source})"
    yield (
        f"step: {run.per_device_train_batch_size} rows x {run.gradient_accumulation_steps} micro-batches x "
        f"{hardware.gpus} GPUs; rollout: {run.rollout_rows * hardware.gpus} rows of up to {run.prompt_length} + "
        f"{run.max_completion_length} tokens, {run.updates} steps"
    )
    if run.use_vllm and not run.vllm_colocate:
        yield "vLLM is on other GPUs (vllm_mode: server), which are not planned here."
    if not run.use_vllm:
        yield "Generation is by transformers (use_vllm: false); its time is reckoned as if it were vLLM's: less."


def _memory(plan: Plan) -> Iterator[str]:
    yield f"{'Memory of a GPU, GiB':<46}" + "".join(f"{phase:>10}" for phase in PHASES)
    for item in plan.items:
        cells = (_gib(item.size) if phase in item.phases else "" for phase in PHASES)
        yield (f"  {item.name:<44}" + "".join(f"{cell:>10}" for cell in cells)).rstrip()
    yield f"  {'together':<44}" + "".join(f"{_gib(size):>10}" for size in plan.by_phase.values())
    if host := model_states(plan.model, plan.run, plan.sharding, plan.hardware.gpus)["host"]:
        yield f"  {'in the memory of the host, for each GPU':<44}{_gib(host):>10}"
    if plan.kv_tokens is not None:
        rows = plan.run.rollout_rows * plan.run.vllm_tensor_parallel_size
        yield (
            f"  vLLM's cache holds {max(plan.kv_tokens, 0):,} tokens: "
            f"{max(plan.kv_tokens, 0) / plan.run.length:.1f} of an engine's {rows} rows at full length"
        )


def _time(plan: Plan) -> Iterator[str]:
    hardware, seconds = plan.hardware, plan.seconds()
    work = [v for k, v in seconds.items() if "communication" not in k]
    yield "Time of a rollout with its steps, seconds"
    for name, value in seconds.items():
        yield f"  {name:<44}{value:>10.1f}"
    yield f"  {'all of it, with and without overlap':<44}{sum(work):>10.0f} to {sum(seconds.values()):.0f}"
    yield (
        f"  at {hardware.flops / 1e12:.0f} TFLOP/s, {hardware.bandwidth / 1e9:g} GB/s between GPUs, "
        f"{hardware.hbm_bandwidth / 1e9:g} GB/s of memory, {hardware.latency * 1e6:g} us a message"
    )


def _growth(plan: Plan) -> Iterator[str]:
    if plan.hardware.gpus == 1:
        return
    yield "Communication of a rollout with its steps, as ranks are added (the batch of a rank kept)"
    columns = [f"GB at {n}" for n in SCALES] + [f"s at {n}" for n in SCALES]
    yield f"  {'':<32}{'calls':>7}" + "".join(f"{column:>11}" for column in columns)
    plans = [replace(plan, hardware=replace(plan.hardware, gpus=n)) for n in SCALES]
    for lines in zip(*(p.traffic for p in plans), strict=True):
        sent = [line.sent(n) / 1e9 for line, n in zip(lines, SCALES, strict=True)]
        waits = [line.waits(n, plan.hardware.latency) for line, n in zip(lines, SCALES, strict=True)]
        cells = "".join(f"{cell:>11.2g}" if cell < 100 else f"{cell:>11.0f}" for cell in sent + waits)
        yield f"  {lines[0].name:<32}{lines[0].calls:>7}{cells}"
    yield "  GB: what a rank sends. s: latency alone, all-reduces by the tree, the others by the ring."


def _verdict(plan: Plan) -> Iterator[str]:
    memory_limit = plan.hardware.gpu_memory
    phase = max(plan.by_phase, key=lambda name: plan.by_phase[name])
    if plan.fits:
        yield f"Fits: {_gib(memory_limit - plan.peak)} GiB to spare (most is held in: {phase})."
        return
    if plan.peak > memory_limit:
        yield f"Does not fit: {_gib(plan.peak - memory_limit)} GiB too much (in: {phase})."
    if not plan.vllm_starts:
        yield (
            f"vLLM does not start: its cache has room for {max(plan.kv_tokens or 0, 0):,} tokens, a sequence may have "
            f"{plan.longest:,}."
        )
    changes = suggest(plan)
    yield (
        "Change one of these, and it fits:" if changes else "No setting known here makes it fit, nor 16 times the GPUs."
    )
    for change in changes:
        yield f"  {change.text}  ({_gib(memory_limit - change.plan.peak)} GiB to spare)"
