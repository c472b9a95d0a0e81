"""[`CovGRPOTrainer`]: TRL's GRPOTrainer with an entropy control in its loss, in the order of the data flow."""

import logging
import textwrap
import warnings
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from entropy_trl.config import CovGRPOConfig
from entropy_trl.controls.base import SELECTED_TOKENS
from entropy_trl.loss.batch import TokenBatches
from entropy_trl.loss.call import LossCall
from entropy_trl.loss.clip_metrics import restore_clip_metrics
from entropy_trl.loss.state import ControlState
from entropy_trl.loss.watch import ControlWatch
from entropy_trl.loss.window import StepWindow
from entropy_trl.monitor.entropy_law import TRACKERS, EntropyLawCallback
from entropy_trl.monitor.recorder import CovarianceRecorder, ObservedMicroBatch, StepFacts
from entropy_trl.monitor.regions import RegionWatch
from entropy_trl.rollout.diversity import completion_digests, diversity_metrics
from entropy_trl.rollout.estimators import estimate_advantages
from entropy_trl.rollout.rounds import GenerationRounds, deciding_reward, make_prompt_stream, weighted_reward
from entropy_trl.rollout.sampling import PromptStream, check_prompts
from entropy_trl.saving.resume import ResumingTrainer
from entropy_trl.saving.run_settings import RunSettings
from entropy_trl.tokens.ranks import ONE_PROCESS, AllProcesses, Ranks


logger = logging.getLogger(__name__)


class CovGRPOTrainer(ResumingTrainer):
    """GRPO with an entropy control: Clip-Cov or KL-Cov of arXiv 2505.22617.

    Takes the arguments of [`~trl.GRPOTrainer`]; `args` is a [`CovGRPOConfig`]. Rollouts, rewards, advantages, the
    forward pass and the loss are TRL's. The control sees the tokens between TRL's forward pass and TRL's loss and edits
    the advantages, or adds a penalty, for the tokens that it selects. In evaluation it does nothing.

    With `entropy_control=None`, and with a plain [`~trl.GRPOConfig`] (which warns), this is TRL's GRPOTrainer bit for
    bit.

    Raises:
        ValueError: If the configuration cannot mean what it says (see [`CovGRPOConfig`]).
        FloatingPointError: In training, before the weights change, if a log-probability or advantage of a valid token
            is not finite. Checked for every [`CovGRPOConfig`], with the control on or off.
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
        #: None where the arguments are a plain GRPOConfig.
        self._options = args if isinstance(args, CovGRPOConfig) else None
        if self._options is None:
            warnings.warn(
                "CovGRPOTrainer got a GRPOConfig: entropy control is off. A CovGRPOConfig switches it on.",
                stacklevel=2,
            )
        # The configuration checked itself when it was made; it may have been changed since.
        self.entropy_control = None if self._options is None else self._options.make_entropy_control()
        _check_reference(model, args, trainer_kwargs)
        # Of the rollout that is being made: TRL's rows and completions of this process, and all processes' rewards.
        self._rows: list[dict[str, Any]] = []
        self._completion_ids: list[list[int]] = []
        self._rewards: Tensor | None = None
        self._prompt_stream: PromptStream | None = None
        # Of the loss that is being computed, and of the optimizer step that it is part of.
        self._loss_call: LossCall | None = None
        self._checked_inputs: dict[str, Any] | None = None  # with the control off
        self._forwards: list[tuple[Tensor, Tensor]] | None = None  # of a loss that is observed
        self._step_window: StepWindow | None = None
        self._evaluating = False
        # A mistake in the observers' options is an error before the model loads.
        observers = [] if self._options is None else _make_observers(self._options)
        super().__init__(model, reward_funcs, args, *trainer_args, **trainer_kwargs)

        if self._options is not None and self._options.entropy_regions:
            observers.append(self._make_region_watch())
        for observer in [*observers, RunSettings()]:
            self.add_callback(observer)
        ranks: Ranks = ONE_PROCESS
        if self._options is not None:
            self.epsilon_low, self.epsilon_high = self._options.ratio_clip()
            if self._options.entropy_control_pool == "step" and self.accelerator.num_processes > 1:
                ranks = AllProcesses()
            if self._options.dynamic_sampling:
                deciding_reward(self.reward_func_names, self._options.dynamic_sampling_reward)
                self._prompt_stream = make_prompt_stream(self)
                self._stateful.append(self._prompt_stream)
        drops_tokens = self.entropy_control is not None and self.entropy_control.drops_tokens
        self._batches = TokenBatches(self, self._trl_forward, ranks, drops_tokens)
        if self.entropy_control is None:
            self._tag_names = GRPOTrainer._tag_names
        else:
            self._control_state = ControlState(self.entropy_control, args.entropy_control)
            self._watch = ControlWatch(self, self.entropy_control)
            self._stateful += [self._control_state, self._watch]
            if not self.entropy_control.acts_on_policy:
                self._stateful.append(self._batches.noise)
            if self.use_vllm and self.vllm_mode == "colocate":
                # TRL seeds a colocated engine with its rank alone, and the engine then seeds the whole process so.
                set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)
        if self.entropy_control is None or SELECTED_TOKENS not in self.entropy_control.claims:
            self._name, self._paper = GRPOTrainer._name, GRPOTrainer._paper  # not by that paper

    def _make_region_watch(self) -> RegionWatch:
        if self.is_deepspeed_enabled and self.args.fp16:
            raise ValueError(
                "`entropy_regions` does not support float16 with DeepSpeed, which hides the loss's scale. "
                "Use bf16, or set `entropy_regions=False`."
            )
        return RegionWatch(self.accelerator, lambda name, value: self._metrics["train"][name].append(value))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        check_prompts(self.args, self.train_dataset)  # not sooner: a trainer may be made only to evaluate
        # Trackers report when their turn comes, and end with the training: what adds to their logs goes first.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, EntropyLawCallback))
        self._step_window = None  # of a run that was interrupted inside a step
        return super().train(resume_from_checkpoint, *args, **kwargs)

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

    # 1. Rollout. TRL generates and computes rewards in one method, so dynamic sampling has to step in between.
    def _generate(self, prompts):
        if self._prompt_stream is None or not self._in_training:
            return super()._generate(prompts)
        rounds = GenerationRounds(self, self._prompt_stream, super()._generate, super()._calculate_rewards)
        output, self._rewards = rounds.fill(self._rows, prompts)
        return output

    # 2. Rewards.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._completion_ids = completion_ids_list
        if self._prompt_stream is None or not self._in_training:
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    # 3. Advantages.
    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._rows = []
        rows, device = len(output["completion_ids"]), output["completion_ids"].device
        first = self.accelerator.process_index * rows
        if self._keeps_rollout or self._observers:
            # Names the rows, so that a random draw does not depend on TRL's shuffle nor on how a step is cut.
            output["row_ids"] = torch.arange(first, first + rows, device=device)
        if self._in_training and self._rewards is not None:
            self._look_at_groups(output, self._rewards.to(device), first)
            if self._options is not None and self._options.advantage_estimator != "grpo":
                self._replace_advantages(output, self._options, self._rewards, first)
        return output

    def _replace_advantages(self, output: dict[str, Any], options: CovGRPOConfig, rewards: Tensor, first: int) -> None:
        total = weighted_reward(rewards, self.reward_weights)
        advantages = estimate_advantages(
            options.advantage_estimator, total, self.num_generations, options.advantage_quantile
        )
        output["advantages"] = advantages[first : first + len(output["completion_ids"])]
        for _ in range(len(advantages)):  # TRL has logged its own
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages.tolist())

    def _look_at_groups(self, output: dict[str, Any], rewards: Tensor, first: int) -> None:
        """Log the groups' diversity, and attach what a recorder wants to know of each completion's group."""
        if self._options is not None:
            digests = self.accelerator.gather(completion_digests(self._completion_ids).to(self.accelerator.device))
            # The first reward function is the verifier; of one that has not scored a completion nothing is known.
            for name, value in diversity_metrics(digests, rewards[:, 0] > 0.5, self.num_generations).items():
                self._metrics["train"][f"diversity/{name}"].append(value)
        if any(isinstance(observer, CovarianceRecorder) for observer in self._observers):
            rows = slice(first, first + len(output["completion_ids"]))
            total = weighted_reward(rewards, self.reward_weights)
            by_group = total.view(-1, self.num_generations).nanmean(dim=1).repeat_interleave(self.num_generations)
            output |= {"rewards": total[rows], "group_accuracy": by_group[rows]}

    # 4. to 8. The loss call, forward pass, selection, edit and loss.
    def _compute_loss(self, model, inputs):
        if not self._in_training:
            return super()._compute_loss(model, inputs)
        observers = [observer for observer in self._observers if observer.wants(self.state.global_step + 1, inputs)]
        if not observers:
            return self._control_loss(model, inputs)[0]

        forwards = self._forwards = []
        try:
            loss, selected = self._control_loss(model, inputs)
        finally:
            self._forwards = None
        ((logps, entropies),) = forwards
        batch = self._batches.of(inputs, logps.detach(), entropies.detach())
        seen, facts = ObservedMicroBatch(inputs, batch, logps, selected), self._step_facts(model)
        for observer in observers:
            observer.observe(seen, facts)
        return loss

    def _control_loss(self, model, inputs):
        """TRL's loss with the control in it, and the tokens that the control restrained, (B, T), if it is on."""
        if self.entropy_control is None:
            self._checked_inputs = inputs if self._options is not None else None
            try:
                return super()._compute_loss(model, inputs), None
            finally:
                self._checked_inputs = None

        if self._step_window is None:
            self._batches.state = self._control_state.values
            self._step_window = StepWindow(self, self._batches, self.entropy_control, model, self._watch)
        window = self._step_window
        call = self._loss_call = LossCall(self, window, inputs)
        try:
            loss = super()._compute_loss(model, call.inputs)
        finally:
            self._loss_call = None
        batch, edit = call.result()
        if edit.penalty is not None:
            loss = loss + call.reduce_penalty(batch, edit.penalty)
        if edit.advantages is not None:
            restore_clip_metrics(self, batch, inputs)

        window.position += 1
        if window.position == window.size:
            self._end_step(window)
            self._step_window = None
        return loss, call.selected

    # TRL's one forward pass. TRL reads the advantages after it, so this is where the control acts.
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_call is not None:
            logps, entropies = self._loss_call.after_forward(logps, entropies)
        elif self._checked_inputs is not None:
            self._batches.check_inputs(self._checked_inputs, logps)
        if self._forwards is not None:
            self._forwards.append((logps, entropies))
        return logps, entropies, aux_loss

    def _trl_forward(self, *args, **kwargs):
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

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

    # 9. Metrics, and the control's next state.
    def _end_step(self, window: StepWindow) -> None:
        means = window.means() | self._control_state.values
        progress = (self.state.global_step + 1) / max(self.state.max_steps, 1)
        self._control_state.advance(means.get("step_entropy", float("nan")), min(progress, 1.0))
        for name, value in means.items():
            self._metrics["train"][f"entropy_control/{name}"].append(value)

    @property
    def _observers(self) -> list[CovarianceRecorder | RegionWatch]:
        watching = (CovarianceRecorder, RegionWatch)
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, watching)]

    def _step_facts(self, model) -> StepFacts:
        """What an observer wants to know of the step at hand."""

        def entropies(inputs: dict[str, Any]) -> Tensor:
            # Dropout draws numbers here; the training's own must stay as they are.
            device = self.accelerator.device
            forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with forked, self.compute_loss_context_manager():
                return self._batches.score(model, inputs, compute_entropy=True)[1]

        return StepFacts(
            learning_rate=self._get_learning_rate(),
            control=None if self._options is None else self._options.entropy_control,
            loss_type=self.loss_type,
            num_generations=self.num_generations,
            ranks=AllProcesses() if self.accelerator.num_processes > 1 else ONE_PROCESS,
            entropies=entropies,
            weights=self._batches.weights,
        )


def _make_observers(options: CovGRPOConfig) -> list[TrainerCallback]:
    """The callbacks that the configuration asks for and that need no trainer."""
    observers: list[TrainerCallback] = []
    if options.token_records is not None:
        observers.append(CovarianceRecorder.of(options.token_records))
    if options.entropy_law:
        observers.append(EntropyLawCallback(figures=bool(set(TRACKERS) & set(options.report_to))))
    return observers


def _check_reference(model: Any, args: GRPOConfig, trainer_kwargs: dict[str, Any]) -> None:
    """Raise ValueError if `beta` needs a reference model and TRL cannot know where to load it from."""
    has_reference = isinstance(model, str) or is_peft_model(model) or trainer_kwargs.get("peft_config")
    if args.beta and not has_reference and not get_config_model_id(model.config):
        raise ValueError(
            f"`beta` is {args.beta:g}, which needs a reference model. TRL loads it from the folder or hub id that "
            "the model came from, and this model has none. Save it with `save_pretrained` and pass the folder "
            "(`model_name_or_path`), or set `beta` to 0."
        )
