"""What the `train` command reads: its own arguments, and TRL's parser with stricter reading and plainer errors."""

import argparse
import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn

from trl import ScriptArguments, TrlParser

from entropy_trl.cli.checks import check_max_steps, check_precision, check_sources
from entropy_trl.cli.config_text import parser_defaults
from entropy_trl.cli.parser import one_spelling
from entropy_trl.config_checks import check_numbers
from entropy_trl.data.options import RowOptions
from entropy_trl.recipes import find_recipe, recipe_names
from entropy_trl.templates import TEMPLATES


logger = logging.getLogger(__name__)

ROW_OPTIONS = tuple(row.name for row in fields(RowOptions) if row.name not in ("tokenizer", "chat_template_kwargs"))
"""The script arguments that are fields of `entropy_trl.data.RowOptions`."""


@dataclass
class CovGRPOScriptArguments(ScriptArguments):
    r"""
    Arguments of the training script, beside those of [`~trl.ScriptArguments`].

    Args:
        reward_funcs (`list[str]`, *optional*, defaults to `["math_reward"]`):
            Reward functions: `math_reward`, `code_reward`, `verifiable_reward` (one or the other, by row), TRL's
            `accuracy_reward`, `reasoning_accuracy_reward`,
            `think_format_reward` and `get_soft_overlong_punishment` (from 80% of `max_completion_length`), or the
            dotted path of any function.
        reward_model_name_or_path (`str`, *optional*):
            Reward model, used beside the reward functions.
        prompt_template (`str`, *optional*):
            How a problem becomes a prompt: `r1_zero`, `qwen_boxed`, `dapo`, `raw`, or a text with `{problem}`. It fixes
            where the answer is read too. By default ready prompts stay as they are, and bare problems get
            `qwen_boxed`.
        prompt_column (`str`, *optional*):
            Column of the problem or prompt; a dot leads into a structure. By default `prompt`, `problem` or `question`.
        solution_column (`str`, *optional*):
            Column of the answer. By default `reward_model.ground_truth`, `solution` or `answer`.
        language (`"en"` or `"zh"`, *optional*):
            Keep the problems without a Han character, or those with one.
        exclude_overlap (`list[str]`, *optional*):
            Files of evaluation problems: training rows that overlap one of them are left out.
        overlap_threshold (`float`, *optional*, defaults to `0.3`):
            Share of an evaluation problem's 13-grams from which on a row overlaps it.
        max_prompt_length (`int`, *optional*):
            Rows whose prompt has more tokens are left out.
        max_tests_size (`int`, *optional*, defaults to `32`):
            Megabytes of tests that one row of a programming task may have: rows with more are unusable.
        check_solutions (`bool`, *optional*, defaults to `False`):
            Leave out programming tasks whose reference programs fail their tests in the sandbox.
        max_bad_rows (`float`, *optional*, defaults to `0.01`):
            Fraction of the rows that may be unusable: more are an error.
        dropped_rows_file (`str`, *optional*):
            File to write, with one JSON line for each training row that is left out.
        eval_benchmarks (`list[str]`, *optional*):
            Benchmarks for `eval_strategy`, `NAME` or `NAME=FILE`, in place of the split `dataset_test_split` (see
            `entropy_trl.evaluation`).
        chat_template_path (`str`, *optional*):
            Jinja file with the chat template of a model that has none, or in place of the one that it has.
        model_factory (`str`, *optional*):
            Dotted path of a function without arguments that returns `(model, tokenizer)`. Used when
            `model_name_or_path` is not given.
        dataset_factory (`str`, *optional*):
            Dotted path of a function without arguments that returns a [`~datasets.Dataset`]. Used when neither
            `dataset_name` nor `datasets` is given.
        rollout_func (`str`, *optional*):
            Dotted path of a function `(prompts, trainer)` that generates the completions, in place of `generate` and
            vLLM: TRL's `rollout_func`.
        log_format (`"text"` or `"json"`, *optional*, defaults to `"text"`):
            What is printed at each log: a line for people, or all metrics as one JSON object on a line of stdout.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_reward"],
        metadata={
            "help": "Reward functions: `math_reward`, `code_reward`, `verifiable_reward` (one or the other, by row), "
            "TRL's `accuracy_reward`, `reasoning_accuracy_reward`, "
            "`think_format_reward`, `get_soft_overlong_punishment` (from 80%% of `max_completion_length`), or dotted "
            "paths (`my_lib.rewards.my_reward`)."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model (hub id or folder), used beside the reward functions."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": f"How a problem becomes a prompt: {', '.join(TEMPLATES)}, or a text with `{{problem}}`. It fixes "
            "where the answer is read too. By default ready prompts stay as they are, and bare problems get qwen_boxed."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the problem or prompt; a dot leads into a structure (`extra_info.question`). By default "
            "`prompt`, `problem` or `question`."
        },
    )
    solution_column: str | None = field(
        default=None,
        metadata={"help": "Column of the answer. By default `reward_model.ground_truth`, `solution` or `answer`."},
    )
    language: Literal["en", "zh"] | None = field(
        default=None, metadata={"help": "Keep the problems without a Han character (en), or those with one (zh)."}
    )
    exclude_overlap: list[str] | None = field(
        default=None,
        metadata={"help": "Files of evaluation problems: training rows that overlap one of them are left out."},
    )
    overlap_threshold: float = field(
        default=0.3,
        metadata={"help": "Share of an evaluation problem's 13-grams from which on a training row overlaps it."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Rows whose prompt has more tokens are left out."}
    )
    max_tests_size: int = field(
        default=32, metadata={"help": "Megabytes of tests that one row of a programming task may have."}
    )
    check_solutions: bool = field(
        default=False,
        metadata={"help": "Leave out programming tasks whose reference programs fail their tests in the sandbox."},
    )
    max_bad_rows: float = field(
        default=0.01, metadata={"help": "Fraction of the rows that may be unusable: more are an error."}
    )
    dropped_rows_file: str | None = field(
        default=None, metadata={"help": "File to write, with one JSON line for each training row that is left out."}
    )
    eval_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Benchmarks for `--eval_strategy` (`aime24`, `math500=FILE`, ...), in place of the split "
            "`dataset_test_split`."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Jinja file with the chat template of a model that has none, or in place of the one it has."},
    )
    model_factory: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a function without arguments that returns (model, tokenizer). Used when "
            "`--model_name_or_path` is not given."
        },
    )
    dataset_factory: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a function without arguments that returns a data set. Used when `--dataset_name` "
            "is not given."
        },
    )
    rollout_func: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a function (prompts, trainer) that generates the completions: TRL's `rollout_func`."
        },
    )
    log_format: Literal["text", "json"] = field(
        default="text",
        metadata={
            "help": "What is printed at each log: a line for people (text), or all metrics as one JSON object on a "
            "line of stdout (json)."
        },
    )

    def __post_init__(self) -> None:
        if self.chat_template_path is not None:  # a recipe names its template as a clone has it
            self.chat_template_path = str(find_recipe(self.chat_template_path) or self.chat_template_path)


class TrainParser(TrlParser):
    """TRL's parser, which refuses what TRL's would let through.

    Unknown keys (TRL's own scripts ignore those of the file), abbreviated ones, and values in the file that the command
    line would not accept: the values of the file are read as if they had been given on the command line.

    Every method raises ValueError over a mistake of the user's, where argparse would print its whole usage and exit.
    """

    def __init__(self, dataclass_types: Sequence[type], needs_sources: bool = False, **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._needs_sources = needs_sources
        self._control_on_command_line: str | None = None
        #: The options by name: their defaults, and what was read for them.
        self.defaults = parser_defaults(self)
        self.values: dict[str, Any] = {}

    def parse(self, argv: Sequence[str]) -> Any:
        """One instance of each dataclass, from the command line and the file that its `--config` names."""
        argv = one_spelling(argv, [*self._option_string_actions, "--config"])
        argv = [part for argument in argv for part in _split_config(argument)]
        if argv[-1:] == ["--config"]:
            raise ValueError("--config needs the name of a file.")
        if "--config" in argv:
            argv[argv.index("--config") + 1] = _config_file(argv[argv.index("--config") + 1])
        command_line = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        command_line.add_argument("--entropy_control", "--entropy-control")
        self._control_on_command_line = command_line.parse_known_args(argv)[0].entropy_control
        return self.parse_args_and_config(argv)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise ValueError(f"Unknown argument{self._nearest(unknown[0].split('=')[0], given=' '.join(unknown))}")
        # Before the dataclasses are made: TrainingArguments fails over some of this, with other words.
        if self._needs_sources:
            check_sources(namespace)
        check_numbers(vars(namespace))
        check_max_steps(namespace.max_steps)
        check_precision(namespace)
        self.values = dict(vars(namespace))
        return namespace, []

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # `--no_x` shares its destination with `--x`, which comes first
        del actions["help"]
        for key in config:
            if key not in actions:
                raise ValueError(f"Unknown key in the config file{self._nearest(key, given=key)}")
        self._drop_replaced_control(config)
        return super().set_defaults_with_config(**{key: _read(actions[key], value) for key, value in config.items()})

    def _drop_replaced_control(self, config: dict[str, Any]) -> None:
        """The file's hyper-parameters are for the file's control: another one from the command line gets its own."""
        chosen = self._control_on_command_line
        replaced = config.get("entropy_control", self.get_default("entropy_control"))
        if chosen not in (None, replaced) and config.get("entropy_control_kwargs"):
            logger.warning(
                "--entropy_control %s replaces the config file's %s, whose entropy_control_kwargs %s are not used.",
                chosen,
                replaced,
                config.pop("entropy_control_kwargs"),
            )

    def _nearest(self, name: str, given: str) -> str:
        valid = {option.lstrip("-").replace("-", "_") for action in self._actions for option in action.option_strings}
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), valid, n=1)
        prefix = "--" if name.startswith("-") else ""
        hint = f"the nearest valid one is {prefix}{near[0]}" if near else "`--help` lists the valid ones"
        return f": {given} ({hint})."


def _config_file(name: str) -> str:
    """The file, or the file of the recipe, that `--config` names."""
    if (file := find_recipe(name)) is not None:
        return str(file)
    near = difflib.get_close_matches(name, names := recipe_names(), n=1)
    hint = f"the nearest one is {near[0]}" if near else f"they are {', '.join(names)}"
    raise FileNotFoundError(f"Config file {name!r} does not exist, and it is not the name of a recipe ({hint}).")


def _split_config(argument: str) -> list[str]:
    """`--config=FILE` as two arguments, the only form that TRL's parser knows."""
    return argument.split("=", maxsplit=1) if argument.startswith("--config=") else [argument]


def _read(action: argparse.Action, value: Any) -> Any:
    """A value of the config file, read as the command line would read it; null, mappings and lists as they are."""
    if action.nargs == "+" and not isinstance(value, list) and value is not None:
        value = [value]
    if action.nargs == "+" and isinstance(value, list):
        return [_read_scalar(action, item) for item in value]
    return _read_scalar(action, value)


def _read_scalar(action: argparse.Action, value: Any) -> Any:
    if value is None or isinstance(value, (dict, list)) or not callable(action.type):
        return value
    try:
        read = action.type(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"Config file: {action.dest}: {value!r} is not a valid value ({error}).") from error
    if action.choices is not None and read not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"Config file: {action.dest}: {value!r} is not one of {choices}.")
    return read
