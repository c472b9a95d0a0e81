"""What `entropy-trl train` prints while it trains: one line a log above the progress bar, as text or as JSON."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from entropy_trl.analysis.verdict import COLLAPSE, SURGE


if TYPE_CHECKING:
    from entropy_trl.trainer import CovGRPOTrainer

#: Points that the trend of entropy looks back on, and the least that have one.
_WINDOW, _LEAST = 10, 4
#: Change between the two halves of the window below which entropy is steady: it moves by as much from step to step.
_STEADY = 0.03
#: The share of the points that stand for "the start", as for the warning of a collapse.
_START = 0.05
_SELECTED = "selected_fraction"
_OF_ROLLOUTS = ("reward", "completions/mean_length")
_RED, _YELLOW, _PLAIN = "\033[31m", "\033[33m", "\033[0m"


def show_progress(trainer: "CovGRPOTrainer", log_format: str, stdout: TextIO) -> None:
    """Print lines for people or machines in place of the dictionaries that transformers prints.

    Args:
        trainer ([`CovGRPOTrainer`]): Its callbacks that print are removed.
        log_format (`str`): `"text"` or `"json"`.
        stdout (`TextIO`): Where the lines go.
    """
    for printing in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(printing)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.add_callback(JsonLines(stdout) if log_format == "json" else TextLines(stdout))


@contextmanager
def whole_bar(trainer: "CovGRPOTrainer") -> Iterator[None]:
    """Write log messages above the progress bar, where they would cut through it."""
    if trainer.args.disable_tqdm:
        yield
        return
    with logging_redirect_tqdm([logging.getLogger(), logging.getLogger("transformers")], tqdm_class=tqdm):
        yield


class Bar(ProgressCallback):
    """The progress bar of transformers without the logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing: a callback of its own prints the logs."""


class JsonLines(TrainerCallback):
    """Print each log as one JSON object on a line of stdout. Values that JSON lacks, such as NaN, are null."""

    def __init__(self, stdout: TextIO):
        self._stdout = stdout

    def on_log(
        self, args: Arguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            entry = {"step": state.global_step} | {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in (logs or {}).items()
            }
            _write(json.dumps(entry, allow_nan=False, default=str), self._stdout)


class TextLines(TrainerCallback):
    """Print each log as one line for people: step, reward, entropy, length, selected share, speed and time left.

    Args:
        stdout (`TextIO`): Where the lines go. They are coloured if it is a terminal.
        clock (`Callable[[], float]`, *optional*, defaults to `time.monotonic`): seconds.
    """

    def __init__(self, stdout: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stdout = stdout
        self._has_colours = stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._begin = (0.0, 0, 0)  # seconds, steps and tokens
        self._rollout: dict[str, Any] = {}  # what is logged once a rollout, which may be trained on for several steps

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begin = (self._clock(), state.global_step, state.num_input_tokens_seen)
        self._rollout = {}

    def on_log(
        self, args: Arguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        width = len(str(state.max_steps))
        where = f"step {state.global_step:>{width}}/{state.max_steps}"
        evaluated = [name for name in logs if name.startswith("eval_") and name[4:].endswith("_reward")]
        prefixes = [name.removesuffix("reward") for name in evaluated]
        if prefixes:
            for prefix in prefixes:
                name = prefix.removeprefix("eval_").rstrip("_")
                self._say([where, f"evaluation{f' on {name}' if name else ''}", *_scores(logs, prefix)])
        elif any(name in logs for name in ("reward", "loss")):
            self._rollout |= {name: logs[name] for name in _OF_ROLLOUTS if name in logs}
            entropies = [entry["entropy"] for entry in state.log_history if _is_number(entry.get("entropy"))]
            scores = _scores(self._rollout | logs, "", _trend(entropies, self._has_colours))
            self._say([where, *scores, *_selected(logs), *self._pace(state)])

    def _say(self, parts: Sequence[str]) -> None:
        _write(" | ".join(parts), self._stdout)

    def _pace(self, state: TrainerState) -> Iterator[str]:
        """Tokens a second, prompts and completions, and the time left: means since this process began to train."""
        then, first_step, tokens_before = self._begin
        seconds, steps = self._clock() - then, state.global_step - first_step
        if seconds <= 0 or steps <= 0:
            return
        yield f"{(state.num_input_tokens_seen - tokens_before) / seconds:,.0f} tokens/s"
        yield f"ETA {duration(seconds / steps * (state.max_steps - state.global_step))}"


def entropy_trend(entropies: Sequence[float]) -> tuple[str, float]:
    """Say where entropy is going.

    Args:
        entropies (`Sequence[float]`): Nats a token, one for each log so far.

    Returns:
        `tuple[str, float]`: `"falling"`, `"steady"` or `"rising"` (empty with fewer than 4 points), by the means of the
        two halves of the last 10 points; and the entropy now as a share of that at the start (NaN if that is 0).
    """
    count = max(round(_START * len(entropies)), 1)
    start, now = (sum(ends) / count for ends in (entropies[:count], entropies[-count:]))
    share = now / start if start > 0 else math.nan
    last = entropies[-_WINDOW:]
    if len(last) < _LEAST:
        return "", share
    half = len(last) // 2
    before, after = sum(last[:half]) / half, sum(last[-half:]) / half
    if abs(after - before) <= _STEADY * before:
        return "steady", share
    return "rising" if after > before else "falling", share


def duration(seconds: float) -> str:
    """A duration in its two largest units: `45 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller:02} {name}"
    return f"{whole} s"


def number(value: float) -> str:
    """A metric in three decimals, or four significant digits if it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3e}"


def _scores(logs: dict[str, Any], prefix: str, trend: str = "") -> Iterator[str]:
    for name, label in (("reward", "reward"), ("entropy", "entropy"), ("completions/mean_length", "length")):
        value = logs.get(f"{prefix}{name}")
        if not isinstance(value, (int, float)):
            continue
        text = f"{label} {value:,.0f}" if label == "length" else f"{label} {number(value)}"
        yield text + trend if label == "entropy" else text


def _trend(entropies: Sequence[float], has_colours: bool) -> str:
    if not entropies:
        return ""
    trend, share = entropy_trend(entropies)
    if not trend or math.isnan(share):
        return ""
    text = f" {trend}, {share:.0%} of start"
    if not has_colours or math.sqrt(COLLAPSE) < share < math.sqrt(SURGE):
        return text
    return f"{_YELLOW if COLLAPSE < share < SURGE else _RED}{text}{_PLAIN}"


def _selected(logs: dict[str, Any]) -> Iterator[str]:
    """The share of the tokens that the control selected; in a chain, that of each control."""
    for name, value in logs.items():
        group, _, metric = name.rpartition("/")
        if group.partition("/")[0] == "entropy_control" and metric == _SELECTED and _is_number(value):
            control = group.removeprefix("entropy_control").lstrip("/")
            yield f"selected {f'{control} ' if control else ''}{100 * value:.3g}%"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _write(line: str, stdout: TextIO) -> None:
    tqdm.write(line, file=stdout)
    stdout.flush()
