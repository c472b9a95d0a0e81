"""The quickstart: warm up once, train every method from there, evaluate on held-out prompts, and say what was seen.

Interrupting it and starting it again continues: a finished run (a method with a seed) is kept, an unfinished one goes
on from its last checkpoint, with the same result as if it had not been interrupted. A stored run counts only if it was
made with the same settings, library versions and code; otherwise it is made again, and the reason is printed.
"""

import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
import trl
from transformers import PrinterCallback

from entropy_trl._version import __version__
from entropy_trl.analysis.logs.runs import Run, Series
from entropy_trl.analysis.verdict import Verdict, verdict
from entropy_trl.config import CovGRPOConfig
from entropy_trl.files import write_json, write_text
from entropy_trl.quickstart import task
from entropy_trl.quickstart.curve import CURVE_PROMPTS, EVALUATION_SEED, SAMPLES, HeldOutCurve
from entropy_trl.quickstart.evaluate import evaluate_policy
from entropy_trl.quickstart.options import Options
from entropy_trl.quickstart.recipe import DEFAULT_METHODS, LABELS, steps_between_evaluations, training_arguments
from entropy_trl.quickstart.summary import TABLE_COLUMNS, Summary
from entropy_trl.quickstart.warm_start import DEFAULT_OUTPUT_DIR, WarmStartConfig, load_or_warm_up
from entropy_trl.saving.checkpoint import last_complete_checkpoint
from entropy_trl.saving.run_settings import RunSettings
from entropy_trl.trainer import CovGRPOTrainer


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
        methods (`Sequence[str]`, *optional*, defaults to `DEFAULT_METHODS`): Keys of `METHODS`.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Seeds of the reinforcement learning.
        recipe (`str`, *optional*, defaults to `"short"`): `"short"` or `"long"`.
        warm_start_seed (`int`, *optional*, defaults to `0`): Seed of the warm-up that all runs start from.
        output_dir (`str | Path`, *optional*, defaults to `DEFAULT_OUTPUT_DIR`): Folder of everything that is written.
        plot (`bool`, *optional*, defaults to `True`): Whether to draw `quickstart.png`, which needs matplotlib, and to
            write `report.html`, with the packages of the `analysis` extra.
        rollouts (`int`, *optional*): Rollouts a run; the recipe's if not given.
        eval_prompts (`int`, *optional*, defaults to `1024`): Held-out prompts of the final evaluation.
        warm_start_steps (`int`, *optional*, defaults to `WarmStartConfig.steps`): Steps of the warm-up; fewer than the
            default give a weak warm start.

    Returns:
        `Summary`: The content of `summary.json`.

    Raises:
        ValueError: If an option is out of its range, before anything is computed.
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
    return run_options(options)


def run_options(options: Options) -> Summary:
    """[`run_quickstart`] with options that were checked."""
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
        "verdicts": {
            method: _verdict(options, method, [run["log"] for run in runs]).to_dict()
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
        if can_report():
            _write_report(options)
    return summary


def _verdict(options: Options, method: str, logs: Sequence[list[dict[str, Any]]]) -> Verdict:
    """The verdict on the entropy of a method, from the training entropy of its runs, as in the report."""
    runs = [Run(method, log=[entry for entry in log if "step" in entry]) for log in logs]
    metric = runs[0].find("entropy") or "entropy"
    series = [run.series(metric) if metric in run.metrics else Series(np.array([], int), np.array([])) for run in runs]
    settings = training_arguments(method, options.resolved_recipe(), options.seeds[0], options.output_dir)
    return verdict(series, settings, metric=metric)


def can_report() -> bool:
    """Whether the packages of the report are there: it fits the law with SciPy."""
    return importlib.util.find_spec("scipy") is not None


def _write_report(options: Options) -> None:
    """Write `report.html` on all runs, those of a method as its seeds."""
    from entropy_trl.analysis.logs.runs import read_run
    from entropy_trl.analysis.report import write_report

    runs = [
        replace(read_run(options.run_folder(method, seed)), name=LABELS[method])
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
    folder = options.run_folder(method, seed)
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
    trainer.remove_callback(RunSettings)  # the file has been written, with what decides whether a run can be reused
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = evaluate_policy(model, prompts, SAMPLES, EVALUATION_SEED) | {"seconds": curve.seconds()}

    lines = [json.dumps(entry) for entry in trainer.state.log_history]
    write_text(folder / "train_log.jsonl", "\n".join(lines) + "\n")
    trainer.save_model(str(folder / "policy"))
    write_json(folder / "result.json", metrics)  # last, since it says that the run is finished
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return _read_run(folder)


def _why_not_reusable(folder: Path, settings: dict[str, Any]) -> str | None:
    """What forbids to use a run's folder: its settings are unknown or differ from `settings`. None if nothing does."""
    try:
        stored = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError, RecursionError):
        return "stored with unknown settings"
    if not isinstance(stored, dict):
        return "stored with unknown settings"
    changed = sorted(name for name in stored.keys() | settings.keys() if stored.get(name) != settings.get(name))
    if changed:
        return f"stored with other settings ({', '.join(changed)})"
    if (folder / "result.json").exists():
        try:
            _read_run(folder)
        except (OSError, ValueError, RecursionError) as error:
            return f"stored with a damaged result ({error})"
    return None


def _read_run(folder: Path) -> dict[str, Any]:
    """The metrics and the log of a finished run.

    Raises:
        ValueError, OSError: One of them is damaged or missing.
    """
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().strip().split("\n")]
    metrics = json.loads((folder / "result.json").read_text())
    if not isinstance(metrics, dict) or not all(type(metrics.get(name)) in (int, float) for name in TABLE_COLUMNS):
        raise ValueError(f"{folder / 'result.json'} does not have {', '.join(TABLE_COLUMNS)}")
    if not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{folder / 'train_log.jsonl'} has a line that is no entry of a log")
    return {"metrics": metrics, "log": log}
