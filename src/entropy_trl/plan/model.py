"""What a plan knows of a model without its weights: sizes from the meta device, activations from a trace.

Nothing here allocates a weight: a model of any size takes seconds and a few MB.
"""

import copy
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from entropy_trl.mistakes import told_of


#: DeepSpeed keeps a parameter of up to this many elements whole on every rank (`stage3_param_persistence_threshold`).
PERSISTENT = 100_000


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a decoder-only language model that cost anything. Counts are of elements, not of bytes."""

    name: str
    config: Any
    params: int  # a tied weight counts once
    trainable: int
    body: int  # weights of the layers' linear maps: each costs 2 FLOPs a token
    layer: int  # the largest indivisible module (a decoder layer, or the embedding)
    persistent: int  # what ZeRO-3 does not shard
    modules: int  # that hold weights ZeRO-3 shards: it gathers those of one module in one message

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def head(self) -> int:
        """Elements of the language-model head, V x h."""
        return int(self.config.vocab_size) * self.hidden

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.heads)

    @property
    def kv_token(self) -> int:
        """Elements that one token takes in a KV cache: a key and a value in each layer."""
        return 2 * self.layers * int(getattr(self.config, "num_key_value_heads", self.heads)) * self.head_dim


_MOST_LAYERS = 10_000


def load_config(name: str, file: str | None = None, revision: str | None = None) -> Any:
    """The model's configuration: of `file` (a config.json), of a local folder, or of the hub.

    Raises:
        ValueError: It cannot be had, or is not that of a dense decoder; in one line, with what to do.
    """
    try:
        if file is not None:
            values = json.loads(Path(file).read_text())
            if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
                raise ValueError("it has no model_type")
            layers = values.get("num_hidden_layers")
            if isinstance(layers, int) and layers > _MOST_LAYERS:  # transformers makes a list with an item for each
                raise ValueError(f"num_hidden_layers must be at most {_MOST_LAYERS:,}, got {str(layers)[:20]}")
            with told_of("its values are wrong"):
                config = AutoConfig.for_model(values.pop("model_type"), **values)
        else:
            with told_of("its values are wrong"):
                config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RecursionError) as error:
        if file is not None:
            raise ValueError(f"--model_config: {file} cannot be read as a model's config.json ({error}).") from error
        raise ValueError(
            f"The configuration of {name!r} is neither in a folder of that name nor to be had from the hub: give it "
            "with --model_config FILE, the model's config.json (a few hundred bytes; no weights are read)."
        ) from error
    if getattr(config, "num_hidden_layers", None) is None or getattr(config, "vocab_size", None) is None:
        raise ValueError(f"{name}: only decoder-only text models can be planned, got a {type(config).__name__}.")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        value = getattr(config, key, None)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise ValueError(f"{name}: {key} of its configuration must be a count, got {value!r}.")
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(f"{name}: mixtures of experts cannot be planned, only dense models.")
    return config


def model_facts(name: str, config: Any, peft_config: Any = None) -> ModelFacts:
    """Counts of the model that `config` describes, built on the meta device; with the adapter of `peft_config`."""
    with init_empty_weights(), told_of(f"{name}: the model of its configuration cannot be made"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    _, (largest, _) = calculate_maximum_sizes(model)  # accelerate's: bytes, here of float32
    model.tie_weights()
    if peft_config is not None:
        from peft import get_peft_model

        with told_of(f"{name}: its adapter cannot be made"):
            model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    sizes = [p.numel() for p in model.parameters()]
    head = model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return ModelFacts(
        name=name,
        config=config,
        params=sum(sizes),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        body=sum(linear),
        layer=largest // 4,
        persistent=sum(size for size in sizes if size <= PERSISTENT),
        modules=sum(any(p.numel() > PERSISTENT for p in m.parameters(recurse=False)) for m in model.modules()),
    )


@dataclass(frozen=True)
class Activations:
    """Bytes that the decoder's layers take in one pass, beside weights and gradients."""

    kept: int  # held at the end of the forward pass, for the backward one
    peak: int  # the highest sum in the backward pass, the gradients of one layer's weights included
    scoring: int  # the highest sum in a pass without gradient


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors alive, by storage: `now` and the highest `peak`, bytes. Those in `known` do not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out

    def count(self, *tensors: Tensor) -> None:
        """Count tensors that were made elsewhere."""
        for tensor in tensors:
            self._count_storage(tensor.untyped_storage())

    def _count_storage(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def activations(
    config: Any,
    rows: int,
    length: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    flash: bool = False,
) -> Activations:
    """What the layers of the model of `config` hold for `rows` sequences of `length` tokens, bytes.

    The model's own code runs forward and backward on fake tensors, which have a shape, a type and a lifetime but no
    memory. It does so with 2 and with 3 layers: the rest is linear in their number. A model of one or two layers runs
    as it is. Gradients of weights are dropped as soon as they are complete.

    Args:
        config (`Any`): The model's configuration.
        rows, length (`int`): Shape of the micro-batch, padding included.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Dtype of the weights as the layers see them.
        autocast (`torch.dtype`, *optional*): The type that autocast computes in, if it is on.
        checkpointing (`bool`, *optional*, defaults to `False`): Recompute each layer in the backward pass
            (gradient_checkpointing).
        flash (`bool`, *optional*, defaults to `False`): Attention by FlashAttention, which is told the lengths.
            Otherwise by PyTorch's fused kernel (`sdpa`), which is given a mask of rows x length x length, since the
            lengths differ: once of bytes, once of floats.
    """
    values = json.dumps(config.to_dict(), default=str)
    run = partial(_run_layers, values, rows=rows, length=length, dtype=dtype, autocast=autocast, flash=flash)

    def all_layers(**how: bool) -> tuple[int, int]:
        if config.num_hidden_layers <= 2:
            return run(config.num_hidden_layers, **how)
        (held2, peak2), (held3, peak3) = run(2, **how), run(3, **how)
        more = config.num_hidden_layers - 2
        return held2 + (held3 - held2) * more, peak2 + (peak3 - peak2) * more

    kept, peak = all_layers(checkpointing=checkpointing, gradient=True)
    _, scoring = all_layers(checkpointing=False, gradient=False)
    return Activations(kept=kept, peak=peak, scoring=scoring)


@lru_cache(maxsize=256)
def _run_layers(
    config: str,
    layers: int,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    flash: bool,
    checkpointing: bool,
    gradient: bool,
) -> tuple[int, int]:
    """Bytes of what `layers` layers hold after a forward pass, and the peak of it and its backward pass."""
    values = json.loads(config)
    values["num_hidden_layers"] = layers
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    # On the CPU: PyTorch without CUDA cannot autocast on a fake GPU. What is saved for the backward pass is the same.
    with FakeTensorMode():
        cut = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForCausalLM.from_config(
            cut, dtype=dtype, attn_implementation=UNPADDED if flash else "sdpa"
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        states = torch.empty(rows, length, cut.hidden_size, dtype=dtype, requires_grad=gradient)
        mask = None if flash else torch.empty(rows, 1, length, length, dtype=torch.bool)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live, torch.set_grad_enabled(gradient):
            # The hidden states and the mask are made outside, and are part of what is held.
            live.count(states, *([] if mask is None else [mask]))
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                out = model.base_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
            held = live.now
            if gradient:
                out.backward(torch.empty_like(out))
    return held, live.peak


class _FlashAttention(torch.autograd.Function):
    """What FlashAttention (arXiv 2205.14135) keeps and returns, for fake tensors: shapes, no values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


UNPADDED = "entropy_trl_unpadded"
AttentionInterface.register(UNPADDED, _flash_attention)
AttentionMaskInterface.register(UNPADDED, lambda *args, **kwargs: None)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
