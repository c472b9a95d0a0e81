"""CovGRPOTrainer in real training: off is TRL, pools, metrics, bad values, checkpoints."""

import copy
import math

import pytest
import torch
from conftest import digit_reward
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from entropy_trl import CovGRPOConfig, CovGRPOTrainer, build_control
from entropy_trl.loss.batch import TokenBatches
from entropy_trl.loss.call import LossCall
from entropy_trl.loss.state import ControlState
from entropy_trl.loss.window import StepWindow
from entropy_trl.quickstart.task import build_dataset
from entropy_trl.tokens.types import TokenBatch


CLIP_COV = {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.02, "cov_high": 9}}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}}
METHODS = {"clip_cov": CLIP_COV, "kl_cov": KL_COV}


def logs(trainer):
    """The log history without wall-clock times."""
    timing = ("time", "per_second", "runtime")
    return [{k: v for k, v in log.items() if not any(t in k for t in timing)} for log in trainer.state.log_history]


def logs_of_trl(trainer):
    """The log history without our own metrics, which TRL does not have."""
    return [{k: v for k, v in log.items() if not k.startswith("diversity/")} for log in logs(trainer)]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


class Gradients(TrainerCallback):
    """The gradient of each optimizer step, flattened."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


@pytest.fixture
def selections(monkeypatch):
    """Every selection made, as {row: selected positions}, and the number of tokens it was made from."""
    made = []
    select = StepWindow._select

    def record(self, pool: TokenBatch):
        selected = select(self, pool)
        rows = {int(row): tuple(s.nonzero().flatten().tolist()) for row, s in zip(pool.row_ids, selected, strict=True)}
        made.append((self.trainer.state.global_step, rows, int(pool.mask.sum())))
        return selected

    monkeypatch.setattr(StepWindow, "_select", record)
    return made


@pytest.mark.parametrize("overrides", [{}, {"gradient_accumulation_steps": 2}, {"num_iterations": 2, "beta": 0.0}])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_off_is_trl_bit_for_bit(make_trainer, overrides, loss_type):
    gradients, trained = (Gradients(), Gradients()), []
    cases = [(GRPOTrainer, GRPOConfig, {}), (CovGRPOTrainer, CovGRPOConfig, {"entropy_control": None})]
    for (trainer_class, config_class, off), callback in zip(cases, gradients, strict=True):
        trainer = make_trainer(trainer_class, config_class, loss_type=loss_type, **off, **overrides)
        trainer.add_callback(callback)
        trainer.train()
        trained.append(trainer)
    assert same_weights(*trained)
    assert logs(trained[0]) == logs_of_trl(trained[1])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0].steps, gradients[1].steps, strict=True))


def test_a_plain_grpo_config_is_plain_grpo_and_warns(make_trainer):
    stock = make_trainer(GRPOTrainer, GRPOConfig)
    stock.train()
    with pytest.warns(UserWarning, match="entropy control is off"):
        plain = make_trainer(CovGRPOTrainer, GRPOConfig)
    plain.train()
    assert same_weights(stock, plain) and logs(stock) == logs(plain)


@pytest.mark.parametrize("method", METHODS)
def test_controls_do_nothing_in_evaluation(make_trainer, set_forward, loss_inputs, method):
    logps, inputs = loss_inputs()
    set_forward(logps)
    on, off = make_trainer(**METHODS[method], epsilon=0.2), make_trainer(entropy_control=None)
    losses = []
    for trainer in (on, off):
        trainer.model.eval()
        losses.append(trainer._compute_loss(trainer.model, inputs))
    assert torch.equal(*losses)
    assert not any(name.startswith("entropy_control/") for name in on._metrics["eval"])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_unselected_tokens_and_clip_metrics_stay_trls(make_trainer, set_forward, loss_inputs, loss_type):
    logps, inputs = loss_inputs(rows=8, length=20, drift=0.5)
    set_forward(logps)
    clip = {"epsilon": 0.2, "epsilon_high": 1.1} if loss_type == "cispo" else {"epsilon": 0.2}
    on, off = (make_trainer(**kw, **clip, loss_type=loss_type) for kw in (CLIP_COV, {"entropy_control": None}))
    gradients = []
    for trainer in (on, off):
        trainer.model.train()
        gradients += torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)
    dropped = (gradients[0] == 0) & (gradients[1] != 0)
    assert 0 < dropped.sum() < 40
    assert torch.equal(gradients[0], gradients[1].masked_fill(dropped, 0.0))
    for name, value in off._metrics["train"].items():
        assert on._metrics["train"][name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_edited_in_place(make_trainer, set_forward, loss_inputs, method):
    logps, inputs = loss_inputs()
    set_forward(logps)
    before = {k: v.clone() for k, v in inputs.items()}
    trainer = make_trainer(**METHODS[method])
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[k], before[k]) for k in inputs)


def cut(make_trainer, method, batch, steps, pool, updates=2, **overrides):
    """Train on rollouts of 16 rows, `16 / updates` rows a step, in micro-batches of `batch` rows."""
    accumulation = 16 // updates // batch
    gradients = Gradients()
    trainer = make_trainer(
        **method,
        entropy_control_pool=pool,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * updates,
        loss_type="dapo",
        max_steps=steps,
        **overrides,
    )
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.steps


@pytest.mark.parametrize(
    ("method", "updates", "scores"),
    [
        ("clip_cov", 2, "rollout"),
        ("kl_cov", 2, "rollout"),
        ("clip_cov", 1, "rollout"),
        ("clip_cov", 2, "current"),
        ("kl_cov", 2, "current"),
    ],
)
def test_the_step_pool_does_not_depend_on_the_cut(make_trainer, selections, method, updates, scores):
    # From the second update on both methods act; on-policy (one update a rollout) only Clip-Cov does.
    reference, spread = None, []
    for batch in (8, 4, 2, 1):
        if updates == 1 and batch == 8:
            batch = 16
        selections.clear()
        _, gradients = cut(make_trainer, METHODS[method], batch, 2, "step", updates, entropy_control_scores=scores)
        made = [(step, rows, n) for step, rows, n in selections]
        assert [step for step, _, _ in made] == [0, 1]
        assert all(sum(map(len, rows.values())) == max(int(0.2 * n), 1) for _, rows, n in made)
        if reference is None:
            reference = made, gradients
        assert made == reference[0]
        spread += [float((g - r).norm() / r.norm()) for g, r in zip(gradients, reference[1], strict=True)]
    assert max(spread) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_micro_batch_pool_depends_on_the_cut(make_trainer, method):
    # The reason for the step pool, and the proof that the test above can fail.
    (_, whole), (_, parts) = (cut(make_trainer, METHODS[method], batch, 2, "micro_batch") for batch in (8, 2))
    assert float((parts[1] - whole[1]).norm() / whole[1].norm()) > 0.1


def test_the_step_pool_needs_no_second_forward_where_scores_exist(make_trainer, monkeypatch):
    calls = []
    score = TokenBatches.score
    monkeypatch.setattr(
        TokenBatches,
        "score",
        lambda self, *args: calls.append(self.trainer.state.global_step) or score(self, *args),
    )
    cut(make_trainer, CLIP_COV, 4, 2, "step", updates=2)  # scores: the rollout's log-probs
    cut(make_trainer, CLIP_COV, 16, 2, "step", updates=1)  # on-policy, one micro-batch: the loss's own forward
    assert calls == []
    cut(make_trainer, CLIP_COV, 4, 2, "step", updates=1)  # on-policy, four micro-batches: one scoring pass each
    assert calls == [0, 0, 0, 0, 1, 1, 1, 1]
    calls.clear()
    cut(make_trainer, CLIP_COV, 8, 2, "step", updates=2, entropy_control_scores="current")  # one micro-batch
    assert calls == []
    cut(make_trainer, CLIP_COV, 4, 2, "step", updates=2, entropy_control_scores="current")
    assert calls == [0, 0, 1, 1]


def test_sampling_scores_need_no_forward_pass(make_trainer, selections, monkeypatch):
    # Exact log-probabilities stand for vLLM's: the selection is that of the scoring pass, and the pass is not made.
    generate, runs, calls = CovGRPOTrainer._generate_and_score_completions, {}, []
    score = TokenBatches.score
    monkeypatch.setattr(TokenBatches, "score", lambda *args: calls.append(1) or score(*args))

    def scored(self, inputs):
        output = generate(self, inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length = output["completion_ids"].size(1)
        with torch.no_grad():
            logps = self._get_per_token_logps_and_entropies(self.model, ids, mask, length)[0]
        self.args.entropy_control_scores = self.scores
        return output | ({"sampling_per_token_logps": logps} if self.scores == "sampling" else {})

    monkeypatch.setattr(CovGRPOTrainer, "_generate_and_score_completions", scored)
    for name, batch in (("rollout", 4), ("sampling", 4), ("sampling", 16)):
        monkeypatch.setattr(CovGRPOTrainer, "scores", name, raising=False)
        selections.clear(), calls.clear()
        cut(make_trainer, CLIP_COV, batch, 2, "step", updates=1)
        assert len(calls) == (8 if name == "rollout" else 0)
        runs[name, batch] = list(selections)
    assert runs["rollout", 4] == runs["sampling", 4] == runs["sampling", 16]


def test_current_scores_follow_the_policy(make_trainer, selections):
    # The same until the policy has moved away from the rollout's, and what the micro-batch pool of one process has.
    runs = {}
    for name, pool, scores in (
        ("rollout", "step", "rollout"),
        ("current", "step", "current"),
        ("authors", "micro_batch", "rollout"),
    ):
        selections.clear()
        cut(make_trainer, KL_COV, 8, 2, pool, learning_rate=0.03, entropy_control_scores=scores)
        runs[name] = list(selections)
    assert runs["rollout"][0] == runs["current"][0]
    assert runs["rollout"][1] != runs["current"][1]
    assert runs["authors"] == runs["current"]


@pytest.mark.parametrize("pool", ["step", "micro_batch"])
def test_metrics_cover_the_whole_accumulation_window(make_trainer, selections, pool):
    trainer, _ = cut(make_trainer, KL_COV, 2, 2, pool)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    for step, log in enumerate(logged):
        pools = [(rows, n) for s, rows, n in selections if s == step]
        assert len(pools) == (1 if pool == "step" else 4)
        selected = sum(len(positions) for rows, _ in pools for positions in rows.values())
        assert log["entropy_control/selected_fraction"] == pytest.approx(selected / sum(n for _, n in pools))
        quantiles = [log[f"entropy_control/cov_top_{q:g}"] for q in (2e-4, 2e-3, 2e-2, 0.2, 0.5)]
        if pool == "step":  # the micro-batches' own quantiles are averaged with their counts
            assert quantiles == sorted(quantiles, reverse=True)
        assert log["entropy_control/cov_selected_mean"] > log["entropy_control/cov_mean"]


def test_penalty_is_its_share_of_the_loss(make_trainer):
    # With coef 0 the same training loses exactly the penalty at the first step that has one.
    runs = [
        cut(make_trainer, {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2, "coef": coef}},
            2, 2, "step")[0]
        for coef in (0.0, 1.0)
    ]  # fmt: skip
    without, with_penalty = (t.state.log_history[1] for t in runs)
    assert with_penalty["entropy_control/penalty"] > 1e-3
    assert with_penalty["loss"] - without["loss"] == pytest.approx(with_penalty["entropy_control/penalty"], rel=1e-3)


def test_the_share_at_rounding_is_seen(make_trainer):
    # The first update after a rollout compares two forward passes of one policy; the second, two policies.
    trainer, _ = cut(make_trainer, KL_COV, 4, 4, "step")
    share = [log["entropy_control/selected_at_rounding"] for log in trainer.state.log_history if "loss" in log]
    assert share[0] == share[2] == 1.0
    assert share[1] < 0.2 and share[3] < 0.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_non_finite_log_probs_stop_training_before_the_weights_change(make_trainer, method, accumulation):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[3] = float("nan")
                self.weights = [p.detach().clone() for p in model.parameters()]

    trainer = make_trainer(
        **METHODS[method], gradient_accumulation_steps=accumulation, steps_per_generation=2 * accumulation
    )
    callback = Break()
    trainer.add_callback(callback)
    with pytest.raises(FloatingPointError, match=r"Optimizer step 2: of \d+ valid .* \d+ have a log-probability"):
        trainer.train()
    assert all(
        torch.equal(p.nan_to_num(), w.nan_to_num())
        for p, w in zip(trainer.model.parameters(), callback.weights, strict=True)
    )


def test_non_finite_rollout_log_probs_are_counted(make_trainer, set_forward, loss_inputs):
    trainer = make_trainer(**KL_COV)
    logps, inputs = loss_inputs()
    inputs["old_per_token_logps"][0, :2] = float("nan")
    set_forward(logps)
    trainer.model.train()
    with pytest.raises(FloatingPointError, match="2 a rollout log-probability"):
        trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("control", [None, "clip_cov"])
@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        *({"advantage_estimator": name} for name in ("rloo", "reinforce_pp", "reinforce_pp_baseline", "quantile")),
        {"scale_rewards": "none"},
    ],
)
def test_infinite_rewards_stop_training_before_the_weights_change(make_trainer, control, infinity, options):
    def reward(completions, **kwargs):
        return [infinity, *digit_reward(completions)[1:]]

    trainer = make_trainer(entropy_control=control, reward_funcs=reward, steps_per_generation=1, **options)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="advantage that is not finite"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp"])
def test_a_completion_without_a_reward_is_allowed(make_trainer, estimator):
    def reward(completions, **kwargs):
        return [None, *digit_reward(completions)[1:]]

    trainer = make_trainer(entropy_control=None, reward_funcs=reward, max_steps=2, advantage_estimator=estimator)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_row_without_tokens_may_have_any_advantage(make_trainer, set_forward, loss_inputs):
    trainer = make_trainer(**CLIP_COV)
    logps, inputs = loss_inputs()
    inputs["completion_mask"][2] = 0
    inputs["advantages"][2] = 0.0
    losses = []
    for value in (0.0, float("nan")):
        inputs["advantages"][2] = value
        set_forward(logps)
        trainer.model.train()
        trainer._batches.check_finite(trainer._batches.of(inputs, logps))
        losses.append(trainer.entropy_control.select(trainer._batches.of(inputs, logps)).selected)
    assert torch.equal(*losses)


def test_non_finite_advantages_are_counted(make_trainer, set_forward, loss_inputs):
    trainer = make_trainer(**KL_COV)
    logps, inputs = loss_inputs()
    inputs["advantages"][1] = math.inf
    set_forward(logps)
    trainer.model.train()
    tokens = int(inputs["completion_mask"][1].sum())
    with pytest.raises(FloatingPointError, match=f"and {tokens} an advantage that is not finite"):
        trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("clip_cov", {"steps_per_generation": 4}),
        ("kl_cov", {"steps_per_generation": 4}),
        ("clip_cov", {"steps_per_generation": 4, "entropy_control_pool": "micro_batch"}),
        ("clip_cov", {"steps_per_generation": 2, "num_iterations": 2}),
        ("kl_cov", {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}),
    ],
)
def test_a_resumed_run_is_the_same_run(make_trainer, selections, tmp_path, method, overrides):
    # A rollout lasts 4 steps: checkpoints 1 to 3 lie inside the first one, 4 at its end, 5 inside the second.
    overrides = METHODS[method] | overrides | {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    through = make_trainer(**overrides)
    through.train()
    drawn = list(selections)
    for checkpoint in range(1, 6):
        selections.clear()
        resumed = make_trainer(**overrides | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        assert selections == [s for s in drawn if s[0] >= checkpoint]
        assert same_weights(through, resumed), checkpoint
        assert logs(through)[checkpoint:6] == logs(resumed)[checkpoint:6]


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "steps_per_generation": 2
        },  # two rollouts an epoch, of four steps: TRL draws the epochs' orders one after another
        # An epoch of three micro-batches ends in a step of one, so steps and rollouts fall out of step.
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "entropy_control_pool": "micro_batch"},
    ],
)
def test_a_run_resumed_in_a_later_epoch_is_the_same_run(make_trainer, tmp_path, overrides):
    overrides = METHODS["clip_cov"] | overrides | {"save_strategy": "steps", "save_steps": 1, "max_steps": 7}
    prompts = 8 if overrides["steps_per_generation"] == 2 else 6

    def make(**more):
        trainer = make_trainer(**overrides | more)
        trainer.train_dataset = build_dataset(prompts)
        return trainer

    through = make()
    through.train()
    assert through.state.epoch > 1.5
    for checkpoint in range(1, 7):
        resumed = make(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        assert same_weights(through, resumed), checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_another_cut(make_trainer, selections, tmp_path, method):
    # Between two rollouts (checkpoint 2) the step may be cut into other micro-batches; inside one it may not.
    overrides = METHODS[method] | {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": "sgd"}
    through = make_trainer(**overrides)
    through.train()
    drawn = [s for s in selections if s[0] >= 2]
    selections.clear()
    other = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    resumed = make_trainer(**overrides | other | {"save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert selections == drawn
    weights = zip(through.model.parameters(), resumed.model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in weights) < 1e-6
    with pytest.raises(ValueError, match="inside a rollout"):
        make_trainer(**overrides | other).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_checkpoint_without_its_rollout_is_said(make_trainer, tmp_path, caplog):
    overrides = METHODS["clip_cov"] | {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make_trainer(**overrides).train()
    assert not list((tmp_path / "out" / "checkpoint-2").glob("rollout*"))  # at the end of a rollout there is none
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for name in ("rollout_rank0.safetensors", "manifest.json"):  # stock TRL writes neither
        (checkpoint / name).unlink()
    with caplog.at_level("WARNING", logger="entropy_trl"):
        make_trainer(**overrides).train(resume_from_checkpoint=str(checkpoint))
    assert "lies inside a rollout" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_model_card_names_the_paper(make_trainer, tmp_path, method):
    trainer = make_trainer(entropy_control=method)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2505.22617" in card and "entropy-trl" in card


def test_only_a_control_with_a_state_minds_the_state_of_a_checkpoint(tmp_path, caplog):
    for name in ("kl_cov", "targeted_clip_higher"):
        state = ControlState(build_control(name, {}), name)
        before = state.state()
        state.load({"raising": 1.0}, tmp_path)
        assert state.state() == before
    (message,) = caplog.messages
    assert "'targeted_clip_higher' starts afresh" in message


def selected_in(trainer, inputs, logps):
    return trainer.entropy_control.select(trainer._batches.of(inputs, logps)).selected


def test_the_draw_changes_with_the_step_and_with_the_seed(make_trainer, loss_inputs):
    logps, inputs = loss_inputs(rows=16, length=40)
    logps = logps.detach()
    first, other = make_trainer(**CLIP_COV), make_trainer(**CLIP_COV, seed=1)
    drawn = [selected_in(first, inputs, logps), selected_in(other, inputs, logps)]
    first.state.global_step = 1
    drawn.append(selected_in(first, inputs, logps))
    assert drawn[0].any()
    assert all(a.sum() == b.sum() and not torch.equal(a, b) for a in drawn for b in drawn if a is not b)


def test_the_step_pool_leaves_out_the_tools_tokens(make_trainer, set_forward, loss_inputs, selections):
    logps, inputs = loss_inputs(mask=torch.ones(4, 6).bool())
    inputs["tool_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1]] * 4)
    halves = [{k: v[i : i + 2] if v.ndim else v for k, v in inputs.items()} for i in (0, 2)]
    trainer = make_trainer(**KL_COV, gradient_accumulation_steps=2, steps_per_generation=4)
    trainer._buffered_inputs = halves
    set_forward(logps[:2])
    trainer.model.train()
    trainer._compute_loss(trainer.model, halves[0])
    ((_, rows, tokens),) = selections
    assert tokens == 16 and sum(map(len, rows.values())) == 3
    assert not any(position in (1, 4) for positions in rows.values() for position in positions)


def test_a_buffer_that_is_not_trls_is_a_loud_error(make_trainer, set_forward, loss_inputs):
    logps, inputs = loss_inputs()
    halves = [{k: v[i : i + 2] if v.ndim else v for k, v in inputs.items()} for i in (0, 2)]
    trainer = make_trainer(**KL_COV, gradient_accumulation_steps=2, steps_per_generation=4)
    set_forward(logps[:2])
    trainer.model.train()
    trainer._buffered_inputs = halves[:1]
    with pytest.raises(RuntimeError, match="only 1 of them belong to the current rollout"):
        trainer._compute_loss(trainer.model, halves[0])
    trainer._buffered_inputs = [{k: v.clone() for k, v in half.items()} for half in halves]
    with pytest.raises(RuntimeError, match="not the one in TRL's rollout buffer"):
        trainer._compute_loss(trainer.model, halves[0])


def test_training_again_after_an_interruption_inside_a_step(make_trainer, selections):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    def train(trainer):
        selections.clear()
        trainer.train()
        return [step for step, _, _ in selections]

    trainer = make_trainer(**CLIP_COV, gradient_accumulation_steps=2, steps_per_generation=4)
    callback = Interrupt()
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(callback)
    assert train(trainer) == [0, 1, 2, 3]
    assert train(trainer) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
        {"entropy_control_pool": "micro_batch"},
    ],
)
def test_the_selection_is_among_tokens_that_the_high_entropy_mask_leaves(make_trainer, monkeypatch, method, options):
    seen, result = [], LossCall.result

    def record(call):
        seen.append((call.selected & call.loss_masks[0], call.selected))
        return result(call)

    monkeypatch.setattr(LossCall, "result", record)
    trainer = make_trainer(top_entropy_quantile=0.3, **METHODS[method] | options)
    trainer.train()
    assert all(torch.equal(counted, selected) for counted, selected in seen)
    assert sum(int(selected.sum()) for _, selected in seen) > 0


@pytest.mark.parametrize("pool", ["step", "micro_batch"])
@pytest.mark.parametrize("method", METHODS)
def test_a_random_draw_acts_in_steps_of_one_sequence(make_trainer, method, pool):
    options = {"per_device_train_batch_size": 1, "steps_per_generation": 4, "entropy_control_pool": pool}
    trainer = make_trainer(
        **options, entropy_control=METHODS[method]["entropy_control"], entropy_control_kwargs={"selection": "random"}
    )
    trainer.train()
    assert all(entry["entropy_control/selected_fraction"] > 0 for entry in trainer.state.log_history[:-1])


def test_a_step_without_signal_selects_nothing(make_trainer, set_forward, loss_inputs):
    logps, inputs = loss_inputs(drift=0.5)
    inputs["advantages"][:] = 0.3
    set_forward(logps)
    selected = {}
    for pool in ("step", "micro_batch"):
        trainer = make_trainer(**KL_COV, entropy_control_pool=pool)
        trainer.model.train()
        trainer._compute_loss(trainer.model, inputs)
        selected[pool] = trainer._metrics["train"]["entropy_control/selected_fraction"][-1]
    assert selected["step"] == 0 < selected["micro_batch"]  # the authors' code takes k tokens all the same


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_metrics_of_the_selected_tokens(make_trainer, set_forward, loss_inputs, name):
    logps, inputs = loss_inputs(rows=8, length=20, drift=1.0)
    set_forward(logps)
    trainer = make_trainer(**METHODS[name], epsilon=0.2)
    trainer.model.train()
    selected = selected_in(trainer, inputs, inputs["old_per_token_logps"])
    trainer._compute_loss(trainer.model, inputs)
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    log_ratio = (logps - inputs["old_per_token_logps"]).detach()
    if name == "kl_cov":
        expected = float(log_ratio[selected].abs().mean())
        assert metrics["entropy_control/selected_abs_log_ratio"] == pytest.approx(expected)
    else:
        advantages = inputs["advantages"][:, None].expand_as(logps)[selected]
        ratio = log_ratio[selected].exp()
        clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
        assert 0 < float(clipped.float().mean()) < 1
        assert metrics["entropy_control/selected_already_clipped"] == pytest.approx(float(clipped.float().mean()))


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 8 * 2**-23), ("bf16", 2**-7), ("bf16 model", 2**-7)])
def test_rounding_is_that_of_the_forward_pass(make_trainer, tiny_model, loss_inputs, precision, rounding):
    model = copy.deepcopy(tiny_model)
    trainer = make_trainer(
        **KL_COV, bf16=precision == "bf16", model=model.bfloat16() if precision == "bf16 model" else model
    )
    logps, inputs = loss_inputs()
    assert trainer._batches.of(inputs, logps).rounding == rounding


def test_clip_metrics_with_a_second_bound_and_per_token_advantages(make_trainer, set_forward, loss_inputs):
    for per_token, overrides in (
        (False, {"epsilon": 1.0, "delta": 1.5}),
        (False, {"epsilon": 0.2, "delta": 1.1}),
        (True, {"epsilon": 0.2, "loss_type": "vespo"}),
        (True, {"epsilon": 0.2}),
    ):
        logps, inputs = loss_inputs(rows=8, length=20, drift=0.8, per_token=per_token)
        set_forward(logps)
        on, off = (make_trainer(**kw, **overrides) for kw in (CLIP_COV, {"entropy_control": None}))
        for trainer in (on, off):
            trainer.model.train()
            trainer._compute_loss(trainer.model, inputs)
        for name, value in off._metrics["train"].items():
            assert on._metrics["train"][name] == pytest.approx(value, rel=1e-6), (name, overrides)


def test_scoring_pass_does_not_warn_about_checkpointing(make_trainer, recwarn):
    trainer = make_trainer(
        **CLIP_COV,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    trainer.train()
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]


def test_model_card_with_the_control_off_is_trls(make_trainer, tmp_path):
    make_trainer(entropy_control=None).create_model_card(model_name="tiny")
    assert "2505.22617" not in (tmp_path / "out" / "README.md").read_text()
