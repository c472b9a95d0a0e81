"""A plan, whether it fits, and what to change if it does not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from entropy_trl.plan.inputs import Hardware, Run, Sharding
from entropy_trl.plan.memory import PHASES, Item, memory, vllm_kv_tokens
from entropy_trl.plan.model import ModelFacts
from entropy_trl.plan.traffic import Traffic, communication, generation_seconds, loss_flops, scoring_flops


@dataclass(frozen=True)
class Plan:
    """A model, a run, a sharding and hardware, and what follows from them."""

    model: ModelFacts
    run: Run
    sharding: Sharding
    hardware: Hardware

    @cached_property
    def items(self) -> list[Item]:
        return memory(self.model, self.run, self.sharding, self.hardware)

    @cached_property
    def by_phase(self) -> dict[str, int]:
        """Bytes of a GPU in each phase."""
        return {phase: sum(item.size for item in self.items if phase in item.phases) for phase in PHASES}

    @property
    def peak(self) -> int:
        return max(self.by_phase.values())

    @property
    def kv_tokens(self) -> int | None:
        """What vLLM's cache holds; None if it does not share these GPUs."""
        return vllm_kv_tokens(self.model, self.run, self.hardware) if self.run.vllm_colocate else None

    @property
    def longest(self) -> int:
        """The longest sequence that vLLM must have room for: what the model can take, unless it is told."""
        return self.run.vllm_max_model_length or int(self.model.config.max_position_embeddings)

    @property
    def vllm_starts(self) -> bool:
        """Whether the cache holds one sequence of the greatest length, without which vLLM does not start."""
        return self.kv_tokens is None or self.kv_tokens >= self.longest

    @property
    def fits(self) -> bool:
        return self.peak <= self.hardware.gpu_memory and self.vllm_starts

    @cached_property
    def traffic(self) -> list[Traffic]:
        return communication(self.model, self.run, self.sharding, self.hardware.gpus)

    def seconds(self) -> dict[str, float]:
        """Seconds of a rollout by kind of work, each at the least; communication as if nothing overlapped."""
        run, gpus = self.run, self.hardware.gpus
        micro = run.steps_per_generation * run.num_iterations
        scorings = run.steps_per_generation * (run.scores_rollout + (run.beta != 0)) + micro * run.scores_step
        bandwidth, alpha = self.hardware.bandwidth, self.hardware.latency
        return {
            "generation": generation_seconds(self.model, run, self.hardware),
            "scoring": scorings * scoring_flops(self.model, run) / self.hardware.flops,
            "forward and backward": micro * loss_flops(self.model, run) / self.hardware.flops,
            "communication, bytes": sum(t.sent(gpus) for t in self.traffic) / bandwidth,
            "communication, latency": sum(t.waits(gpus, alpha) for t in self.traffic),
        }


# What to change


@dataclass(frozen=True)
class Change:
    """A setting to change, and the plan with it."""

    text: str
    plan: Plan


def _batch(run: Run, rows: int) -> Run:
    """The same steps and rollouts in micro-batches of `rows` rows."""
    factor = run.per_device_train_batch_size // rows
    return replace(
        run,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=run.gradient_accumulation_steps * factor,
        steps_per_generation=run.steps_per_generation * factor,
    )


def _candidates(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Single changes, the cheapest in time first."""
    run, sharding, gpus = plan.run, plan.sharding, plan.hardware.gpus
    if run.vllm_colocate and not run.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode: false -> true", replace(plan, run=replace(run, vllm_enable_sleep_mode=True))
    if run.vllm_colocate and plan.longest > run.length:
        shorter = replace(run, vllm_max_model_length=run.length)
        yield f"vllm_max_model_length: {plan.longest} -> {run.length}", replace(plan, run=shorter)
    if run.vllm_colocate:
        now = run.vllm_gpu_memory_utilization
        for percent in range(round(now * 100) - 5, 5, -5):
            lower = replace(plan, run=replace(run, vllm_gpu_memory_utilization=percent / 100))
            if lower.vllm_starts:
                yield f"vllm_gpu_memory_utilization: {now:g} -> {percent / 100:g}", lower
        for percent in range(round(now * 100) + 5, 95, 5):
            higher = replace(plan, run=replace(run, vllm_gpu_memory_utilization=percent / 100))
            if higher.vllm_starts and not plan.vllm_starts:
                yield f"vllm_gpu_memory_utilization: {now:g} -> {percent / 100:g}", higher
    if not run.gradient_checkpointing:
        changed = replace(run, gradient_checkpointing=True)
        yield "gradient_checkpointing: false -> true", replace(plan, run=changed)
    rows = run.per_device_train_batch_size
    while rows > 1 and rows % 2 == 0 and (run.entropy_control is None or run.step_pool):  # not another pool
        rows //= 2
        smaller = _batch(run, rows)
        text = (
            f"per_device_train_batch_size: {run.per_device_train_batch_size} -> {rows}, with "
            f"gradient_accumulation_steps: {smaller.gradient_accumulation_steps} and steps_per_generation: "
            f"{smaller.steps_per_generation} (the same steps and rollouts)"
        )
        yield text, replace(plan, run=smaller)
    if run.vllm_colocate:
        parallel = 2 * run.vllm_tensor_parallel_size
        while parallel <= min(8, gpus) and gpus % parallel == 0 and plan.model.heads % parallel == 0:
            changed = replace(run, vllm_tensor_parallel_size=parallel)
            yield (
                f"vllm_tensor_parallel_size: {run.vllm_tensor_parallel_size} -> {parallel}",
                replace(plan, run=changed),
            )
            parallel *= 2
    if gpus > 1 and run.peft and run.use_vllm and sharding.kind == "zero3":
        fsdp = Sharding("fsdp", source="suggested")
        yield (
            "--accelerate_config configs/accelerate/fsdp2.yaml (ZeRO-3 gathers the whole model to merge the adapter)",
            replace(plan, sharding=fsdp),
        )
    if gpus > 1 and not sharding.shards_params:
        zero = Sharding("zero3", source="suggested")
        yield "--accelerate_config configs/accelerate/zero3.yaml (ZeRO-3)", replace(plan, sharding=zero)
    if not sharding.offload_optimizer:
        offload = Sharding("zero3", True, True, source="suggested")
        yield (
            "--accelerate_config configs/accelerate/zero3_offload.yaml (parameters and optimizer state on the host)",
            replace(plan, sharding=offload),
        )


def suggest(plan: Plan) -> list[Change]:
    """What makes a plan fit that does not: every single change that does it; or else several together; or more GPUs.

    Each is a whole plan of its own, evaluated like any other. Empty if the plan fits, or if nothing here helps.
    """
    if plan.fits:
        return []
    changes: dict[str, Change] = {}
    for text, changed in _candidates(plan):
        if changed.fits:
            changes.setdefault(text.split(":")[0], Change(text, changed))  # the smallest change of each setting
    for offload in (False, True) if not changes else ():
        texts, best = _together(plan, offload)
        if best.fits:
            changes["together"] = Change("; and ".join(texts), best)
            break
    return [*changes.values(), *_more_gpus(plan)]


def _together(plan: Plan, offload: bool) -> tuple[list[str], Plan]:
    """Changes made one after the other until the plan fits: one that suffices, or else the one that helps most."""
    texts: list[str] = []
    while not plan.fits:
        options = [(text, p) for text, p in _candidates(plan) if _gap(p) < _gap(plan)]
        options = [option for option in options if offload or not option[1].sharding.offload_optimizer]
        if not options:
            break
        enough = (option for option in options if option[1].fits)
        text, plan = next(enough, min(options, key=lambda option: _gap(option[1])))
        texts.append(text)
    return texts, plan


def _gap(plan: Plan) -> float:
    """How far a plan is from fitting, bytes: what the GPU lacks, and what vLLM's cache does."""
    cache = 0 if plan.kv_tokens is None else plan.longest - plan.kv_tokens
    lacking = max(cache, 0) * 2 * plan.model.kv_token / plan.run.vllm_tensor_parallel_size
    return max(plan.peak - plan.hardware.gpu_memory, 0) + lacking


def _more_gpus(plan: Plan) -> list[Change]:
    """The least doubling of the GPUs with which the plan fits, the batch of a step kept where it divides."""
    for factor in (2, 4, 8, 16):
        gpus = plan.hardware.gpus * factor
        run = plan.run
        if run.gradient_accumulation_steps % factor == 0:
            run = replace(
                run,
                gradient_accumulation_steps=run.gradient_accumulation_steps // factor,
                steps_per_generation=run.steps_per_generation // factor,
            )
        sharding = plan.sharding if plan.hardware.gpus > 1 else Sharding("zero3", source="suggested")
        more = replace(plan, run=run, sharding=sharding, hardware=replace(plan.hardware, gpus=gpus))
        if more.fits:
            kept = "" if run is plan.run else f", with gradient_accumulation_steps: {run.gradient_accumulation_steps}"
            kept += "" if run is plan.run else f" and steps_per_generation: {run.steps_per_generation}"
            return [Change(f"--gpus: {plan.hardware.gpus} -> {gpus}{kept}", more)]
    return []
