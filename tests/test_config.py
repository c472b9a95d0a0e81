"""What CovGRPOConfig refuses, warns about, and takes for the ratio clip."""

import json
import math
import warnings

import pytest
import torch
from trl import GRPOConfig

from entropy_trl import CONTROLS, ClipCov, CovGRPOConfig, KLCov, TokenBatch, build_control


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # KL-Cov that can never act.
        ({"entropy_control": "kl_cov", "steps_per_generation": 1}, ["steps_per_generation=8", "num_iterations"]),
        (
            {"entropy_control": "kl_cov", "steps_per_generation": 4, "gradient_accumulation_steps": 4},
            ["gradient_accumulation_steps` (4)", "steps_per_generation=32"],
        ),
        (
            {"entropy_control": "kl_cov", "steps_per_generation": 1, "use_vllm": True},
            ["can never act", "num_iterations"],
        ),
        # Pools that cannot be.
        (
            {"entropy_control_pool": "micro_batch", "per_device_train_batch_size": 1, "steps_per_generation": 4},
            ["one sequence", "per_device_train_batch_size"],
        ),
        (
            {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
            ["steps_per_generation` (2)", "gradient_accumulation_steps` (4)"],
        ),
        (
            {"steps_per_generation": 6, "gradient_accumulation_steps": 4},
            ["steps_per_generation` (6)", "micro_batch"],
        ),
        ({"entropy_control_pool": "steps"}, ["'steps'", "did you mean 'step'", "'micro_batch'"]),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 4}, ["one sequence", "step"]),
        ({"entropy_control_pool": None}, ["None", "'step'"]),
        ({"entropy_control_kwargs": ["fraction"]}, ["['fraction']", "mapping"]),
        ({"entropy_control": 3}, ["3", "'clip_cov'"]),
        ({"epsilon": -0.2}, ["epsilon", "-0.2"]),
        # Hyper-parameters.
        *(
            ({"entropy_control_kwargs": {"fraction": fraction}}, [repr(float(fraction)), "(0, 1]"])
            for fraction in (0.0, -0.1, 1.5, math.nan, 20)
        ),
        ({"entropy_control_kwargs": {"fraction": "a lot"}}, ["'a lot'", "number"]),
        ({"entropy_control_kwargs": {"fraction": True}}, ["True", "number"]),
        ({"entropy_control_kwargs": {"cov_low": 5.0, "cov_high": 1.0}}, ["(5.0, 1.0)"]),
        ({"entropy_control_kwargs": {"cov_low": 1.0, "cov_high": 1.0}}, ["empty"]),
        ({"entropy_control_kwargs": {"cov_low": math.nan}}, ["empty"]),
        ({"entropy_control_kwargs": {"cov_low": -math.inf}}, ["finite"]),
        ({"entropy_control": "kl_cov", "entropy_control_kwargs": {"coef": -1}}, ["-1.0", "negative"]),
        ({"entropy_control": "kl_cov", "entropy_control_kwargs": {"coef": math.inf}}, ["inf"]),
        ({"entropy_control_kwargs": {"selection": "rand"}}, ["'rand'", "'random'"]),
        # Scores of the sampler.
        ({"entropy_control_scores": "sampling"}, ["sampling", "`use_vllm=False`", "rollout"]),
        (
            {"entropy_control_scores": "sampling", "use_vllm": True, "top_p": 0.9},
            ["`top_p=0.9`", "`top_p=1`", "rollout"],
        ),
        # Names.
        ({"entropy_control": "clipcov"}, ["'clipcov'", "did you mean 'clip_cov'", "'kl_cov'"]),
        ({"entropy_control_kwargs": {"fractoin": 0.1}}, ["'fractoin'", "did you mean 'fraction'", "'cov_low'"]),
        ({"entropy_control_kwargs": {"coef": 1.0}}, ["'coef'", "'clip_cov'"]),
        ({"entropy_control_kwargs": "fraction=0.1"}, ["fraction=0.1", "mapping"]),
        ({"entropy_control": None, "entropy_control_kwargs": {"fraction": 0.1}}, ["off", "clip_cov"]),
        # Losses in which a token cannot be taken out.
        ({"importance_sampling_level": "sequence"}, ["sequence", "kl_cov"]),
        ({"loss_type": "dappo"}, ["'dappo'", "did you mean 'dapo'"]),
    ],
)
def test_refused_with_the_value_the_reason_and_the_fix(make_config, overrides, words):
    with pytest.raises(ValueError) as error:
        make_config(**overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"entropy_control": "kl_cov", "steps_per_generation": 2},
        {"entropy_control": "kl_cov", "steps_per_generation": 1, "num_iterations": 2},
        {"entropy_control": "kl_cov", "importance_sampling_level": "sequence"},
        {"entropy_control": "clip_cov", "steps_per_generation": 1},
        {"per_device_train_batch_size": 1, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        # A random draw compares no sequences.
        *(
            {
                "entropy_control": control,
                "entropy_control_kwargs": {"selection": "random"},
                "entropy_control_pool": pool,
                "per_device_train_batch_size": 1,
                "steps_per_generation": 4,
            }
            for control in ("clip_cov", "kl_cov")
            for pool in ("micro_batch", "step")
        ),
        {"entropy_control": None, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
        {"entropy_control": None, "importance_sampling_level": "sequence"},
    ],
)
def test_accepted(make_config, overrides):
    make_config(**overrides)


def test_a_change_after_construction_is_checked_by_the_trainer(make_trainer, make_config, monkeypatch):
    config = make_config()
    config.entropy_control = "kl_cov"
    config.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="can never act"):
        config.make_entropy_control()


@pytest.mark.parametrize("word", ["none", "None", "null", False])
def test_none_means_off(make_config, word):
    assert make_config(entropy_control=word).entropy_control is None


def test_defaults_are_the_papers():
    assert ClipCov() == ClipCov(fraction=2e-4, cov_low=1.0, cov_high=5.0, selection="covariance")
    assert KLCov() == KLCov(fraction=2e-3, coef=1.0, selection="covariance")
    fields = CovGRPOConfig.__dataclass_fields__
    assert fields["entropy_control"].default == "clip_cov"
    assert fields["entropy_control_pool"].default == "step"
    assert fields["epsilon"].default is None


@pytest.mark.parametrize("text", ["2e-3", 0.002, "0.002"])
def test_numbers_may_be_text(text):
    assert build_control("kl_cov", {"fraction": text}) == KLCov(fraction=2e-3)


def test_kwargs_may_be_json(make_config):
    config = make_config(entropy_control="kl_cov", entropy_control_kwargs='{"fraction": 0.01, "coef": 2}')
    assert config.make_entropy_control() == KLCov(fraction=0.01, coef=2.0)


@pytest.mark.parametrize(
    ("overrides", "clip"),
    [
        ({"entropy_control": None}, (0.2, 0.2)),
        ({"entropy_control": "clip_cov"}, (1.0, 1.0)),
        ({"entropy_control": "kl_cov"}, (math.inf, math.inf)),
        ({"entropy_control": "kl_cov", "epsilon": 0.2}, (0.2, 0.2)),
        ({"entropy_control": "clip_cov", "epsilon": 0.2, "epsilon_high": 0.28}, (0.2, 0.28)),
        ({"entropy_control": "clip_cov", "epsilon_high": 0.28}, (1.0, 0.28)),
        ({"entropy_control": None, "epsilon_high": 0.28}, (0.2, 0.28)),
        ({"entropy_control": "clip_cov", "loss_type": "cispo"}, (1.0, 2.0)),
        ({"entropy_control": "kl_cov", "loss_type": "cispo"}, (math.inf, math.inf)),
        ({"entropy_control": "kl_cov", "loss_type": "cispo", "epsilon_high": 5.0}, (math.inf, 5.0)),
    ],
)
def test_epsilon_defaults_to_the_published_range(make_trainer, overrides, clip):
    trainer = make_trainer(**overrides)
    assert (trainer.epsilon_low, trainer.epsilon_high) == clip


def test_a_percentage_is_suspected(make_config):
    big = {"per_device_train_batch_size": 8, "max_completion_length": 2000}
    with pytest.warns(UserWarning, match="percentages"):
        make_config(entropy_control_kwargs={"fraction": 0.2}, **big)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config(entropy_control_kwargs={"fraction": 0.05}, **big)
        make_config(entropy_control_kwargs={"fraction": 0.2})  # a pool of 48 tokens


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
def test_a_truncated_distribution_biases_the_correction(make_config, cut):
    (name,) = cut
    with pytest.warns(UserWarning, match=f"`{name}={cut[name]}`.*biased") as told:
        make_config(use_vllm=True, **cut)
    assert len([w for w in told if "biased" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*biased")
        make_config(use_vllm=True, vllm_importance_sampling_correction=False, **cut)
        make_config(use_vllm=True)
        make_config(**cut)


def test_survives_a_round_trip_through_a_file(make_config, tmp_path):
    config = make_config(entropy_control="kl_cov", entropy_control_kwargs={"fraction": 0.01})
    values = json.loads(config.to_json_string())
    assert values["entropy_control"] == "kl_cov"
    assert values["entropy_control_kwargs"] == {"fraction": 0.01}
    assert values["epsilon"] is None


def test_has_every_field_of_grpo_config():
    assert GRPOConfig.__dataclass_fields__.keys() < CovGRPOConfig.__dataclass_fields__.keys()


def test_every_control_says_what_the_trainer_asks():
    for control in CONTROLS.values():
        assert len(control.published_epsilon) == 2
        assert isinstance(control.acts_on_policy, bool)
        assert isinstance(control().drops_tokens, bool)


@pytest.mark.parametrize("control", [ClipCov, KLCov])
def test_a_random_draw_acts_in_a_pool_of_one_sequence(control):
    generator = torch.Generator().manual_seed(0)
    pool = TokenBatch(
        logps=-torch.rand(1, 50, generator=generator),
        old_logps=-torch.rand(1, 50, generator=generator),
        advantages=torch.tensor([[0.7]]),
        mask=torch.arange(50)[None] < 40,
        row_ids=torch.tensor([3]),
    )
    selected = control(fraction=0.25, selection="random").select(pool).selected
    assert int(selected.sum()) == 10 and not selected[:, 40:].any()


def test_the_top_is_as_many_tokens_as_the_draw_and_the_highest():
    generator = torch.Generator().manual_seed(0)
    pool = TokenBatch(
        logps=-torch.rand(6, 50, generator=generator) * 6,
        old_logps=-torch.rand(6, 50, generator=generator) * 6,
        advantages=torch.randn(6, 1, generator=generator),
        mask=torch.rand(6, 50, generator=generator) < 0.8,
        clipped=torch.rand(6, 50, generator=generator) < 0.2,
    )
    for band in ({"cov_low": 0.5, "cov_high": 1.0}, {"cov_low": 2.4}, {"cov_low": 80.0, "cov_high": 90.0}):
        drawn, top = (
            ClipCov(fraction=0.1, selection=name, **band).select(pool).selected for name in ("covariance", "top")
        )
        covariance = ClipCov().select(pool).covariance
        eligible = pool.mask & ~pool.clipped
        highest = sorted(covariance[eligible].tolist(), reverse=True)[: int(drawn.sum())]
        assert sorted(covariance[top].tolist(), reverse=True) == highest and not (top & ~eligible).any()
    with pytest.raises(ValueError, match="`selection` must be one of 'covariance', 'random', got 'top'"):
        KLCov(selection="top")
