"""CovGRPOTrainer in real training: off is TRL, pools, metrics, bad values, checkpoints."""

import math

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import entropy_trl.trainer
from entropy_trl import CONTROLS, CovGRPOConfig, CovGRPOTrainer
from entropy_trl.types import TokenBatch


CLIP_COV = {"entropy_control": "clip_cov", "entropy_control_kwargs": {"fraction": 0.2, "cov_low": 0.02, "cov_high": 9}}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}}
METHODS = {"clip_cov": CLIP_COV, "kl_cov": KL_COV}


def logs(trainer):
    """The log history without wall-clock times."""
    timing = ("time", "per_second", "runtime")
    return [{k: v for k, v in log.items() if not any(t in k for t in timing)} for log in trainer.state.log_history]


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
    select = entropy_trl.trainer._StepWindow._select

    def record(self, pool: TokenBatch):
        selected = select(self, pool)
        rows = {int(row): tuple(s.nonzero().flatten().tolist()) for row, s in zip(pool.row_ids, selected, strict=True)}
        made.append((self.step, rows, int(pool.mask.sum())))
        return selected

    monkeypatch.setattr(entropy_trl.trainer._StepWindow, "_select", record)
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
    assert logs(trained[0]) == logs(trained[1])
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


@pytest.mark.parametrize(("method", "updates"), [("clip_cov", 2), ("kl_cov", 2), ("clip_cov", 1)])
def test_the_step_pool_does_not_depend_on_the_cut(make_trainer, selections, method, updates):
    # From the second update on both methods act; on-policy (one update a rollout) only Clip-Cov does.
    reference, spread = None, []
    for batch in (8, 4, 2, 1):
        if updates == 1 and batch == 8:
            batch = 16
        selections.clear()
        _, gradients = cut(make_trainer, METHODS[method], batch, 2, "step", updates)
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
    score = CovGRPOTrainer._score_micro_batch
    monkeypatch.setattr(
        CovGRPOTrainer,
        "_score_micro_batch",
        lambda self, *args: calls.append(self.state.global_step) or score(self, *args),
    )
    cut(make_trainer, CLIP_COV, 4, 2, "step", updates=2)  # scores: the rollout's log-probs
    cut(make_trainer, CLIP_COV, 16, 2, "step", updates=1)  # on-policy, one micro-batch: the loss's own forward
    assert calls == []
    cut(make_trainer, CLIP_COV, 4, 2, "step", updates=1)  # on-policy, four micro-batches: one scoring pass each
    assert calls == [0, 0, 0, 0, 1, 1, 1, 1]


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


def test_non_finite_advantages_are_counted(make_trainer, set_forward, loss_inputs):
    trainer = make_trainer(**KL_COV)
    logps, inputs = loss_inputs()
    inputs["advantages"][1] = math.inf
    set_forward(logps)
    trainer.model.train()
    tokens = int(inputs["completion_mask"][1].sum())
    with pytest.raises(FloatingPointError, match=f"and {tokens} an advantage that is not finite"):
        trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["step", "micro_batch"])
def test_a_resumed_run_repeats_the_draws(make_trainer, selections, tmp_path, method, pool):
    overrides = METHODS[method] | {"entropy_control_pool": pool, "save_strategy": "steps", "save_steps": 2}
    through = make_trainer(**overrides, max_steps=6)
    through.train()
    drawn = [s for s in selections if s[0] >= 4]
    selections.clear()
    resumed = make_trainer(**overrides, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))  # a rollout ends there
    assert [s for s in selections if s[0] >= 4] == drawn
    assert same_weights(through, resumed)
    assert logs(through)[4:6] == logs(resumed)[4:6]


@pytest.mark.parametrize("method", CONTROLS)
def test_model_card_names_the_paper(make_trainer, tmp_path, method):
    trainer = make_trainer(entropy_control=method)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2505.22617" in card and "entropy-trl" in card
