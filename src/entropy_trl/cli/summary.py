"""What `entropy-trl train` says before and after the training: a summary of the run, and what happened."""

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entropy_trl.analysis.logs.runs import Series
from entropy_trl.analysis.verdict import verdict
from entropy_trl.cli.progress import duration, number
from entropy_trl.controls import Chain, ClipCov, EntropyTarget, KLCov, describe_control


if TYPE_CHECKING:
    from entropy_trl.cli.train_arguments import CovGRPOScriptArguments
    from entropy_trl.config import CovGRPOConfig
    from entropy_trl.trainer import CovGRPOTrainer

#: Hyper-parameters that are off unless they are given.
_OPTIONAL = ("entropy_target", "entropy_controller")

#: Above this a full fine-tuning by reinforcement learning is unusual: recipes have 1e-7 to 1e-5.
_HIGH_LEARNING_RATE = 1e-5


def start_summary(
    trainer: "CovGRPOTrainer", model_name: str, script_args: "CovGRPOScriptArguments", args: "CovGRPOConfig"
) -> list[str]:
    """About ten lines on a run that is about to begin, each a label and what it is.

    Args:
        trainer ([`CovGRPOTrainer`]): The trainer, ready to run.
        model_name (`str`): The name, folder or factory of the model.
        script_args ([`CovGRPOScriptArguments`]): Where the data and the rewards come from.
        args ([`CovGRPOConfig`]): The configuration that was asked for. That of a dry run's trainer saves nothing.
    """
    lines = {
        "model": _model(trainer, model_name),
        "data": _data(trainer, script_args),
        "rewards": ", ".join(trainer.reward_func_names),
        "control": _control(trainer),
        "restrains": _restrains(trainer),
        "rollout": _rollout(args),
        "training": _training(trainer),
        "devices": _devices(trainer),
        "output": _output(args),
        "unusual": "; ".join(_unusual(trainer, args)),
    }
    return [f"{label:<9}  {text}" for label, text in lines.items() if text]


def end_summary(trainer: "CovGRPOTrainer") -> list[str]:
    """What happened in three lines: steps and time, reward, entropy with a verdict."""
    state, log = trainer.state, trainer.state.log_history
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), 0.0)
    lines = [
        f"Trained to step {state.global_step:,} of {state.max_steps:,} in {duration(seconds)}, on "
        f"{state.num_input_tokens_seen:,} tokens of prompts and completions."
    ]
    rewards = _values(log, "reward")
    if rewards:
        count = max(len(rewards) // 10, 1)
        first, last = (sum(ends) / count for ends in (rewards[:count], rewards[-count:]))
        lines.append(
            f"Reward: {number(first)} at the start, {number(last)} at the end, {number(max(rewards))} at most."
        )
    entropies = _values(log, "entropy")
    if entropies:
        lines.append(
            f"Entropy: {number(entropies[0])} nats a token at the first log, {number(entropies[-1])} at the last."
        )
        steps = [entry["step"] for entry in log if _is_number(entry.get("entropy"))]
        found = verdict([Series(np.array(steps), np.array(entropies))], trainer.args.to_dict())
        if found.sign != "unknown":
            lines[-1] += f" {found.sentence}" + (f" {found.advice}" if found.alarm else "")
    lines += [_held(log, name) for name in _logged(log, "target")]
    return lines


def _logged(log: list[dict[str, Any]], name: str) -> list[str]:
    """The names in the log of a number of the control's state, one for each control of a chain."""
    found = {key for entry in log for key in entry if key.startswith("entropy_control/")}
    return sorted(key for key in found if key.rsplit("/", 1)[-1] == name)


def _held(log: list[dict[str, Any]], name: str) -> str:
    """How near its target the entropy was over the second half, and how often the control was at its bound."""
    rows = [entry for entry in log if _is_number(entry.get(name)) and _is_number(entry.get("entropy"))]
    rows = rows[len(rows) // 2 :]
    if not rows:
        return "Entropy target: not measured."
    share = sum(abs(entry["entropy"] / entry[name] - 1) for entry in rows) / len(rows)
    bound = sum(entry[name.removesuffix("target") + "saturated"] for entry in rows) / len(rows)
    return (
        f"Entropy target: {number(rows[-1][name])} nats a token; over the second half the entropy was {share:.0%} off "
        f"on average, and the control at its bound in {bound:.0%} of the steps."
    )


def next_command(output_dir: str) -> str:
    """The command to run after a training."""
    return shlex.join(["entropy-trl", "report", output_dir])


def _values(log: list[dict[str, Any]], name: str) -> list[float]:
    return [entry[name] for entry in log if _is_number(entry.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _model(trainer: "CovGRPOTrainer", name: str) -> str:
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    total = sum(_size(parameter) for parameter in parameters)
    trained = sum(_size(parameter) for parameter in parameters if parameter.requires_grad)
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    text = f"{name}: {_short(total)} parameters, {dtypes}"
    return text if trained == total else f"{text}, of which {_short(trained)} are trained"


def _size(parameter: Any) -> int:
    """The elements of a parameter. Under ZeRO-3 it is empty here, and `ds_numel` is its size."""
    sharded: dict[str, Any] = vars(parameter)
    return int(sharded.get("ds_numel", parameter.numel()))


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _data(trainer: "CovGRPOTrainer", script_args: "CovGRPOScriptArguments") -> str:
    name = script_args.dataset_name or script_args.dataset_factory or "the mixture of datasets"
    text = f"{name} ({script_args.dataset_train_split}): {_rows(trainer.train_dataset)}"
    evaluated = trainer.eval_dataset
    if isinstance(evaluated, dict):
        return f"{text}; evaluation: " + ", ".join(f"{key} {_rows(rows)}" for key, rows in evaluated.items())
    return text if evaluated is None else f"{text}; evaluation: {_rows(evaluated)}"


def _rows(dataset: Any) -> str:
    from datasets import IterableDataset

    return "rows streamed" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} rows kept"


def _control(trainer: "CovGRPOTrainer") -> str:
    args: CovGRPOConfig = trainer.args
    low, high = args.ratio_clip()
    clip = f"ratio clip {_bound(low)} below, {_bound(high)} above"
    if trainer.entropy_control is None:
        return f"none: plain GRPO, {clip}"
    parts = []
    for name, values in _parts(trainer).items():
        shown = (f"{key} {_setting(value)}" for key, value in values.items() if key not in _OPTIONAL or value)
        parts.append(f"{name} ({', '.join(shown)})")
    return f"{' + '.join(parts)}; {clip}"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict) and "share" in value:
        return f"{value['share']:g} of the entropy at the start"
    if isinstance(value, dict) and "start" in value:
        return f"from {value['start']:g} to {value['end']:g} over {value['over']:.0%} of the training"
    return str(value)


def _largest(value: Any) -> float | None:
    """The number, or the larger end of its schedule; None for anything else."""
    if isinstance(value, dict) and "start" in value:
        return max(float(value["start"]), float(value["end"]))
    return float(value) if isinstance(value, (int, float)) else None


def _bound(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "none"


def _parts(trainer: "CovGRPOTrainer") -> dict[str, dict[str, Any]]:
    """The hyper-parameters of each control by its name."""
    control = trainer.entropy_control
    if control is None:
        return {}
    name, values = describe_control(control)
    return values if isinstance(control, Chain) else {name: values}


def _targets(trainer: "CovGRPOTrainer") -> dict[str, EntropyTarget]:
    """The controllers of the controls that hold the entropy at a target by a fraction, by the control's name."""
    control = trainer.entropy_control
    chained = dict(control.controls) if isinstance(control, Chain) else dict.fromkeys(_parts(trainer), control)
    parts = {name: part.at(0.0) for name, part in chained.items() if part is not None}
    return {
        name: part.target
        for name, part in parts.items()
        if isinstance(part, (ClipCov, KLCov)) and part.target is not None
    }


def _pool(trainer: "CovGRPOTrainer") -> tuple[int, str]:
    """The most completion tokens among which a control selects, and what they are the tokens of."""
    args: CovGRPOConfig = trainer.args
    rows, name = args.per_device_train_batch_size, "a micro-batch"
    if args.entropy_control_pool == "step":
        rows, name = rows * args.gradient_accumulation_steps * args.world_size, "a step"
    return rows * (args.max_completion_length or 0), name


def _restrains(trainer: "CovGRPOTrainer") -> str:
    tokens, name = _pool(trainer)
    said = []
    targets = _targets(trainer)
    for part, values in _parts(trainer).items():
        if part in targets:
            wanted, most = _setting(values["entropy_target"]), targets[part].max_fraction
            unit = "" if targets[part].of_start else " nats"
            said.append(
                f"{part} moves its fraction between {-most:g} and {most:g} once a step, so that the entropy follows "
                f"its target, {wanted}{unit}: below it, the highest covariances are restrained, above it the lowest"
            )
            continue
        fraction = _largest(values.get("fraction"))
        if fraction is not None:
            limit = f", at most {math.floor(fraction * tokens):,} of {tokens:,}" if tokens else ""
            said.append(f"{part}: up to {100 * fraction:g}% of the tokens of {name}{limit}")
        else:
            said.append(f"{part}: all tokens, by its hyper-parameters")
    return "; ".join(said)


def _rollout(args: "CovGRPOConfig") -> str:
    completions = int(args.generation_batch_size or 0)
    text = (
        f"{completions // args.num_generations:,} prompts x {args.num_generations} completions = {completions:,} "
        f"completions"
    )
    if args.max_completion_length:
        text += f" of at most {args.max_completion_length:,} tokens"
    return f"{text}, temperature {args.temperature:g}{', with dynamic sampling' if args.dynamic_sampling else ''}"


def _updates(args: "CovGRPOConfig") -> float:
    """Optimizer steps a rollout."""
    return args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps


def _training(trainer: "CovGRPOTrainer") -> str:
    args: CovGRPOConfig = trainer.args
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = completions * (args.max_completion_length or 0)
    text = f"{_updates(args):g} updates a rollout, each of {completions:,} completions"
    if tokens:
        text += f" (at most {tokens:,} tokens)"
    return f"{text}; {_length(trainer)}; learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}"


def _length(trainer: "CovGRPOTrainer") -> str:
    from datasets import IterableDataset

    args: CovGRPOConfig = trainer.args
    if args.max_steps > 0:
        return f"{args.max_steps:,} steps"
    text = f"{args.num_train_epochs:g} epochs"
    if isinstance(trainer.train_dataset, IterableDataset):
        return text
    rollouts = len(trainer.train_dataset) // max(int(args.generation_batch_size or 0) // args.num_generations, 1)
    return f"{text}, about {math.ceil(args.num_train_epochs * rollouts * _updates(args)):,} steps"


def _devices(trainer: "CovGRPOTrainer") -> str:
    args: CovGRPOConfig = trainer.args
    device = trainer.accelerator.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    parts = [f"{args.world_size} process{'es' if args.world_size > 1 else ''} on {kind}"]
    parts.append("bf16" if args.bf16 else "fp16" if args.fp16 else "float32")
    if trainer.is_deepspeed_enabled:
        parts.append("DeepSpeed")
    if trainer.is_fsdp_enabled:
        parts.append("FSDP")
    if trainer.rollout_func is not None:
        parts.append("rollout_func generates")
    else:
        parts.append(f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers generates")
    return ", ".join(parts)


def _output(args: "CovGRPOConfig") -> str:
    parts = [str(args.output_dir), f"a log every {_every(args.logging_steps)}"]
    strategy = str(args.save_strategy.value)
    parts.append(
        {"no": "no checkpoints", "steps": f"a checkpoint every {_every(args.save_steps)}"}.get(
            strategy, f"a checkpoint by {strategy}"
        )
    )
    if args.report_to:
        parts.append(f"trackers: {', '.join(args.report_to)}")
    if args.push_to_hub:
        parts.append("pushed to the Hub")
    return ", ".join(parts)


def _every(steps: float) -> str:
    return "step" if steps == 1 else f"{steps:g} steps" if steps > 1 else f"{steps:.0%} of the steps"


def _unusual(trainer: "CovGRPOTrainer", args: "CovGRPOConfig") -> Iterator[str]:
    """What most runs do not do, and who did it by mistake would want to know."""
    tokens, name = _pool(trainer)
    targets = _targets(trainer)
    for part, values in _parts(trainer).items():
        fraction = _largest(values.get("fraction"))
        if fraction is not None and tokens and fraction * tokens < 1 and part not in targets:
            yield f"{part} restrains less than one token of {name} (raise fraction)"
    if args.temperature != 1:
        yield f"temperature {args.temperature:g} (1 samples from the policy that is trained)"
    cuts = [
        f"{cut} {value:g}" for cut, value in (("top_p", args.top_p), ("min_p", args.min_p or 0)) if value not in (0, 1)
    ]
    cuts += [f"top_k {args.top_k}"] if args.top_k > 0 else []
    if cuts:
        yield f"{', '.join(cuts)} leaves tokens out of the sampling"
    if args.learning_rate > _HIGH_LEARNING_RATE and not _has_adapter(trainer):
        yield f"learning rate {args.learning_rate:g} without an adapter (1e-6 is common)"
    if args.save_strategy.value == "no":
        yield "no checkpoints (an interrupted run starts again)"
    if args.use_cpu or trainer.accelerator.device.type == "cpu":
        yield "training on a CPU"


def _has_adapter(trainer: "CovGRPOTrainer") -> bool:
    from accelerate.utils import is_peft_model

    return bool(is_peft_model(trainer.accelerator.unwrap_model(trainer.model)))
