"""The command `entropy-trl train`, which is what `train.py` runs."""

import argparse
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from entropy_trl.cli.checks import check_model, check_packages
from entropy_trl.cli.errors import UsageError, for_machines, import_object, is_first_rank, tell, usage_errors
from entropy_trl.cli.interruption import Interrupted, leave, resuming_command, say
from entropy_trl.cli.train_data import check_reward_columns, load_benchmarks, load_split, reward_functions
from entropy_trl.files import check_writable


if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

    from accelerate import Accelerator
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, ModelConfig

    from entropy_trl.cli.train_arguments import CovGRPOScriptArguments, TrainParser
    from entropy_trl.config import CovGRPOConfig
    from entropy_trl.trainer import CovGRPOTrainer

NOT_PUSHED = 3
"""Exit code of a training that is done and saved, but of which not all is on the Hub."""

DESCRIPTION = (
    "Train with TRL's GRPO and entropy control. `--config FILE.yaml` reads any of the options below from a file; "
    "options on the command line go first."
)


@dataclass
class Job:
    """A trainer that is ready to run, and what to do around the run."""

    trainer: "CovGRPOTrainer"
    checkpoint: Path | None
    dataset_name: str | None
    summary: list[str]
    #: Where a dry run writes.
    scratch: "TemporaryDirectory[str] | None" = None


@dataclass
class Policy:
    """What is made of the model's name or factory, when it is first asked for."""

    script_args: "CovGRPOScriptArguments"
    training_args: "CovGRPOConfig"
    model_args: "ModelConfig"

    @cached_property
    def made(self) -> tuple[Any, Any]:
        """The model that the factory makes, or None, and the tokenizer."""
        from transformers import AutoTokenizer

        if self.model_args.model_name_or_path is None:
            return import_object(str(self.script_args.model_factory), "model_factory")()
        with usage_errors(ValueError, OSError):
            return None, AutoTokenizer.from_pretrained(
                self.model_args.model_name_or_path,
                revision=self.model_args.model_revision,
                trust_remote_code=self.training_args.trust_remote_code,
            )

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = self.made[1]
        if self.script_args.chat_template_path is not None:
            tokenizer.chat_template = Path(self.script_args.chat_template_path).read_text()
        return tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is for the command alone. TRL's parser has all other options (see [`parse_train_args`])."""
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved configuration as YAML that runs, and end"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="load model and data, make one rollout and one step, say what memory they took, and save nothing",
    )
    parser.add_argument("-h", "--help", action="store_true", help="list the options of entropy-trl")
    parser.add_argument("--help_all", action="store_true", help="list all options, also those of TRL and transformers")


def prepare(options: argparse.Namespace) -> Job | None:
    """Do everything up to the first step of training; or print the configuration, if that is all that is wanted.

    Args:
        options (`argparse.Namespace`): What [`parse_train_args`] returns, as `script_args`, `training_args`,
            `model_args` and `mixture_args`.

    Raises:
        UsageError: A mistake of the user's.
    """
    if options.print_config:
        from entropy_trl.cli.config_text import config_text

        if is_first_rank():
            print(config_text(options.values, options.defaults, options.training_args), end="")
        return None
    with for_machines(options.script_args.log_format) as stdout:
        return _prepare(options, stdout)


def _prepare(options: argparse.Namespace, stdout: TextIO) -> Job:
    from entropy_trl.cli.dry_run import leave_no_trace
    from entropy_trl.cli.progress import show_progress
    from entropy_trl.cli.summary import start_summary
    from entropy_trl.rollout.sampling import check_prompts
    from entropy_trl.saving.run_settings import RunSettings

    script_args: CovGRPOScriptArguments = options.script_args
    training_args: CovGRPOConfig = options.training_args
    model_args: ModelConfig = options.model_args
    mixture_args: DatasetMixtureConfig = options.mixture_args
    with usage_errors(ValueError):
        check_writable(str(training_args.output_dir), "--output_dir")
    check_packages(training_args, model_args)
    asked_for = copy(training_args)
    checkpoint = _checkpoint(training_args)
    _check_model_choice(script_args, model_args, training_args.trust_remote_code)
    policy = Policy(script_args, training_args, model_args)
    scratch = leave_no_trace(training_args) if options.dry_run else None
    reward_funcs = reward_functions(script_args, training_args.max_completion_length)
    train_dataset = load_split(script_args, training_args, policy, mixture_args, script_args.dataset_train_split)
    check_reward_columns(reward_funcs, train_dataset)
    with usage_errors(ValueError):  # before the model loads
        check_prompts(training_args, train_dataset)
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None
    if training_args.eval_strategy != "no":
        if script_args.eval_benchmarks:
            eval_dataset = load_benchmarks(script_args)
        else:
            eval_dataset = load_split(script_args, training_args, policy, mixture_args, script_args.dataset_test_split)
        for rows in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            check_reward_columns(reward_funcs, rows)
    trainer = _build_trainer(script_args, training_args, model_args, policy, reward_funcs, train_dataset, eval_dataset)
    show_progress(trainer, script_args.log_format, stdout)
    others = {"data": asdict(script_args), "model": asdict(model_args)}
    trainer.remove_callback(RunSettings)
    trainer.add_callback(RunSettings([*options.prog.split(), *options.argv], others))
    model_name = str(model_args.model_name_or_path or script_args.model_factory)
    summary = start_summary(trainer, model_name, script_args, asked_for)
    return Job(trainer, checkpoint, script_args.dataset_name, summary, scratch)


def run(prepared: Job | None, options: argparse.Namespace) -> int:
    """Train. Returns the exit code: 3 if all is done and saved but not all of it is on the Hub."""
    if prepared is None:
        return 0
    with for_machines(options.script_args.log_format):
        return _run(prepared, options)


def _run(prepared: Job, options: argparse.Namespace) -> int:
    prepared.trainer.accelerator.print("\n".join(prepared.summary), flush=True)
    try:
        if prepared.scratch is None:
            _train(prepared)
        else:
            with prepared.scratch:
                _try(prepared)
        exit_code = NOT_PUSHED if prepared.trainer.hub_failures else 0
    except UsageError as error:  # of a reward function, which the first rollout calls
        if not prepared.trainer.args.disable_tqdm:
            print(file=sys.stderr)  # ends the line of the progress bar
        exit_code = tell(error, options.prog)
    except Interrupted as stop:
        exit_code = say(stop, options.prog, _how_to_resume(prepared.trainer, options))
        if prepared.trainer.accelerator.num_processes > 1:
            leave(exit_code)
    _end(prepared.trainer.accelerator, exit_code)
    return exit_code


def _how_to_resume(trainer: "CovGRPOTrainer", options: argparse.Namespace) -> str:
    """Where an interrupted training stopped, and the command that goes on with it."""
    from entropy_trl.saving.checkpoint import last_complete_checkpoint

    output_dir = str(trainer.args.output_dir)
    checkpoint = last_complete_checkpoint(output_dir)
    where = f" in step {trainer.state.global_step + 1} of {trainer.state.max_steps}."
    if checkpoint is None:
        return f"{where} There is no complete checkpoint in {output_dir!r}: the same command starts again."
    launched = trainer.accelerator.num_processes > 1
    return (
        f"{where} Resume from {checkpoint.name} with{' the same launcher and' if launched else ''}: "
        f"{resuming_command(options.prog, options.argv)}"
    )


def parse_train_args(
    argv: Sequence[str], prog: str = "train.py", processes: int | None = None, needs_sources: bool = False
) -> "tuple[CovGRPOScriptArguments, CovGRPOConfig, ModelConfig, DatasetMixtureConfig]":
    """Parses a command line, and the file that its `--config` names, with TRL's parser and dataclasses.

    Values on the command line replace those of the file. Another control named on the command line replaces the file's
    control whole, so the file's `entropy_control_kwargs` go with it. `processes` stands for the number of processes
    that the settings are checked for, where it is not the number of those that run. `needs_sources` refuses a command
    line without a model or data.

    Raises:
        UsageError: An unknown key (the nearest valid one is named), a value of the wrong type, a file that is missing
            or is not a YAML mapping, or settings that contradict each other.
    """
    return read_train_args(make_parser(prog, processes, needs_sources), argv)


def make_parser(prog: str, processes: int | None = None, needs_sources: bool = False) -> "TrainParser":
    """The parser of [`parse_train_args`]."""
    from trl import DatasetMixtureConfig, ModelConfig

    from entropy_trl.cli.train_arguments import CovGRPOScriptArguments, TrainParser
    from entropy_trl.config import CovGRPOConfig

    config_class: Any = CovGRPOConfig
    if processes is not None:
        config_class = type("CovGRPOConfig", (CovGRPOConfig,), {"world_size": processes})
    return TrainParser(
        (CovGRPOScriptArguments, config_class, ModelConfig, DatasetMixtureConfig),
        prog=prog,
        description=DESCRIPTION,
        needs_sources=needs_sources,
    )


def read_train_args(parser: "TrainParser", argv: Sequence[str]) -> Any:
    """What [`parse_train_args`] returns, with a parser that then has the values before they were made to that.

    Raises:
        UsageError: As for [`parse_train_args`].
    """
    import yaml

    with usage_errors(ValueError, ImportError, OSError, yaml.YAMLError):
        return parser.parse(argv)


def _checkpoint(training_args: "CovGRPOConfig") -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means, if any."""
    from entropy_trl.saving.checkpoint import checkpoint_to_resume, warn_of_another_run
    from entropy_trl.saving.manifest import Layout
    from entropy_trl.saving.options import warn_of_other_options

    choice: str | bool | None = training_args.resume_from_checkpoint
    if choice is not None and str(choice).lower() in ("false", "none", "null", "true"):
        choice = str(choice).lower() == "true"
    with usage_errors(ValueError):
        checkpoint = checkpoint_to_resume(choice, str(training_args.output_dir), Layout.of(training_args))
        if is_first_rank():
            warn_of_another_run(str(training_args.output_dir), checkpoint)
            if checkpoint is not None:
                print(f"Resuming from {checkpoint}.", flush=True)
                warn_of_other_options(checkpoint, training_args)
    return checkpoint


def _check_model_choice(
    script_args: "CovGRPOScriptArguments", model_args: "ModelConfig", trust_remote_code: bool
) -> None:
    template = script_args.chat_template_path
    if template is not None and not Path(template).is_file():
        raise UsageError(f"chat_template_path: there is no file {template!r}.")
    if model_args.model_name_or_path is not None:
        check_model(model_args.model_name_or_path, model_args.model_revision, trust_remote_code)


def _build_trainer(
    script_args: "CovGRPOScriptArguments",
    training_args: "CovGRPOConfig",
    model_args: "ModelConfig",
    policy: "Policy",
    reward_funcs: list[Any],
    train_dataset: "Dataset | IterableDataset",
    eval_dataset: "Dataset | IterableDataset | dict[str, Dataset] | None",
) -> "CovGRPOTrainer":
    from trl import get_peft_config, get_quantization_config

    from entropy_trl.trainer import CovGRPOTrainer

    model: Any = model_args.model_name_or_path
    tokenizer = policy.tokenizer if model is None or script_args.chat_template_path else None  # else TRL loads it
    if model is None:
        model = policy.made[0]
    else:
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            "trust_remote_code": training_args.trust_remote_code,
            **(training_args.model_init_kwargs or {}),
        }
    rollout_func = script_args.rollout_func and import_object(script_args.rollout_func, "rollout_func")
    # TRL and transformers report settings that cannot go together, a missing optional package and a model that cannot
    # be found with these.
    with usage_errors(ValueError, ImportError, OSError, NotImplementedError):
        return CovGRPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            rollout_func=rollout_func,
        )


def _try(job: Job) -> None:
    """Make one step, and say what it took."""
    from entropy_trl.cli.dry_run import try_one_step
    from entropy_trl.cli.progress import whole_bar

    with whole_bar(job.trainer):
        said = try_one_step(job.trainer, _resumed(job))
    job.trainer.accelerator.print(said)


def _resumed(job: Job) -> str | None:
    return None if job.checkpoint is None else str(job.checkpoint)


def _train(job: Job) -> None:
    """Trains, and leaves model, tokenizer, model card and log in the output folder (and on the hub, if asked to)."""
    from entropy_trl.cli.progress import whole_bar
    from entropy_trl.cli.summary import end_summary, next_command

    trainer = job.trainer
    output_dir = trainer.args.output_dir
    with whole_bar(trainer):
        trainer.train(resume_from_checkpoint=_resumed(job))
    trainer.accelerator.print("\n".join(["Training completed.", *end_summary(trainer)]))

    if trainer.is_fsdp_enabled:  # checkpoints may be sharded, and then transformers would save no model at all here
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_state()
    hub_dataset = None if job.dataset_name is None or Path(job.dataset_name).exists() else job.dataset_name
    commit = None
    if trainer.args.push_to_hub:
        # Saves model and card before it uploads anything; `save_model` would push once more, without the data set.
        commit = trainer.push_to_hub(dataset_name=hub_dataset)
    else:
        trainer.save_model(output_dir)
        trainer.create_model_card(model_name=Path(output_dir).name, dataset_name=hub_dataset)
    trainer.accelerator.print(f"Model saved to {output_dir}.")
    if commit is not None:
        trainer.accelerator.print(f"Model pushed to {commit.repo_url}.")
    trainer.accelerator.print(f"Next: {next_command(str(output_dir))}")


def _end(accelerator: "Accelerator", exit_code: int) -> None:
    """Ends the trackers and the process group; several processes on CPUs leave without the interpreter's teardown.

    In it torch 2.13 destroys gloo's process group with the GIL held, for which a thread of gloo may be waiting: up to a
    third of the exits of a small program hung or aborted, with all work done.
    """
    import torch.distributed as dist

    on_gloo = dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"
    accelerator.end_training()
    if on_gloo and accelerator.num_processes > 1:
        leave(exit_code)
