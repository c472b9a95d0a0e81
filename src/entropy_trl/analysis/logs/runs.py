"""What a run logged, whichever trainer and tracker wrote it.

[`read_run`] and [`read_runs`] find and read the log of a run; `formats.py` has the file formats. Nothing here needs the
trainer, TRL or a network.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.logs import formats
from entropy_trl.analysis.logs.entries import Log
from entropy_trl.analysis.logs.trackers import is_event_file, read_events
from entropy_trl.analysis.logs.unread import note_unread


#: The names under which trainers log a quantity, in the order in which they are tried; `*` stands for any text. TRL's
#: are first, as in `trainer_state.json` (`NAME`, `eval_NAME`). [`Run.find`] also tries what transformers makes of them
#: for its trackers (`train/NAME`, `eval/NAME`). Then those of verl, SkyRL, NeMo-RL, OpenRLHF, prime-rl.
METRIC_NAMES: dict[str, tuple[str, ...]] = {
    # Mean entropy of the next-token distribution, nats a token, on the completions that the policy is trained on.
    "entropy": (
        "entropy",
        "actor/entropy",
        "actor/entropy_loss",
        "policy/policy_entropy",
        "train/approx_entropy",
        "train/entropy_loss",
        "entropy/all/mean",
        "entropy/mean",
        "policy/entropy_avg",
        "held_out/entropy",
        "eval_entropy",
    ),
    # The same on the completions of an evaluation.
    "evaluation_entropy": ("held_out/entropy", "eval_entropy"),
    # Mean reward of the completions that the policy is trained on.
    "reward": (
        "reward",
        "critic/score/mean",
        "critic/rewards/mean",
        "reward/avg_raw_reward",
        "reward/all/mean",
        "reward/mean",
        "rollout/raw_reward",
        "objective/scores",
    ),
    # Mean accuracy, or reward, of an evaluation.
    "accuracy": (
        "held_out/avg@*",
        "eval_reward",
        "val-core/*/acc/mean@*",
        "val-core/*/reward/mean@*",
        "val/test_score/*",
        "eval/all/avg_score",
        "validation/accuracy",
        "eval/*_pass1",
        "accuracy",
    ),
    "pass_at_k": ("held_out/pass@*", "val-core/*/acc/best@*/mean", "eval/all/pass_at_*", "eval/*_pass*"),
    # Mean tokens of a completion.
    "length": (
        "completions/mean_length",
        "response_length/mean",
        "generate/avg_num_tokens",
        "train/mean_gen_tokens_per_sample",
        "train/response_length",
        "seq_len/all/mean",
    ),
    "loss": ("loss", "actor/pg_loss", "policy/final_loss", "train/policy_loss", "loss/mean"),
    "learning_rate": ("learning_rate", "actor/lr", "policy/policy_lr", "train/lr", "train/actor_lr", "optim/lr"),
    "grad_norm": ("grad_norm", "actor/grad_norm", "policy/raw_grad_norm", "optim/grad_norm"),
    "kl": ("kl", "actor/kl_loss", "policy/policy_kl", "train/kl"),
    "clip_fraction": ("clip_ratio/region_mean", "actor/pg_clipfrac", "policy/ppo_clip_ratio", "train/ppo_clip_ratio"),
    "covariance": ("entropy_control/cov_mean",),
    "selected_fraction": ("entropy_control/selected_fraction",),
    "distinct_correct": ("diversity/distinct_correct",),
    "distinct_completions": ("diversity/distinct_completions",),
    "solved": ("diversity/solved",),
}

#: A file so named is named after its folder.
_GENERIC_STEMS = {"trainer_state", "train_log", "log", "logs", "metrics", "history", "progress", "output", "main"}

_SEED = re.compile(r"(?:^|[-_./ ])seed[-_=]?(\d+)$")


class Series(NamedTuple):
    """One metric over the steps of a run: `steps` (int64), increasing, and `values` (float64), none of them NaN."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What a run logged.

    Attributes:
        name (`str`): The name as given, as the tracker has it, or of the folder or file.
        path (`Path`, *optional*): What was read.
        log (`list[dict[str, Any]]`, *optional*): The entries in order, each with `"step"` (int) and metrics under the
            names that they were logged with.
        config (`dict[str, Any]`, *optional*): The settings, as far as they are stored beside the log.
        seed (`int`, *optional*): Seed of the run: in the settings, or at the end of the name (`-seed3`); None if
            unknown.
        results (`dict[str, float]`, *optional*): The final evaluation; empty if there is none.
    """

    name: str
    path: Path | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    results: dict[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The name without a seed at its end: runs of one group differ in the seed only."""
        return _SEED.sub("", self.name) or self.name

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the metrics that the run logged as numbers, in the order of their first entries."""
        names: dict[str, None] = {}
        for entry in self.log:
            names.update((name, None) for name, value in entry.items() if name != "step" and is_number(value))
        return list(names)

    def series(self, metric: str) -> Series:
        """The values of a metric by step. Of several at one step, as a resumed run logs them, the last counts.

        Raises:
            ValueError: The run did not log it; the error names the nearest metrics.
        """
        values = {
            int(entry["step"]): float(entry[metric])
            for entry in self.log
            if is_number(entry.get(metric)) and not np.isnan(float(entry[metric]))
        }
        if not values:
            logged = self.metrics
            if metric in logged:
                raise ValueError(f"Run {self.name!r} logged {metric!r} as NaN only.")
            near = difflib.get_close_matches(metric, logged, 3, 0.4) or sorted(logged)[:8]
            raise ValueError(
                f"Run {self.name!r} did not log {metric!r}; "
                + (f"it has {', '.join(near)}." if near else "it is empty.")
            )
        steps = sorted(values)
        return Series(np.array(steps, dtype=np.int64), np.array([values[step] for step in steps], dtype=np.float64))

    def candidates(self, kind: str) -> list[str]:
        """All names under which the run logged a kind of metric, the preferred one first; see `METRIC_NAMES`.

        Raises:
            ValueError: An unknown kind.
        """
        if kind not in METRIC_NAMES:
            raise ValueError(f"unknown kind of metric {kind!r}; choose from {', '.join(METRIC_NAMES)}")
        logged = self.metrics
        found: dict[str, None] = {}
        for name in METRIC_NAMES[kind]:
            for pattern in _spellings(name):
                found.update((metric, None) for metric in logged if fnmatchcase(metric, pattern))
        return list(found)

    def find(self, kind: str) -> str | None:
        """The name under which the run logged a kind of metric (`"entropy"`, `"reward"`, ...), or None.

        Where several names fit, such as the accuracies on several benchmarks, the first of [`Run.candidates`].
        """
        return next(iter(self.candidates(kind)), None)


def _spellings(name: str) -> Iterator[str]:
    """A name, and what transformers makes of it for trackers."""
    tracker = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
    yield name
    yield tracker


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read one run.

    Args:
        path (`str | Path`): What holds the log. A folder: the `train_log.jsonl` of the quickstart (with
            `settings.json` and `result.json`), the newest `trainer_state.json` of transformers and TRL (in the folder
            or its `checkpoint-*`), TensorBoard event files, or log files. A file: `trainer_state.json`, JSON lines,
            JSON, CSV (one column a metric; `step,metric,value`; the chart export of W&B), Parquet (W&B's history,
            trackio's export), trackio's SQLite store (`.db`), or the console output of verl (`.log`, `.txt`).
        name (`str`, *optional*): What to call the run. Where the file holds several runs, the one to read.

    Raises:
        ValueError: There is no log, it cannot be understood, or it holds several runs.
        OSError: It cannot be read.
        ImportError: The package whose format it is is missing.
    """
    runs = _read(Path(path).expanduser())
    if len(runs) > 1:
        chosen = [run for run in runs if run.name == name]
        if len(chosen) != 1:
            names = ", ".join(run.name for run in runs[:8]) + (", ..." if len(runs) > 8 else "")
            raise ValueError(f"{str(path)!r} holds {len(runs)} runs ({names}): name one of them, or read them all.")
        runs = chosen
    return runs[0] if name is None else _renamed(runs[0], name)


def read_runs(specs: Sequence[str]) -> list[Run]:
    """Read several runs.

    Args:
        specs (`Sequence[str]`): Each `PATH` or `NAME=PATH`. What holds several runs (a folder of run folders, a
            tracker's store) stands for all of them; with a NAME, for the one of that name, or else for seeds of one
            group of that name.

    Raises:
        ValueError, OSError, ImportError: As for [`read_run`].
    """
    runs: list[Run] = []
    for spec in specs:
        name, _, path = ("", "", spec) if Path(spec).expanduser().exists() else spec.rpartition("=")
        found = _read(Path(path).expanduser())
        if name:
            found = [run for run in found if run.name == name] or [_renamed(run, name) for run in found]
        runs += found
    return _distinguished(runs)


def _renamed(run: Run, name: str) -> Run:
    return replace(run, name=name, seed=_seed(run.config, name) if run.seed is None else run.seed)


def _distinguished(runs: list[Run]) -> list[Run]:
    """The runs, those of one name and seed in different folders with the folder's name in front."""
    keys = [(run.name, run.seed) for run in runs]
    return [
        replace(run, name=f"{run.path.parent.name}/{run.name}")
        if run.path is not None and run.path.parent.name and keys.count(key) > 1
        else run
        for run, key in zip(runs, keys, strict=True)
    ]


def _read(path: Path) -> list[Run]:
    """All runs that a path holds, by name."""
    if not path.exists():
        raise ValueError(f"There is no file or folder {str(path)!r}.")
    runs = _read_folder(path) if path.is_dir() else _from_logs(path, formats.read_file(path))
    if not runs:
        raise ValueError(
            f"Folder {str(path)!r} has no log that is known here: no train_log.jsonl, trainer_state.json, "
            "TensorBoard events, .jsonl, .csv, .parquet or .db, in it or in its folders."
        )
    return runs


def _read_folder(folder: Path, depth: int = 4) -> list[Run]:
    """The run whose folder this is, or the runs in its folders."""
    source = _log_of(folder)
    if source is not None:
        return _from_logs(folder, formats.read_file(source))
    if any(is_event_file(file) for file in folder.iterdir()):
        return _from_logs(folder, read_events(folder))
    files = [file for file in sorted(folder.iterdir()) if formats.is_log(file)]
    if files:
        return _readable(files, lambda file: _from_logs(file, formats.read_file(file)))
    if depth == 0:
        return []
    # Token records are no log, and a killed run may have nothing else.
    children = [child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
    children = sorted(child for child in children if child.name != "_token_records")
    return _readable(children, lambda child: _read_folder(child, depth - 1))


def _readable(paths: Sequence[Path], read: Callable[[Path], list[Run]]) -> list[Run]:
    """The runs of all paths that can be read. The others are named, and an error only where there is no run."""
    runs: list[Run] = []
    errors: list[ValueError | OSError] = []
    for path in paths:
        try:
            runs += read(path)
        except (ValueError, OSError) as error:
            errors.append(error)
    if errors and not runs:
        raise errors[0]
    for left_out in errors:
        note_unread(f"Left out: {left_out}")
    return runs


def _log_of(folder: Path) -> Path | None:
    """The file that has the whole log of the run of a folder."""
    quickstart = folder / "train_log.jsonl"
    if quickstart.exists():
        return quickstart
    states = [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("trainer_state.json")]
    steps, errors = {}, []
    for state in states:
        try:
            steps[state] = formats.trainer_step(state)
        except ValueError as error:  # cut off by a full disk, say: an older one has the log up to it
            errors.append(error)
    if errors and not steps:
        raise errors[0]
    for left_out in errors:
        note_unread(f"Left out: {left_out}")
    if steps:
        return max(steps, key=lambda file: (steps[file], file.parent == folder))
    return next(iter(sorted(folder.glob("*.wandb"))), None)


def _from_logs(path: Path, logs: list[Log]) -> list[Run]:
    folder = path if path.is_dir() else path.parent
    own = path
    if own.is_file() and own.stem in _GENERIC_STEMS:
        own = own.parent
    if re.fullmatch(r"checkpoint-\d+", own.name):
        own = own.parent
    if is_event_file(path) or (path.is_dir() and any(map(is_event_file, path.iterdir()))):
        own = folder.resolve()
        if own.parent.name == "runs":  # transformers: OUTPUT_DIR/runs/DATE_HOST/events...
            own = own.parent.parent
    beside = formats.read_settings(folder)
    if not beside and own.is_dir():  # of a checkpoint or of event files: the settings are in the folder of the run
        beside = formats.read_settings(own)
    runs = []
    for log in logs:
        if not log.entries:
            raise ValueError(f"{str(path)!r} has no entries: nothing was logged to it yet.")
        name = log.name or (own.stem if own.is_file() else own.resolve().name)
        config = beside | log.config
        runs.append(Run(name, path, log.entries, config, _seed(config, name), formats.read_results(folder)))
    return runs


def _seed(config: dict[str, Any], name: str) -> int | None:
    match = _SEED.search(name)
    if match:
        return int(match[1])
    seed = config.get("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None
