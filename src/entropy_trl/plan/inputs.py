"""What a plan is made of, beside the model: the run, how it is sharded, and the hardware."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from entropy_trl.config_checks import check_deepspeed
from entropy_trl.controls import EntropyControl


if TYPE_CHECKING:
    from trl import ModelConfig

    from entropy_trl.config import CovGRPOConfig


@dataclass(frozen=True)
class Hardware:
    """GPUs and what connects them. Bandwidths are of one GPU and one direction, bytes/s."""

    gpus: int
    gpu_memory: int
    flops: float  # that are reached: peak times utilisation
    bandwidth: float
    hbm_bandwidth: float
    latency: float  # of one message between two ranks, seconds


@dataclass(frozen=True)
class Sharding:
    """Who holds what: `kind` is none, ddp, zero1, zero2, zero3 or fsdp. Sizes are DeepSpeed's defaults, in elements."""

    kind: str
    offload_optimizer: bool = False
    offload_params: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    live_params: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    source: str = ""

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def shards_params(self) -> bool:
        return self.kind in ("zero3", "fsdp")

    @property
    def shards_optimizer(self) -> bool:
        return self.deepspeed or self.kind == "fsdp"


def load_sharding(file: str | None, deepspeed: str | dict[str, Any] | None, gpus: int) -> Sharding:
    """The sharding of an accelerate config file, or of a DeepSpeed configuration; ZeRO-3 if there is neither.

    Raises:
        ValueError: The file cannot be read as one, or asks for something that is not planned here.
    """
    if deepspeed is not None:
        return _deepspeed_sharding(deepspeed, "the training config's deepspeed")
    if file is None:
        kind = "none" if gpus == 1 else "zero3"
        return Sharding(kind, source="assumed: no --accelerate_config was given")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(file)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--accelerate_config: {file} cannot be read ({error}).") from error
    for part in ("deepspeed_config", "fsdp_config"):
        if not isinstance(getattr(config, part) or {}, dict):
            raise ValueError(f"--accelerate_config: {part} of {file} must be a mapping, got {getattr(config, part)!r}.")
    distributed = str(getattr(config.distributed_type, "value", config.distributed_type))
    if distributed == "DEEPSPEED":
        inline = config.deepspeed_config or {}
        if "deepspeed_config_file" in inline:
            return _deepspeed_sharding(inline["deepspeed_config_file"], file)
        stage = str(inline.get("zero_stage", 2))
        if stage not in ("0", "1", "2", "3"):
            raise ValueError(f"--accelerate_config: {file} has zero_stage {stage}: use 0, 1, 2 or 3.")
        zero = {"stage": int(stage)}
        devices = {k: {"device": inline.get(f"{k}_device", "none")} for k in ("offload_optimizer", "offload_param")}
        return _deepspeed_sharding({"zero_optimization": zero | devices}, file)
    if distributed == "FSDP":
        offload = str((config.fsdp_config or {}).get("fsdp_offload_params", False)).lower() == "true"
        return Sharding("fsdp", offload, offload, source=file)
    if distributed == "NO" and gpus > 1:
        raise ValueError(f"--accelerate_config: {file} is for one process, not for {gpus} GPUs.")
    if distributed in ("NO", "MULTI_GPU"):
        return Sharding("none" if gpus == 1 else "ddp", source=file)
    raise ValueError(f"--accelerate_config: {file} has distributed_type {distributed}, which cannot be planned.")


def _deepspeed_sharding(config: str | dict[str, Any], source: str) -> Sharding:
    if isinstance(config, str):
        config = check_deepspeed(config)
    zero = config.get("zero_optimization", {})

    def offloads(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") not in ("none", None)

    keys = {
        "reduce_bucket": "reduce_bucket_size",
        "prefetch_bucket": "stage3_prefetch_bucket_size",
        "live_params": "stage3_max_live_parameters",
        "sub_group": "sub_group_size",
    }  # "auto" is at most DeepSpeed's default
    sizes = {k: int(zero[v]) for k, v in keys.items() if isinstance(zero.get(v), (int, float))}
    stage = int(zero.get("stage", 0))
    return Sharding(
        f"zero{stage}" if stage else "ddp",
        offloads("offload_optimizer"),
        offloads("offload_param"),
        source=source,
        **sizes,
    )


@dataclass(frozen=True)
class Run:
    """What a training configuration says that costs anything, under TRL's names."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
    prompt_length: int
    max_completion_length: int
    mean_completion_length: int
    mixed_precision: bool  # bf16 or fp16
    weight_bytes: int  # of the weights as loaded (dtype)
    gradient_checkpointing: bool
    flash_attention: bool
    optim: str
    beta: float
    loss_type: str
    peft: bool
    use_vllm: bool
    vllm_colocate: bool
    vllm_tensor_parallel_size: int
    vllm_gpu_memory_utilization: float
    vllm_max_model_length: int | None
    vllm_enable_sleep_mode: bool
    vllm_correction: bool
    entropy_control: EntropyControl | None
    step_pool: bool

    @property
    def length(self) -> int:
        """Tokens of a padded row. TRL pads to the longest of a rank's rollout, which soon is the longest allowed."""
        return self.prompt_length + self.max_completion_length

    @property
    def rollout_rows(self) -> int:
        """Rows of a rollout on one rank."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def updates(self) -> int:
        """Optimizer steps on one rollout."""
        return max(self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps, 1)

    @property
    def scores_rollout(self) -> bool:
        """Whether TRL computes the rollout's log-probabilities: off-policy, or to correct vLLM's."""
        generate_every = self.steps_per_generation * self.num_iterations
        off_policy = self.gradient_accumulation_steps % generate_every != 0
        return off_policy or (self.use_vllm and self.vllm_correction)

    @property
    def scores_step(self) -> bool:
        """Whether the step pool needs a scoring pass of its own."""
        control = self.entropy_control
        if control is None or not (control.needs_pool and self.step_pool and self.gradient_accumulation_steps > 1):
            return False
        return control.scores_entropies or not self.scores_rollout

    @property
    def compute_bytes(self) -> int:
        return 2 if self.mixed_precision else self.weight_bytes


def read_run(args: "CovGRPOConfig", model: "ModelConfig", prompt_length: int | None, mean: int | None) -> Run:
    """The parts of the parsed arguments that cost anything.

    The longest prompt is, unless given, what `vllm_max_model_length` leaves for it, or else 1024.
    """
    completion = int(args.max_completion_length)
    room = (args.vllm_max_model_length or 0) - completion
    prompt = prompt_length or (room if room > 0 else 1024)
    init = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, **(args.model_init_kwargs or {})}
    attention = str(init["attn_implementation"] or "sdpa")
    return Run(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        steps_per_generation=int(args.steps_per_generation),
        num_iterations=args.num_iterations,
        prompt_length=prompt,
        max_completion_length=completion,
        mean_completion_length=min(mean or completion, completion),
        mixed_precision=bool(args.bf16 or args.fp16),
        weight_bytes=2 if str(init["dtype"]).removeprefix("torch.") in ("bfloat16", "float16") else 4,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        flash_attention="flash" in attention,
        optim=str(getattr(args.optim, "value", args.optim)),
        beta=args.beta,
        loss_type=args.loss_type,
        peft=bool(model.use_peft),
        use_vllm=args.use_vllm,
        vllm_colocate=args.use_vllm and args.vllm_mode == "colocate",
        vllm_tensor_parallel_size=args.vllm_tensor_parallel_size,
        vllm_gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        vllm_max_model_length=args.vllm_max_model_length,
        vllm_enable_sleep_mode=bool(args.vllm_enable_sleep_mode),
        vllm_correction=args.vllm_importance_sampling_correction,
        entropy_control=args.make_entropy_control(),
        step_pool=args.entropy_control_pool == "step",
    )
