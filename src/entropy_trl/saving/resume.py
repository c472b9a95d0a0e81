"""[`ResumingTrainer`]: TRL's GRPOTrainer whose interrupted runs go on bit for bit, inside a rollout too.

TRL saves no rollout, and makes a new one where it goes on in the middle of one: another run from there on.
"""

import json
import logging
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from entropy_trl.config import CovGRPOConfig
from entropy_trl.files import write_text
from entropy_trl.saving.checkpoint import (
    checkpoint_to_resume,
    load_rollout,
    rollout_file,
    rotate,
    save_rollout,
    warn_of_another_run,
)
from entropy_trl.saving.data_draws import WatchedReads, draws_file, save_random_state, warn_of_workers
from entropy_trl.saving.manifest import MANIFEST, TRAINER_STATE, UNFINISHED, Layout, Run, read_manifest, write_manifest
from entropy_trl.saving.options import recorded_options, warn_nothing_left, warn_of_other_data, warn_of_other_options
from entropy_trl.saving.shards import check_shards, save_shard_sample
from entropy_trl.saving.uploads import PushingTrainer
from entropy_trl.saving.weights import restore_weights


logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"


class Stateful(Protocol):
    """What has a state of its own that a checkpoint keeps, as JSON, in a file of that name."""

    file: str

    def reset(self) -> None:
        """Begin as a new run does."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint shall keep; nothing is written if it is empty."""

    def load(self, stored: dict[str, Any], checkpoint: Path) -> None:
        """Take up what a checkpoint kept; empty if it kept nothing."""


@cache
def _let_torch_load_to_numbered_cpus() -> None:
    """Teach `torch.load` the device `cpu:0`.

    With several processes on CPUs accelerate names it so and transformers loads the optimizer's state to it. Torch 2.13
    knows `cpu` only.
    """
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


class ResumingTrainer(PushingTrainer):
    """TRL's GRPOTrainer with complete checkpoints, and an exact resume of everything in `_stateful`."""

    data_collator: Callable[[list[Any]], Any]

    def __init__(self, *args, **kwargs):
        self._stateful: list[Stateful] = []
        self._resumed: Path | None = None  # the checkpoint that the run goes on from
        self._run = Run()
        self._save_total_limit: int | None = None  # while transformers, which would apply it too early, must not see it
        super().__init__(*args, **kwargs)
        # Workers read with random generators of their own, and their collator must be picklable.
        self._reads: WatchedReads | None = None
        if self._keeps_rollout and self.args.dataloader_num_workers == 0:
            self._reads = WatchedReads(self.data_collator)
            self.data_collator = self._reads
        self._loader: DataLoader[Any] | None = None  # of a run that resumes, until it reads
        self._random_state_is_restored = False

    @property
    def _keeps_rollout(self) -> bool:
        """Whether checkpoints hold the rollout: with a plain GRPOConfig the trainer resumes as TRL's does."""
        return isinstance(self.args, CovGRPOConfig)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trains, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder, or `True` for the newest complete one in `args.output_dir`: those that an
                interruption left incomplete are passed over with a warning. `"auto"` is `True` if there is one, and
                otherwise starts from the beginning.

        Raises:
            ValueError: If there is no complete checkpoint, or the run cannot go on from it as it is configured now.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, Layout.of(self.args))
        self._resumed, self._run = checkpoint, Run()
        self._loader, self._random_state_is_restored = None, False
        if checkpoint is not None and (checkpoint / MANIFEST).exists():
            self._run = Run(**read_manifest(checkpoint)["run"])
        if self.is_world_process_zero():
            warn_of_another_run(self.args.output_dir, checkpoint)
            if checkpoint is not None:
                warn_of_other_options(checkpoint, self.args)
                warn_of_other_data(checkpoint, self._data_facts)
        for part in self._stateful:
            part.reset()
        if self._keeps_rollout:
            # A run that was interrupted inside a step leaves TRL's counter and rollout behind. The data start afresh,
            # and so must they, or the steps would no longer lie inside the rollouts.
            self._step, self._buffered_inputs = 0, None
            self._last_loaded_step = -1  # nor has vLLM the weights that this run starts from
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    # TRL's sampler draws an order an epoch from one generator, and would begin with the first epoch's when it resumes.
    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if self._keeps_rollout and self._resumed is not None and self.shuffle_dataset:
            steps = json.loads((self._resumed / TRAINER_STATE).read_text())["global_step"]
            micro_batches = len(sampler) // self.args.generation_batch_size
            for _ in range(steps // math.ceil(micro_batches / self.args.gradient_accumulation_steps)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    # transformers makes one more step where a run resumes at its end.
    def _run_epoch(self, *args, **kwargs):
        finished = self.state.global_step >= self.state.max_steps
        if self._resumed is None or not self._keeps_rollout or not finished:
            super()._run_epoch(*args, **kwargs)
            return
        self.control.should_training_stop = True
        if self.is_world_process_zero():
            warn_nothing_left(self._resumed, self.state.global_step, self.state.max_steps)

    # Where a run resumes, its loader must not draw from torch's generator as it begins: the first read does.
    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        self._loader = None
        if self._resumed is None or not self._keeps_rollout:
            return loader
        if self._reads is None:
            warn_of_workers(self.train_dataset)
        elif isinstance(loader, DataLoaderShard):
            self._loader = loader.base_dataloader
            if not isinstance(self.train_dataset, IterableDataset):
                self._loader.generator = torch.Generator()
        return loader

    # transformers calls this before the first read at the start of an epoch, and after the first step's reads else.
    def _load_rng_state(self, checkpoint):
        if self._random_state_is_restored:
            self._random_state_is_restored = False
            return
        if self._loader is not None:
            self._loader.generator, self._loader = None, None
        super()._load_rng_state(checkpoint)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        reads, loader, checkpoint = self._reads, self._loader, self._resumed
        if reads is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._loader = None
        streams = isinstance(self.train_dataset, IterableDataset)
        resumes = loader is not None and checkpoint is not None  # in the middle of an epoch
        if loader is not None and checkpoint is not None and not streams:
            loader.generator = None  # the loader that skips has its own
            file = draws_file(checkpoint, self.accelerator.process_index)
            reads.resume(file, partial(self._load_rng_state, checkpoint))
        samples = super().get_batch_samples(reads.watch(epoch_iterator), num_batches, device)
        if resumes and streams:
            reads.warn_if_random("a stream is read again from its start")
        self._random_state_is_restored = resumes and not streams
        return samples

    # An older checkpoint is deleted only when all processes have written all of the new one.
    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / UNFINISHED).touch()
            (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier run in the same folder, now overwritten
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._save_total_limit = limit
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._save_total_limit = limit, None
        # By TRL's count, which a plain GRPOConfig does not restore: an epoch may end in a step of fewer micro-batches.
        step = self._step if self._keeps_rollout else self.state.global_step * self.args.gradient_accumulation_steps
        inside_rollout = self._inside_rollout(step)
        for part in self._stateful:
            if part.state() and self.args.should_save:
                write_text(folder / part.file, json.dumps(part.state()) + "\n")
        if self._keeps_rollout:
            path = rollout_file(folder, self.accelerator.process_index)
            if self._buffered_inputs is not None and inside_rollout:
                save_rollout(path, self._step, self._buffered_inputs)
            else:
                path.unlink(missing_ok=True)  # of an earlier run
            drawn = None if self._reads is None else self._reads.state_to_keep
            path = draws_file(folder, self.accelerator.process_index)
            if drawn is not None:
                save_random_state(path, drawn)
            else:
                path.unlink(missing_ok=True)  # of an earlier run
        if self._is_sharded:
            processes = self.accelerator.num_processes
            save_shard_sample(self._own_model, folder, self.accelerator.process_index, processes)
        if self._reference is not None and self.args.should_save:
            save_model(self._reference, str(folder / REFERENCE))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            options = recorded_options(self.args) | self._data_facts
            write_manifest(folder, Layout.of(self.args), inside_rollout, self._run, options)
            if not self._is_pushing:  # a checkpoint that is on its way to the Hub stays until the next save
                rotate(run, limit, self.state.best_model_checkpoint, folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    # `training_args.bin` has the limit that the user set.
    def _save(self, output_dir=None, state_dict=None):
        hidden = self._save_total_limit
        if hidden is not None:
            self.args.save_total_limit = hidden
        try:
            super()._save(output_dir, state_dict)
        finally:
            if hidden is not None:
                self.args.save_total_limit = None

    @property
    def _data_facts(self) -> dict[str, Any]:
        """What is trained on, beside the options."""
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        return {"train_rows": rows, "reward_funcs": list(self.reward_func_names)}

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def _own_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def _reference(self) -> nn.Module | None:
        """The reference model that follows the policy (`sync_ref_model`), where this process has all of it."""
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if not self.args.sync_ref_model or self.ref_model is None or sharded:
            return None
        return self.accelerator.unwrap_model(self.ref_model)

    def _load_reference(self, checkpoint: Path) -> None:
        if self._reference is not None and (checkpoint / REFERENCE).exists():
            load_model(self._reference, str(checkpoint / REFERENCE))
        elif self.args.sync_ref_model and self.ref_model is not None:
            logger.warning(
                f"{checkpoint} does not have the reference model of `sync_ref_model` (ZeRO-3 and FSDP do not save it): "
                "the reference starts from the first weights, and the run differs from one that was not interrupted."
            )

    # With ZeRO and FSDP every process has a shard, which DeepSpeed and torch restore by their own names.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            restore_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            restore_weights(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self.args.device.type == "cpu" and self.args.device.index is not None:
            _let_torch_load_to_numbered_cpus()
        fields = [] if self.optimizer is None else [set(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        self._check_optimizer(fields)
        if checkpoint is not None and self._is_sharded:
            processes = self.accelerator.num_processes
            check_shards(self._own_model, Path(checkpoint), self.accelerator.process_index, processes)
        if checkpoint is not None:
            self._load_reference(Path(checkpoint))
        if not self._keeps_rollout or checkpoint is None:
            return
        for part in self._stateful:
            file = Path(checkpoint) / part.file
            stored = json.loads(file.read_text()) if file.exists() else {}
            if not isinstance(stored, dict):
                raise ValueError(f"{file} is damaged: it holds {stored!r}. Resume from another checkpoint.")
            part.load(stored, Path(checkpoint))
        path = rollout_file(checkpoint, self.accelerator.process_index)
        if path.exists():
            self._step, self._buffered_inputs = load_rollout(path, self.accelerator.device)
        elif self._lies_inside_rollout(Path(checkpoint)):
            logger.warning(
                f"{checkpoint} lies inside a rollout but does not have it (it was not saved with a CovGRPOConfig, or "
                "by an earlier version with the control off): a new rollout is made, and the run differs from one that "
                "was not interrupted."
            )

    def _check_optimizer(self, fields: list[set[str]]) -> None:
        """Refuse the state of another kind of optimizer: torch loads it, and fails in the first step, if at all."""
        for expected, group in zip(fields, self.optimizer.param_groups, strict=False):
            if missing := sorted(expected - group.keys()):
                optim = OptimizerNames(self.args.optim).value
                raise ValueError(
                    f"{self._resumed} has the state of another optimizer than {optim} (it has no "
                    f"{', '.join(missing)}). Keep the optimizer of the run that saved it, or start a new run from its "
                    "weights (model_name_or_path)."
                )

    def _lies_inside_rollout(self, checkpoint: Path) -> bool:
        if (checkpoint / MANIFEST).exists():
            return bool(read_manifest(checkpoint)["inside_rollout"])
        return self._inside_rollout(self.state.global_step * self.args.gradient_accumulation_steps)

    def _inside_rollout(self, step: int) -> bool:
        return step % (self.args.steps_per_generation * self.num_iterations) != 0
