"""`entropy-trl train --help`: our options in groups, then the most used of TRL's; `--help_all` has all of them."""

import argparse
import re

from entropy_trl.cli.parser import HelpFormatter


GROUPS = {
    "model": ("model_name_or_path", "model_factory", "chat_template_path", "dtype", "use_peft"),
    "data": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
        *("dataset_factory", "prompt_template", "prompt_column", "solution_column", "language", "exclude_overlap"),
        *("overlap_threshold", "max_prompt_length", "max_bad_rows", "dropped_rows_file"),
        *("max_tests_size", "check_solutions"),
    ),
    "rewards": ("reward_funcs", "reward_model_name_or_path"),
    "entropy control": (
        *("entropy_control", "entropy_control_kwargs", "entropy_control_pool", "entropy_control_scores", "epsilon"),
    ),
    "advantages and sampling": (
        *("advantage_estimator", "advantage_quantile", "dynamic_sampling", "dynamic_sampling_reward"),
        *("max_generation_rounds", "dynamic_sampling_incomplete", "rollout_func"),
    ),
    "what is measured": ("log_format", "entropy_law", "entropy_regions", "token_records", "eval_benchmarks"),
    "most used of TRL and transformers": (
        *("output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs", "learning_rate", "num_generations"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
        *("max_completion_length", "temperature", "beta", "loss_type", "epsilon_high", "use_vllm", "vllm_mode"),
        *("bf16", "gradient_checkpointing", "use_cpu", "logging_steps", "save_strategy", "save_steps"),
        *("save_total_limit", "eval_strategy", "eval_steps", "report_to", "push_to_hub", "seed"),
    ),
}

_SAYS_DEFAULT = re.compile(r"\(defaults?\b|\bby default\b|\bdefault: |\bdefaults? to\b", re.IGNORECASE)


class TrainHelpFormatter(HelpFormatter):
    """Help in which each text has its default: as it says itself, or else at its end."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or _SAYS_DEFAULT.search(text):
            return text
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        shown = "none" if default is None or default == "" else str(default)
        return f"{text.rstrip()} (default: {shown.replace('%', '%%')})".lstrip()


def train_help(command: argparse.ArgumentParser, parser: argparse.ArgumentParser, everything: bool) -> str:
    """The help of the `train` command.

    Args:
        command (`argparse.ArgumentParser`): The options of the command alone.
        parser (`argparse.ArgumentParser`): The options of the configuration.
        everything (`bool`): Whether to list the options that are in no group too.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.dest != "help":
            actions.setdefault(action.dest, []).append(action)
    formatter = TrainHelpFormatter(parser.prog)
    formatter.add_text(f"usage: {parser.prog} [--config FILE] [--OPTION VALUE ...]")
    formatter.add_text(parser.description)
    formatter.start_section("this command")
    formatter.add_arguments([argparse.Action(["--config"], "config", metavar="FILE", help=_CONFIG), *command._actions])
    formatter.end_section()
    for title, names in GROUPS.items():
        formatter.start_section(title)
        for name in names:
            formatter.add_arguments(actions.pop(name)[:1])
        formatter.end_section()
    if everything:
        formatter.start_section("all other options of TRL and transformers")
        for others in actions.values():
            formatter.add_arguments(others[:1])
        formatter.end_section()
    else:
        formatter.add_text(f"`--help_all` lists {len(actions)} more options of TRL and transformers.")
    return formatter.format_help()


_CONFIG = "YAML file with any of the options, or the name of a recipe such as qwen2.5-7b/kl_cov"
