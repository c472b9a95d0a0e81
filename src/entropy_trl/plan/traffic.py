"""The time of a rollout with its steps: FLOPs, generation, and what travels between ranks.

Pure functions of [`ModelFacts`], [`Run`], [`Sharding`] and [`Hardware`]. docs/scaling.md explains them and says what
each of them was checked against.

Units: bytes, tokens, FLOPs, seconds. Symbols: `n` GPUs, `T` tokens of a row.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_trl.controls import EntropyControl
from entropy_trl.loss.reduction import CLIPPED_LOSS_TYPES
from entropy_trl.plan.inputs import Hardware, Run, Sharding
from entropy_trl.plan.memory import TEXT_BYTES, vllm_kv_tokens
from entropy_trl.plan.model import ModelFacts
from entropy_trl.tokens.covariance import covariance_metrics
from entropy_trl.tokens.types import TokenBatch


def forward_flops(model: ModelFacts, tokens: int, length: int) -> float:
    """FLOPs of the layers' forward pass: 2 for each weight and token (arXiv 2001.08361, section 2.1), and attention.

    Attention is `4 T heads d` for each token and layer: nothing is taken off for the causal mask, which a kernel with a
    padding mask does not make use of. The LM head is apart, since it works on completion tokens only.
    """
    return tokens * (2.0 * model.body + 4.0 * length * model.heads * model.head_dim * model.layers)


def loss_flops(model: ModelFacts, run: Run) -> float:
    """FLOPs of a micro-batch: forward, a backward pass of twice as much, and the layers once more with recomputation.

    Fused attention's backward pass is 2.5 times its forward one, as it makes the scores again; the head's is 3 times,
    as TRL makes its tiles again. Recomputation: arXiv 2205.05198. Frozen weights have no gradient: an adapter saves it.
    """
    rows = run.per_device_train_batch_size
    tokens = rows * run.length
    attention = forward_flops(replace(model, body=0), tokens, run.length)
    body = 2.0 * tokens * model.body
    backward = body * (1 if run.peft else 2) + 2.5 * attention
    recomputed = body + attention if run.gradient_checkpointing else 0.0
    head = 2.0 * rows * run.max_completion_length * model.head * (3 if run.peft else 4)
    return body + attention + backward + recomputed + head


def scoring_flops(model: ModelFacts, run: Run) -> float:
    """FLOPs of the forward pass without gradient over one micro-batch."""
    rows = run.per_device_train_batch_size
    head = 2.0 * rows * run.max_completion_length * model.head
    return forward_flops(model, rows * run.length, run.length) + head


@dataclass(frozen=True)
class Traffic:
    """One kind of collective: what one call moves (the whole tensor, bytes), and how often a rollout makes it."""

    name: str
    operation: str  # all_reduce, all_gather, reduce_scatter
    size: float
    calls: int  # a rollout, all of its updates included

    def sent(self, gpus: int) -> float:
        """Bytes that a rank sends in a rollout, by the ring; all-reduces send twice (arXiv 1910.02054, section 7)."""
        twice = 2 if self.operation == "all_reduce" else 1
        return twice * self.calls * self.size * (gpus - 1) / gpus

    def waits(self, gpus: int, alpha: float) -> float:
        """Seconds of latency in a rollout: see [`latency`]."""
        return self.calls * min(latency(self.operation, gpus, alpha))


def communication(model: ModelFacts, run: Run, sharding: Sharding, gpus: int) -> list[Traffic]:
    """The collectives of one rollout with all of its updates. Sizes of one call; small ones are the latency's."""
    if gpus == 1:
        return []
    micro = run.steps_per_generation * run.num_iterations
    scorings = run.steps_per_generation * (run.scores_rollout + (run.beta != 0)) + micro * run.scores_step
    width, full, trained = run.compute_bytes, model.params, model.trainable
    lines = []

    def add(name: str, operation: str, size: float, messages: int, times: int) -> None:
        if messages:  # ZeRO-3 gathers no module of a model whose parameters are all small
            lines.append(Traffic(name, operation, size / messages, messages * times))

    if sharding.kind == "zero3":
        # A module is gathered for each use: forward, recomputation, backward; not where DeepSpeed still holds it.
        # transformers' generate has all of them gathered once.
        passes = micro * (3 if run.gradient_checkpointing else 2) + scorings + (not run.use_vllm)
        add("parameters", "all_gather", width * full, model.modules, passes)
        add("gradients", "reduce_scatter", width * trained, math.ceil(trained / sharding.reduce_bucket), micro)
    elif sharding.kind == "fsdp":
        # A layer is gathered for each pass, of which transformers' generate makes one a token.
        passes = micro * 2 + scorings + (0 if run.use_vllm else run.max_completion_length)
        add("parameters", "all_gather", width * full, model.layers + 2, passes)
        add("gradients", "reduce_scatter", width * trained, model.layers + 2, run.updates)
    elif sharding.deepspeed:
        buckets = math.ceil(trained / sharding.reduce_bucket)
        add("gradients", "all_reduce", width * trained, buckets, micro if sharding.kind == "zero2" else run.updates)
        add("updated parameters", "all_gather", width * trained, buckets, run.updates)
    else:
        size = run.weight_bytes * trained
        add("gradients", "all_reduce", size, math.ceil(size / (25 * 2**20)), run.updates)  # DDP's bucket_cap_mb
    if run.use_vllm and sharding.shards_params:
        add("weights to vLLM", "all_gather", (width if sharding.deepspeed else 4) * full, model.modules, 1)
    text = TEXT_BYTES * gpus * run.rollout_rows
    add("texts, for TRL's log", "all_gather", text * (run.prompt_length + run.mean_completion_length), 2, 1)
    reductions, gathers = trl_messages(run)
    add("TRL's metrics", "all_reduce", 8, 1, reductions)
    add("TRL's metrics and rewards by row", "all_gather", 8 * gpus * run.per_device_train_batch_size, 1, gathers)
    add("digests of completions, for the diversity", "all_gather", 8 * gpus * run.rollout_rows, 1, 1)
    if run.entropy_control is not None:
        calls, size = control_messages(run)
        add("entropy control", "all_reduce", size, calls, run.updates)
    return lines


def trl_messages(run: Run) -> tuple[int, int]:
    """Small all-reduces and all-gathers that TRL 1.16 makes in a rollout with its updates.

    A control that takes tokens out of the loss makes the one of clipped tokens again.
    """
    micro = run.steps_per_generation * run.num_iterations
    clipped = run.loss_type in CLIPPED_LOSS_TYPES
    again = run.entropy_control is not None and run.entropy_control.drops_tokens
    reductions = micro * (1 + (3 if clipped else run.loss_type in ("cispo", "vespo")) + (run.beta != 0))
    # Lengths, truncation, tokens, rewards; four gathers of objects, each with one of their sizes first; vLLM's ratios.
    gathers = 5 + 8 + (5 if run.use_vllm and run.vllm_correction else 0)
    return reductions, gathers + micro * (2 + again if clipped else 0)


class _CountingRanks:
    """Stands for other processes without tokens of their own, and counts what would be sent to them."""

    several = True

    def __init__(self) -> None:
        self.calls = self.size = 0

    def sum(self, value: Tensor) -> Tensor:
        self.calls += 1
        self.size += value.numel() * value.element_size()
        return value

    min = sum


def selection_messages(control: EntropyControl, ties: bool = False) -> tuple[int, int]:
    """All-reduces of one selection over several processes with its table of quantiles, and their bytes together.

    Counted, by running the control on a few tokens: neither depends on their number. With `ties` many tokens have the
    same covariance, which takes KL-Cov six more histograms.
    """
    generator = torch.Generator().manual_seed(0)
    logps = 4 * torch.rand(8, 64, generator=generator) if not ties else torch.arange(8.0)[:, None].expand(8, 64)
    ranks = _CountingRanks()
    pool = TokenBatch(
        logps=-logps,
        old_logps=-logps,
        advantages=torch.tensor([[1.0], [-1.0]]).repeat(4, 1),
        mask=torch.ones(8, 64, dtype=torch.bool),
        row_ids=torch.arange(8),
        clipped=None,
        seed=0,
        rounding=0.0,
        ranks=ranks,
        entropies=logps,
    )
    selection = control.select(pool)
    if selection.covariance is not None:
        covariance_metrics(selection.covariance, pool.mask, selection.selected, ranks)
    return ranks.calls, ranks.size


def control_messages(run: Run) -> tuple[int, int]:
    """All-reduces that an entropy control adds to an optimizer step, and their bytes together, at most."""
    assert run.entropy_control is not None
    steps = run.gradient_accumulation_steps
    calls, size = (0, 0)
    if run.entropy_control.needs_pool and run.step_pool:
        calls, size = selection_messages(run.entropy_control, ties=True)
    checks = steps + (run.step_pool and steps > 1)  # log-probabilities that are not finite
    clips = run.entropy_control.drops_tokens and run.loss_type in (*CLIPPED_LOSS_TYPES, "cispo", "vespo")
    clip_metrics = steps if clips else 0
    return calls + checks + clip_metrics + 1, size + 12 * checks + 32 * clip_metrics + 192


def latency(operation: str, gpus: int, alpha: float) -> tuple[float, float]:
    """Seconds of an empty message by the ring and by the tree (infinite if there is none); a step takes `alpha`.

    Ring: `n - 1` steps, twice that for an all-reduce. Tree: `2 ceil(log2 n)`, which NCCL prefers for small all-reduces.
    It has none for all-gathers and reduce-scatters (but PAT, with one GPU a node): they go by the ring.
    """
    if operation == "all_reduce":
        return 2 * (gpus - 1) * alpha, 2 * math.ceil(math.log2(gpus)) * alpha
    return (gpus - 1) * alpha, math.inf


def generation_seconds(model: ModelFacts, run: Run, hardware: Hardware) -> float:
    """Seconds of a rollout's generation by vLLM, at the least: bound by memory, at the data sheet's bandwidth.

    Each decoding step reads the weights (all but the embedding), and each token the keys and values before it. There
    are as many steps as the longest completion has tokens, or more if the cache does not hold all rows at once. Prompts
    cost their forward FLOPs.
    """
    parallel = run.vllm_tensor_parallel_size if run.vllm_colocate else 1
    rows = run.rollout_rows * parallel
    mean = run.mean_completion_length
    concurrent = rows
    if run.vllm_colocate:
        concurrent = max(min(rows, vllm_kv_tokens(model, run, hardware) // (run.prompt_length + mean)), 1)
    steps = max(run.max_completion_length, rows * mean / concurrent)
    weights = 2 * (model.body + model.head) * steps
    cache = 2 * model.kv_token * rows * mean * (run.prompt_length + mean / 2)
    prefill = forward_flops(model, rows * run.prompt_length, run.prompt_length)
    return ((weights + cache) / hardware.hbm_bandwidth + prefill / hardware.flops) / parallel
