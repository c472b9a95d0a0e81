"""The memory of one GPU: what each phase of a step holds there.

Pure functions of four inputs: [`ModelFacts`], [`Run`], [`Sharding`] and [`Hardware`]. docs/scaling.md explains them and
says what each of them was checked against.

Units: bytes, elements, tokens. Symbols: `n` GPUs, `P` parameters, `h` hidden size, `V` vocabulary, `N` completion
tokens of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from entropy_trl.plan.inputs import Hardware, Run, Sharding
from entropy_trl.plan.model import ModelFacts, activations


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
