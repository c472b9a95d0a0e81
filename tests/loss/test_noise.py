"""What two forward passes of one policy differ by, and what KL-Cov's metric makes of it."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_trl.loss.call import LossCall
from entropy_trl.loss.noise import ForwardNoise, warn_of_dropout


KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}}
EIGHT_STEPS = {"max_steps": 8, "steps_per_generation": 4, "learning_rate": 1e-3}


def with_attention_dropout(model, rate):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = rate
    return model


def logged(trainer, name):
    key = f"entropy_control/{name}"
    return [entry.get(key) for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def seen(monkeypatch):
    """(batch, selected) of every call of the loss."""
    seen, result = [], LossCall.result

    def record(call):
        seen.append((call.batch, call.selected))
        return result(call)

    monkeypatch.setattr(LossCall, "result", record)
    return seen


def differences(batch):
    logps = batch.logps.detach().double()
    return (logps - batch.old_logps).abs() / logps.abs().clamp(min=1)


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 8},
        {"steps_per_generation": 2, "num_iterations": 2},
        {"entropy_control_pool": "micro_batch"},
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_first_update_of_a_rollout_measures_the_noise_of_the_others(make_trainer, tiny_model, seen, rate, cut):
    trainer = make_trainer(**KL_COV | EIGHT_STEPS | cut, model=with_attention_dropout(tiny_model, rate))
    trainer.train()
    per_step = trainer.args.gradient_accumulation_steps
    level = 0.0
    for step, (share, noise) in enumerate(
        zip(logged(trainer, "selected_at_rounding"), logged(trainer, "forward_noise"), strict=True)
    ):
        calls = seen[step * per_step : (step + 1) * per_step]
        relative = torch.cat([differences(batch)[batch.mask] for batch, _ in calls])
        selected = torch.cat([differences(batch)[chosen] for batch, chosen in calls])
        if step % 4 == 0:
            level = float(relative.square().mean().sqrt())
            assert noise == pytest.approx(level) and share == 1.0
            assert (level > 1e-4) == (rate > 0)
        else:
            assert noise is None
            assert share == pytest.approx(float((selected <= max(3 * level, 8 * 2**-23)).float().mean()))


def test_a_rollout_that_begins_inside_a_step(make_trainer):
    # Rollouts of three micro-batches, steps of two: the second step ends the first rollout and begins the second one.
    trainer = make_trainer(
        **KL_COV, entropy_control_pool="micro_batch", steps_per_generation=3, gradient_accumulation_steps=2
    )
    trainer.train()
    assert logged(trainer, "selected_at_rounding")[0] == 1.0
    assert logged(trainer, "selected_at_rounding")[1] < 1.0


def test_a_resumed_run_knows_the_noise(make_trainer, tiny_model, tmp_path):
    runs = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = make_trainer(
            **KL_COV | EIGHT_STEPS | {"learning_rate": 1e-2},
            model=with_attention_dropout(tiny_model, 0.1),
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    shares = [logged(trainer, "selected_at_rounding") for trainer in runs]
    assert shares[0] == shares[1] and runs[0]._batches.noise.level == runs[1]._batches.noise.level > 0
    assert any(0 < share < 1 for share in shares[0])


@pytest.mark.parametrize("level", [-1.0, float("nan"), "0.1", True])
def test_a_damaged_level_is_refused(tmp_path, level):
    with pytest.raises(ValueError, match=r"forward_noise.json: .*no run measures"):
        ForwardNoise().load({"level": level}, tmp_path)


@pytest.mark.parametrize(
    ("control", "dropout", "warns"), [("kl_cov", 0.05, 1), ("kl_cov", 0.0, 0), ("clip_cov", 0.05, 0)]
)
def test_dropout_that_the_penalty_would_act_on_is_told(make_trainer, recwarn, control, dropout, warns):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=dropout)
    make_trainer(entropy_control=control, trainer_kwargs={"peft_config": lora})
    assert sum("`lora_dropout=0` for LoRA" in str(warning.message) for warning in recwarn) == warns


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda tiny: with_attention_dropout(tiny, 0.2), "`attention_dropout` 0.2"),
        (lambda tiny: tiny, None),
        (lambda tiny: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), "up to 0.1"),
        (
            lambda tiny: GPT2LMHeadModel(
                GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
            ),
            None,  # `summary_first_dropout` is of another head
        ),
    ],
)
def test_rates_without_a_module_are_found(tiny_model, recwarn, model, words):
    made = model(tiny_model)
    warn_of_dropout(made, made.config.to_dict())
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (words is not None) and all(words in text for text in told)


def test_rates_that_only_the_configuration_has_are_found(tiny_model, recwarn):
    warn_of_dropout(tiny_model, {"text_config": {"hidden_dropout": 0.3}, "classifier_dropout": 0.1, "dropout": None})
    (told,) = (str(warning.message) for warning in recwarn)
    assert "`hidden_dropout` 0.3" in told and "classifier" not in told
