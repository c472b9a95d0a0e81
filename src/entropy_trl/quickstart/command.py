"""The command `entropy-trl quickstart`: its options, and what it prints."""

import argparse
import sys
from pathlib import Path

import transformers

from entropy_trl.files import check_writable
from entropy_trl.quickstart.options import Options
from entropy_trl.quickstart.recipe import DEFAULT_METHODS, METHODS
from entropy_trl.quickstart.run import can_report, run_options
from entropy_trl.quickstart.summary import describe, format_table, format_verdicts
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig


DESCRIPTION = "See entropy collapse and its cure on an embedded task, on a CPU, in minutes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the quickstart's options to a command-line parser."""
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), help=f"any of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the reinforcement learning")
    parser.add_argument("--recipe", default="short", help="short (120 rollouts, lr 6e-4) or long (400, lr 2e-4)")
    parser.add_argument("--warm_start_seed", type=int, default=0, help="seed of the warm-up that all runs start from")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR, help="folder of all output")
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="draw quickstart.png and write report.html"
    )
    parser.add_argument("--rollouts", type=int, default=None, help="rollouts a run, instead of the recipe's")
    parser.add_argument("--eval_prompts", type=int, default=1024, help="held-out prompts of the final evaluation")
    parser.add_argument(
        "--warm_start_steps", type=int, default=WarmStartConfig.steps, help="supervised steps of the warm-up"
    )


def prepare(options: argparse.Namespace) -> Options:
    """Check the options.

    Raises:
        ValueError, OSError: An option is out of its range, or nothing can be written to the output folder.
    """
    checked = Options(
        methods=tuple(options.methods),
        seeds=tuple(options.seeds),
        recipe=options.recipe,
        warm_start_seed=options.warm_start_seed,
        output_dir=options.output_dir,
        plot=options.plot,
        rollouts=options.rollouts,
        eval_prompts=options.eval_prompts,
        warm_start_steps=options.warm_start_steps,
    )
    check_writable(checked.output_dir, "--output_dir")
    return checked


def run(prepared: Options, options: argparse.Namespace) -> int:
    """Run the quickstart, and print the table and the sentence. Returns the exit code."""
    transformers.utils.logging.disable_progress_bar()  # one a saved file, of a model that is written in milliseconds
    try:
        summary = run_options(prepared)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        return 130
    print()
    print(format_table(summary))
    print()
    print(format_verdicts(summary))
    print()
    print(describe(summary))
    print(f"\nwritten: {prepared.output_dir / 'summary.json'}" + (" and quickstart.png" if prepared.plot else ""))
    if prepared.plot and can_report():
        print(f"a page with everything, for a browser: {prepared.output_dir / 'report.html'}")
    elif prepared.plot:
        print("for a page with everything, report.html: pip install 'entropy-trl[analysis]', and run this again")
    return 0
