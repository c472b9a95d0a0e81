"""Controls that act together: by hand, in order, with their own states and metrics, and in real training."""

import json
import math
from dataclasses import dataclass

import oracle
import pytest
import torch
import yaml
from test_rivals import advantage, clipped_loss, entropies_like, logged, omegas, tokens, train

from entropy_trl import (
    Chain,
    ClipCov,
    EntropyControl,
    KLCov,
    Steer,
    TargetedClipHigher,
    TokenEdit,
    build_control,
)
from entropy_trl.cli import parse_train_args, train_main


INF = math.inf
CLIP_COV = {"fraction": 0.2, "cov_low": 0.05, "cov_high": 3.0}
KL_COV = {"fraction": 0.2, "coef": 0.7}
TARGETED = {"epsilon": 0.1, "delta": 0.05, "k_max": 0.2, "entropy_target": 2.8}
RANGE = 0.9, 1 / 0.9 + 0.3  # that of TARGETED with k = 0.3


@pytest.fixture
def loss_of(make_trainer, set_forward):
    """Loss and gradient of a micro-batch through the real trainer, and the trainer."""

    def compute(name, kwargs, logps, inputs, entropies=None, state=None, **overrides):
        trainer = make_trainer(entropy_control=name, entropy_control_kwargs=kwargs, loss_type="bnpo", **overrides)
        trainer._control_state.values |= state or {}
        set_forward(logps, entropies)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        return loss.detach(), torch.autograd.grad(loss, logps)[0], trainer

    return compute


def by_hand(logps, inputs, token_loss):
    """Gradient of the mean over the valid tokens of `token_loss(where, r, A, log r)`."""
    leaf = logps.detach().requires_grad_()
    losses = []
    for b, t in tokens(inputs["completion_mask"]):
        log_ratio = leaf[b, t] - inputs["old_per_token_logps"][b, t]
        losses.append(token_loss((b, t), torch.exp(log_ratio), advantage(inputs, b, t), log_ratio))
    return torch.autograd.grad(sum(losses) / len(losses), leaf)[0]


def chosen(trainer, inputs, scores):
    selected = trainer.entropy_control.select(trainer._batches.of(inputs, scores)).selected
    return {tuple(i) for i in selected.nonzero().tolist()}


@pytest.mark.parametrize("names", ["clip_cov+targeted_clip_higher", "targeted_clip_higher+clip_cov"])
def test_clip_cov_with_a_clip_range(loss_of, loss_inputs, names):
    logps, inputs = loss_inputs(rows=8, length=12, drift=0.5)
    kwargs = {"clip_cov": CLIP_COV, "targeted_clip_higher": TARGETED}
    _, gradient, trainer = loss_of(names, kwargs, logps, inputs, state={"targeted_clip_higher/k": 0.3})
    assert (trainer.epsilon_low, trainer.epsilon_high) == (INF, INF)
    dropped = chosen(trainer, inputs, inputs["old_per_token_logps"])
    alone = ClipCov(**CLIP_COV).select(trainer._batches.of(inputs, inputs["old_per_token_logps"])).selected
    assert dropped == {tuple(i) for i in alone.nonzero().tolist()} and len(dropped) > 3
    expected = by_hand(logps, inputs, lambda where, r, a, _: 0 * r if where in dropped else clipped_loss(r, a, *RANGE))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    only_one = by_hand(logps, inputs, lambda where, r, a, _: clipped_loss(r, a, *RANGE))
    assert not torch.allclose(gradient, only_one, rtol=1e-3)


@pytest.mark.parametrize("names", ["kl_cov+targeted_clip_higher", "targeted_clip_higher+kl_cov"])
def test_kl_cov_with_a_clip_range(loss_of, loss_inputs, names):
    logps, inputs = loss_inputs(rows=8, length=12, drift=0.5)
    kwargs = {"kl_cov": KL_COV, "targeted_clip_higher": TARGETED}
    _, gradient, trainer = loss_of(names, kwargs, logps, inputs, state={"targeted_clip_higher/k": 0.3})
    cov = oracle.covariances(inputs["old_per_token_logps"], inputs["advantages"], inputs["completion_mask"])
    penalised = oracle.kl_cov_selected(cov, 0.2)
    assert chosen(trainer, inputs, inputs["old_per_token_logps"]) == penalised

    def token_loss(where, r, a, log_ratio):
        return clipped_loss(r, a, *RANGE) + (0.7 * torch.abs(log_ratio) if where in penalised else 0.0)

    torch.testing.assert_close(gradient, by_hand(logps, inputs, token_loss), rtol=1e-10, atol=1e-12)
    stopped = by_hand(logps, inputs, lambda where, r, a, _: clipped_loss(r, a, *RANGE)) == 0
    assert any(bool(stopped[i]) for i in penalised)  # clipped and penalised: the penalty's gradient alone


@pytest.mark.parametrize(("names", "clip"), [("steer+kl_cov", (0.8, 1.28)), ("kl_cov+steer", (-INF, INF))])
def test_weights_with_a_penalty_and_the_ratio_clip_of_the_first(loss_of, loss_inputs, names, clip):
    # STEER weighs the policy loss, not the penalty. It needs scores of the current policy, so KL-Cov has them too.
    logps, inputs = loss_inputs(rows=8, length=12, drift=0.5)
    entropies = entropies_like(logps)
    kwargs = {"kl_cov": KL_COV, "steer": {"weight_min": 0.3}}
    _, gradient, _ = loss_of(names, kwargs, logps, inputs, entropies)
    penalised = oracle.kl_cov_selected(oracle.covariances(logps, inputs["advantages"], inputs["completion_mask"]), 0.2)
    change = omegas(logps, inputs, entropies)
    largest = max(abs(x) for x in change.values())

    def token_loss(where, r, a, log_ratio):
        weight = 0.3 ** (abs(change[where]) / largest)
        return weight * clipped_loss(r, a, *clip) + (0.7 * torch.abs(log_ratio) if where in penalised else 0.0)

    torch.testing.assert_close(gradient, by_hand(logps, inputs, token_loss), rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Add(EntropyControl):
    amount: float = 1.0

    def edit(self, batch, selected):
        return TokenEdit(advantages=(batch.advantages + self.amount).expand_as(batch.logps))


@dataclass(frozen=True)
class Multiply(EntropyControl):
    factor: float = 3.0

    def edit(self, batch, selected):
        return TokenEdit(advantages=(batch.advantages * self.factor).expand_as(batch.logps))

    def initial_state(self):
        return {"steps": 0.0}

    def next_state(self, state, entropy, progress):
        return {"steps": state["steps"] + 1}


def test_the_order_is_that_of_the_names(loss_of, loss_inputs):
    logps, inputs = loss_inputs(drift=0.0)
    add, multiply = f"{__name__}.Add", f"{__name__}.Multiply"
    for names, edited in ((f"{add}+{multiply}", lambda a: 3 * (a + 1)), (f"{multiply}+{add}", lambda a: 3 * a + 1)):
        _, gradient, _ = loss_of(names, None, logps, inputs)
        expected = by_hand(logps, inputs, lambda where, r, a, _, edited=edited: -r * edited(a))
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_states_are_kept_apart():
    chain = Chain({"a": Multiply(), "targeted_clip_higher": TargetedClipHigher(entropy_target=1.0), "b": Multiply()})
    state = chain.initial_state()
    assert state == {"a/steps": 0.0, "targeted_clip_higher/k": 0.0, "b/steps": 0.0}
    state = chain.next_state(state | {"a/steps": 5.0}, 0.5, 0.1)
    assert state == {"a/steps": 6.0, "targeted_clip_higher/k": 0.25, "b/steps": 1.0}


CLAIMS = {  # what each control wants for itself
    "clip_cov": {"tokens"},
    "kl_cov": {"tokens"},
    "flexible_clip": {"range"},
    "ce_gppo": {"range"},
    "targeted_clip_higher": {"range", "target"},
    "entropic": {"target"},
    "steer": {"weights"},
}


@pytest.mark.parametrize("first", CLAIMS)
@pytest.mark.parametrize("second", CLAIMS)
def test_pairs_that_want_the_same_thing_are_refused(make_config, first, second):
    def make():
        return make_config(entropy_control=f"{first}+{second}").make_entropy_control()

    if first == second:
        with pytest.raises(ValueError, match="twice"):
            make()
    elif CLAIMS[first] & CLAIMS[second]:
        with pytest.raises(ValueError, match=f"`{first}` and `{second}` cannot act together: both want the"):
            make()
    else:
        assert list(make().controls) == [first, second]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"entropy_control": "kl_cov+stear"}, ["'stear'", "did you mean 'steer'"]),
        ({"entropy_control": "kl_cov+"}, ["''"]),
        (
            {"entropy_control": "kl_cov+steer", "entropy_control_kwargs": {"fraction": 0.1}},
            ["a mapping for each control", "'fraction': 0.1"],
        ),
        (
            {"entropy_control": "kl_cov+steer", "entropy_control_kwargs": {"clip_cov": {"fraction": 0.1}}},
            ["'clip_cov'", "Valid: 'kl_cov', 'steer'"],
        ),
        (
            {"entropy_control": "kl_cov+steer", "entropy_control_kwargs": {"steer": {"fraction": 0.1}}},
            ["'fraction'", "'steer'", "'weight_min'"],
        ),
        (
            {"entropy_control": "kl_cov+steer", "entropy_control_kwargs": {"steer": {"weight_min": 2}}},
            ["weight_min", "2"],
        ),
        ({"entropy_control": "clip_cov+steer", "importance_sampling_level": "sequence"}, ["sequence"]),
        ({"entropy_control": "kl_cov+ce_gppo", "loss_type": "sapo"}, ["kl_cov+ce_gppo", "moves the ratio clip"]),
        ({"entropy_control": "kl_cov+ce_gppo", "steps_per_generation": 1}, ["can never act"]),
    ],
)
def test_refused_with_the_value_and_the_fix(make_config, overrides, words):
    with pytest.raises(ValueError) as error:
        make_config(**overrides)
    for word in words:
        assert word in str(error.value)


def test_a_chain_of_one_is_refused():
    with pytest.raises(ValueError, match="two controls or more, got kl_cov"):
        Chain({"kl_cov": KLCov()})


@pytest.mark.parametrize(
    ("names", "clip"),
    [
        ("clip_cov+steer", (1.0, 1.0)),
        ("steer+clip_cov", (0.2, 0.28)),
        ("clip_cov+targeted_clip_higher", (INF, INF)),  # the owner of the range, wherever it stands
        ("entropic+ce_gppo", (INF, INF)),
        ("entropic+clip_cov", (0.2, 0.2)),
    ],
)
def test_ratio_clip_of_a_chain(make_config, names, clip):
    assert make_config(entropy_control=names).ratio_clip() == clip
    given = {"entropy_control": names, "epsilon": 0.3, "epsilon_high": 0.4}
    if clip == (INF, INF):
        with pytest.raises(ValueError, match="ratio clip of its own"):
            make_config(**given)
    else:
        assert make_config(**given).ratio_clip() == (0.3, 0.4)


def test_what_one_part_needs_the_chain_needs():
    chain = build_control("entropic+kl_cov")
    assert chain.needs_pool and not chain.acts_on_policy and not chain.scores_entropies and not chain.drops_tokens
    chain = build_control("kl_cov+ce_gppo")
    assert chain.drops_tokens and not chain.acts_on_policy
    chain = build_control("clip_cov+steer")
    assert chain.scores_entropies and chain.acts_on_policy


@pytest.mark.parametrize(
    ("names", "inert"),
    [
        ("kl_cov+steer", "`kl_cov` can"),
        ("clip_cov+flexible_clip", "`flexible_clip` can"),
        ("kl_cov+ce_gppo", "` and `"),
    ],
)
def test_a_part_that_cannot_act_is_refused(make_config, names, inert):
    with pytest.raises(ValueError, match=f"{inert}.*never act here"):
        make_config(entropy_control=names, steps_per_generation=1, use_vllm=True)


NESTED = {"kl_cov": {"fraction": "2e-1", "coef": 0.7}, "targeted_clip_higher": {"entropy_target": 2.8}}
BUILT = Chain({"kl_cov": KLCov(0.2, 0.7), "targeted_clip_higher": TargetedClipHigher(entropy_target=2.8)})


def test_configuration_and_back(make_config):
    for given in (
        {"entropy_control": "kl_cov + targeted_clip_higher", "entropy_control_kwargs": NESTED},
        {"entropy_control": "kl_cov+targeted_clip_higher", "entropy_control_kwargs": json.dumps(NESTED)},
        {"entropy_control": BUILT},
    ):
        config = make_config(**given)
        assert config.make_entropy_control() == BUILT
        for stored in (config.to_dict(), json.loads(config.to_json_string())):
            keys = ("entropy_control", "entropy_control_kwargs")
            assert make_config(**{key: stored[key] for key in keys}).make_entropy_control() == BUILT
    # What is not said has the published value.
    assert build_control("kl_cov+steer", {"kl_cov": {"coef": 2}}).controls == {
        "kl_cov": KLCov(coef=2.0),
        "steer": Steer(),
    }


QUICKSTART = "configs/quickstart/kl_cov.yaml"


def test_on_the_command_line(caplog, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    names = "kl_cov+targeted_clip_higher"
    _, args, _, _ = parse_train_args(["--config", QUICKSTART, "--entropy_control", names])
    assert (
        "replaces the config file's kl_cov, whose entropy_control_kwargs {'fraction': 0.1, 'coef': 1.0}" in caplog.text
    )
    assert args.make_entropy_control() == build_control(names)
    _, args, _, _ = parse_train_args(
        ["--config", QUICKSTART, "--entropy_control", names, "--entropy_control_kwargs", json.dumps(NESTED)]
    )
    assert args.make_entropy_control() == BUILT
    assert args.ratio_clip() == (INF, INF)


def test_in_a_file_through_the_command(tmp_path, monkeypatch, request):
    settings = yaml.safe_load((request.config.rootpath / QUICKSTART).read_text())
    settings |= {"entropy_control": "kl_cov+targeted_clip_higher", "entropy_control_kwargs": NESTED, "max_steps": 16}
    settings |= {"model_factory": "conftest.untrained_policy", "reward_funcs": ["conftest.digit_reward"]}
    settings |= {"output_dir": str(tmp_path / "out"), "disable_tqdm": True}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert train_main(["--config", str(path)]) == 0
    # The file's hyper-parameters stay with the control of the same name.
    _, args, _, _ = parse_train_args(["--config", str(path), "--entropy_control", "kl_cov+targeted_clip_higher"])
    assert args.make_entropy_control() == BUILT
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    last = [log for log in history if "loss" in log][-1]
    assert {"entropy_control/kl_cov/selected_at_rounding", "entropy_control/targeted_clip_higher/k"} <= last.keys()
    assert 0 < last["entropy_control/selected_fraction"] <= 0.2  # what the pool has in common is not prefixed


CHAINS = {
    "clip_cov+targeted_clip_higher": {"clip_cov": CLIP_COV, "targeted_clip_higher": TARGETED},
    "kl_cov+steer+entropic": {
        "kl_cov": KL_COV,
        "steer": {"weight_min": 0.3},
        "entropic": {"entropy_target": 2.8, "min_probability": 0.06},
    },
}


@pytest.mark.parametrize("names", CHAINS)
def test_a_resumed_chain_is_the_same_run(make_trainer, tmp_path, names):
    # A rollout lasts two steps of two micro-batches each: checkpoints 1 and 3 lie inside one.
    overrides = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "learning_rate": 0.02}
    overrides |= {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}
    overrides |= {"entropy_control": names, "entropy_control_kwargs": CHAINS[names]}
    through = make_trainer(**overrides)
    through.train()
    assert through._control_state.values != through.entropy_control.initial_state()
    for checkpoint in (1, 2, 3):
        resumed = make_trainer(**overrides)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        weights = zip(through.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights), checkpoint
        assert logged(through)[checkpoint:] == logged(resumed)[checkpoint:]
        assert through._control_state.values == resumed._control_state.values


@pytest.mark.parametrize("names", CHAINS)
def test_a_chain_trains_whatever_the_cut_of_a_step(make_trainer, names):
    runs = []
    for batch in (8, 2):
        overrides = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        overrides |= {"steps_per_generation": 16 // batch, "entropy_control_kwargs": CHAINS[names]}
        runs.append(train(make_trainer, names, loss_type="dapo", learning_rate=0.02, **overrides))
    (whole, expected), (parts, gradients) = runs
    assert max(float((g - e).norm() / e.norm()) for g, e in zip(gradients, expected, strict=True)) < 1e-4
    prefixes = {
        key.split("/")[1] for log in logged(whole) for key in log if key.count("/") == 2 and "reward" not in key
    }
    assert prefixes == set(names.split("+"))
    for log, wanted in zip(logged(parts), logged(whole), strict=True):
        for key in (k for k in wanted if k.startswith("entropy_control/")):
            assert log[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key


def test_qae_goes_with_a_control(make_trainer):
    trainer, _ = train(
        make_trainer, "clip_cov", advantage_estimator="quantile", entropy_control_kwargs=CLIP_COV | {"cov_low": 0.02}
    )
    assert any(log["entropy_control/selected_fraction"] > 0 for log in logged(trainer))
