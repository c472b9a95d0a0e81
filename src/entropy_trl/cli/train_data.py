"""The `train` command's data and rewards: the rows of a split, and the functions that score completions."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from entropy_trl.cli.errors import UsageError, import_object, is_first_rank, usage_errors


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig

    from entropy_trl.cli.train import Policy
    from entropy_trl.cli.train_arguments import CovGRPOScriptArguments
    from entropy_trl.config import CovGRPOConfig


def load_split(
    script_args: "CovGRPOScriptArguments",
    training_args: "CovGRPOConfig",
    policy: "Policy",
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


def load_benchmarks(script_args: "CovGRPOScriptArguments") -> "dict[str, Dataset]":
    """The benchmarks for evaluation in training, with the prompts that the policy is trained with."""
    from entropy_trl.evaluation import get_benchmark, load_benchmark

    loaded = {}
    with usage_errors(ValueError, OSError):
        for choice in script_args.eval_benchmarks or ():
            benchmark = get_benchmark(choice)
            loaded[benchmark.name] = load_benchmark(benchmark, prompt_template=script_args.prompt_template)
    return loaded


def _read_rows(
    script_args: "CovGRPOScriptArguments", mixture_args: "DatasetMixtureConfig", split: str, options: dict[str, Any]
) -> "Dataset | IterableDataset":
    from trl import get_dataset

    from entropy_trl.data import RowOptions, load_rows, prepare_rows

    with usage_errors(ValueError, OSError):
        if not mixture_args.datasets:
            return load_rows(
                script_args.dataset_name,
                split=split,
                config=script_args.dataset_config,
                streaming=script_args.dataset_streaming,
                options=RowOptions(**options),
            )
        mixture = get_dataset(mixture_args)
        if split not in mixture:
            raise UsageError(f"The mixture of datasets has no split {split!r}: set test_split_size to make 'test'.")
        return prepare_rows(mixture[split], name="datasets", options=RowOptions(**options))


def _row_options(
    script_args: "CovGRPOScriptArguments", training_args: "CovGRPOConfig", policy: "Policy", split: str
) -> dict[str, Any]:
    """The fields of `RowOptions`. Only training rows are compared with evaluation problems, and listed in a file."""
    from entropy_trl.cli.train_arguments import ROW_OPTIONS

    options: dict[str, Any] = {name: getattr(script_args, name) for name in ROW_OPTIONS}
    training = split == script_args.dataset_train_split
    options["exclude_overlap"] = (script_args.exclude_overlap or ()) if training else ()
    if not (training and is_first_rank()):
        options["dropped_rows_file"] = None
    if script_args.max_prompt_length is not None:
        options["chat_template_kwargs"] = training_args.chat_template_kwargs or {}
        options["tokenizer"] = policy.tokenizer
    return options


def _make_rows(script_args: "CovGRPOScriptArguments", split: str) -> "Dataset | IterableDataset":
    """The rows of `dataset_factory`, which are used as they are."""
    from entropy_trl.cli.train_arguments import ROW_OPTIONS

    if script_args.dataset_factory is None:
        raise UsageError("No data: give --dataset_name (a file, a folder or a hub data set), or --dataset_factory.")
    if split != script_args.dataset_train_split:
        raise UsageError("dataset_factory makes training rows only: set eval_strategy to 'no', or give --dataset_name.")
    given = [name for name in ROW_OPTIONS if getattr(script_args, name) != getattr(type(script_args), name)]
    if given:
        raise UsageError(f"{given[0]} is for --dataset_name: the rows of dataset_factory are used as they are.")
    return import_object(script_args.dataset_factory, "dataset_factory")()


def reward_functions(script_args: "CovGRPOScriptArguments", longest: int | None) -> list[Any]:
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
            functions.append(_checked_reward(import_object(name, "reward_funcs"), name))
        else:
            raise UsageError(
                f"Unknown reward function {name!r} in reward_funcs: use one of {', '.join(known)}, or a dotted path "
                "such as my_module.my_reward."
            )
    return functions


def _checked_reward(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function of the user's, which refuses results that are not one reward for each completion."""
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        return function

    def refuse(result: str) -> UsageError:
        return UsageError(
            f"The reward function {name} returns {result}: a reward function gets all completions of a batch. "
            "Return a list with one number (or None) for each of `completions`."
        )

    annotation = inspect.signature(function).return_annotation
    if annotation in (float, int, bool, "float", "int", "bool"):
        raise refuse(f"one {annotation if isinstance(annotation, str) else annotation.__name__}")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        rewards = function(*args, **kwargs)
        try:
            count = len(rewards)
        except TypeError as error:
            raise refuse(f"{rewards!r} ({type(rewards).__name__})") from error
        completions = kwargs.get("completions")
        if completions is not None and count != len(completions):
            raise refuse(f"{count} rewards for {len(completions)} completions")
        return rewards

    return checked


def check_reward_columns(reward_funcs: list[Any], rows: "Dataset | IterableDataset") -> None:
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
