"""[`CovGRPOConfig`]: TRL's GRPOConfig plus entropy control."""

import warnings
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from trl import GRPOConfig

from entropy_trl.config_checks import check_config
from entropy_trl.controls import CONTROLS, Chain, EntropyControl, build_control, describe_control, nearest
from entropy_trl.controls.base import CLIP_RANGE
from entropy_trl.loss.reduction import CLIPPED_LOSS_TYPES, LOSS_TYPES
from entropy_trl.rollout.estimators import ESTIMATORS
from entropy_trl.trl_compat import check_fused_loss


POOLS = ("step", "micro_batch")
SCORES = ("rollout", "current", "sampling")
INCOMPLETE = ("error", "train")


@dataclass
class CovGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`CovGRPOTrainer`]: everything in [`~trl.GRPOConfig`], and the parameters below.

    Args:
        entropy_control (`str` or [`EntropyControl`], *optional*, defaults to `"clip_cov"`):
            The control: a key of [`CONTROLS`]; the dotted path of a class of one's own; several of these joined by `+`,
            which then act one after the other ([`Chain`]); or an instance. `None` (`none` or `null` on the command
            line and in YAML) leaves TRL's GRPO bit for bit as it is.
        entropy_control_kwargs (`dict` or `str`, *optional*):
            Hyper-parameters of the control, for example `{"fraction": 2e-3, "coef": 1.0}`; of a chain, such a mapping
            for each control's name. What is not given has the published value. Any number may follow a
            [`Schedule`] over the training, for example `{"coef": {"start": 1.0, "end": 0.1, "over": 0.5}}`. With
            `{"entropy_target": 0.3}` (nats, or `{"share": 0.5}` of the entropy at the start), Clip-Cov and KL-Cov move
            their fraction so that the entropy follows the target ([`EntropyTarget`]).
        entropy_control_pool (`str`, *optional*, defaults to `"step"`):
            The tokens among which a control selects. `"step"`: all tokens of an optimizer step, so that the selection
            does not depend on how the step is cut into micro-batches and processes. `"micro_batch"`: the tokens of one
            forward pass on one process, as in the authors' code.
        entropy_control_scores (`str`, *optional*, defaults to `"rollout"`):
            The policy whose log-probabilities the step pool's covariance is taken with. `"rollout"`: the one that TRL
            scored the rollout with, where it did (off-policy, or with vLLM's importance correction), which costs
            nothing. `"current"`: the policy at the start of the step, as the authors' micro-batch pool has it; in a
            step of several micro-batches it costs one more forward pass without gradient. `"sampling"`: the log-probs
            that vLLM returned with the tokens, which cost nothing and differ from the trainer's by rounding.
        advantage_estimator (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"` (TRL's, with `scale_rewards`), `"rloo"`, `"reinforce_pp"`, `"reinforce_pp_baseline"` or
            `"quantile"` (see [`estimate_advantages`], which has its own unit and does not use
            `scale_rewards`).
        advantage_quantile (`float`, *optional*, defaults to `0.4`):
            With `advantage_estimator="quantile"` (QAE): the quantile of a prompt's rewards that is the baseline, in
            (0, 1). A higher one keeps more entropy.
        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Whether prompts whose completions all have the same reward are replaced by new ones until the rollout is
            full. Prompts then come from a stream of their own over the data set, which checkpoints remember.
        dynamic_sampling_reward (`str`, *optional*):
            Name of the reward function that decides which prompts dynamic sampling keeps: those whose completions
            differ in it. Defaults to the first one, the verifier. Shaping rewards, such as a length punishment, do not
            decide. Where the function scores no completion of a prompt, the weighted sum decides. With
            `advantage_estimator="reinforce_pp"` equal rewards have an advantage: no prompt is dropped for them unless
            this is given.
        max_generation_rounds (`int`, *optional*, defaults to `10`):
            Rounds of generation for a rollout, the first one included (10 in the authors' recipe).
        dynamic_sampling_incomplete (`str`, *optional*, defaults to `"error"`):
            What to do when the rounds are over and the rollout is not full: `"error"`, as the authors do, or `"train"`
            on it, filled up with prompts without a signal.
        token_records (`dict` or `str`, *optional*):
            Arguments of a [`CovarianceRecorder`], which then records the tokens of chosen steps for
            `entropy-trl covariance`, for example `{"every": 50, "entropy_change": true}`.
        entropy_regions (`bool`, *optional*, defaults to `False`):
            Whether to log what each entropy region of arXiv 2602.09782 has of the tokens, of the gradient and of the
            change of entropy to be expected from it ([`region_metrics`]), with every control and with none.
        entropy_law (`bool`, *optional*, defaults to `False`):
            Whether to log the fit of `R = -a exp(H) + b` as training goes on, warn when entropy collapses or
            surges, and give W&B and trackio the figures at the end ([`EntropyLawCallback`]).
        epsilon (`float`, *optional*):
            Lower ratio clip, and the upper one unless `epsilon_high` is given. `None` is the control's published
            range: 1 for Clip-Cov, no ratio clip at all for KL-Cov, TRL's 0.2 with the control off. For
            `loss_type="cispo"`, whose `epsilon_high` bounds the ratio itself, `None` is the same upper bound. Must be
            `None` for a control that has a ratio clip of its own (flexible clip, targeted clip-higher, CE-GPPO).

    Raises:
        ValueError: If the control, its parameters or their combination with TRL's cannot mean what they say.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "entropy_control_kwargs", "token_records"]

    entropy_control: str | None = field(
        default="clip_cov",
        metadata={
            "help": f"Entropy control: {', '.join(CONTROLS)}, the dotted path of a class, several joined by `+`, or "
            "`none` for plain GRPO."
        },
    )
    entropy_control_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Hyper-parameters of the entropy control, e.g. `{"fraction": 2e-3, "coef": 1.0}`.'},
    )
    entropy_control_pool: str = field(
        default="step",
        metadata={
            "help": "Tokens among which the control selects: `step` (all of an optimizer step) or `micro_batch`.",
            "choices": list(POOLS),
        },
    )
    entropy_control_scores: str = field(
        default="rollout",
        metadata={
            "help": "Policy that the step pool's covariance is taken with: `rollout`, `current` (one more forward "
            "pass in a step of several micro-batches) or `sampling` (vLLM's own log-probabilities).",
            "choices": list(SCORES),
        },
    )
    advantage_estimator: str = field(
        default="grpo",
        metadata={
            "help": "Advantage estimator: `grpo` (TRL's), `rloo`, `reinforce_pp`, `reinforce_pp_baseline` or "
            "`quantile`.",
            "choices": list(ESTIMATORS),
        },
    )
    advantage_quantile: float = field(
        default=0.4,
        metadata={"help": "Quantile of a prompt's rewards that `advantage_estimator=quantile` takes as its baseline."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace prompts whose completions all have the same reward until the rollout is full."},
    )
    dynamic_sampling_reward: str | None = field(
        default=None,
        metadata={
            "help": "Dynamic sampling: name of the reward function that decides which prompts are kept. Default: the "
            "first, which is the verifier."
        },
    )
    max_generation_rounds: int = field(
        default=10, metadata={"help": "Dynamic sampling: rounds of generation for a rollout, the first one included."}
    )
    dynamic_sampling_incomplete: str = field(
        default="error",
        metadata={
            "help": "Dynamic sampling: what to do when the rounds are over and the rollout is not full: `error`, or "
            "`train` on it, filled up with prompts without a signal.",
            "choices": list(INCOMPLETE),
        },
    )
    token_records: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Record the tokens of chosen steps: arguments of CovarianceRecorder, e.g. `{"every": 50}`.'},
    )
    entropy_regions: bool = field(
        default=False,
        metadata={"help": "Log what each entropy region (E1 to E4) has of tokens, gradient and entropy change."},
    )
    entropy_law: bool = field(
        default=False,
        metadata={"help": "Log the fit of R = -a exp(H) + b, and warn when entropy collapses or surges."},
    )
    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Ratio clip. `none` is the entropy control's published range: 1 for clip_cov, no clip for kl_cov, "
            "TRL's own default with the control off."
        },
    )

    def __post_init__(self):
        check_config(self)
        super().__post_init__()
        if str(self.entropy_control).lower() in ("none", "null", "false"):  # YAML reads `off` as False
            self.entropy_control = None
        given: object = self.entropy_control  # the parser of the command line knows text only
        if isinstance(given, EntropyControl):
            if self.entropy_control_kwargs:
                raise ValueError("`entropy_control` is an instance: it has its hyper-parameters, give no more of them.")
            # By name, so that the configuration can be stored and read again.
            self.entropy_control, self.entropy_control_kwargs = describe_control(given)
        self._check_rollout()
        self._warn_of_truncated_sampling()
        control = self.make_entropy_control()
        if control is not None:
            control.check_pool_size(self._pool_rows() * (self.max_completion_length or 0))

    def _warn_of_truncated_sampling(self) -> None:
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": (self.min_p or 0) > 0}
        given = ", ".join(f"`{name}={getattr(self, name)}`" for name, cut in cuts.items() if cut)
        if given and self.use_vllm and self.vllm_importance_sampling_correction:
            warnings.warn(
                f"{given} with `vllm_importance_sampling_correction` gives biased weights: vLLM's probabilities are of "
                "the tokens that are left, the trainer's of all tokens (huggingface/trl issue 6789). Set `top_p=1`, "
                "`top_k=0` and no `min_p`, or `vllm_importance_sampling_correction=False`.",
                UserWarning,
                stacklevel=4,
            )

    def make_entropy_control(self) -> EntropyControl | None:
        """Build the control that the configuration asks for, `None` if it is off, and check that it can act.

        Raises:
            ValueError: See the class.
        """
        self._check_choice("entropy_control_pool", POOLS)
        self._check_choice("entropy_control_scores", SCORES)
        if self.entropy_control is None:
            if self.entropy_control_kwargs:
                raise ValueError(
                    f"`entropy_control_kwargs` {self.entropy_control_kwargs} are given but `entropy_control` is off. "
                    f"Remove them, or name the control they are for: {', '.join(CONTROLS)}."
                )
            return None
        if not isinstance(self.entropy_control_kwargs, (dict, NoneType)):
            raise ValueError(
                f"`entropy_control_kwargs` must be a mapping, such as '{{\"fraction\": 2e-3}}', "
                f"got {self.entropy_control_kwargs!r}."
            )
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}. Leave it out for the published range.")
        control = build_control(self.entropy_control, self.entropy_control_kwargs)
        self._check_on_policy(control)
        self._check_loss(control)
        self._check_pool(control)
        self._check_sampling_scores()
        return control

    def _check_choice(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ValueError(f"Unknown `{name}` {value!r}{nearest(str(value), known)}.")

    def _check_rollout(self) -> None:
        self._check_choice("advantage_estimator", ESTIMATORS)
        self._check_choice("dynamic_sampling_incomplete", INCOMPLETE)
        if not 0 < self.advantage_quantile < 1:
            raise ValueError(
                f"`advantage_quantile` must lie between 0 and 1, both excluded, got {self.advantage_quantile}. The "
                "paper uses 0.4; 1 is the best completion of a prompt, which leaves nothing to reinforce."
            )
        if self.advantage_estimator != "grpo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`advantage_estimator={self.advantage_estimator!r}` takes one reward a completion, the weighted sum, "
                f"which `multi_objective_aggregation={self.multi_objective_aggregation!r}` has not. Use "
                '`"sum_then_normalize"`, or `advantage_estimator="grpo"`.'
            )
        if not self.dynamic_sampling:
            return
        if self.max_generation_rounds < 1:
            raise ValueError(f"`max_generation_rounds` must be at least 1, got {self.max_generation_rounds}.")
        if self.advantage_estimator == "reinforce_pp" and self.dynamic_sampling_reward is None:
            warnings.warn(
                "`dynamic_sampling` with `advantage_estimator='reinforce_pp'` drops no prompt for equal rewards: "
                "they have an advantage there. Use `reinforce_pp_baseline`, set `dynamic_sampling=False`, or name "
                "`dynamic_sampling_reward` to drop them all the same.",
                UserWarning,
                stacklevel=4,
            )
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if rows % self.num_generations != 0:
            raise ValueError(
                f"`dynamic_sampling` needs all completions of a prompt on one process, but its part of a rollout, "
                f"`per_device_train_batch_size` x `steps_per_generation` = {rows} completions, is not a multiple of "
                f"`num_generations` ({self.num_generations}). Change one of the three."
            )

    def ratio_clip(self) -> tuple[float, float]:
        """The ratio clip in force, (epsilon_low, epsilon_high); infinite where there is none."""
        if self.entropy_control is None:
            low = high = float(GRPOConfig.epsilon)  # a dataclass keeps its defaults as class attributes
        else:
            kwargs: Any = self.entropy_control_kwargs  # checked to be a mapping when the configuration was made
            low, high = build_control(self.entropy_control, kwargs).published_epsilon
            if self.loss_type == "cispo":  # bounds the ratio, not its distance from 1
                high = 1 + high
        if self.epsilon is not None:
            low = high = self.epsilon
        if self.epsilon_high is not None:
            high = self.epsilon_high
        return low, high

    def _check_on_policy(self, control: EntropyControl) -> None:
        updates = self.steps_per_generation * self.num_iterations
        if control.acts_on_policy or self.gradient_accumulation_steps % updates != 0:
            return
        parts = control.controls if isinstance(control, Chain) else {self.entropy_control: control}
        inert = " and ".join(f"`{name}`" for name, part in parts.items() if not part.acts_on_policy)
        raise ValueError(
            f"{inert} can never act here: `gradient_accumulation_steps` "
            f"({self.gradient_accumulation_steps}) is a multiple of `steps_per_generation` x `num_iterations` "
            f"({self.steps_per_generation} x {self.num_iterations}), so that every update is the first one after its "
            "rollout, where every ratio is 1: there is nothing to clip, and the penalty |log pi - log pi_old| has no "
            "gradient. Make several updates a rollout: "
            f"`steps_per_generation={8 * self.gradient_accumulation_steps}` gives the paper's 8 (or lower "
            "`gradient_accumulation_steps`), or set `num_iterations` to 2 or more; or use `clip_cov`, which acts "
            "on-policy too."
        )

    def _check_loss(self, control: EntropyControl) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"Unknown `loss_type` {self.loss_type!r}{nearest(self.loss_type, LOSS_TYPES)}.")
        if control.drops_tokens and self.importance_sampling_level == "sequence":
            raise ValueError(
                f"`entropy_control={self.entropy_control!r}` takes single tokens out of the gradient, which "
                '`importance_sampling_level="sequence"` does not allow: one ratio for the whole sequence sends the '
                'gradient of every token to all of them. Use `importance_sampling_level="token"`, or `kl_cov` without '
                "a target."
            )
        check_fused_loss(self.use_liger_kernel)
        if CLIP_RANGE not in control.claims:
            return
        for name in ("epsilon", "epsilon_high"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`entropy_control={self.entropy_control!r}` has a ratio clip of its own, and "
                    f"`{name}={getattr(self, name)}` would be a second one that stops tokens before it can act. Leave "
                    f"`{name}` out (`none` on the command line); the control's own bounds are in "
                    "`entropy_control_kwargs`."
                )
        if self.loss_type not in CLIPPED_LOSS_TYPES:
            raise ValueError(
                f"`entropy_control={self.entropy_control!r}` moves the ratio clip, which "
                f"`loss_type={self.loss_type!r}` does not have. Use one of {', '.join(CLIPPED_LOSS_TYPES)}."
            )

    def _pool_rows(self) -> int:
        """Completions in a pool."""
        rows = self.per_device_train_batch_size
        if self.entropy_control_pool == "step":
            rows *= self.gradient_accumulation_steps * self.world_size
        return rows

    def _check_sampling_scores(self) -> None:
        if self.entropy_control_scores != "sampling":
            return
        if not self.use_vllm:
            raise ValueError(
                '`entropy_control_scores="sampling"` needs vLLM (`use_vllm=False`): other generation returns no '
                'log-probabilities. Set `use_vllm=True`, or use `entropy_control_scores="rollout"`.'
            )
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": (self.min_p or 0) > 0}
        cuts["repetition_penalty"] = self.repetition_penalty != 1
        given = ", ".join(f"`{name}={getattr(self, name)}`" for name, cut in cuts.items() if cut)
        if given:
            raise ValueError(
                f'`entropy_control_scores="sampling"` does not support {given}: vLLM\'s probabilities are then not the '
                "policy's. Set `top_p=1`, `top_k=0`, no `min_p` and `repetition_penalty=1`, or use "
                '`entropy_control_scores="rollout"`.'
            )

    def _check_pool(self, control: EntropyControl) -> None:
        if control.compares_sequences and self._pool_rows() == 1:
            raise ValueError(
                f'`entropy_control_pool="{self.entropy_control_pool}"` with `per_device_train_batch_size=1` makes a '
                "pool of one sequence: all its tokens have the same advantage and their covariance is 0. Use a larger "
                '`per_device_train_batch_size`, or `entropy_control_pool="step"` with several micro-batches a step. '
                'With `selection="random"` in `entropy_control_kwargs` one sequence is enough.'
            )
        if self.parallelism_config is not None and self.parallelism_config.tp_enabled:
            raise ValueError(
                "Entropy control does not support tensor parallelism (`parallelism_config.tp_size > 1`), where several "
                "processes hold the same rows. Set `tp_size=1`, or `entropy_control=None`."
            )
        needs_step_pool = control.needs_pool and self.entropy_control_pool == "step"
        if needs_step_pool and self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f'`entropy_control_pool="step"` needs every optimizer step to lie inside one rollout, but '
                f"`steps_per_generation` ({self.steps_per_generation}) is not a multiple of "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}). Change one of the two "
                f"(`steps_per_generation={self.gradient_accumulation_steps}` is one step a rollout), or use "
                '`entropy_control_pool="micro_batch"`.'
            )
