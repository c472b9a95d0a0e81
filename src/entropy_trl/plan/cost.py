"""The formulas of a plan: memory of a GPU, FLOPs, and what travels between ranks.

Pure functions of four inputs: [`ModelFacts`], [`Run`], [`Sharding`] and [`Hardware`]. docs/scaling.md explains them and
says what each of them was checked against.

Units: bytes, elements, tokens, FLOPs, seconds. Symbols: `n` GPUs, `P` parameters, `h` hidden size, `V` vocabulary, `N`
completion tokens of a micro-batch, `T` tokens of a row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_trl.controls import EntropyControl
from entropy_trl.loss.reduction import CLIPPED_LOSS_TYPES
from entropy_trl.plan.inputs import Hardware, Run, Sharding
from entropy_trl.plan.model import ModelFacts, activations
from entropy_trl.tokens.covariance import covariance_metrics
from entropy_trl.tokens.types import TokenBatch


GIB = 2**30

#: When memory is taken. A GPU must hold the largest column, not the sum.
PHASES = ("rollout", "scoring", "loss", "update")

#: Assumed, not measured: CUDA context, NCCL's buffers, fragmentation; and what a sleeping vLLM keeps, alone and with
#: tensor parallelism (0.8 and 2.4 GiB were reported by NVIDIA-NeMo/RL issue 223).
RESERVE = 3 * GIB
VLLM_ASLEEP = (1 * GIB, int(2.5 * GIB))
#: Assumed: vLLM's own activations and CUDA graphs, within its share (0.4 GiB without graphs in vLLM issue 17117).
VLLM_WORKSPACE = 1 * GIB
#: Assumed: bytes of text a token decodes to, in the gather of all texts that TRL logs from.
TEXT_BYTES = 4
#: TRL's fused LM head works in tiles of tokens x vocabulary (trl.kernels.chunked_logprob, trl.trainer.utils).
TILE = (4096, 32768)
#: Bytes that a selection holds at its peak for each token of a rank's part of the step pool; 53 were measured.
POOL_BYTES = 64


# Memory of one GPU


@dataclass(frozen=True)
class Item:
    """A line of the memory table: bytes on one GPU, in the phases that hold it."""

    name: str
    size: int
    phases: tuple[str, ...] = PHASES


def optimizer_bytes(optim: str, master_bytes: int) -> float:
    """State bytes for each trained element, by the name that transformers gives the optimizer; Adam's if not known."""
    if optim in ("sgd", "adafactor"):
        return 0.0  # no momentum; Adafactor keeps one number for each row and column (arXiv 1804.04235)
    if "8bit" in optim and "adamw" in optim:
        return 2.0
    if optim in ("adagrad", "rmsprop", "lion_32bit"):
        return float(master_bytes)
    return 2.0 * master_bytes


def model_states(model: ModelFacts, run: Run, sharding: Sharding, gpus: int) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer state on one rank (ZeRO, arXiv 1910.02054, section 3).

    Under DeepSpeed the layers see weights in the type of the computation, and each rank has the float32 copy that the
    optimizer updates of its share, whatever the type was loaded; elsewhere the weights are those that were loaded, and
    FSDP makes those it trains float32. `host` is what offloading puts in the host's memory, float32 gradients included.
    """
    share = 1 / gpus
    full, trained, width = model.params, model.trainable, run.compute_bytes
    parts = dict.fromkeys(("parameters", "master", "gradients", "optimizer", "host"), 0.0)
    if sharding.deepspeed:
        parts["parameters"] = width * (full * share if sharding.kind == "zero3" else full)
        parts["master"] = 4 * trained * share
        parts["gradients"] = width * trained * (share if sharding.kind in ("zero2", "zero3") else 1)
        parts["optimizer"] = optimizer_bytes(run.optim, 4) * trained * share
    elif sharding.kind == "fsdp":
        width = 4 if run.mixed_precision else run.weight_bytes
        parts["parameters"] = (width * trained + run.weight_bytes * (full - trained)) * share
        parts["gradients"] = width * trained * share
        parts["optimizer"] = optimizer_bytes(run.optim, width) * trained * share
    else:
        width = run.weight_bytes
        parts["parameters"], parts["gradients"] = width * full, width * trained
        parts["optimizer"] = optimizer_bytes(run.optim, width) * trained
    if sharding.kind == "zero3":
        parts["parameters"] += run.compute_bytes * model.persistent * (1 - share)
    moved = ["parameters"] if sharding.offload_params else []
    moved += ["master", "gradients", "optimizer"] if sharding.offload_optimizer else []
    for name in moved:
        parts["host"] += parts[name]
        parts[name] = 0.0
    if sharding.deepspeed and sharding.offload_optimizer:
        parts["host"] += 4 * trained * share
    return parts


def head_memory(model: ModelFacts, run: Run, rows: int, gradient: bool = True) -> int:
    """Bytes at the peak of TRL 1.16's fused LM head, which never makes logits of more than one tile.

    With gradient: `tile + N h (4 + c) + V h (4 + w)`, the gradients of the `N` scored hidden states and of the head's
    weight in float32 and once more in their own type (c and w bytes, none where that is float32).
    """
    tokens, width = rows * run.max_completion_length, run.compute_bytes
    tile = min(tokens, TILE[0]) * TILE[1] * width
    kept = tokens * (model.hidden * width + 7 * 4)  # the scored hidden states, and seven float32 statistics of a token
    if not gradient:
        return tile + kept
    copies = (tokens * model.hidden + (model.head if model.trainable == model.params else 0)) * (width % 4)
    weight = 4 * model.head if model.trainable == model.params else 0
    return tile + kept + 4 * tokens * model.hidden + weight + copies


def rollout_bytes(run: Run) -> int:
    """Bytes of the rollout that TRL keeps on a GPU until it has been used: ids and masks are int64."""
    completion = 16 + 4 * run.scores_rollout + 4 * run.use_vllm + 4 * (run.beta != 0)
    row = 16 * run.prompt_length + completion * run.max_completion_length + 4 + (8 if run.entropy_control else 0)
    return run.rollout_rows * row + 8


def vllm_kv_tokens(model: ModelFacts, run: Run, hardware: Hardware) -> int:
    """Tokens that the KV cache of one vLLM engine holds, over its GPUs; negative if not even the weights fit.

    vLLM takes `vllm_gpu_memory_utilization` of the whole GPU for weights, its workspace and, with the rest, the cache.
    """
    share = run.vllm_gpu_memory_utilization * hardware.gpu_memory
    free = share - VLLM_WORKSPACE - 2 * model.params / run.vllm_tensor_parallel_size
    return int(free * run.vllm_tensor_parallel_size / (2 * model.kv_token))


def memory(model: ModelFacts, run: Run, sharding: Sharding, hardware: Hardware) -> list[Item]:
    """The lines of the memory table of one GPU; a column's sum is what the GPU must hold in that phase."""
    gpus, width, trained = hardware.gpus, run.compute_bytes, model.trainable
    states = model_states(model, run, sharding, gpus)
    rows = run.per_device_train_batch_size
    autocast = run.mixed_precision and run.weight_bytes == 4 and not sharding.shards_optimizer
    types = {"dtype": torch.float32, "autocast": torch.bfloat16} if autocast else {}
    types = types or {"dtype": torch.bfloat16 if width == 2 else torch.float32}
    trace = activations(
        model.config,
        rows,
        run.length,
        checkpointing=run.gradient_checkpointing,
        flash=run.flash_attention,
        **types,
    )
    work = max(trace.peak - trace.kept, head_memory(model, run, rows))
    text = TEXT_BYTES * gpus * run.rollout_rows * run.length if gpus > 1 else 0
    items = [
        Item("parameters", int(states["parameters"])),
        Item("float32 copy of the trained share", int(states["master"])),
        Item("gradients", int(states["gradients"]), PHASES if sharding.kind == "zero3" else ("loss", "update")),
        Item(f"optimizer state ({run.optim})", int(states["optimizer"])),
        *_sharding_buffers(model, run, sharding, gpus),
        Item("activations kept for the backward pass", trace.kept, ("loss",)),
        Item("one layer at work, or the LM head", work, ("loss",)),
        Item("forward pass without gradient", trace.scoring + head_memory(model, run, rows, False), ("scoring",)),
        Item("optimizer's temporaries", _update_temporaries(run, sharding, trained, gpus), ("update",)),
        Item("rollout buffer", rollout_bytes(run)),
        Item("all ranks' texts, gathered for the log", text, ("scoring",)),
        Item("CUDA, NCCL, fragmentation (assumed)", RESERVE),
    ]
    if run.beta != 0 and not run.peft:
        size = model.params * (width if sharding.deepspeed else run.weight_bytes)
        items.append(Item("reference model", size // gpus if sharding.shards_params else size))
    if run.entropy_control is not None:
        pool = rows * run.max_completion_length * (run.gradient_accumulation_steps if run.step_pool else 1)
        items.append(Item("entropy control", POOL_BYTES * pool, ("loss",)))
    if run.vllm_colocate:
        share = int(run.vllm_gpu_memory_utilization * hardware.gpu_memory)
        asleep = VLLM_ASLEEP[run.vllm_tensor_parallel_size > 1]
        rest = asleep if run.vllm_enable_sleep_mode else share
        items.append(Item("vLLM: weights and KV cache", share, ("rollout",)))
        items.append(Item("vLLM asleep (assumed)" if rest == asleep else "vLLM, awake", rest, PHASES[1:]))
    elif not run.use_vllm:
        cache = run.rollout_rows * run.length * model.kv_token * width
        items.append(Item("KV cache of transformers' generate", cache, ("rollout",)))
    if sharding.shards_params:
        gathered = _gathered(model, run, sharding)
        if run.vllm_colocate and run.vllm_enable_sleep_mode:
            # Only vLLM's weights are awake then, and its cache later.
            weights = 2 * model.params // run.vllm_tensor_parallel_size
            cache = int(run.vllm_gpu_memory_utilization * hardware.gpu_memory) - weights
            gathered = max(gathered - max(cache, 0), 0)
        items.append(Item("weights gathered for generation", gathered, ("rollout",)))
    return [item for item in items if item.size]


def _live_params(model: ModelFacts, sharding: Sharding) -> int:
    """Elements of sharded parameters that are whole at once in a pass over the layers."""
    if sharding.kind == "zero3":
        return min(model.params, max(sharding.live_params, model.head) + sharding.prefetch_bucket)
    # FSDP: the embedding and the head, the layer at work and the next.
    return min(model.params, 2 * (model.body // model.layers) + 2 * model.head)


def _gathered(model: ModelFacts, run: Run, sharding: Sharding) -> int:
    """Bytes of the weights that are whole at once for the generator.

    vLLM takes one parameter after the other. But under ZeRO-3 TRL merges an adapter with all of them gathered, and so
    does it call transformers' generate.
    """
    if sharding.kind == "zero3" and (run.peft or not run.use_vllm):
        return run.compute_bytes * model.params
    if run.use_vllm:
        return (run.compute_bytes if sharding.deepspeed else 4) * model.head
    return run.compute_bytes * _live_params(model, sharding)


def _sharding_buffers(model: ModelFacts, run: Run, sharding: Sharding, gpus: int) -> Iterator[Item]:
    width, trained = run.compute_bytes, model.trainable
    passes = ("scoring", "loss")
    if sharding.kind == "zero3":
        yield Item("ZeRO-3: gathered parameters", width * _live_params(model, sharding), passes)
        yield Item("ZeRO-3: bucket of gradients", 0 if sharding.offload_params else width * sharding.reduce_bucket)
    elif sharding.kind in ("zero1", "zero2"):
        yield Item("ZeRO: bucket of gradients", width * min(sharding.reduce_bucket, trained), ("loss",))
    elif sharding.kind == "fsdp":
        yield Item("FSDP: gathered parameters", width * _live_params(model, sharding), passes)
        if run.gradient_accumulation_steps > 1:  # transformers defers the reduction to the last micro-batch
            yield Item("FSDP: gradients not yet reduced", width * trained, ("loss",))
    elif gpus > 1:
        yield Item("DDP: buckets of gradients", run.weight_bytes * trained)


def _update_temporaries(run: Run, sharding: Sharding, trained: int, gpus: int) -> int:
    """Bytes of the optimizer step: float32 gradients of DeepSpeed's share, and the roots that Adam takes at once."""
    if sharding.offload_optimizer:
        return 0
    share = trained / gpus if sharding.shards_optimizer else trained
    share = min(share, sharding.sub_group) if sharding.kind == "zero3" else share
    width = 4 if sharding.shards_optimizer else run.weight_bytes
    gradients = 4 * share if sharding.deepspeed else 0
    return int(gradients + (width * share if run.optim == "adamw_torch" else 0))


# Time and communication


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
