"""The command line: `entropy-trl` with its commands, and what `train.py` runs.

A mistake of the user's (a mistyped key, a missing file, settings that cannot go together) is one line on stderr and
exit code 2. Only the steps that read what the user wrote are guarded so; anything else that fails keeps its traceback.
`ENTROPY_TRL_DEBUG=1` shows the traceback of a mistake too.
"""

import argparse
import atexit
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_trl._version import __version__
from entropy_trl.dotted_path import NoSuchModuleError, import_from


if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, ModelConfig

    from entropy_trl.config import CovGRPOConfig
    from entropy_trl.script_args import CovGRPOScriptArguments
    from entropy_trl.trainer import CovGRPOTrainer

logger = logging.getLogger(__name__)

COMMANDS = {
    "train": "train a model with entropy control",
    "evaluate": "score models on maths benchmarks by the paper's protocol",
    "plan": "compute a run's memory, time and communication on paper",
    "law": "fit reward against entropy, R = -a exp(H) + b, to the logs of any trainer",
    "covariance": "show which tokens drive a run's entropy, from its token records",
    "report": "write a page on one or more runs: curves, entropy law, covariance, settings, results",
    "quickstart": "see entropy collapse and its cure on an embedded task, on a CPU, in minutes",
}


NOT_PUSHED = 3
"""Exit code of a training that is done and saved, but of which not all is on the Hub."""

#: What a shell reports of a program that the end of a pipe has stopped.
_SIGPIPE = 141


class UsageError(Exception):
    """A mistake of the user's, told in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console command `entropy-trl`. Returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="entropy-trl",
        description="Entropy control for reinforcement learning with verifiable rewards, on Hugging Face TRL.",
        epilog="commands:\n" + "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"entropy-trl {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="what to do; `entropy-trl COMMAND --help` lists its options")
    command = parser.parse_args(argv[:1]).command
    if command == "train":
        return train_main(argv[1:], prog="entropy-trl train")
    mains = {
        "evaluate": _evaluate_main,
        "plan": _plan_main,
        "law": _law_main,
        "covariance": _covariance_main,
        "report": _report_main,
        "quickstart": _quickstart_main,
    }
    try:
        exit_code = mains[command](argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return _SIGPIPE
    return exit_code


def _quickstart_main(argv: Sequence[str]) -> int:
    from entropy_trl.quickstart import run

    parser = argparse.ArgumentParser(
        prog="entropy-trl quickstart",
        description=f"{COMMANDS['quickstart'][0].upper()}{COMMANDS['quickstart'][1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_arguments(parser)
    return run.main(parser.parse_args(argv))


def _evaluate_main(argv: Sequence[str], prog: str = "entropy-trl evaluate") -> int:
    """Evaluates models, or prints earlier results. Returns 0, or 2 for a mistake of the user's."""
    from entropy_trl.evaluation import command

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Score models on maths benchmarks by the protocol of arXiv 2505.22617. A run that was interrupted "
        "goes on where it stopped.",
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return _checked(parser, argv, command.prepare, lambda job, _: command.main(job))


def _plan_main(argv: Sequence[str], prog: str = "entropy-trl plan") -> int:
    """Prints the plan of a run. Returns 0 if it fits, 1 if it does not, 2 for a mistake of the user's."""
    from entropy_trl.plan import command

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compute what a run takes of given hardware. The training configuration is given as to "
        "`entropy-trl train`: `--config FILE.yaml` and any of its options. Exit code 0: it fits, 1: it does not.",
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    options, rest = parser.parse_known_args(argv)
    try:
        # This machine may have no GPU, where bf16 is refused unless the CPU is asked for.
        _, training_args, model_args, _ = parse_train_args([*rest, "--use_cpu", "true"], prog, options.gpus)
        with _usage_errors(ValueError, ImportError):
            plan = command.make_plan(options, training_args, model_args)
    except UsageError as error:
        return _tell(error, prog)
    return command.main(plan, options.json)


def _law_main(argv: Sequence[str], prog: str = "entropy-trl law") -> int:
    """Fits the law to logs. Returns 0, or 2 for a mistake of the user's."""
    from entropy_trl.analysis.law import command

    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.DESCRIPTION,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return _checked(parser, argv, command.prepare, command.run)


def _covariance_main(argv: Sequence[str], prog: str = "entropy-trl covariance") -> int:
    """Prints the analyses of a run's token records. Returns 0, or 2 for a mistake of the user's."""
    from entropy_trl.analysis.covariance import command

    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.DESCRIPTION,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return _checked(parser, argv, command.prepare, command.run, (ValueError, OSError))


def _report_main(argv: Sequence[str], prog: str = "entropy-trl report") -> int:
    """Writes the page on runs. Returns 0, or 2 for a mistake of the user's."""
    try:
        with _usage_errors(ImportError):  # matplotlib
            from entropy_trl.analysis.report import command
    except UsageError as error:
        return _tell(error, prog)
    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.DESCRIPTION,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return _checked(parser, argv, command.prepare, command.run)


def _checked(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    prepare: Callable[[argparse.Namespace], Any],
    run: Callable[[Any, argparse.Namespace], int],
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError, ImportError),
) -> int:
    """Runs a command with what `prepare` makes of its options, where these kinds of errors are the user's mistakes."""
    options = parser.parse_args(argv)
    try:
        with _usage_errors(*mistakes):
            prepared = prepare(options)
    except UsageError as error:
        return _tell(error, parser.prog)
    return run(prepared, options)


def train_main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Trains as the command line and its config file say.

    Returns the exit code: 2 for a mistake of the user's, 3 if all is done and saved but not all of it is on the Hub.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not _is_first_rank():  # what every rank would say, the first one says
        logging.getLogger("entropy_trl").setLevel(logging.ERROR)
    try:
        job = _prepare(argv, prog)
    except UsageError as error:
        return _tell(error, prog)
    _train(job)
    exit_code = NOT_PUSHED if job.trainer.hub_failures else 0
    _end(job.trainer.accelerator, exit_code)
    return exit_code


def _tell(error: UsageError, prog: str) -> int:
    """Says a mistake of the user's, once, and returns the exit code for it."""
    if _is_first_rank():
        if os.environ.get("ENTROPY_TRL_DEBUG"):
            traceback.print_exc()
        from entropy_trl.analysis.pages import terminal

        print(terminal(f"{prog}: error: {error}"), file=sys.stderr)
    return 2


def _is_first_rank() -> bool:
    """Whether this process is the one that speaks. Asked before there is a process group, so of the launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds, raised over what the user wrote, into a `UsageError` of one line."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UsageError(f"{error.doc!r} is not valid JSON: {error}.") from error
    except kinds as error:
        raise UsageError(" ".join(str(error).split()) or type(error).__name__) from error


@dataclass
class _Job:
    """A trainer that is ready to run, and what to do around the run."""

    trainer: "CovGRPOTrainer"
    checkpoint: Path | None
    dataset_name: str | None


@dataclass
class _Policy:
    """What is made of the model's name or factory, when it is first asked for."""

    script_args: "CovGRPOScriptArguments"
    training_args: "CovGRPOConfig"
    model_args: "ModelConfig"

    @cached_property
    def made(self) -> tuple[Any, Any]:
        """The model that the factory makes, or None, and the tokenizer."""
        from transformers import AutoTokenizer

        if self.model_args.model_name_or_path is None:
            return _import_object(str(self.script_args.model_factory), "model_factory")()
        with _usage_errors(ValueError, OSError):
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


def _prepare(argv: Sequence[str], prog: str) -> _Job:
    """Everything up to the first step of training; raises `UsageError`."""
    script_args, training_args, model_args, mixture_args = parse_train_args(argv, prog)
    checkpoint = _checkpoint(training_args)
    _check_model_choice(script_args, model_args)
    policy = _Policy(script_args, training_args, model_args)
    reward_funcs = _reward_functions(script_args, training_args.max_completion_length)
    train_dataset = _load_split(script_args, training_args, policy, mixture_args, script_args.dataset_train_split)
    _check_reward_columns(reward_funcs, train_dataset)
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None
    if training_args.eval_strategy != "no":
        if script_args.eval_benchmarks:
            eval_dataset = _load_benchmarks(script_args)
        else:
            eval_dataset = _load_split(script_args, training_args, policy, mixture_args, script_args.dataset_test_split)
        for rows in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            _check_reward_columns(reward_funcs, rows)
    trainer = _build_trainer(script_args, training_args, model_args, policy, reward_funcs, train_dataset, eval_dataset)
    return _Job(trainer, checkpoint, script_args.dataset_name)


def parse_train_args(
    argv: Sequence[str], prog: str = "train.py", processes: int | None = None
) -> "tuple[CovGRPOScriptArguments, CovGRPOConfig, ModelConfig, DatasetMixtureConfig]":
    """Parses a command line, and the file that its `--config` names, with TRL's parser and dataclasses.

    Values on the command line replace those of the file. Another control named on the command line replaces the file's
    control whole, so the file's `entropy_control_kwargs` go with it. `processes` stands for the number of processes
    that the settings are checked for, where it is not the number of those that run.

    Raises:
        UsageError: An unknown key (the nearest valid one is named), a value of the wrong type, a file that is missing
            or is not a YAML mapping, or settings that contradict each other.
    """
    import yaml
    from trl import DatasetMixtureConfig, ModelConfig

    from entropy_trl.config import CovGRPOConfig
    from entropy_trl.script_args import CovGRPOScriptArguments, TrainParser

    config_class: Any = CovGRPOConfig
    if processes is not None:
        config_class = type("CovGRPOConfig", (CovGRPOConfig,), {"world_size": processes})
    parser = TrainParser(
        (CovGRPOScriptArguments, config_class, ModelConfig, DatasetMixtureConfig),
        prog=prog,
        description="Train with TRL's GRPO and entropy control. `--config FILE.yaml` reads any of the options below "
        "from a file; options on the command line go first.",
    )
    with _usage_errors(ValueError, ImportError, OSError, yaml.YAMLError):
        return parser.parse(argv)


def _load_split(
    script_args: "CovGRPOScriptArguments",
    training_args: "CovGRPOConfig",
    policy: "_Policy",
    mixture_args: "DatasetMixtureConfig",
    split: str,
) -> "Dataset | IterableDataset":
    """One split of the data that the arguments name, with the columns that the trainer and the rewards read."""
    from accelerate import PartialState

    if mixture_args.datasets and script_args.dataset_name:
        raise UsageError("Both datasets and dataset_name are given: remove one of them.")
    if not (mixture_args.datasets or script_args.dataset_name):
        return _make_rows(script_args, split)
    options = _row_options(script_args, training_args, policy, split)
    # One process of a machine reads and prepares the rows; the others find its results in the cache.
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        return _read_rows(script_args, mixture_args, split, options)
    finally:  # after a mistake too, so that the others tell it as well and end
        if state.is_local_main_process:
            state.wait_for_everyone()


def _load_benchmarks(script_args: "CovGRPOScriptArguments") -> "dict[str, Dataset]":
    """The benchmarks for evaluation in training, with the prompts that the policy is trained with."""
    from entropy_trl.evaluation import get_benchmark, load_benchmark

    loaded = {}
    with _usage_errors(ValueError, OSError):
        for choice in script_args.eval_benchmarks or ():
            benchmark = get_benchmark(choice)
            loaded[benchmark.name] = load_benchmark(benchmark, prompt_template=script_args.prompt_template)
    return loaded


def _read_rows(
    script_args: "CovGRPOScriptArguments", mixture_args: "DatasetMixtureConfig", split: str, options: dict[str, Any]
) -> "Dataset | IterableDataset":
    from trl import get_dataset

    from entropy_trl.data import load_rows, prepare_rows

    with _usage_errors(ValueError, OSError):
        if not mixture_args.datasets:
            return load_rows(
                script_args.dataset_name,
                split=split,
                config=script_args.dataset_config,
                streaming=script_args.dataset_streaming,
                **options,
            )
        mixture = get_dataset(mixture_args)
        if split not in mixture:
            raise UsageError(f"The mixture of datasets has no split {split!r}: set test_split_size to make 'test'.")
        return prepare_rows(mixture[split], name="datasets", **options)


def _row_options(
    script_args: "CovGRPOScriptArguments", training_args: "CovGRPOConfig", policy: "_Policy", split: str
) -> dict[str, Any]:
    """The fields of `RowOptions`. Only training rows are compared with evaluation problems, and listed in a file."""
    from entropy_trl.script_args import ROW_OPTIONS

    options: dict[str, Any] = {name: getattr(script_args, name) for name in ROW_OPTIONS}
    training = split == script_args.dataset_train_split
    options["exclude_overlap"] = (script_args.exclude_overlap or ()) if training else ()
    if not (training and _is_first_rank()):
        options["dropped_rows_file"] = None
    if script_args.max_prompt_length is not None:
        options["chat_template_kwargs"] = training_args.chat_template_kwargs or {}
        options["tokenizer"] = policy.tokenizer
    return options


def _make_rows(script_args: "CovGRPOScriptArguments", split: str) -> "Dataset | IterableDataset":
    """The rows of `dataset_factory`, which are used as they are."""
    from entropy_trl.script_args import ROW_OPTIONS

    if script_args.dataset_factory is None:
        raise UsageError("No data: give --dataset_name (a file, a folder or a hub data set), or --dataset_factory.")
    if split != script_args.dataset_train_split:
        raise UsageError("dataset_factory makes training rows only: set eval_strategy to 'no', or give --dataset_name.")
    given = [name for name in ROW_OPTIONS if getattr(script_args, name) != getattr(type(script_args), name)]
    if given:
        raise UsageError(f"{given[0]} is for --dataset_name: the rows of dataset_factory are used as they are.")
    return _import_object(script_args.dataset_factory, "dataset_factory")()


def _reward_functions(script_args: "CovGRPOScriptArguments", longest: int | None) -> list[Any]:
    """The reward functions by name or dotted path, after the reward model if there is one.

    The overlong punishment starts at 80% of the longest completion, as in DAPO (16,384 of 20,480) and `trl grpo`.
    """
    from trl import rewards as trl_rewards

    from entropy_trl.rewards import math_reward

    known: dict[str, Callable[..., Any]] = {
        "math_reward": math_reward,
        "accuracy_reward": trl_rewards.accuracy_reward,
        "reasoning_accuracy_reward": trl_rewards.reasoning_accuracy_reward,
        "think_format_reward": trl_rewards.think_format_reward,
    }
    if longest is not None:
        known["get_soft_overlong_punishment"] = trl_rewards.get_soft_overlong_punishment(
            max_completion_len=longest, soft_punish_cache=longest // 5
        )
    elif "get_soft_overlong_punishment" in script_args.reward_funcs:
        raise UsageError("get_soft_overlong_punishment needs max_completion_length, which is null.")
    functions: list[Any] = []
    if script_args.reward_model_name_or_path:
        functions.append(script_args.reward_model_name_or_path)
    for name in script_args.reward_funcs:
        if name in known:
            functions.append(known[name])
        elif "." in name:
            functions.append(_import_object(name, "reward_funcs"))
        else:
            raise UsageError(
                f"Unknown reward function {name!r} in reward_funcs: use one of {', '.join(known)}, or a dotted path "
                "such as my_module.my_reward."
            )
    return functions


def _import_object(path: str, option: str) -> Callable[..., Any]:
    """The function at a dotted path, from an installed module or one in the current folder."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UsageError(f"{option}: {path!r} is not a dotted path such as my_module.my_function.")
    try:
        function: Any = import_from(path, f"{option}:")
    except NoSuchModuleError as error:
        raise UsageError(str(error)) from error
    if not callable(function):
        raise UsageError(f"{option}: {path!r}: module {module_name!r} has no function {name!r}.")
    found: Callable[..., Any] = function
    return found


def _check_reward_columns(reward_funcs: list[Any], rows: "Dataset | IterableDataset") -> None:
    """Refuses data without a column that a reward function cannot do without."""
    columns = rows.column_names
    if columns is None:  # streamed rows may not know their columns before they are read
        columns = list(next(iter(rows)))
    from_trl = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
    for function in reward_funcs:
        if not inspect.isroutine(function):
            continue
        for parameter in inspect.signature(function).parameters.values():
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if required and parameter.name not in from_trl and parameter.name not in columns:
                raise UsageError(
                    f"The reward function {function.__name__} needs a column {parameter.name!r}, which the data does "
                    f"not have: its columns are {', '.join(map(repr, columns))}."
                )


def _checkpoint(training_args: "CovGRPOConfig") -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means, if any."""
    from entropy_trl.saving.checkpoint import checkpoint_to_resume
    from entropy_trl.saving.manifest import Layout

    choice: str | bool | None = training_args.resume_from_checkpoint
    if choice is not None and str(choice).lower() in ("false", "none", "null", "true"):
        choice = str(choice).lower() == "true"
    with _usage_errors(ValueError):
        checkpoint = checkpoint_to_resume(choice, str(training_args.output_dir), Layout.of(training_args))
    if checkpoint is not None and _is_first_rank():
        print(f"Resuming from {checkpoint}.", flush=True)
    return checkpoint


def _check_model_choice(script_args: "CovGRPOScriptArguments", model_args: "ModelConfig") -> None:
    if model_args.model_name_or_path is None and script_args.model_factory is None:
        raise UsageError("No model: give --model_name_or_path (a hub id or a folder), or --model_factory.")
    name = model_args.model_name_or_path
    template = script_args.chat_template_path
    if template is not None and not Path(template).is_file():
        raise UsageError(f"chat_template_path: there is no file {template!r}.")
    if name is not None and name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UsageError(f"model_name_or_path: there is no folder {name!r}.")


def _build_trainer(
    script_args: "CovGRPOScriptArguments",
    training_args: "CovGRPOConfig",
    model_args: "ModelConfig",
    policy: "_Policy",
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
    # TRL and transformers report settings that cannot go together, a missing optional package and a model that cannot
    # be found with these.
    with _usage_errors(ValueError, ImportError, OSError, NotImplementedError):
        return CovGRPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )


def _train(job: _Job) -> None:
    """Trains, and leaves model, tokenizer, model card and log in the output folder (and on the hub, if asked to)."""
    trainer = job.trainer
    output_dir = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=None if job.checkpoint is None else str(job.checkpoint))
    trainer.accelerator.print("Training completed.")

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


def _end(accelerator: "Accelerator", exit_code: int) -> None:
    """Ends the trackers and the process group; several processes on CPUs leave without the interpreter's teardown.

    In it torch 2.13 destroys gloo's process group with the GIL held, for which a thread of gloo may be waiting: up to a
    third of the exits of a small program hung or aborted, with all work done.
    """
    import torch.distributed as dist

    on_gloo = dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"
    accelerator.end_training()
    if on_gloo and accelerator.num_processes > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
