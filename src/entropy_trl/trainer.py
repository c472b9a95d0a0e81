"""[`CovGRPOTrainer`]: TRL's GRPOTrainer with an entropy control in its loss. The only module that subclasses it."""

import inspect
import json
import logging
import math
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, set_seed
from transformers.utils.hub import PushInProgress, hf_api
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, nanmax, nanmin

from entropy_trl.callbacks import TRACKERS, EntropyLawCallback
from entropy_trl.checkpoint import (
    MANIFEST,
    TRAINER_STATE,
    Layout,
    checkpoint_to_resume,
    load_rollout,
    rollout_file,
    rotate,
    save_rollout,
    write_manifest,
)
from entropy_trl.config import CovGRPOConfig
from entropy_trl.controls import EntropyControl
from entropy_trl.controls.base import SELECTED_TOKENS
from entropy_trl.covariance import covariance_metrics
from entropy_trl.diversity import completion_digests, diversity_metrics
from entropy_trl.estimators import estimate_advantages
from entropy_trl.hub import (
    REQUEST_ERRORS,
    PushMistake,
    Uploads,
    describe,
    intended_name,
    limit_waiting,
    make_repository,
)
from entropy_trl.metrics import StepMetrics
from entropy_trl.model_card import write_card
from entropy_trl.ranks import ONE_PROCESS, AllProcesses, Ranks
from entropy_trl.recorder import CovarianceRecorder, ObservedMicroBatch, StepFacts
from entropy_trl.reduction import CLIPPED_LOSS_TYPES, clipped_tokens, token_weights
from entropy_trl.regions import region_metrics
from entropy_trl.sampling import Group, PromptStream, fill_rollout, has_signal
from entropy_trl.types import TokenBatch, TokenEdit


logger = logging.getLogger(__name__)

#: In a checkpoint: where dynamic sampling's stream of prompts stands, and the state of a control that has one.
PROMPT_STREAM, CONTROL_STATE = "prompt_stream.json", "entropy_control_state.json"

#: What TRL's forward pass takes beside the token ids (images and the like), by name.
_FORWARD_INPUTS = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)


class CovGRPOTrainer(GRPOTrainer):
    """GRPO with an entropy control: Clip-Cov or KL-Cov of arXiv 2505.22617.

    Takes the arguments of [`~trl.GRPOTrainer`]; `args` is a [`CovGRPOConfig`]. Rollouts, rewards, advantages, the
    forward pass and the loss are TRL's. The control sees the tokens between TRL's forward pass and TRL's loss and edits
    the advantages, or adds a penalty, for the tokens that it selects. In evaluation it does nothing.

    With `entropy_control=None`, and with a plain [`~trl.GRPOConfig`] (which warns), this is TRL's GRPOTrainer bit for
    bit.

    Raises:
        ValueError: if the configuration cannot mean what it says (see [`CovGRPOConfig`]).
        FloatingPointError: in training, before the weights change, if a log-probability or advantage of a valid token
            is not finite.
    """

    _tag_names = ["trl", "grpo", "entropy-trl"]
    _name = "GRPO with covariance-based entropy control"
    _paper = {
        "title": "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
        "id": "2505.22617",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{cui2025entropy,
                title        = {{The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models}},
                author       = {Ganqu Cui and Yuchen Zhang and Jiacheng Chen and Lifan Yuan and Zhi Wang and Yuxin Zuo and Haozhan Li and Yuchen Fan and Huayu Chen and Weize Chen and others},
                year         = 2025,
                eprint       = {arXiv:2505.22617},
            }"""),  # noqa: E501
    }

    def __init__(self, model, reward_funcs=None, args: GRPOConfig | None = None, *trainer_args, **trainer_kwargs):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CovGRPOConfig(f"{name.split('/')[-1]}-CovGRPO")
        if isinstance(args, CovGRPOConfig):
            # The configuration checked itself when it was made; it may have been changed since.
            self.entropy_control = args.make_entropy_control()
        else:
            self.entropy_control = None
            warnings.warn(
                "CovGRPOTrainer got a GRPOConfig: entropy control is off and this is plain GRPO. Pass a CovGRPOConfig "
                "to switch it on.",
                UserWarning,
                stacklevel=2,
            )
        has_reference = isinstance(model, str) or is_peft_model(model) or trainer_kwargs.get("peft_config")
        if args.beta and not has_reference and not get_config_model_id(model.config):
            raise ValueError(
                f"`beta` is {args.beta:g}, which needs a reference model. TRL loads it from the folder or hub id that "
                "the model came from, and this model has none. Save it with `save_pretrained` and pass the folder "
                "(`model_name_or_path`), or set `beta` to 0."
            )
        self._loss_call: _LossCall | None = None
        self._forwards: list[tuple[Tensor, Tensor]] | None = None  # of a loss that is observed
        self._region_metrics: StepMetrics | None = None
        self._step_window: _StepWindow | None = None
        self._pool_ranks: Ranks = ONE_PROCESS
        self._control_state = {} if self.entropy_control is None else self.entropy_control.initial_state()
        self._prompt_stream: PromptStream | None = None
        self._resumed: Path | None = None  # the checkpoint that the run goes on from
        self._evaluating = False
        self._uploads = Uploads(args)
        # Of the rollout that is being made: TRL's rows of this process, and the rewards of all processes.
        self._rows: list[dict[str, Any]] = []
        self._rewards: Tensor | None = None
        observers: list[TrainerCallback] = []
        if isinstance(args, CovGRPOConfig) and args.token_records is not None:
            observers.append(CovarianceRecorder.of(args.token_records))
        if isinstance(args, CovGRPOConfig) and args.entropy_law:
            observers.append(EntropyLawCallback(figures=bool(set(TRACKERS) & set(args.report_to))))
        # Every checkpoint's `training_args.bin`, which may be shared, would have it in plain text.
        if args.hub_token is not None:
            hf_api().token, args.hub_token = args.hub_token, None
        super().__init__(model, reward_funcs, args, *trainer_args, **trainer_kwargs)
        self._uploads.started = True
        if self._logs_regions and self.is_deepspeed_enabled and args.fp16:
            raise ValueError(
                "`entropy_regions` does not know by how much DeepSpeed scales a float16 loss. Use bf16, or set "
                "`entropy_regions=False`."
            )
        for observer in observers:
            self.add_callback(observer)
        if isinstance(args, CovGRPOConfig):
            self.epsilon_low, self.epsilon_high = args.ratio_clip()
            if args.entropy_control_pool == "step" and self.accelerator.num_processes > 1:
                self._pool_ranks = AllProcesses()
            if args.dynamic_sampling:
                self._prompt_stream = self._make_prompt_stream()
        # What is more than TRL's GRPOTrainer resumes exactly, and needs TRL's rollout for it.
        self._keeps_rollout = self.entropy_control is not None or self._prompt_stream is not None
        if self.entropy_control is not None and self.use_vllm and self.vllm_mode == "colocate":
            # TRL seeds a colocated engine with its rank alone, and the engine then seeds the whole process with that.
            set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)
        if self.entropy_control is None:
            self._tag_names = GRPOTrainer._tag_names
        if self.entropy_control is None or SELECTED_TOKENS not in self.entropy_control.claims:
            self._name, self._paper = GRPOTrainer._name, GRPOTrainer._paper  # not by that paper

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trains, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder, or `True` for the newest complete one in `args.output_dir`: those that an
                interruption left incomplete are passed over with a warning. `"auto"` is `True` if there is one, and
                otherwise starts from the beginning.

        Raises:
            ValueError: if there is no complete checkpoint, or the run cannot go on from it as it is configured now.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, Layout.of(self.args))
        self._resumed = checkpoint
        # Trackers report when their turn comes, and end with the training: what adds to their logs goes first.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, EntropyLawCallback))
        if self.entropy_control is not None:
            self._control_state = self.entropy_control.initial_state()
        if self._prompt_stream is not None:
            self._prompt_stream.position = 0
        if self._keeps_rollout:
            # A run that was interrupted inside a step leaves TRL's counter and rollout behind. The data start afresh,
            # and so must they, or the steps would no longer lie inside the rollouts.
            self._step, self._buffered_inputs, self._step_window = 0, None, None
            self._last_loaded_step = -1  # nor has vLLM the weights that this run starts from
        self._region_metrics = None
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

    # TRL saves no rollout, and makes a new one where it goes on in the middle of one: another run from there on. And an
    # older checkpoint is deleted only when all processes have written all of the new one.
    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier run in the same folder, now overwritten
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        # By TRL's count: an epoch may end in a step of fewer micro-batches. (With the control off it is not restored.)
        step = self._step if self._keeps_rollout else self.state.global_step * self.args.gradient_accumulation_steps
        inside_rollout = self._inside_rollout(step)
        if self._control_state and self.args.should_save:
            (folder / CONTROL_STATE).write_text(json.dumps(self._control_state) + "\n")
        if self._prompt_stream is not None and self.args.should_save:
            (folder / PROMPT_STREAM).write_text(json.dumps({"position": self._prompt_stream.position}) + "\n")
        if self._keeps_rollout:
            path = rollout_file(folder, self.accelerator.process_index)
            if self._buffered_inputs is not None and inside_rollout:
                save_rollout(path, self._step, self._buffered_inputs)
            else:
                path.unlink(missing_ok=True)  # of an earlier run
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder, Layout.of(self.args), inside_rollout)
            if not self._is_pushing:  # a checkpoint that is on its way to the Hub stays until the next save
                rotate(run, limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    # The Hub. What goes wrong there is a warning, and costs neither the model nor the run; only what the user alone can
    # put right is an error, before training.
    hub_model_id: str | None
    push_in_progress: PushInProgress | None = None
    _unwritten_card: tuple[Any, ...] | None = None

    def init_hf_repo(self, token=None):
        self.push_in_progress = None
        mistake = None
        if self.is_world_process_zero():
            try:
                self.hub_model_id = make_repository(self.args, token)
            except (PushMistake, *REQUEST_ERRORS) as error:
                if self._uploads.started:
                    self._uploads.failed(Path(self.args.output_dir), error)
                elif isinstance(error, PushMistake):
                    mistake = str(error)
                else:
                    logger.warning(
                        f"The Hub cannot be used now ({describe(error)}). Training goes on, and pushing is tried again "
                        "later: nothing is lost."
                    )
        if not self._uploads.started and self.accelerator.num_processes > 1:
            (mistake,) = broadcast_object_list([mistake])
        if mistake is not None:
            raise PushMistake(mistake)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Saves the model and its card, and uploads them, as [`~transformers.Trainer.push_to_hub`] does.

        Everything is complete in `args.output_dir` before the upload begins. An upload that fails does not raise: it
        warns, with the command that uploads the same later, and is listed in `hub_failures`.

        Returns:
            `CommitInfo`, or its `Future` if not `blocking`. `None` if the upload failed, and on all processes but the
            first.
        """
        if self.is_world_process_zero():
            limit_waiting()
            self._finish_current_push()  # it reads the files that are now written anew
            if self.hub_model_id is None:
                self.init_hf_repo(token)
            if self.hub_model_id is None:  # and it has been told why
                self.save_model(_internal_call=True)
                self.create_model_card(**{"model_name": intended_name(self.args).split("/")[-1]} | kwargs)
                return None
        job = super().push_to_hub(commit_message, False, token, revision, **kwargs)
        if job is None:
            return None
        self.push_in_progress = PushInProgress([job])
        self._uploads.watch(str(self.hub_model_id), "", Path(self.args.output_dir), job)
        if not blocking:
            return job
        return None if job.exception() is not None else job.result()

    def _push_from_checkpoint(self, checkpoint_folder):
        # Transformers calls this before the rollout and the manifest are there, `_save_checkpoint` when they are.
        folder = Path(checkpoint_folder)
        if not self.is_world_process_zero() or not (folder / MANIFEST).exists():
            return
        if self.hub_model_id is None and self.args.hub_strategy != HubStrategy.END:
            self.init_hf_repo()
        if self.hub_model_id is None:
            return
        if self.args.hub_always_push:  # transformers would write over the files that the last upload still reads
            self._finish_current_push()
        self._write_card()
        known = set() if self.push_in_progress is None else set(self.push_in_progress.jobs)
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        in_repo = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
        sources = (("", Path(self.args.output_dir)), (in_repo, folder))
        for (path_in_repo, source), job in zip(sources, [job for job in jobs if job not in known], strict=False):
            self._uploads.watch(self.hub_model_id, path_in_repo, source, job)

    @property
    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    @property
    def hub_failures(self) -> list[str]:
        """What was to be uploaded to the Hub and was not: of each a sentence with the command that does it later."""
        return self._uploads.failures

    # An upload hashes a file, and reads it again later to send it: no file of the folder may change in between. A save
    # in training does not wait for that. It leaves the card for the end of the upload.
    def _finish_current_push(self):
        super()._finish_current_push()
        self._write_card()

    def save_model(self, output_dir=None, _internal_call=False):
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            self._finish_current_push()
        super().save_model(output_dir, _internal_call)

    def save_state(self):
        self._finish_current_push()
        super().save_state()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_in_train:
            self._finish_current_push()
        self._unwritten_card = (model_name, dataset_name, tags)
        self._write_card()

    def _write_card(self):
        if self._unwritten_card is None or self._is_pushing or not self.is_world_process_zero():
            return
        card, self._unwritten_card = self._unwritten_card, None
        base = partial(super().create_model_card, *card)
        write_card(self.args, base, self.state, self.hub_model_id, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._keeps_rollout or checkpoint is None:
            return
        if self._prompt_stream is not None:
            position_file = Path(checkpoint) / PROMPT_STREAM
            if position_file.exists():
                self._prompt_stream.position = json.loads(position_file.read_text())["position"]
            else:
                logger.warning(f"{checkpoint} was saved without dynamic sampling: its prompts start from the first.")
        if self._control_state:
            self._load_control_state(Path(checkpoint) / CONTROL_STATE)
        path = rollout_file(checkpoint, self.accelerator.process_index)
        if path.exists():
            self._step, self._buffered_inputs = load_rollout(path, self.accelerator.device)
        elif self._lies_inside_rollout(Path(checkpoint)):
            logger.warning(
                f"{checkpoint} lies inside a rollout but does not have it (it was not saved by CovGRPOTrainer with an "
                "entropy control): a new rollout is made, and the run differs from one that was not interrupted."
            )

    def _load_control_state(self, path: Path) -> None:
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.keys() == self._control_state.keys():
            self._control_state = stored
        else:
            logger.warning(
                f"{path.parent} was saved with another entropy control: the state of "
                f"{self.args.entropy_control!r} starts afresh."
            )

    def _lies_inside_rollout(self, checkpoint: Path) -> bool:
        if (checkpoint / MANIFEST).exists():
            return json.loads((checkpoint / MANIFEST).read_text())["inside_rollout"]
        return self._inside_rollout(self.state.global_step * self.args.gradient_accumulation_steps)

    def _inside_rollout(self, step: int) -> bool:
        return step % (self.args.steps_per_generation * self.num_iterations) != 0

    def prediction_step(self, *args, **kwargs):
        self._evaluating = True
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self._evaluating = False

    @property
    def _in_training(self) -> bool:
        # TRL's continuous batching leaves the model in training mode, in evaluation too.
        return self.model.training and not self._evaluating

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._rows = []
        rows, device = len(output["completion_ids"]), output["completion_ids"].device
        first = self.accelerator.process_index * rows
        if self._keeps_rollout or self._logs_regions or self._recorder is not None:
            # Names the rows, so that a random draw does not depend on TRL's shuffle nor on how a step is cut.
            output["row_ids"] = torch.arange(first, first + rows, device=device)
        if self._in_training and self._rewards is not None:
            self._look_at_groups(output, self._rewards.to(device), first)
        estimator = getattr(self.args, "advantage_estimator", "grpo")  # the arguments may be a plain GRPOConfig
        if estimator != "grpo" and self._in_training and self._rewards is not None:
            rewards = self._weighted(self._rewards)
            advantages = estimate_advantages(estimator, rewards, self.num_generations, self.args.advantage_quantile)
            output["advantages"] = advantages[first : first + rows]
            for _ in range(len(advantages)):  # TRL has logged its own
                self._logs["advantages"].pop()
            self._logs["advantages"].extend(advantages.tolist())
        return output

    def _look_at_groups(self, output: dict[str, Any], rewards: Tensor, first: int) -> None:
        """Log the groups' diversity, and attach what a recorder wants to know of each completion's group."""
        if isinstance(self.args, CovGRPOConfig):
            digests = self.accelerator.gather(completion_digests(output["completion_ids"], output["completion_mask"]))
            # The first reward function is the verifier; of one that has not scored a completion nothing is known.
            for name, value in diversity_metrics(digests, rewards[:, 0] > 0.5, self.num_generations).items():
                self._metrics["train"][f"diversity/{name}"].append(value)
        if self._recorder is not None:
            rows = slice(first, first + len(output["completion_ids"]))
            total = self._weighted(rewards)
            by_group = total.view(-1, self.num_generations).nanmean(dim=1).repeat_interleave(self.num_generations)
            output |= {"rewards": total[rows], "group_accuracy": by_group[rows]}

    @property
    def _recorder(self) -> CovarianceRecorder | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, CovarianceRecorder)), None)

    @property
    def _logs_regions(self) -> bool:
        return getattr(self.args, "entropy_regions", False)  # the arguments may be a plain GRPOConfig

    # TRL computes rewards after it has generated, in one method: to choose what it goes on with is to do so in between.
    def _generate(self, prompts):
        if self._prompt_stream is None or not self._in_training:
            return super()._generate(prompts)
        rounds = _GenerationRounds(self, self._prompt_stream, super()._generate, super()._calculate_rewards)
        output, self._rewards = rounds.fill(self._rows, prompts)
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._prompt_stream is None or not self._in_training:
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _weighted(self, rewards: Tensor) -> Tensor:
        """The reward of each completion, (N,), as TRL adds up its reward functions' (N, F); NaN if none scored it."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), float("nan"))

    def _make_prompt_stream(self) -> PromptStream:
        if self.environment_factories is not None:
            raise ValueError("`dynamic_sampling` does not know environments, which own their prompts. Switch one off.")
        columns = self.train_dataset.column_names or next(iter(self.train_dataset)).keys()
        if {"image", "images"} & set(columns):
            raise ValueError("`dynamic_sampling` does not know prompts with images. Set `dynamic_sampling=False`.")
        return PromptStream(self.train_dataset, self.shuffle_dataset, self.args.seed)

    def _compute_loss(self, model, inputs):
        if not self._in_training:
            return super()._compute_loss(model, inputs)
        recorder = self._recorder
        if recorder is not None and not recorder.wants(self.state.global_step + 1):
            recorder = None
        if recorder is not None and "group_accuracy" not in inputs:
            logger.warning(
                f"Step {self.state.global_step + 1} is not recorded: its rollout was made by a run without a recorder."
            )
            recorder = None
        if recorder is None and not self._logs_regions:
            return self._control_loss(model, inputs)[0]

        forwards = self._forwards = []
        try:
            loss, selected = self._control_loss(model, inputs)
        finally:
            self._forwards = None
        ((logps, entropies),) = forwards
        entropies = entropies.detach()
        batch = self._token_batch(inputs, logps.detach(), entropies)
        if recorder is not None:
            micro_batch = ObservedMicroBatch(inputs, batch.mask, batch.logps, batch.old_logps, entropies, selected)
            recorder.observe(micro_batch, self._step_facts(model))
        if self._logs_regions:
            self._watch_regions(inputs, batch, logps)
        return loss

    def _watch_regions(self, inputs: dict[str, Any], batch: TokenBatch, logps: Tensor) -> None:
        """Add a micro-batch to the region metrics once its backward pass has told the gradient by `logps`.

        That gradient has in it all that the loss does: ratio clip, edited advantages, penalty, masks, importance
        weights. Divided by what its reduction gives each token it is the derivative of the token's own loss.
        """
        if self._region_metrics is None:
            self._region_metrics = StepMetrics(self.accelerator.device)
        metrics, weights = self._region_metrics, self._token_weights(inputs, batch.mask, torch.float32)
        scaler = getattr(self.accelerator, "scaler", None)  # of float16
        scale = 1.0 if scaler is None else scaler.get_scale()

        def add(gradient: Tensor) -> None:
            metrics.add(region_metrics(batch, -gradient.float() / (scale * weights)))

        logps.register_hook(add)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self._region_metrics is not None and self.accelerator.sync_gradients:
            for name, value in self._region_metrics.means(self.accelerator).items():
                self._metrics["train"][f"entropy_regions/{name}"].append(value)
            self._region_metrics = None
        return loss

    def _token_weights(self, inputs: dict[str, Any], mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of each token of a micro-batch in TRL's loss, (B, T)."""
        accumulation_steps = self.current_gradient_accumulation_steps
        step_items = (
            inputs["num_items_in_batch"].clamp(min=1.0)
            / self.accelerator.num_processes
            * accumulation_steps
            / self.args.steps_per_generation
        )
        return token_weights(
            self.loss_type,
            mask,
            accumulation_steps=accumulation_steps,
            max_completion_length=self.max_completion_length,
            step_items=step_items,
            dtype=dtype,
        )

    def _control_loss(self, model, inputs):
        """TRL's loss with the control in it, and the tokens that the control restrained, (B, T), if it is on."""
        if self.entropy_control is None:
            return super()._compute_loss(model, inputs), None

        if self._step_window is None:
            self._step_window = _StepWindow(self, self.entropy_control, model)
        window = self._step_window
        call = self._loss_call = _LossCall(self, window, inputs)
        try:
            loss = super()._compute_loss(model, call.inputs)
        finally:
            self._loss_call = None
        batch, edit = call.result()
        if edit.penalty is not None:
            loss = loss + call.reduce_penalty(batch, edit.penalty)
        if edit.advantages is not None:
            call.restore_clip_metrics(batch)

        window.position += 1
        if window.position == window.size:
            self._end_step(window)
            self._step_window = None
        return loss, call.selected

    def _end_step(self, window: "_StepWindow") -> None:
        """Log what the control did in an optimizer step, and let it go on to its next state."""
        means = window.metrics.means(self.accelerator)
        if self._control_state:
            means |= self._control_state
            progress = (self.state.global_step + 1) / max(self.state.max_steps, 1)
            if not math.isnan(means["step_entropy"]):
                self._control_state = window.control.next_state(
                    self._control_state, means["step_entropy"], min(progress, 1.0)
                )
        for name, value in means.items():
            self._metrics["train"][f"entropy_control/{name}"].append(value)

    def _step_facts(self, model) -> StepFacts:
        """What a recorder wants to know of the step at hand."""

        def entropies(inputs: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                return self._score_micro_batch(model, inputs, compute_entropy=True)[1]

        return StepFacts(
            learning_rate=self._get_learning_rate(),
            control=getattr(self.args, "entropy_control", None),
            loss_type=self.loss_type,
            num_generations=self.num_generations,
            ranks=AllProcesses() if self.accelerator.num_processes > 1 else ONE_PROCESS,
            entropies=entropies,
        )

    # TRL's one forward pass. TRL reads the advantages after it, so this is where the control acts.
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_call is not None:
            logps, entropies = self._loss_call.after_forward(logps, entropies)
        if self._forwards is not None:
            self._forwards.append((logps, entropies))
        return logps, entropies, aux_loss

    # Two masks that TRL multiplies the policy loss by: the penalty gets them as well.
    def get_high_entropy_mask(self, *args, **kwargs):
        mask = super().get_high_entropy_mask(*args, **kwargs)
        if self._loss_call is not None:
            self._loss_call.loss_masks.append(mask)
        return mask

    def get_off_policy_mask(self, *args, **kwargs):
        mask = super().get_off_policy_mask(*args, **kwargs)
        if self._loss_call is not None:
            self._loss_call.loss_masks.append(mask)
        return mask

    def _score_micro_batch(self, model, inputs: dict[str, Any], compute_entropy: bool = False) -> tuple[Tensor, Any]:
        """Log-probabilities (and entropies) of a micro-batch's completion tokens under the current policy.

        A forward pass without gradient, (B, T), nats. Only a step of several micro-batches needs it, and only if TRL
        does not have the rollout's log-probabilities (strictly on-policy) or they are not wanted
        (`entropy_control_scores="current"`): of one micro-batch the loss's own forward pass tells.
        """
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].size(1),
                compute_entropy=compute_entropy,
                **{name: inputs[name] for name in _FORWARD_INPUTS & inputs.keys()},
            )
        return logps, entropies

    def _token_batch(self, inputs: dict[str, Any], logps: Tensor, entropies: Tensor | None = None) -> TokenBatch:
        """The tokens of a micro-batch (or of several, concatenated) as a control sees them.

        Args:
            inputs (`dict`): TRL's inputs of the loss: rows of one rollout.
            logps (`Tensor` of shape (B, T)): log-probabilities to score the tokens by.
            entropies (`Tensor` of shape (B, T), *optional*): of the current policy.
        """
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        clipped = None
        if (
            self.entropy_control is not None
            and self.entropy_control.drops_tokens
            and self.loss_type in CLIPPED_LOSS_TYPES
            and logps is not old_logps  # a step pool, scored with the rollout's policy, has no ratio to clip
        ):
            clipped = clipped_tokens(
                logps - old_logps, advantages, self.epsilon_low, self.epsilon_high, self.args.delta
            )
        # Autocast computes in the reduced type although the log-probabilities come out as float32. Two engines were
        # measured to differ by half an epsilon of bf16 (sums are in float32) and by four epsilons of float32.
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        epsilons = 1 if dtype in (torch.bfloat16, torch.float16) else 8
        return TokenBatch(
            logps=logps,
            old_logps=old_logps,
            advantages=advantages,
            mask=mask,
            row_ids=inputs["row_ids"],
            clipped=clipped,
            # Odd multiplier, so that the steps of one seed and the seeds of one step all differ.
            seed=self.args.seed * 0x9E3779B97F4A7C15 + self.state.global_step,
            rounding=epsilons * torch.finfo(dtype).eps,
            ranks=self._pool_ranks,
            entropies=entropies,
            progress=min(self.state.global_step / max(self.state.max_steps, 1), 1.0),
            state=self._control_state,
        )

    def _check_finite(self, batch: TokenBatch) -> None:
        """Raise FloatingPointError, on all ranks, if a valid token has a log-probability or advantage not finite."""
        tensors = (batch.logps.detach(), batch.old_logps, batch.advantages)
        # A sum that is finite has finite terms only. Few steps come past this, and all ranks together.
        total = self.accelerator.reduce(torch.stack([x.sum(dtype=torch.float32) for x in tensors]), reduction="sum")
        if total.isfinite().all():
            return
        bad = torch.stack([(~x.isfinite() & batch.mask).sum() for x in tensors] + [batch.mask.sum()])
        logps, old_logps, advantages, tokens = self.accelerator.reduce(bad, reduction="sum").tolist()
        if logps or old_logps or advantages:
            raise FloatingPointError(
                f"Optimizer step {self.state.global_step + 1}: of {tokens} valid completion tokens, {logps} have a "
                f"log-probability that is not finite, {old_logps} a rollout log-probability that is not finite and "
                f"{advantages} an advantage that is not finite. The weights are still those of step "
                f"{self.state.global_step}. Look for an overflow (a lower learning rate, bf16 instead of fp16) or for "
                "a reward function that returns NaN or infinity."
            )


class _GenerationRounds:
    """The rounds in which dynamic sampling makes one rollout, by TRL's own generation and rewards.

    Args:
        trainer: the trainer.
        stream: where prompts come from.
        generate, calculate_rewards: TRL's methods.
    """

    def __init__(
        self,
        trainer: CovGRPOTrainer,
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

    def fill(self, rows: list[dict[str, Any]], prompts: list[Any]) -> tuple[tuple[Any, ...], Tensor]:
        """Generate until the rollout is full of groups with a signal (see [`fill_rollout`]).

        `rows` and `prompts`, which TRL holds, become those of the groups that are kept.

        Returns:
            What TRL's `_generate` returns, and the rewards of all processes, (N, number of reward functions).
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
        for name, value in {
            "rounds": rollout.rounds,
            "acceptance_rate": rollout.with_signal / rollout.generated,
            "prompts": rollout.generated,
            "epoch": self.stream.epoch,
            "reward": torch.cat([trainer._weighted(rewards) for rewards in self.rewards]).nanmean().item(),
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
            raise ValueError("`dynamic_sampling` does not know images, in prompts or from tools. Switch it off.")
        for name, values in fields.items():  # of a rollout_func, for the reward functions
            for row, value in zip(rows, values if isinstance(values, list) else [values] * len(rows), strict=True):
                row[name] = value
        self.rewards.append(self.calculate_rewards(rows, prompts, completions, ids))
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
            "extra": extras,
        }
        made = [{name: values[i] for name, values in completion_columns.items()} for i in range(len(rows))]
        return [made[i : i + size] for i in range(0, len(made), size)]

    def _has_signal(self, group: Group) -> bool:
        rewards = torch.stack([completion["rewards"] for completion in group])
        if self.trainer.multi_objective_aggregation == "sum_then_normalize":
            return has_signal(self.trainer._weighted(rewards))
        return has_signal(rewards[:, self.trainer.reward_weights.cpu() != 0])

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


class _StepWindow:
    """One optimizer step: the tokens that the control selected in it, and its metrics."""

    def __init__(self, trainer: CovGRPOTrainer, control: EntropyControl, model):
        self.trainer = trainer
        self.control = control
        self.size = trainer.current_gradient_accumulation_steps
        self.position = 0
        self.metrics = StepMetrics(trainer.accelerator.device)
        self.micro_batches: list[dict[str, Any]] = []
        self.selected: Tensor | None = None
        self.shared: Mapping[str, Tensor] = {}
        if control.needs_pool and trainer.args.entropy_control_pool == "step" and self.size > 1:
            self._select_step(model)

    def _select_step(self, model) -> None:
        """Select over all micro-batches of the step before the first of them is trained on."""
        trainer = self.trainer
        first = trainer._step % trainer.args.steps_per_generation
        self.micro_batches = (trainer._buffered_inputs or [])[first : first + self.size]
        if len(self.micro_batches) < self.size:
            raise RuntimeError(
                f"Optimizer step {trainer.state.global_step + 1} has {self.size} micro-batches, but only "
                f"{len(self.micro_batches)} of them belong to the current rollout (TRL {trl.__version__}): a pool "
                'over the step is not possible. Use `entropy_control_pool="micro_batch"`.'
            )
        keys = ["completion_mask", "advantages", "row_ids"]
        keys += [key for key in ("tool_mask", "old_per_token_logps") if key in self.micro_batches[0]]
        pool = {key: torch.cat([inputs[key] for inputs in self.micro_batches]) for key in keys}
        entropies = None
        if self._takes_rollout_scores(pool):
            scores = pool["old_per_token_logps"]
        else:
            compute_entropy = self.control.scores_entropies
            scored = [trainer._score_micro_batch(model, inputs, compute_entropy) for inputs in self.micro_batches]
            scores = torch.cat([logps for logps, _ in scored])
            entropies = torch.cat([values for _, values in scored]) if compute_entropy else None
        batch = trainer._token_batch(pool, scores, entropies)
        trainer._check_finite(batch)
        self.selected = self._select(batch)

    def _takes_rollout_scores(self, inputs: dict[str, Any]) -> bool:
        """Whether the pool is scored by the policy that the rollout was scored with."""
        wanted = self.trainer.args.entropy_control_scores == "rollout" and not self.control.scores_entropies
        return wanted and inputs.get("old_per_token_logps") is not None

    def _select(self, pool: TokenBatch) -> Tensor:
        selection = self.control.select(pool)
        selected = selection.selected
        if selection.covariance is not None:
            if self.trainer.args.entropy_control_pool == "step":
                # Where all advantages are equal there is nothing to select. The authors' code takes arbitrary tokens.
                selected = selected & (selection.covariance != 0)
            self.metrics.add(covariance_metrics(selection.covariance, pool.mask, selected, pool.ranks))
        self.metrics.add(selection.metrics)
        self.shared = selection.shared
        return selected

    def selected_in(self, inputs: dict[str, Any], batch: TokenBatch) -> Tensor:
        """The selected tokens of the micro-batch at hand, (B, T), bool."""
        if self.selected is not None:
            if self.micro_batches[self.position]["completion_ids"] is not inputs["completion_ids"]:
                raise RuntimeError(
                    f"Micro-batch {self.position + 1} of {self.size} is not the one in TRL's rollout buffer (TRL "
                    f"{trl.__version__}): the selection made for the step does not fit it. Use "
                    '`entropy_control_pool="micro_batch"` with a trainer that changes the inputs of the loss.'
                )
            rows = inputs["completion_ids"].size(0)
            return self.selected[self.position * rows : (self.position + 1) * rows]
        if not self.control.needs_pool:
            return torch.zeros_like(batch.mask)
        if self.trainer.args.entropy_control_pool == "step" and self._takes_rollout_scores(inputs):
            # The same scores as in a step of several micro-batches, so that the cut of the step does not matter.
            batch = self.trainer._token_batch(inputs, inputs["old_per_token_logps"])
        return self._select(batch)


class _LossCall:
    """One call of TRL's loss on a micro-batch, with the advantages withheld until the control has seen the forward."""

    def __init__(self, trainer: CovGRPOTrainer, window: _StepWindow, inputs: dict[str, Any]):
        self.trainer = trainer
        self.window = window
        self.original = inputs
        # A copy: TRL replays the buffered inputs when num_iterations > 1.
        self.inputs = _WithheldInputs(inputs)
        self.loss_masks: list[Tensor] = []
        self.batch: TokenBatch | None = None
        self.edit: TokenEdit | None = None
        self.selected: Tensor | None = None

    def after_forward(self, logps: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Let the control act. Returns the log-probs and entropies that TRL continues with, and releases advantages."""
        if self.batch is not None:
            raise RuntimeError(
                f"TRL {trl.__version__} makes a second forward pass in its loss; entropy_trl knows one. Use a TRL "
                "version that entropy_trl was tested with."
            )
        self.batch = self.trainer._token_batch(self.original, logps, entropies)
        self.trainer._check_finite(self.batch)
        with torch.no_grad():
            self.selected = self.window.selected_in(self.original, self.batch)
        if self.window.shared:
            self.batch = replace(self.batch, shared=self.window.shared)
        if self.trainer._control_state:
            total = entropies.detach().where(self.batch.mask, 0.0).sum(dtype=torch.float64)
            self.window.metrics.add({"step_entropy": (total, self.batch.mask.sum())})
        self.edit = self.window.control.edit(self.batch, self.selected)
        self.window.metrics.add(self.edit.metrics)

        edited = self.edit.advantages
        self.inputs.release(self.original["advantages"] if edited is None else edited.detach())
        if "old_per_token_logps" in self.inputs:
            self.inputs["old_per_token_logps"] = self.batch.old_logps
        return self.batch.logps, entropies.where(self.batch.mask, 0.0)

    def result(self) -> tuple[TokenBatch, TokenEdit]:
        """What the control saw and did. Raises RuntimeError unless TRL did what the control relies on."""
        if self.batch is None or self.edit is None:
            problem = "computed its loss without `_get_per_token_logps_and_entropies`"
        elif not self.inputs.advantages_read:
            problem = "computed its loss without reading the advantages"
        else:
            return self.batch, self.edit
        raise RuntimeError(
            f"TRL {trl.__version__} {problem}: the entropy control did not act. Use a TRL version that entropy_trl was "
            "tested with, or set `entropy_control=None`."
        )

    def reduce_penalty(self, batch: TokenBatch, penalty: Tensor) -> Tensor:
        """The control's penalty, (B, T), as a scalar: with the weights that TRL's loss gives the tokens."""
        weights = self.trainer._token_weights(self.original, batch.mask, penalty.dtype)
        for mask in self.loss_masks:
            weights = weights * mask
        total = (weights * penalty).sum()
        # The share of each micro-batch in the loss is in its weights already, so the step's penalty is their sum; and
        # DDP averages over the ranks. Hence the count: one a step and rank.
        self.window.metrics.add({"penalty": (total, torch.tensor(1.0 / self.window.size))})
        return total

    def restore_clip_metrics(self, batch: TokenBatch) -> None:
        """Log TRL's clip metrics of the advantages as they were: TRL has computed them from the edited ones."""
        trainer, metrics = self.trainer, self.trainer._metrics["train"]
        if trainer.loss_type in CLIPPED_LOSS_TYPES:
            ratio = batch.log_ratio.detach().exp()
            if trainer.args.delta is not None:
                ratio = ratio.clamp(max=trainer.args.delta)  # TRL counts what is left after it
            low = (ratio < 1 - trainer.epsilon_low) & (batch.advantages < 0)
            high = (ratio > 1 + trainer.epsilon_high) & (batch.advantages > 0)
            means = self._means(batch.mask, low, high, low | high)
            for name, mean in zip(("low", "high", "region"), means, strict=True):
                metrics[f"clip_ratio/{name}_mean"][-1] = mean
            # By row; a row without tokens has no ratio and does not count.
            rows = [side.where(batch.mask, False).sum(-1) / batch.mask.sum(-1) for side in (low, high)]
            low_rows, high_rows = trainer.accelerator.gather(torch.stack(rows, dim=1)).unbind(1)
            metrics["clip_ratio/low_min"][-1] = nanmin(low_rows).item()
            metrics["clip_ratio/high_max"][-1] = nanmax(high_rows).item()
        elif trainer.loss_type == "cispo":
            clipped = (batch.log_ratio.detach().exp() > trainer.epsilon_high) & (batch.advantages > 0)
            (metrics["cispo_clip_ratio"][-1],) = self._means(batch.mask, clipped)
        elif trainer.loss_type == "vespo":
            weights = trainer.get_gamma_weights(
                advantages=batch.advantages,
                log_ratio_per_token=batch.log_ratio,
                mask=batch.mask,
                importance_sampling_ratio=self.original.get("importance_sampling_ratio"),
                k_pos=trainer.args.vespo_k_pos,
                lambda_pos=trainer.args.vespo_lambda_pos,
                k_neg=trainer.args.vespo_k_neg,
                lambda_neg=trainer.args.vespo_lambda_neg,
            )
            # One weight a row, unless the advantages are one a token.
            mask = batch.mask if weights.shape[1] > 1 else torch.ones_like(weights, dtype=torch.bool)
            (metrics["vespo/phi_seq_mean"][-1],) = self._means(mask, weights)

    def _means(self, mask: Tensor, *values: Tensor) -> list[float]:
        """Means over the valid tokens of all ranks, in one collective."""
        sums = torch.stack([*((value * mask).sum() for value in values), mask.sum()]).double()
        *totals, count = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        return [total / max(count, 1.0) for total in totals]


class _WithheldInputs(dict[str, Any]):
    """TRL's inputs of the loss without the advantages, until they are released."""

    def __init__(self, inputs: dict[str, Any]):
        super().__init__(inputs)
        del self["advantages"]
        self.advantages_read = False

    def release(self, advantages: Tensor) -> None:
        self["advantages"] = advantages

    def __getitem__(self, key):
        if key == "advantages":
            self.advantages_read = True
        return super().__getitem__(key)

    def __missing__(self, key):
        if key == "advantages":
            raise RuntimeError(
                f"TRL {trl.__version__} reads the advantages before its forward pass: the entropy control cannot act. "
                "Use a TRL version that entropy_trl was tested with, or set `entropy_control=None`."
            )
        raise KeyError(key)
