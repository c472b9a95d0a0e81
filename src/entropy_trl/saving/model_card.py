"""What a run's model card says beyond TRL's: the control and its settings, the entropy curve, the law fitted to it.

TRL writes the card; [`extend_card`] adds to that file, and takes nothing but false statements away.
"""

import math
import platform
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import ModelCard
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from entropy_trl._version import __version__
from entropy_trl.analysis.law.points import Points
from entropy_trl.analysis.law.result import law_of
from entropy_trl.analysis.logs.runs import Run
from entropy_trl.analysis.tables import markdown_table, number, spread
from entropy_trl.config import CovGRPOConfig
from entropy_trl.controls import Chain, describe_control
from entropy_trl.controls.base import SELECTED_TOKENS
from entropy_trl.saving.hub import intended_name


FIGURE = "entropy_curve.png"
TABLE_ROWS = 8

#: In TRL's card: this package's sections come before the first, and its versions behind the second.
_VERSIONS, _FIRST_VERSION = "### Framework versions", "- TRL: "


class _Point(NamedTuple):
    step: int
    entropy: float
    reward: float


def write_card(
    args: GRPOConfig,
    write_base_card: Callable[[], None],
    state: TrainerState,
    hub_model_id: str | None,
    model: Any,
    draw: bool = True,
) -> None:
    """Writes the card and its figure into `args.output_dir`, each in one move, so that a reader sees a whole file.

    A card that shows a figure is replaced after its new figure is there, and before its old figure goes.

    Args:
        args (`GRPOConfig`): The run's configuration.
        write_base_card (`Callable`): TRL's card writing, which saves to `args.output_dir`.
        state (`TrainerState`): The run's progress and log.
        hub_model_id (`str`, *optional*): The repository, once there is one.
        model (`PreTrainedModel` or `PeftModel`): The policy.
        draw (`bool`, defaults to `True`): Whether the card shows the figure, which takes longer than all the rest.
    """
    run = args.output_dir
    folder = Path(str(run))
    folder.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that a move replaces at once; uploads leave names with `_` out.
    with tempfile.TemporaryDirectory(prefix="_card_", dir=folder) as name:
        staging = Path(name)
        args.output_dir = name
        try:
            write_base_card()
        finally:
            args.output_dir = run
        extend_card(staging, args, state, hub_model_id, model, draw)
        drawn = (staging / FIGURE).exists()
        if drawn:
            (staging / FIGURE).replace(folder / FIGURE)
        (staging / "README.md").replace(folder / "README.md")
        if not drawn:
            (folder / FIGURE).unlink(missing_ok=True)  # of an earlier run in the same folder


def extend_card(
    folder: Path, args: GRPOConfig, state: TrainerState, hub_model_id: str | None, model: Any, draw: bool = True
) -> None:
    """Adds to the card that TRL has written into `folder`, and draws the figure that it shows beside it.

    A run of a plain `GRPOConfig` keeps TRL's card, but for what TRL says of a base model or repository called `None`.

    Args:
        folder (`Path`): Where the card is. [`write_card`] moves it to the run's folder when it is complete.
        args (`GRPOConfig`): The run's configuration.
        state (`TrainerState`): Its progress and log.
        hub_model_id (`str`, *optional*): The repository, once there is one.
        model (`PreTrainedModel` or `PeftModel`): The policy.
        draw (`bool`, defaults to `True`): Whether to draw the figure.
    """
    path = folder / "README.md"
    card = ModelCard.load(path)
    text = card.text.replace("[None](https://huggingface.co/None)", "a local model")
    text = text.replace('model="None"', f'model="{hub_model_id or intended_name(args)}"')
    tags: list[str] = list(card.data.tags or [])
    adapter = next(iter(model.peft_config.values())) if hasattr(model, "peft_config") else None
    if adapter is not None:
        # As PEFT's own card has it; with `base_model` the Hub then lists it under the model that it adapts.
        card.data["library_name"] = "peft"
        tags.append(adapter.peft_type.value.lower())
    if isinstance(args, CovGRPOConfig):
        control = args.make_entropy_control()
        if control is not None and args.entropy_control is not None:
            tags += args.entropy_control.split("+")
            if SELECTED_TOKENS in control.claims:  # the others have TRL's citation, which is GRPO's
                text += f"\nCite GRPO as:\n\n```bibtex\n{GRPOTrainer._paper['citation']}\n```\n"
        text = _before(text, _VERSIONS, "\n\n".join(_sections(folder if draw else None, args, control, adapter, state)))
        text = _before(
            text, _FIRST_VERSION, f"- Entropy-TRL: {__version__}\n- Python: {platform.python_version()}", "\n"
        )
    card.text = text
    card.data.tags = sorted(set(tags))
    card.save(path)


def _before(text: str, mark: str, addition: str, gap: str = "\n\n") -> str:
    """The text with an addition before a mark, or at its end if TRL's card no longer has the mark."""
    if mark not in text:
        return f"{text.rstrip()}\n\n{addition}\n"
    return text.replace(mark, f"{addition}{gap}{mark}", 1)


def _sections(
    folder: Path | None, args: CovGRPOConfig, control: Any, adapter: Any, state: TrainerState
) -> Iterable[str]:
    yield "### Entropy control"
    if control is None:
        yield "Off: this is plain GRPO."
    else:
        what = (type(control.at(0.0)).__doc__ or "").splitlines()[0]
        yield f"`{args.entropy_control}`. {what}"
    yield markdown_table(("Setting", "Value"), list(_settings(args, control, adapter, state)))

    reward_name = "dynamic_sampling/reward" if args.dynamic_sampling else "reward"
    points = _points(state.log_history, reward_name)
    yield "### Entropy and reward"
    if not points:
        yield "The run has logged no step."
    else:
        yield from _curve(folder, points, all_completions=args.dynamic_sampling)
    yield "### Law of entropy and reward"
    yield _law(points)


def _settings(args: CovGRPOConfig, control: Any, adapter: Any, state: TrainerState) -> Iterable[tuple[str, str]]:
    if control is None:
        yield "Entropy control", "off"
    else:
        yield "Entropy control", f"`{args.entropy_control}`"
        parts: dict[str, Any] = dict(control.controls) if isinstance(control, Chain) else {"the control": control}
        for name, part in parts.items():
            for key, value in describe_control(part)[1].items():
                if value is None:  # an option that is off
                    continue
                yield f"`{key}` of {name}", _value(value)
        pool = {"step": "all tokens of an optimizer step", "micro_batch": "the tokens of a micro-batch"}
        yield "Pool that the control selects in", pool[args.entropy_control_pool]
        if args.entropy_control_pool == "step":
            scores = {
                "rollout": "the rollout's policy",
                "current": "the policy at the start of the step",
                "sampling": "vLLM's log-probabilities",
            }
            yield "Covariance taken with", scores[args.entropy_control_scores]
    scaling = f", rewards scaled by `{args.scale_rewards}`" if args.advantage_estimator == "grpo" else ""
    yield "Advantages", f"`{args.advantage_estimator}`{scaling}"
    rounds = f"up to {args.max_generation_rounds} rounds of generation" if args.dynamic_sampling else "off"
    yield "Dynamic sampling", rounds
    low, high = args.ratio_clip()
    if args.loss_type == "cispo":
        yield "Ratio clip", f"ratio at most {_value(high)}" if math.isfinite(high) else "off"
    else:
        sides = [f"{_value(side)} {where}" for side, where in ((low, "below 1"), (high, "above 1")) if side < math.inf]
        yield "Ratio clip", ", ".join(sides) or "off"
    yield "Loss", f"`{args.loss_type}`"
    yield "KL penalty to the reference policy", f"{_value(args.beta)}" if args.beta else "off"
    yield "Learning rate", f"{_value(args.learning_rate)}, schedule `{_value(args.lr_scheduler_type)}`"
    completions = args.per_device_train_batch_size * args.world_size
    updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    yield "Updates a rollout", _value(updates)
    yield "Completions an update", _value(completions * args.gradient_accumulation_steps)
    yield "Completions a rollout", f"{completions * args.steps_per_generation} ({args.num_generations} a prompt)"
    yield "Longest completion", f"{args.max_completion_length} tokens" if args.max_completion_length else "no limit"
    yield "Sampling", f"temperature {_value(args.temperature)}, top-p {_value(args.top_p)}"
    yield "Updates made", _value(state.global_step)
    yield "Seed", _value(args.seed)
    if adapter is not None:
        rank = f", rank {adapter.r}, alpha {_value(adapter.lora_alpha)}" if hasattr(adapter, "lora_alpha") else ""
        yield "Weights in this repository", f"an adapter ({adapter.peft_type.value}{rank}), without the base model"


def _value(value: Any) -> str:
    value = getattr(value, "value", value)  # of an enum
    return f"{value:g}" if isinstance(value, float) else str(value)


def _points(log: Iterable[dict[str, Any]], reward_name: str) -> list[_Point]:
    """The logged steps that have both numbers. Of a step that was logged twice, by a resumed run, the last counts."""
    points = {}
    for entry in log:
        entropy, reward = entry.get("entropy"), entry.get(reward_name)
        if entropy is not None and reward is not None and math.isfinite(entropy) and math.isfinite(reward):
            points[int(entry["step"])] = _Point(int(entry["step"]), float(entropy), float(reward))
    return [points[step] for step in sorted(points)]


def _curve(folder: Path | None, points: Sequence[_Point], all_completions: bool) -> Iterable[str]:
    first, last = points[0], points[-1]
    summary = (
        f"Policy entropy went from {first.entropy:.3g} to {last.entropy:.3g} nats a token, and the training reward "
        f"from {first.reward:.3g} to {last.reward:.3g}, between updates {first.step} and {last.step}."
    )
    if folder is not None and find_spec("matplotlib") is not None and len(points) > 1:
        _draw(points, folder / FIGURE)
        yield f"![{summary}]({FIGURE})"
    elif folder is not None:
        (folder / FIGURE).unlink(missing_ok=True)  # of an earlier run in the same folder
    yield summary
    yield markdown_table(
        ("Update", "Entropy (nats a token)", "Reward"),
        [(str(p.step), number(p.entropy, ".4g"), number(p.reward, ".4g")) for p in spread(points, TABLE_ROWS)],
    )
    if all_completions:
        yield "The reward is that of all generated completions, before dynamic sampling chooses among them."


def _draw(points: Sequence[_Point], path: Path) -> None:
    """Entropy and reward over the updates, one above the other."""
    figure = import_module("matplotlib.figure").Figure(figsize=(7, 5))
    # A layout that looks for the margins itself draws everything twice.
    figure.subplots_adjust(left=0.14, right=0.98, bottom=0.1, top=0.98, hspace=0.1)
    steps = [point.step for point in points]
    panels = (
        ("policy entropy\n(nats a token)", [point.entropy for point in points], "#0072B2"),
        ("training reward", [point.reward for point in points], "#D55E00"),
    )
    for axes, (label, values, colour) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
        axes.plot(steps, values, color=colour)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("updates")
    figure.savefig(path, dpi=120)


def _law(points: Sequence[_Point]) -> str:
    """The fit of `R = -a exp(H) + b` to the logged steps, or why there is none."""
    steps, entropy, reward = (np.array([point[i] for point in points]) for i in range(3))
    try:
        law = law_of(Run("this run"), Points(steps, entropy, reward, "entropy", "reward"))
    except ValueError as error:
        return f"`R = -a exp(H) + b` is not fitted to this run: {error}"
    fit = law.fit
    numbers = f"a = {fit.a:.4g}, b = {fit.b:.4g}"
    quality = f"{fit.points} logged steps, R² = {fit.r2:.2f}" if math.isfinite(fit.r2) else f"{fit.points} logged steps"
    ceiling = f"{fit.ceiling:.4g}"
    try:
        inference = law.inference
    except ImportError as error:
        interval = f"without an interval: {error}"
    else:
        if math.isfinite(inference.ceiling.low) and math.isfinite(inference.ceiling.high):
            interval = (
                f"{inference.confidence:.0%} interval {inference.ceiling.low:.4g} to {inference.ceiling.high:.4g}, for "
                "autocorrelated noise"
            )
        else:
            interval = "the points are too few for an interval"
    return (
        "`R = -a exp(H) + b` (arXiv 2505.22617, Eq. 6), with R the training reward and H the policy entropy, fitted to "
        f"this run: {numbers} ({quality}). At zero entropy that is a reward of {ceiling} ({interval}). It describes "
        "this run on its training prompts, and is no promise for longer training."
        + "".join(f" Note: {note}" for note in law.notes)
    )
