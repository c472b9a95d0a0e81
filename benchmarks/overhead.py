"""What entropy control costs: step time and peak memory of `CovGRPOTrainer` as ratios to stock `trl.GRPOTrainer`.

    python benchmarks/overhead.py                                # a small Qwen2 on a CPU, Qwen2.5-0.5B's shape on a GPU
    python benchmarks/overhead.py --generate --output overhead.json
    torchrun --nproc_per_node 2 benchmarks/overhead.py           # DistributedDataParallel, the step pool over all ranks

On a CPU, `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` in the environment (glibc) keeps freed memory in the
process: less time goes into page faults, and the times scatter less.

The model is a Qwen2 with random weights and Qwen2.5's vocabulary of 151,936, built locally; nothing is downloaded.

**Cases.** `stock`, the control off, and each control with each pool, two optimizer steps a rollout, so that the
rollout's log-probabilities exist; and, beside a stock trainer of its own, `clip_cov` strictly on-policy with a step of
several micro-batches, the one case that needs an extra scoring pass.

**Rollouts** are replayed: random tokens of random lengths with random advantages, and the log-probabilities that the
initial policy gives them, the same for all cases. The loop is that of the trainer: `training_step` (loss and backward)
for each micro-batch, gradient clip, optimizer step. With `--generate` the rollouts are real ones instead, and their
generation, scoring and rewards are part of the time.

**Time.** All cases live in one process and take turns, one rollout with all its steps at a time, the order rotating. A
ratio is that of a case to its stock trainer in the same round; reported are the median and the quartiles over the
rounds, by the wall clock and, on a CPU, by the processor time of the process, which other programs disturb less. The
control that is off is stock TRL: its ratios show how exact the measurement is. Of several processes, which have
rollouts of their own and start each turn together, the first one's clock counts.

**Added time.** Where the whole step scatters by more than the control costs, this still resolves it: the same loops on
replayed rollouts with the forward pass replaced by constant log-probabilities, so that only the loss, its gradient down
to the log-probabilities and the control are left. `added` is the median over the rounds (ten times as many) of a case's
time for an optimizer step minus its stock trainer's; `1 + added` is relative to the stock trainer's whole step. The
on-policy case has none: what it adds is a forward pass.

**Memory.** Each case alone in the process, one rollout after a warm-up. On a GPU the peak is
`torch.cuda.max_memory_allocated`, reset before. On a CPU it is the bytes of the tensors that exist when the rollout
begins (weights, optimizer state, rollout) plus the highest sum of what torch's allocator hands out and takes back from
then on, as torch.profiler's memory events record it: every tensor counts at its exact size, and neither the interpreter
nor what malloc keeps for later does.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
import trl
from overhead_cases import (
    CASES,
    PROCESSES,
    PROMPT_LENGTH,
    RANK,
    VOCABULARY,
    Case,
    build_model,
    build_rollout,
    build_trainer,
)
from torch import Tensor
from trl import GRPOTrainer

import entropy_trl


TARGET = {1: 1.01, 2: 1.02}  # time / stock, by the number of processes


@contextmanager
def replayed(rollout: dict[str, Tensor] | None) -> Iterator[None]:
    """Let TRL's rollout be `rollout` (a real one if `None`)."""
    if rollout is None:
        yield
        return
    with mock.patch.object(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: dict(rollout)):
        yield


def run_rollout(trainer: GRPOTrainer) -> None:
    """One rollout and all optimizer steps on it, as `Trainer.train` makes them."""
    config = trainer.args
    prompts = [{"prompt": "word " * PROMPT_LENGTH}] * (config.per_device_train_batch_size * config.steps_per_generation)
    for _ in range(config.steps_per_generation // config.gradient_accumulation_steps):
        for i in range(config.gradient_accumulation_steps):
            last = i == config.gradient_accumulation_steps - 1
            with nullcontext() if last else trainer.accelerator.no_sync(trainer.model_wrapped):
                trainer.training_step(trainer.model_wrapped, prompts, None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), config.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
    trainer._metrics["train"].clear()


def measure_time(
    trainers: dict[Case, GRPOTrainer], rollouts: dict[bool, Any], device: str, repeats: int
) -> dict[str, dict[Case, list[float]]]:
    """Wall-clock and processor seconds of an optimizer step of each case, one value a round."""
    clocks = {"wall": time.perf_counter} | ({"processor": time.process_time} if device == "cpu" else {})
    seconds: dict[str, dict[Case, list[float]]] = {clock: {case: [] for case in trainers} for clock in clocks}
    for repeat in range(-1, repeats):  # the first round warms up
        shift = max(repeat, 0) % len(trainers)
        for case in [*trainers][shift:] + [*trainers][:shift]:
            trainer = trainers[case]
            with replayed(rollouts[case.on_policy]):
                synchronize(device)
                trainer.accelerator.wait_for_everyone()
                start = {clock: read() for clock, read in clocks.items()}
                run_rollout(trainer)
                synchronize(device)
                if repeat >= 0:
                    for clock, read in clocks.items():
                        seconds[clock][case].append((read() - start[clock]) / (1 if case.on_policy else 2))
    return seconds


def measure_added(
    trainers: dict[Case, GRPOTrainer], rollouts: dict[bool, Any], device: str, repeats: int
) -> dict[Case, float]:
    """Seconds that a case adds to an optimizer step of its stock trainer, the forward pass aside."""
    old_logps = rollouts[False]["old_per_token_logps"]

    def forward(self, model, input_ids, *args, **kwargs):
        logps = old_logps[: len(input_ids)].clone().requires_grad_()
        return logps, torch.ones_like(logps), None

    off_policy = {case: trainer for case, trainer in trainers.items() if not case.on_policy}
    with mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", forward):
        seconds = measure_time(off_policy, rollouts, device, repeats)["wall"]
    return {case: float(np.median(np.subtract(seconds[case], seconds[case.baseline]))) for case in off_policy}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def measure_memory(trainer: GRPOTrainer, rollout: dict[str, Tensor] | None, device: str) -> int:
    """Peak bytes of tensors during one rollout and its steps (see the module's docstring for how)."""
    with replayed(rollout):
        run_rollout(trainer)  # makes the optimizer's state
        gc.collect()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
            run_rollout(trainer)
            return torch.cuda.max_memory_allocated(device)
        trainer._buffered_inputs = None  # the last rollout: freed here, not while the next one is measured
        state = [value for values in trainer.optimizer.state.values() for value in values.values()]
        tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *state, *(rollout or {}).values()]
        resident = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run_rollout(trainer)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event["args"] | {"ts": event["ts"]} for event in events if event["name"] == "[memory]"]
    first = min(memory, key=lambda event: event["ts"])
    # The allocator's total goes on from one profile of the process to the next: count from where this one began.
    start = first["Total Allocated"] - first["Bytes"]
    return resident + max(event["Total Allocated"] for event in memory) - start


def ratio(values: list[float], baseline: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, pair by pair."""
    low, median, high = np.quantile(np.divide(values, baseline), [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def print_table(report: dict[str, Any]) -> None:
    """One line a case: milliseconds a step, ratios to stock with quartiles, added time, memory and its ratio."""
    kind = "with generation" if report["settings"]["generate"] else "with replayed rollouts"
    print(
        f"optimizer steps {kind}, {report['settings']['repeats']} rounds, {report['processes']} processes, "
        f"on {report['device_name']}"
    )
    print(
        f"{'case':<32}{'ms':>9}  {'time / stock':<24}{'processor / stock':<24}"
        f"{'added ms':>10}{'1 + added':>11}{'MiB':>9}  memory / stock"
    )
    for name, row in report["cases"].items():
        times = [f"{r['median']:.4f} [{r['q1']:.4f}, {r['q3']:.4f}]" for r in row["time_ratio"].values()]
        cells = "".join(f"{cell:<24}" for cell in [*times, ""][:2])
        has_added = row["added_seconds"] is not None
        added = f"{1e3 * row['added_seconds']:>10.2f}{row['added_ratio']:>11.4f}" if has_added else " " * 21
        print(
            f"{name:<32}{1e3 * row['seconds']['wall']:>9.1f}  {cells}{added}"
            f"{row['peak_bytes'] / 2**20:>9.1f}  {row['memory_ratio']:.4f}"
        )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line; sizes that are not given depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--generate", action="store_true", help="real rollouts, counted in the time")
    parser.add_argument("--vocab_size", type=int, default=VOCABULARY)
    parser.add_argument("--hidden_size", type=int, help="default: 128 on a CPU, 896 on a GPU")
    parser.add_argument("--layers", type=int, help="default: 2 on a CPU, 24 on a GPU")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; default: 4 on a CPU, 8 on a GPU")
    parser.add_argument("--micro_batches", type=int, default=2, help="micro-batches of an optimizer step")
    parser.add_argument("--completion_length", type=int, help="default: 32 on a CPU, 1024 on a GPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    sizes = {"hidden_size": (128, 896), "layers": (2, 24), "rows": (4, 8), "completion_length": (32, 1024)}
    for name, (small, large) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, small if cpu else large)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what `--output` writes."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    model = build_model(args)
    replays = {on_policy: build_rollout(model, args, on_policy) for on_policy in (False, True)}
    model.cpu()  # a trainer moves its copy to the device: the only one there when memory is measured
    rollouts = {on_policy: None if args.generate else replay for on_policy, replay in replays.items()}
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for case in CASES:
            trainer = build_trainer(case, model, args, folder)
            peaks[case] = measure_memory(trainer, rollouts[case.on_policy], args.device)
            del trainer
            gc.collect()
        trainers = {case: build_trainer(case, model, args, folder) for case in CASES}
        seconds = measure_time(trainers, rollouts, args.device, args.repeats)
        added = measure_added(trainers, replays, args.device, 10 * args.repeats)
    step = statistics.median(seconds["wall"][Case("stock")])

    cases = {
        case.name: {
            "seconds": {clock: statistics.median(values[case]) for clock, values in seconds.items()},
            "time_ratio": {clock: ratio(values[case], values[case.baseline]) for clock, values in seconds.items()},
            "added_seconds": added.get(case),
            "added_ratio": 1 + added[case] / step if case in added else None,
            "peak_bytes": peaks[case],
            "memory_ratio": peaks[case] / peaks[case.baseline],
        }
        for case in CASES
    }
    report = {
        "benchmark": "overhead",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "entropy_trl": entropy_trl.__version__,
        },
        "device_name": platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "processes": PROCESSES,
        "target": TARGET.get(PROCESSES),
        "cases": cases,
    }
    if RANK == 0:
        print_table(report)
    if args.output is not None and RANK == 0:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
    if PROCESSES > 1:  # torch 2.13's gloo may hang or abort in the interpreter's teardown (see entropy_trl.cli)
        sys.stdout.flush()
        os._exit(0)
