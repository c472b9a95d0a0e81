"""The quickstart: warm up once, train every method from there, evaluate on held-out prompts, and say what was seen.

Interrupting it and starting it again continues: a finished run (a method with a seed) is kept, an unfinished one goes
on from its last checkpoint, with the same result as if it had not been interrupted. A stored run counts only if it was
made with the same settings, library versions and code; otherwise it is made again, and the reason is printed.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
import trl
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_trl._version import __version__
from entropy_trl.config import CovGRPOConfig
from entropy_trl.files import write_json
from entropy_trl.quickstart import task
from entropy_trl.quickstart.evaluate import Metrics, evaluate_policy
from entropy_trl.quickstart.recipe import (
    DEFAULT_METHODS,
    LABELS,
    METHODS,
    RECIPES,
    Recipe,
    steps_between_evaluations,
    training_arguments,
)
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up
from entropy_trl.saving.checkpoint import last_complete_checkpoint
from entropy_trl.trainer import CovGRPOTrainer


SAMPLES = 16
CURVE_PROMPTS = 256
EVALUATION_SEED = 0
TABLE_COLUMNS = ("final_entropy", "greedy", "avg@16", "pass@4", "pass@16", "seconds")
# What the closing sentence calls a difference: entropies apart by this factor, and this much more pass@16.
ENTROPY_RATIO, PASS_GAIN = 2.0, 0.05

Summary = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to run; see `run_quickstart`."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: str
    warm_start_seed: int
    output_dir: Path
    plot: bool
    rollouts: int | None
    eval_prompts: int
    warm_start_steps: int

    def __post_init__(self) -> None:
        _check_list("methods", self.methods)
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
        _check_list("seeds", self.seeds)
        if min(self.seeds) < 0 or self.warm_start_seed < 0:
            raise ValueError("a seed is negative; seeds are integers from 0")
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}; choose from {', '.join(RECIPES)}")
        if self.rollouts is not None and self.rollouts < 1:
            raise ValueError(f"rollouts={self.rollouts} must be at least 1")
        if self.eval_prompts < 1:
            raise ValueError(f"eval_prompts={self.eval_prompts} must be at least 1")
        task.held_out_prompts(self.eval_prompts)  # refuses more than there are
        self.warm_start()  # refuses a warm-up without steps
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"output_dir {self.output_dir} is a file; give a folder")
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the picture needs matplotlib: pip install 'entropy-trl[plot]', or give --no-plot")

    def resolved_recipe(self) -> Recipe:
        recipe = RECIPES[self.recipe]
        return recipe if self.rollouts is None else Recipe(self.rollouts, recipe.learning_rate)

    def warm_start(self) -> WarmStartConfig:
        noisy_steps = min(WarmStartConfig.noisy_steps, self.warm_start_steps)
        return WarmStartConfig(self.warm_start_seed, self.warm_start_steps, noisy_steps)


def _check_list(name: str, values: Sequence[object]) -> None:
    if not values:
        raise ValueError(f"no {name} given; give at least one")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} {' '.join(map(str, values))} name one of them twice")


class HeldOutCurve(TrainerCallback):
    """Evaluates the policy during training and puts the result into the trainer's log.

    An entry `{"step", "seconds", "held_out/...": ...}` goes into `state.log_history`, which checkpoints keep, so that
    the curve of a resumed run is whole. The evaluation has its own generator and changes nothing in the training.

    Args:
        prompts: held-out prompts.
        every: updates between two evaluations.
        label: what the progress lines start with.
    """

    def __init__(self, prompts: Sequence[str], every: int, label: str) -> None:
        self.prompts = prompts
        self.every = every
        self.label = label
        self._start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        done = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self._start = time.perf_counter() - (done[-1] if done else 0.0)
        if state.global_step == 0:
            self._evaluate(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._evaluate(state, model)

    def _evaluate(self, state: TrainerState, model: Any) -> None:
        metrics = evaluate_policy(model, self.prompts, SAMPLES, EVALUATION_SEED, greedy=False)
        entry = {
            "step": state.global_step,
            "seconds": self.seconds(),
            "held_out/entropy": metrics["final_entropy"],
            "held_out/avg@16": metrics["avg@16"],
            "held_out/pass@16": metrics["pass@16"],
        }
        state.log_history.append(entry)
        print(
            f"{self.label}: update {state.global_step}/{state.max_steps}, {entry['seconds']:.0f} s, "
            f"entropy {entry['held_out/entropy']:.3f}, avg@16 {entry['held_out/avg@16']:.3f}, "
            f"pass@16 {entry['held_out/pass@16']:.3f}",
            flush=True,
        )

    def seconds(self) -> float:
        """Seconds of training until now, those before a resume included."""
        return time.perf_counter() - self._start


@cache
def versions() -> dict[str, str]:
    """What the numbers may depend on besides the settings. `code` is a digest of the package's Python files."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for source in sorted(root.rglob("*.py")):
        digest.update(source.relative_to(root).as_posix().encode())
        digest.update(source.read_bytes())
    return {
        "entropy_trl": __version__,
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "code": digest.hexdigest()[:10],
    }


def run_quickstart(
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = (0,),
    recipe: str = "short",
    warm_start_seed: int = 0,
    output_dir: str | Path = DEFAULT_OUTPUT_DIR,
    plot: bool = True,
    rollouts: int | None = None,
    eval_prompts: int = 1024,
    warm_start_steps: int = WarmStartConfig.steps,
) -> Summary:
    """Train and evaluate each method with each seed from one warm start, and write `summary.json` and the picture.

    Args:
        methods: keys of `METHODS`.
        seeds: seeds of the reinforcement learning.
        recipe: `"short"` or `"long"`.
        warm_start_seed: seed of the warm-up that all runs start from.
        output_dir: folder of everything that is written.
        plot: whether to draw `quickstart.png`, which needs matplotlib, and to write `report.html`, with the packages of
            the `analysis` extra.
        rollouts: rollouts a run; the recipe's if not given.
        eval_prompts: held-out prompts of the final evaluation.
        warm_start_steps: steps of the warm-up; fewer than the default give a weak warm start.

    Returns:
        The content of `summary.json`.

    Raises:
        ValueError: if an option is out of its range, before anything is computed.
    """
    options = Options(
        tuple(methods),
        tuple(seeds),
        recipe,
        warm_start_seed,
        Path(output_dir),
        plot,
        rollouts,
        eval_prompts,
        warm_start_steps,
    )
    return _run(options)


def _run(options: Options) -> Summary:
    prompts = task.held_out_prompts(options.eval_prompts)
    warm_start = options.warm_start()
    with _one_thread():
        print(f"warm start, seed {warm_start.seed}: {warm_start.steps} supervised steps, unless stored", flush=True)
        model, _, warm_seconds = load_or_warm_up(warm_start, options.output_dir)
        warm_metrics = evaluate_policy(model, prompts, SAMPLES, EVALUATION_SEED) | {"seconds": warm_seconds}
        results = {
            method: [_run_once(options, method, seed, prompts) for seed in options.seeds] for method in options.methods
        }
    summary: Summary = {
        "methods": {
            method: {
                **{name: fmean(run["metrics"][name] for run in runs) for name in TABLE_COLUMNS},
                "per_seed": [{"seed": seed} | run["metrics"] for seed, run in zip(options.seeds, runs, strict=True)],
            }
            for method, runs in results.items()
        },
        "warm_start": {"seed": warm_start.seed} | warm_metrics,
        "seeds": list(options.seeds),
        "recipe": {"name": options.recipe} | asdict(options.resolved_recipe()),
        "eval_prompts": options.eval_prompts,
        "versions": versions(),
    }
    write_json(options.output_dir / "summary.json", summary)
    if options.plot:
        # matplotlib is an extra: only drawing needs it
        from entropy_trl.quickstart.plot import draw

        draw(
            {method: [run["log"] for run in runs] for method, runs in results.items()},
            options.output_dir / "quickstart.png",
        )
        if _can_report():
            _write_report(options)
    return summary


def _can_report() -> bool:
    """Whether the packages of the report are there: it fits the law with SciPy."""
    return importlib.util.find_spec("scipy") is not None


def _write_report(options: Options) -> None:
    """Write `report.html` on all runs, those of a method as its seeds."""
    from entropy_trl.analysis.logs.runs import read_run
    from entropy_trl.analysis.report import write_report

    runs = [
        replace(read_run(options.output_dir / options.recipe / f"{method}-seed{seed}"), name=LABELS[method])
        for method in options.methods
        for seed in options.seeds
    ]
    write_report(runs, options.output_dir, f"Quickstart, {options.recipe} recipe")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: as fast as two for so small a model, and the same result on machines of different size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_once(options: Options, method: str, seed: int, prompts: list[str]) -> dict[str, Any]:
    """Train and evaluate one method with one seed, or read the stored result."""
    label = f"{LABELS[method]}, seed {seed}"
    folder = options.output_dir / options.recipe / f"{method}-seed{seed}"
    recipe = options.resolved_recipe()
    arguments = training_arguments(method, recipe, seed, folder)
    settings: dict[str, Any] = {
        **{name: value for name, value in arguments.items() if name != "output_dir"},
        "warm_start": asdict(options.warm_start()),
        "eval_prompts": options.eval_prompts,
        "versions": versions(),
    }
    if folder.exists():
        reason = _why_not_reusable(folder, settings)
        if reason is not None:
            print(f"{label}: {reason}, starts again", flush=True)
            shutil.rmtree(folder)
    if (folder / "result.json").exists():
        print(f"{label}: finished before, kept", flush=True)
        return _read_run(folder)

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is not None:
        print(f"{label}: continues from {checkpoint.name}", flush=True)
    model, tokenizer, _ = load_or_warm_up(options.warm_start(), options.output_dir)
    curve = HeldOutCurve(prompts[:CURVE_PROMPTS], steps_between_evaluations(recipe.rollouts), label)
    trainer = CovGRPOTrainer(
        model=model,
        reward_funcs=task.countdown_reward,
        args=CovGRPOConfig(**arguments, disable_tqdm=True),
        train_dataset=task.build_dataset(),
        processing_class=tokenizer,
        callbacks=[curve],
    )
    trainer.remove_callback(PrinterCallback)  # the curve's lines are enough
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = evaluate_policy(model, prompts, SAMPLES, EVALUATION_SEED) | {"seconds": curve.seconds()}

    lines = [json.dumps(entry) for entry in trainer.state.log_history]
    (folder / "train_log.jsonl").write_text("\n".join(lines) + "\n")
    trainer.save_model(str(folder / "policy"))
    write_json(folder / "result.json", metrics)  # last, since it says that the run is finished
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return _read_run(folder)


def _why_not_reusable(folder: Path, settings: dict[str, Any]) -> str | None:
    """What forbids to use a run's folder: its settings are unknown or differ from `settings`. None if nothing does."""
    path = folder / "settings.json"
    if not path.exists():
        return "stored with unknown settings"
    stored = json.loads(path.read_text())
    changed = sorted(name for name in stored.keys() | settings.keys() if stored.get(name) != settings.get(name))
    return f"stored with other settings ({', '.join(changed)})" if changed else None


def _read_run(folder: Path) -> dict[str, Any]:
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().strip().split("\n")]
    return {"metrics": json.loads((folder / "result.json").read_text()), "log": log}


def format_table(summary: Summary) -> str:
    """The summary as a table: a row for the warm-up and one for each method, means over the seeds."""
    rows = [("warm-up", summary["warm_start"])]
    rows += [(LABELS[method], metrics) for method, metrics in summary["methods"].items()]
    lines = ["".join([f"{'method':<12}", *(f"{name:>15}" for name in TABLE_COLUMNS)])]
    for name, metrics in rows:
        cells = [f"{metrics[column]:>15.3f}" for column in TABLE_COLUMNS[:-1]]
        lines.append("".join([f"{name:<12}", *cells, f"{metrics['seconds']:>15.0f}"]))
    return "\n".join(lines)


def describe(summary: Summary) -> str:
    """One sentence on what the numbers show, and on what they do not."""
    methods: dict[str, Metrics] = summary["methods"]
    n_seeds = len(summary["seeds"])
    start = f"With {n_seeds} seed{'s' if n_seeds > 1 else ''}, "
    warm_entropy = summary["warm_start"]["final_entropy"]
    if "grpo" not in methods:
        return start + "nothing can be compared, because GRPO, the baseline, was not among the methods."
    grpo = methods["grpo"]
    collapsed = grpo["final_entropy"] * ENTROPY_RATIO < warm_entropy
    parts = [
        f"GRPO's entropy {'collapsed' if collapsed else 'did not collapse'} "
        f"({warm_entropy:.2f} to {grpo['final_entropy']:.2f} nats)"
    ]
    for method, metrics in methods.items():
        if method == "grpo":
            continue
        ratio = metrics["final_entropy"] / grpo["final_entropy"]
        gain = metrics["pass@16"] - grpo["pass@16"]
        if ratio < ENTROPY_RATIO:
            verdict = "did not keep clearly more"
        elif gain < PASS_GAIN:
            verdict = "kept more, with no clear gain in pass@16"
        else:
            verdict = "kept more and solves more prompts in 16 tries"
        parts.append(
            f"{LABELS[method]} {verdict} ({ratio:.1f} times GRPO's entropy, pass@16 {gain:+.2f}, "
            f"avg@16 {metrics['avg@16'] - grpo['avg@16']:+.2f}, greedy {metrics['greedy'] - grpo['greedy']:+.2f})"
        )
    return start + "; ".join(parts) + "."


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


def main(args: argparse.Namespace) -> int:
    """Run the quickstart from parsed options and print the table and the sentence. Returns the exit code."""
    transformers.utils.logging.disable_progress_bar()  # one a saved file, of a model that is written in milliseconds
    try:
        options = Options(
            methods=tuple(args.methods),
            seeds=tuple(args.seeds),
            recipe=args.recipe,
            warm_start_seed=args.warm_start_seed,
            output_dir=args.output_dir,
            plot=args.plot,
            rollouts=args.rollouts,
            eval_prompts=args.eval_prompts,
            warm_start_steps=args.warm_start_steps,
        )
    except ValueError as error:
        print(f"entropy-trl quickstart: error: {error}", file=sys.stderr)
        return 2
    try:
        summary = _run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        return 130
    print()
    print(format_table(summary))
    print()
    print(describe(summary))
    print(f"\nwritten: {options.output_dir / 'summary.json'}" + (" and quickstart.png" if options.plot else ""))
    if options.plot and _can_report():
        print(f"a page with everything, for a browser: {options.output_dir / 'report.html'}")
    elif options.plot:
        print("for a page with everything, report.html: pip install 'entropy-trl[analysis]', and run this again")
    return 0
