"""The options of a run, as its checkpoints keep them: a resume with other options says which of the two hold."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig

from entropy_trl.analysis.secrets import masked
from entropy_trl.config import CovGRPOConfig
from entropy_trl.saving.checkpoint import warn_once
from entropy_trl.saving.manifest import TRAINER_STATE, DamagedManifest, Layout, read_manifest


#: What decides where and how a run reports, not what it computes; and the layout, which is compared on its own.
_NOT_COMPARED = {
    *(field.name for field in dataclasses.fields(Layout)),
    *("generation_batch_size", "output_dir", "run_name", "project", "resume_from_checkpoint", "do_train", "do_eval"),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "log_completions_hub_repo", "num_completions_to_print"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "deepspeed", "fsdp", "fsdp_config", "local_rank", "skip_memory_metrics", "debug"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("logging_steps", "eval_steps", "save_steps"),  # compared with the trainer's state
}
#: torch restores an optimizer with its hyper-parameters, and a scheduler with the learning rate that it scales.
_IN_OPTIMIZER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"}
#: What a rollout that is made already does not depend on.
_OF_UPDATES = _IN_OPTIMIZER | {
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("gradient_checkpointing", "logging_strategy", "eval_strategy", "save_strategy", "save_total_limit"),
}
#: Schedules that are restored whole. The others keep their count of steps only.
_WHOLE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def recorded_options(args: GRPOConfig) -> dict[str, Any]:
    """The options of a run as JSON values, without secrets."""
    options: dict[str, Any] = json.loads(json.dumps(args.to_dict(), default=_named))
    return {name: masked(name, value) for name, value in options.items() if name not in _NOT_COMPARED}


def warn_of_other_options(checkpoint: Path, args: GRPOConfig) -> None:
    """Say in one line which options differ from the run that saved a checkpoint, and which of the two hold.

    Args:
        checkpoint (`Path`): The checkpoint to resume from.
        args (`GRPOConfig`): The configuration of the run that is to go on.

    Raises:
        ValueError: If the run cannot go on from the checkpoint's schedule or rollout.
    """
    state = _read_state(checkpoint)
    step = state.get("global_step", 0)
    if 0 < args.max_steps <= step:
        warn_nothing_left(checkpoint, step, args.max_steps)
        return
    try:
        manifest = read_manifest(checkpoint)
    except (FileNotFoundError, DamagedManifest):
        return
    before = manifest["options"]
    now = recorded_options(args)
    different = {name for name in before.keys() & now.keys() if _text(before[name]) != _text(now[name])}
    if now["model_init_kwargs"] is None:  # the command line makes them later, and the trainer compares them
        different.discard("model_init_kwargs")
    schedules = {before.get("lr_scheduler_type"), now["lr_scheduler_type"]}
    whole = schedules & set(_WHOLE_SCHEDULES)
    has_optimizer = (checkpoint / "scheduler.pt").exists() or (checkpoint / "latest").exists()
    if before and has_optimizer and whole and len(schedules) > 1:
        raise ValueError(
            f"lr_scheduler_type is {now['lr_scheduler_type']!r}, but {checkpoint} has the state of "
            f"{before['lr_scheduler_type']!r}: the one cannot go on from the other. Keep the schedule, or start a new "
            "run from the checkpoint's weights (model_name_or_path)."
        )
    if isinstance(args, CovGRPOConfig) and manifest["inside_rollout"] and before.get("beta") == 0 != args.beta:
        raise ValueError(
            f"beta is {args.beta:g}, but {checkpoint} lies inside a rollout that was made with beta 0: its completions "
            "have no log-probabilities of the reference. Resume with beta 0, or from a checkpoint between two rollouts."
        )
    kept = set()
    if has_optimizer:
        kept = different & (_IN_OPTIMIZER | ({"lr_scheduler_kwargs"} if whole else set()))
    theirs = [f"{name} {_text(before[name])} (not {_text(now[name])})" for name in sorted(kept)]
    theirs += _other_intervals(state, args)
    ours = [f"{name} {_text(now[name])} (was {_text(before[name])})" for name in sorted(different - kept)]
    if not ours and not theirs:
        return
    parts = [f"{checkpoint} was saved by a run with other options."]
    if ours:
        parts.append(f"The new ones hold for {', '.join(ours)}.")
    if theirs:
        parts.append(f"The checkpoint's hold for {', '.join(theirs)}.")
    if different - _OF_UPDATES and manifest["inside_rollout"]:
        parts.append("The saved rollout is used up as it is: options of generation and rewards act from the next.")
    if different & {"seed", "data_seed", "shuffle_dataset"}:
        parts.append("The order of the prompts is another one, so that some may come twice and others not at all.")
    warn_once(" ".join(parts))


def warn_of_other_data(checkpoint: Path, now: dict[str, Any]) -> None:
    """Say in one line whether a run goes on with another number of training rows, or with other reward functions.

    Args:
        checkpoint (`Path`): The checkpoint to resume from.
        now (`dict`): `train_rows` (`None` if unknown) and `reward_funcs` of the run that is to go on.
    """
    try:
        before = read_manifest(checkpoint)["options"]
    except (FileNotFoundError, DamagedManifest):
        return
    found = [n for n, value in now.items() if None not in (value, before.get(n)) and value != before[n]]
    if not found:
        return
    values = ", ".join(f"{name} {_text(now[name])} (was {_text(before[name])})" for name in found)
    order = " Prompts may come twice, and others not at all." if "train_rows" in found else ""
    warn_once(f"{checkpoint} was saved by a run with other data or rewards. The new ones hold: {values}.{order}")


def warn_nothing_left(checkpoint: Path, step: int, max_steps: int) -> None:
    """Say that a run has made all of its steps."""
    warn_once(
        f"Nothing is left to train: {checkpoint} is at step {step}, and the run ends at step {max_steps} (max_steps). "
        "Raise max_steps to train on."
    )


def _other_intervals(state: dict[str, Any], args: GRPOConfig) -> list[str]:
    """Intervals of logging, evaluating and saving that differ: transformers goes on with those of the state."""
    found = []
    for kind in ("logging", "eval", "save"):
        name, strategy = f"{kind}_steps", getattr(args, f"{kind}_strategy")
        steps, before = getattr(args, name), state.get(name)
        if strategy != "steps" or steps is None or before is None:
            continue
        if steps != before and (steps >= 1 or args.max_steps > 0):
            now = steps if steps >= 1 else -(-args.max_steps * steps // 1)
            if now != before:
                found.append(f"{name} {before:g} (not {steps:g})")
    return found


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / TRAINER_STATE).read_text())
    return state if isinstance(state, dict) else {}


def _named(value: Any) -> str:
    """What stands for a value that JSON does not have: the same for equal ones, in every process."""
    if isinstance(value, torch.dtype) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return repr(value)
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if not isinstance(value, str) else value
