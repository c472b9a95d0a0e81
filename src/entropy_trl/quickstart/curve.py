"""The held-out curve of a training: the policy's scores every few updates, in the trainer's log."""

import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_trl.quickstart.evaluate import evaluate_policy


SAMPLES = 16
CURVE_PROMPTS = 256
EVALUATION_SEED = 0


class HeldOutCurve(TrainerCallback):
    """Evaluates the policy during training and puts the result into the trainer's log.

    An entry `{"step", "seconds", "held_out/...": ...}` goes into `state.log_history`, which checkpoints keep, so that
    the curve of a resumed run is whole. The evaluation has its own generator and changes nothing in the training.

    Args:
        prompts (`Sequence[str]`): Held-out prompts.
        every (`int`): Updates between two evaluations.
        label (`str`): What the progress lines start with.
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
