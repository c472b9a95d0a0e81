"""Every feature of TRL's loss x every control: the gradient of an independent oracle, or a named error at construction.

Here for Clip-Cov and KL-Cov; for the other controls their own tests have it. Also: real runs, with every control, of
the features that change the model or the loop rather than the loss.
"""

import math

import oracle
import pytest
import torch

from entropy_trl import CONTROLS
from entropy_trl.quickstart.task import build_model


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
KWARGS = {
    "clip_cov": {"fraction": 0.2, "cov_low": 0.05, "cov_high": 3.0},
    "kl_cov": {"fraction": 0.2, "coef": 0.7},
}
REFUSED = {("clip_cov", "sequence level"): "importance_sampling_level"}

IMPORTANCE = torch.rand(4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5
ENTROPIES = torch.rand(4, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def reference(inputs):
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return inputs | {"ref_per_token_logps": inputs["old_per_token_logps"] + 0.2 * noise}


def tools(inputs):
    return inputs | {"tool_mask": torch.tensor([[1, 0, 1, 1, 0, 1]] * 4)}


def importance(inputs):
    return inputs | {"importance_sampling_ratio": IMPORTANCE, "sampling_per_token_logps": inputs["old_per_token_logps"]}


def high_entropy(inputs):
    valid = inputs["completion_mask"].bool()
    return ENTROPIES[valid].float().quantile(0.6) <= ENTROPIES


#: name: (configuration, change of the inputs, what the oracle is told)
FEATURES = {
    "plain": ({}, None, {}),
    "per-token advantages": ({}, lambda i: i | {"advantages": i["advantages"][:, None] * IMPORTANCE}, {}),
    "epsilon given": ({"epsilon": 0.1, "epsilon_high": 0.15}, None, {"low": 0.1, "high": 0.15}),
    "delta": ({"epsilon": 0.1, "delta": 1.3}, None, {"low": 0.1, "high": 0.1, "delta": 1.3}),
    "tool mask": ({}, tools, {}),
    "beta": ({"beta": 0.04, "use_bias_correction_kl": False}, reference, {"beta": 0.04}),
    "beta, bias correction": (
        {"beta": 0.04, "use_bias_correction_kl": True},
        reference,
        {"beta": 0.04, "bias_correction": True},
    ),
    "high-entropy mask": ({"top_entropy_quantile": 0.4}, None, {"token_filter": high_entropy}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.02}, None, {"off_policy_threshold": 0.02}),
    "both masks": (
        {"top_entropy_quantile": 0.4, "off_policy_mask_threshold": 0.02},
        None,
        {"token_filter": high_entropy, "off_policy_threshold": 0.02},
    ),
    "vLLM importance correction": ({}, importance, {"importance_ratio": IMPORTANCE}),
    "sequence level": ({"importance_sampling_level": "sequence"}, None, {"sequence_level": True}),
    "accumulation": (
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        None,
        {"accumulation": 2, "steps_per_generation": 4},
    ),
}
CASES = [(loss_type, "plain") for loss_type in LOSS_TYPES]
CASES += [(loss_type, feature) for feature in FEATURES if feature != "plain" for loss_type in ("dapo", "grpo")]
CASES += [
    ("vespo", "vLLM importance correction"),
    ("luspo", "sequence level"),
    ("cispo", "tool mask"),
    ("sapo", "high-entropy mask"),
]


@pytest.mark.parametrize("control", KWARGS)
@pytest.mark.parametrize(("loss_type", "feature"), CASES)
def test_gradient_matches_the_oracle_or_is_refused(
    make_trainer, make_config, set_forward, loss_inputs, control, loss_type, feature
):
    config, change, told = FEATURES[feature]
    config = {"loss_type": loss_type, "entropy_control": control, "entropy_control_kwargs": KWARGS[control]} | config
    config["entropy_control_pool"] = "micro_batch"
    if (control, feature) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[control, feature]):
            make_config(**config)
        return
    trainer = make_trainer(**{k: v for k, v in config.items() if k != "beta"})
    trainer.beta = config.get("beta", 0.0)  # no reference model is needed: its log-probs are given
    if change is importance:
        trainer.use_vllm = True

    logps, inputs = loss_inputs()
    inputs = change(inputs) if change else inputs
    told = {"low": trainer.epsilon_low, "high": trainer.epsilon_high} | told
    if callable(told.get("token_filter")):
        told["token_filter"] = told["token_filter"](inputs)
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    counted = mask * told.get("token_filter", 1)  # a control selects among the tokens of the policy loss
    cov = oracle.covariances(logps.detach(), inputs["advantages"], counted)
    if control == "kl_cov":
        told["penalised"] = oracle.kl_cov_selected(cov, 0.2)
        told["coef"] = 0.7
    else:
        batch = trainer._batches.of(inputs | {"completion_mask": counted}, logps.detach())
        told["dropped"] = {tuple(i) for i in trainer.entropy_control.select(batch).selected.nonzero().tolist()}
        assert told["dropped"] <= oracle.clip_cov_candidates(cov, 0.05, 3.0)
        assert told["dropped"]

    set_forward(logps, ENTROPIES)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logps)
    leaf = logps.detach().clone().requires_grad_()
    expected = oracle.loss(leaf, inputs, loss_type, **told)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    # float32 enters through TRL: num_items_in_batch / processes, and vespo's clamps.
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)


def test_a_sequence_that_the_loss_leaves_out_has_no_penalty(make_trainer, set_forward, loss_inputs):
    logps, inputs = loss_inputs()
    inputs["advantages"] = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    options = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 1.0}, "epsilon": 0.2}
    gradients = []
    for masked in (False, True):
        trainer = make_trainer(**options, off_policy_mask_threshold=0.0 if masked else None)
        set_forward(logps)
        trainer.model.train()
        gradients += torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)
    drift = ((inputs["old_per_token_logps"] - logps.detach()) * inputs["completion_mask"]).sum(1)
    left_out = (drift > 0) & (inputs["advantages"] < 0)
    assert 0 < left_out.sum() < 4
    assert gradients[0][left_out].count_nonzero() > 0 == gradients[1][left_out].count_nonzero()
    assert torch.equal(gradients[0][~left_out], gradients[1][~left_out])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adaptive", [False, True], ids=["entropy bonus", "adaptive entropy"])
def test_entropy_bonus_is_added_untouched(make_trainer, set_forward, loss_inputs, control, adaptive):
    overrides = {"entropy_control": control, "entropy_control_kwargs": KWARGS.get(control)}
    bonus = {"use_adaptive_entropy": True} if adaptive else {}
    logps, inputs = loss_inputs()
    gradients = {}
    for coef in (0.0, 0.05):
        trainer = make_trainer(**overrides, **({"entropy_coef": coef} | bonus if coef else {}))
        trainer._last_world_entropy = -1.0  # below the target, so that the adaptive bonus is on
        entropies = ENTROPIES.clone().requires_grad_()
        set_forward(logps, entropies)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        gradients[coef] = torch.autograd.grad(loss, (logps, entropies), allow_unused=True)
    mask = inputs["completion_mask"].double()
    assert torch.equal(gradients[0.0][0], gradients[0.05][0])
    torch.testing.assert_close(gradients[0.05][1], -0.05 * mask / mask.sum())


@pytest.mark.parametrize("control", CONTROLS)
def test_moe_auxiliary_loss_is_added_untouched(make_trainer, set_forward, loss_inputs, control):
    logps, inputs = loss_inputs()
    losses = []
    for auxiliary in (0.0, 3.0):
        trainer = make_trainer(entropy_control=control, entropy_control_kwargs=KWARGS.get(control))
        trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.1
        set_forward(logps, aux_loss=torch.tensor(auxiliary, dtype=torch.float64))
        trainer.model.train()
        losses.append(trainer._compute_loss(trainer.model, inputs).item())
    assert losses[1] - losses[0] == pytest.approx(0.3)


def moe_model():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from entropy_trl.quickstart.task import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        router_aux_loss_coef=0.01,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2MoeForCausalLM(config)


def lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


def adapted_model():
    from peft import get_peft_model

    return get_peft_model(build_model(seed=0), lora()["peft_config"])


#: name: () -> (configuration, other arguments of the trainer factory)
REAL_RUNS = {
    "num_iterations": lambda: ({"steps_per_generation": 1, "num_iterations": 3}, {}),
    "gradient checkpointing": lambda: ({"gradient_checkpointing": True}, {}),
    "reentrant checkpointing": lambda: (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "LoRA": lambda: ({}, {"trainer_kwargs": lora()}),
    "LoRA and beta": lambda: ({"beta": 0.01}, {"trainer_kwargs": lora()}),
    "a model with LoRA, and beta": lambda: ({"beta": 0.01}, {"model": adapted_model()}),
    "mixture of experts": lambda: ({}, {"model": moe_model()}),
    "bf16": lambda: ({"bf16": True}, {}),
    "truncated completions masked": lambda: ({"mask_truncated_completions": True}, {}),
    "fp32 LM head": lambda: ({"cast_lm_head_to_fp32": True}, {}),
    "batch-scaled rewards": lambda: ({"scale_rewards": "batch"}, {}),
}


# The others do the same in both pools: they have none.
POOLS = [(name, "step") for name in CONTROLS]
POOLS += [(name, "micro_batch") for name, control in CONTROLS.items() if control.needs_pool]


@pytest.mark.parametrize(("control", "pool"), POOLS)
@pytest.mark.parametrize("feature", REAL_RUNS)
def test_real_run(make_trainer, control, pool, feature):
    config, other = REAL_RUNS[feature]()
    trainer = make_trainer(
        entropy_control=control,
        entropy_control_pool=pool,
        entropy_control_kwargs=KWARGS[control] | {"fraction": 0.1} if control in KWARGS else None,
        **config,
        **other,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 4
    assert all(math.isfinite(log["loss"]) for log in steps)
    if control not in KWARGS:
        return
    # Masked truncation may leave a step without any token.
    with_tokens = [log for log in steps if log["entropy_control/selected_fraction"] is not None]
    assert with_tokens and all(0 <= log["entropy_control/selected_fraction"] <= 0.5 for log in with_tokens)
    assert any(log["entropy_control/selected_fraction"] > 0 for log in with_tokens)
    if control == "kl_cov":
        assert max(log["entropy_control/penalty"] for log in steps) > 0
