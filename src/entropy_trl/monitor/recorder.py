"""[`CovarianceRecorder`]: writes the tokens of chosen optimizer steps, with all that the control saw of them."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_trl.analysis.covariance.records import FOLDER, write_records
from entropy_trl.tokens.covariance import token_covariance
from entropy_trl.tokens.ranks import Ranks
from entropy_trl.tokens.types import TokenBatch


logger = logging.getLogger(__name__)

#: Prompts are for reading: of a longer one the end is kept.
_PROMPT_CHARACTERS = 2000


@dataclass(frozen=True)
class ObservedMicroBatch:
    """What the trainer shows the recorder of one micro-batch. Shapes: B completions, T completion positions.

    Args:
        inputs (`dict`): TRL's inputs of the loss, with `row_ids`, `rewards` and `group_accuracy`, each of shape (B,).
        batch ([`TokenBatch`]): Its tokens, with the loss's own log-probabilities and entropies, without gradient.
        live_logps (`Tensor` of shape (B, T)): The log-probabilities that the loss's gradient flows through.
        selected (`Tensor` of shape (B, T), bool, *optional*): The tokens that the control restrains.
    """

    inputs: dict[str, Any]
    batch: TokenBatch
    live_logps: Tensor
    selected: Tensor | None


@dataclass(frozen=True)
class StepFacts:
    """What the trainer knows of the step.

    Args:
        learning_rate (`float`): The step's learning rate.
        control (`str`, *optional*): The name of the entropy control.
        loss_type (`str`): TRL's loss type.
        num_generations (`int`): Completions a prompt.
        ranks ([`Ranks`]): All processes of the run.
        entropies (`Callable`): Makes a forward pass: inputs of the loss to entropies, (B, T), nats.
        weights (`Callable`): Inputs of the loss and mask to each token's weight in TRL's loss, (B, T).
    """

    learning_rate: float
    control: str | None
    loss_type: str
    num_generations: int
    ranks: Ranks
    entropies: Callable[[dict[str, Any]], Tensor]
    weights: Callable[[dict[str, Any], Tensor], Tensor]


class CovarianceRecorder(TrainerCallback):
    """Records the tokens of chosen optimizer steps in `OUTPUT_DIR/_token_records`, a parquet file a step and process.

    For a [`CovGRPOTrainer`], with its control on or off; `entropy-trl covariance` and `entropy_trl.analysis` read the
    files ([`~entropy_trl.analysis.covariance.records.SCHEMA`] has the columns). Training is the same with it and
    without: nothing random of the training is used, and nothing written into its tensors.

    The covariance is that of Eq. 10 of arXiv 2505.22617 over all tokens of the step, of all processes, with the
    log-probabilities of the loss's own forward pass, whatever pool and scores the control uses.

    Args:
        every (`int`, *optional*): Record the first step and every so many after it.
        steps (`Sequence[int]`, *optional*): Record these steps, counted from 1, instead.
        max_tokens (`int`): Tokens to record of a step, over all processes. Of a larger step whole completions are
            drawn.
        max_steps (`int`): Steps to record in a run, those before a resume included.
        entropy_change (`bool`): Whether to measure each token's entropy again after the update, on the same states:
            one more forward pass without gradient in a recorded step.

    Raises:
        ValueError: If neither or both of `every` and `steps` are given, or a number is below 1.
    """

    def __init__(
        self,
        every: int | None = None,
        steps: Sequence[int] | None = None,
        max_tokens: int = 50_000,
        max_steps: int = 200,
        entropy_change: bool = False,
    ):
        if (every is None) == (steps is None):
            raise ValueError(f"Give either `every` or `steps` (got every={every}, steps={steps}).")
        for name, value in {"every": every, "max_tokens": max_tokens, "max_steps": max_steps}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer from 1, got {value!r}.")
        if steps is not None and (not steps or min(steps) < 1):
            raise ValueError(f"`steps` are counted from 1, got {list(steps)}.")
        self.every = every
        self.steps = None if steps is None else frozenset(steps)
        self.max_tokens = max_tokens
        self.max_steps = max_steps
        self.entropy_change = entropy_change
        self._recorded: set[int] = set()
        self._facts: StepFacts | None = None
        self._micro_batches: list[ObservedMicroBatch] = []

    @classmethod
    def of(cls, options: Any) -> "CovarianceRecorder":
        """The recorder that the configuration's `token_records` asks for.

        Raises:
            ValueError: Not a mapping, an unknown key, or a bad value.
        """
        known = list(inspect.signature(cls).parameters)
        if not isinstance(options, Mapping):
            raise ValueError(f"`token_records` must be a mapping, such as '{{\"every\": 50}}', got {options!r}.")
        unknown = [key for key in options if key not in known]
        if unknown:
            raise ValueError(f"Unknown `token_records` key {unknown[0]!r}. Valid: {', '.join(map(repr, known))}.")
        return cls(**options)

    def wants(self, step: int, inputs: dict[str, Any]) -> bool:
        """Whether the trainer shall show the tokens of this step (counted from 1)."""
        chosen = (step - 1) % self.every == 0 if self.every is not None else step in (self.steps or ())
        chosen = chosen and (len(self._recorded) < self.max_steps or step in self._recorded)
        if chosen and "group_accuracy" not in inputs:
            logger.warning(f"Step {step} is not recorded: its rollout was made by a run without a recorder.")
        return chosen and "group_accuracy" in inputs

    def observe(self, micro_batch: ObservedMicroBatch, facts: StepFacts) -> None:
        """Take a micro-batch of a step that is wanted. Every process must have as many."""
        self._facts = facts
        self._micro_batches.append(micro_batch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches = []  # of a step that an earlier run was interrupted in
        files = {path: int(path.stem.split("-")[1]) for path in sorted(self._folder(args).glob("step-*.parquet"))}
        self._recorded = {step for step in files.values() if step <= state.global_step}
        later = [path for path, step in files.items() if step > state.global_step]
        if later and args.process_index == 0:  # no process records before this one has made its first step
            logger.warning(
                f"{later[0].parent}: removed {len(later)} files with records of steps after {state.global_step}, of an "
                "earlier run."
            )
            for path in later:
                path.unlink()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self._micro_batches:
            return
        micro_batches, facts = self._micro_batches, self._facts
        assert facts is not None
        self._micro_batches, self._facts = [], None
        self._recorded.add(state.global_step)
        if len(self._recorded) == self.max_steps:
            logger.warning(
                f"Step {state.global_step} is the last one that is recorded: `max_steps` ({self.max_steps}) is reached."
            )
        step = _Step(micro_batches, facts, self.entropy_change)
        metadata = step.totals() | {
            "step": state.global_step,
            "learning_rate": facts.learning_rate,
            "control": facts.control,
            "loss_type": facts.loss_type,
            "num_generations": facts.num_generations,
        }
        rows = step.draw_rows(max(self.max_tokens // args.world_size, 1), seed=[state.global_step, args.process_index])
        name = f"step-{state.global_step:08d}" + (f"-rank{args.process_index}" if args.process_index else "")
        columns, prompts = step.columns(rows, processing_class)
        metadata |= {"tokens_recorded": len(columns["position"]), "prompts": prompts}
        write_records(self._folder(args) / f"{name}.parquet", columns, metadata)

    @staticmethod
    def _folder(args: TrainingArguments) -> Path:
        return Path(str(args.output_dir)) / FOLDER


class _Step:
    """The micro-batches of a step as one batch of rows, padded to one length."""

    def __init__(self, micro_batches: list[ObservedMicroBatch], facts: StepFacts, entropy_change: bool):
        self.facts = facts
        self.inputs = [micro_batch.inputs for micro_batch in micro_batches]
        self.mask = _pad([m.batch.mask for m in micro_batches])
        self.logps, self.old_logps, self.entropies = (
            _pad([getattr(m.batch, name) for m in micro_batches]) for name in ("logps", "old_logps", "entropies")
        )
        selected = [torch.zeros_like(m.batch.mask) if m.selected is None else m.selected for m in micro_batches]
        self.selected = _pad(selected)
        advantages = [inputs["advantages"] for inputs in self.inputs]
        self.advantages = _pad(
            [a.reshape(len(a), -1).expand_as(m.batch.mask) for a, m in zip(advantages, micro_batches, strict=True)]
        )
        self.covariance = token_covariance(self.logps, self.advantages, self.mask, facts.ranks)
        self.entropies_after: Tensor | None = None
        if entropy_change:
            after = [facts.entropies(inputs) for inputs in self.inputs]
            self.entropies_after = _pad(after).where(self.mask, 0.0)

    def totals(self) -> dict[str, Any]:
        """Means over all tokens of the step, of all processes."""
        after = self.entropies if self.entropies_after is None else self.entropies_after
        sums = [x.where(self.mask, 0.0).sum(dtype=torch.float64) for x in (self.covariance, self.entropies, after)]
        *totals, tokens = self.facts.ranks.sum(torch.stack([*sums, self.mask.sum().double()])).tolist()
        covariance, entropy, entropy_after = (total / max(tokens, 1) for total in totals)
        return {
            "tokens": int(tokens),
            "mean_covariance": covariance,
            "mean_entropy": entropy,
            "mean_entropy_after": None if self.entropies_after is None else entropy_after,
        }

    def draw_rows(self, max_tokens: int, seed: list[int]) -> list[int]:
        """Rows that have no more tokens together, drawn at random unless all fit, in order; at least one."""
        order = np.random.default_rng(seed).permutation(len(self.mask))
        lengths = self.mask.sum(-1).cpu().numpy()[order]
        fitting = int((lengths.cumsum() <= max_tokens).sum())
        return sorted(order[: max(fitting, 1)].tolist())

    def columns(self, rows: list[int], processing_class: Any) -> tuple[dict[str, Any], dict[int, str]]:
        """The recorded columns of these rows, and the texts of their prompts by group."""
        mask = self.mask[rows]
        row, position = mask.nonzero(as_tuple=True)

        def of_token(values: Tensor) -> Any:
            return values[rows][mask].cpu().numpy()

        def of_row(name: str) -> Any:
            return torch.cat([inputs[name] for inputs in self.inputs])[rows][row].cpu().numpy()

        token_ids = of_token(_pad([inputs["completion_ids"] for inputs in self.inputs]))
        row_ids = of_row("row_ids")
        texts = {int(token): processing_class.decode([int(token)]) for token in np.unique(token_ids)}
        return {
            "row_id": row_ids,
            "group": row_ids // self.facts.num_generations,
            "position": position.cpu().numpy(),
            "token_id": token_ids,
            "token": [texts[int(token)] for token in token_ids],
            "logp": of_token(self.logps.float()),
            "old_logp": of_token(self.old_logps.float()),
            "entropy": of_token(self.entropies.float()),
            "entropy_after": None if self.entropies_after is None else of_token(self.entropies_after.float()),
            "advantage": of_token(self.advantages.float()),
            "covariance": of_token(self.covariance.float()),
            "selected": of_token(self.selected),
            "reward": of_row("rewards"),
            "group_accuracy": of_row("group_accuracy"),
        }, self._prompts(rows, processing_class)

    def _prompts(self, rows: list[int], processing_class: Any) -> dict[int, str]:
        prompts: dict[int, str] = {}
        chosen, row = set(rows), 0
        for inputs in self.inputs:
            for row_id, ids, mask in zip(
                inputs["row_ids"].tolist(), inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True
            ):
                group = row_id // self.facts.num_generations
                if row in chosen and group not in prompts:
                    prompts[group] = processing_class.decode(ids[mask])[-_PROMPT_CHARACTERS:]
                row += 1
        return prompts


def _pad(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the rows; what is shorter is filled up with 0."""
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(t.detach(), (0, length - t.shape[1])) for t in tensors])
