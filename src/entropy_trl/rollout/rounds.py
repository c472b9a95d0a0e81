"""[`GenerationRounds`]: the rounds in which dynamic sampling makes one rollout."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from entropy_trl.rollout.estimators import estimate_advantages
from entropy_trl.rollout.sampling import Group, PromptStream, fill_rollout, has_signal
from entropy_trl.trl_compat import completion_ends


def weighted_reward(rewards: Tensor, weights: Tensor) -> Tensor:
    """Sum the rewards of each completion, (N, F) to (N,), as TRL weighs its reward functions; NaN if none scored it."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), float("nan"))


def deciding_reward(names: Sequence[str], chosen: str | None) -> int:
    """Find the reward function by which dynamic sampling keeps or drops a group.

    Args:
        names (`Sequence[str]`): Names of the reward functions, in TRL's order.
        chosen (`str`, *optional*): `CovGRPOConfig.dynamic_sampling_reward`. `None` is the first function.

    Returns:
        `int`: Its place among the reward functions.

    Raises:
        ValueError: If no function, or more than one, has that name.
    """
    if chosen is None:
        return 0
    places = [place for place, name in enumerate(names) if name == chosen]
    if len(places) != 1:
        problem = "names more than one reward function" if places else "is not a reward function of this run"
        raise ValueError(
            f"`dynamic_sampling_reward={chosen!r}` {problem}: dynamic sampling cannot tell which prompts to keep. "
            f"Use one of {', '.join(map(repr, names))}, each with a name of its own, or leave it out for the first."
        )
    return places[0]


def make_prompt_stream(trainer: GRPOTrainer) -> PromptStream:
    """Make the stream that dynamic sampling takes a trainer's prompts from.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer, with its training data.

    Raises:
        ValueError: If the trainer has environments, or prompts with images.
    """
    if trainer.environment_factories is not None:
        raise ValueError(
            "`dynamic_sampling` does not support environments, because an environment chooses its own prompts. Set one "
            "of them to off."
        )
    columns = trainer.train_dataset.column_names or next(iter(trainer.train_dataset)).keys()
    if {"image", "images"} & set(columns):
        raise ValueError("`dynamic_sampling` does not support prompts with images. Set `dynamic_sampling=False`.")
    return PromptStream(trainer.train_dataset, trainer.shuffle_dataset, trainer.args.seed)


class GenerationRounds:
    """The rounds in which dynamic sampling makes one rollout, by TRL's own generation and rewards.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer, with the arguments of a [`CovGRPOConfig`].
        stream ([`PromptStream`]): Where prompts come from.
        generate (`Callable`): TRL's `_generate`.
        calculate_rewards (`Callable`): TRL's `_calculate_rewards`.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        stream: PromptStream,
        generate: Callable[..., Any],
        calculate_rewards: Callable[..., Tensor],
    ):
        self.trainer = trainer
        self.stream = stream
        self.generate = generate
        self.calculate_rewards = calculate_rewards
        self.taken: list[dict[str, Any]] = []  # rows of the data set, of all processes
        self.rewards: list[Tensor] = []  # of each round, of all processes
        self.decider = deciding_reward(trainer.reward_func_names, trainer.args.dynamic_sampling_reward)
        self.reward_metrics: list[dict[str, list[float]]] = []  # what the reward functions logged in each round

    def fill(self, rows: list[dict[str, Any]], prompts: list[Any]) -> tuple[tuple[Any, ...], Tensor]:
        """Generate until the rollout is full of groups with a signal (see [`fill_rollout`]).

        `rows` and `prompts`, which TRL holds, become those of the groups that are kept.

        Returns:
            `tuple[tuple[Any, ...], Tensor]`: What TRL's `_generate` returns, and the rewards of all processes, (N,
            number of reward functions).
        """
        start = time.perf_counter()
        trainer, accelerator = self.trainer, self.trainer.accelerator
        metrics = trainer._metrics["train"]
        logged = {name: len(values) for name, values in metrics.items()}
        rollout = fill_rollout(
            self._make_groups,
            self._has_signal,
            lambda flags: accelerator.gather(torch.tensor(flags, device=accelerator.device)).tolist(),
            gather_object,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            groups_per_process=len(prompts) // trainer.num_generations,
            max_rounds=trainer.args.max_generation_rounds,
            train_on_incomplete=trainer.args.dynamic_sampling_incomplete == "train",
        )
        self.stream.put_back(self.taken[rollout.used :])  # the prompts that were too many come again
        kept = [completion for group in rollout.groups for completion in group]
        columns = {name: [completion[name] for completion in kept] for name in kept[0]}
        rows[:], prompts[:] = columns["row"], columns["prompt"]
        for name in {name for extra in columns["extra"] for name in extra}:
            trainer._pending_extra_logs[name] = [extra.get(name) for extra in columns["extra"]]

        self._merge_rounds(metrics, logged)
        self._merge_reward_metrics()
        for name, value in {
            "rounds": rollout.rounds,
            "acceptance_rate": rollout.with_signal / rollout.generated,
            "prompts": rollout.generated,
            "epoch": self.stream.epoch,
            "reward": torch.cat([weighted_reward(rewards, trainer.reward_weights) for rewards in self.rewards])
            .nanmean()
            .item(),
            "seconds": time.perf_counter() - start,
        }.items():
            metrics[f"dynamic_sampling/{name}"].append(value)

        tool_mask, logps = (columns[n] if columns[n][0] is not None else None for n in ("tool_mask", "logps"))
        output: tuple[Any, ...] = (
            columns["prompt_ids"],
            columns["ids"],
            tool_mask,
            columns["completion"],
            logps,
            {},
            None,
            [],
        )
        return output, accelerator.gather(torch.stack(columns["rewards"]).to(accelerator.device))

    def _make_groups(self, n: int) -> list[Group]:
        """The next `n` prompts of this process, generated and scored."""
        trainer, size = self.trainer, self.trainer.num_generations
        rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        taken = self.stream.take(n * processes)
        self.taken += taken
        rows = [dict(row) for row in taken[rank * n : (rank + 1) * n] for _ in range(size)]
        prompts = [row["prompt"] for row in rows]
        prompt_ids, ids, tool_mask, completions, logps, fields, images, tool_images = self.generate(prompts)
        if images is not None or any(tool_images):
            raise ValueError("`dynamic_sampling` does not support images, in prompts or from tools. Switch it off.")
        for name, values in fields.items():  # of a rollout_func, for the reward functions
            for row, value in zip(rows, values if isinstance(values, list) else [values] * len(rows), strict=True):
                row[name] = value
        self.rewards.append(self.calculate_rewards(rows, prompts, completions, ids))
        self.reward_metrics.append(dict(trainer._pending_metrics))
        trainer._pending_metrics.clear()
        rewards = self.rewards[-1][rank * len(rows) : (rank + 1) * len(rows)].cpu()
        logged = trainer._pending_extra_logs
        extras = [{name: values[i] for name, values in logged.items() if i < len(values)} for i in range(len(rows))]
        logged.clear()
        completion_columns = {
            "row": rows,
            "prompt": prompts,
            "prompt_ids": prompt_ids,
            "ids": ids,
            "tool_mask": tool_mask or [None] * len(rows),
            "completion": completions,
            "logps": logps or [None] * len(rows),
            "rewards": rewards,
            "trainable": self._trainable(ids, tool_mask),
            "extra": extras,
        }
        made = [{name: values[i] for name, values in completion_columns.items()} for i in range(len(rows))]
        return [made[i : i + size] for i in range(0, len(made), size)]

    def _has_signal(self, group: Group) -> bool:
        """Whether the deciding reward differs in the group, and a token that the loss counts has an advantage."""
        args = self.trainer.args
        rewards = torch.stack([completion["rewards"] for completion in group])
        deciding, trained = rewards[:, self.decider], self._trained_rewards(rewards)
        if deciding.isnan().all():  # another function scores prompts of this kind
            deciding = trained
        # REINFORCE++ has no group baseline: a group of equal rewards has an advantage and is worth training on.
        keeps_equal = args.advantage_estimator == "reinforce_pp" and args.dynamic_sampling_reward is None
        if not keeps_equal and not has_signal(deciding):
            return False
        trainable = torch.tensor([completion["trainable"] for completion in group])
        return bool((self._has_advantage(trained) & trainable).any())

    def _trained_rewards(self, rewards: Tensor) -> Tensor:
        """What advantages are made of: the weighted sum, (G,), or the columns that have a weight, (G, F)."""
        weights = self.trainer.reward_weights.cpu()
        if self.trainer.multi_objective_aggregation == "sum_then_normalize":
            return weighted_reward(rewards, weights)
        return rewards[:, weights != 0]

    def _has_advantage(self, trained: Tensor) -> Tensor:
        """Which completions of a group have an advantage other than 0, (G,), bool."""
        args = self.trainer.args
        if args.advantage_estimator == "reinforce_pp":
            return ~trained.isnan()
        if args.advantage_estimator == "grpo":  # 0 where the reward is the mean of the group's
            columns = trained.view(len(trained), -1)
            return ((columns - columns.nanmean(0)).abs() > 1e-6).any(1)
        estimated = estimate_advantages(args.advantage_estimator, trained, len(trained), args.advantage_quantile)
        return estimated.abs() > 1e-6

    def _trainable(self, ids: list[list[int]], tool_mask: list[list[int]] | None) -> list[bool]:
        """Which completions have a token that the loss counts."""
        trainer = self.trainer
        written = [True] * len(ids) if tool_mask is None else [any(mask) for mask in tool_mask]
        if not trainer.mask_truncated_completions:
            return written
        ends = completion_ends(trainer)
        return [has_token and row[-1] in ends for has_token, row in zip(written, ids, strict=True)]

    def _merge_reward_metrics(self) -> None:
        """Hand TRL what reward functions logged in all rounds, weighted by the completions of each round.

        TRL averages the values it holds, over all processes. So each value stands there as often as its round is large.
        """
        sizes = [len(rewards) for rewards in self.rewards]
        unit = math.gcd(*sizes)
        for size, values_of in zip(sizes, self.reward_metrics, strict=True):
            for name, values in values_of.items():
                self.trainer._pending_metrics[name] += values * (size // unit)

    def _merge_rounds(self, metrics: dict[str, list[float]], logged: dict[str, int]) -> None:
        """Make one value a rollout of what TRL has logged in every round."""
        sizes = [len(rewards) for rewards in self.rewards]
        clipped = metrics["completions/clipped_ratio"][logged.get("completions/clipped_ratio", 0) :]
        terminated = [round(n * (1 - share)) for n, share in zip(sizes, clipped, strict=True)]
        calls = metrics.get("tools/call_frequency", [])[logged.get("tools/call_frequency", 0) :]
        calls = [round(n * each) for n, each in zip(sizes, calls, strict=False)]  # none without tools
        for name, values in metrics.items():
            rounds = values[logged.get(name, 0) :]
            if len(rounds) != len(sizes):
                continue  # not logged by the rounds
            # Of terminated completions, and of failures by tool call, TRL logs 0 in a round that has none.
            weights = terminated if "terminated" in name else calls if name == "tools/failure_frequency" else sizes
            weights = weights if any(weights) else sizes
            counted = [(value, n) for value, n in zip(rounds, weights, strict=True) if n]
            if "/min" in name or "/max" in name:
                value = (min if "/min" in name else max)(value for value, _ in counted)
            else:
                value = sum(value * n for value, n in counted) / sum(n for _, n in counted)
            values[logged.get(name, 0) :] = [value]
