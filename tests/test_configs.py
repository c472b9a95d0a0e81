"""Every shipped training configuration parses, with no unknown key, and says what it is named for."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from entropy_trl.cli import parse_train_args


CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN_CONFIGS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("accelerate", "quickstart"))
PUBLISHED = {  # (model, method): learning rate, control, its hyper-parameters, ratio clip
    ("qwen2.5-7b", "grpo"): (5e-7, None, None, (0.2, 0.2)),
    ("qwen2.5-7b", "clip_higher"): (5e-7, None, None, (0.2, 0.28)),
    ("qwen2.5-7b", "clip_cov"): (5e-7, "clip_cov", {"fraction": 2e-4, "cov_low": 1.0, "cov_high": 5.0}, (1.0, 1.0)),
    ("qwen2.5-7b", "kl_cov"): (5e-7, "kl_cov", {"fraction": 2e-3, "coef": 1.0}, (float("inf"), float("inf"))),
    ("qwen2.5-32b", "kl_cov"): (1e-6, "kl_cov", {"fraction": 2e-4, "coef": 1.0}, (float("inf"), float("inf"))),
}


def parse(path):
    # This machine may have no GPU, and bf16 is refused there unless the CPU is asked for.
    return parse_train_args(["--config", str(path), "--use_cpu", "true"])


def name(path):
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", TRAIN_CONFIGS, ids=name)
def test_parses(path):
    script_args, training_args, model_args, _ = parse(path)
    assert script_args.dataset_name or script_args.dataset_factory
    assert model_args.model_name_or_path or script_args.model_factory
    assert training_args.output_dir.startswith("runs/")
    assert "entropy_control" in yaml.safe_load(path.read_text())  # said, never left to the default


def test_published_recipes_are_all_here():
    found = {(path.parent.name, path.stem) for path in TRAIN_CONFIGS if path.parent.name != "smoke"}
    assert found == set(PUBLISHED)


@pytest.mark.parametrize(("model", "method"), PUBLISHED)
def test_published_recipe(model, method):
    learning_rate, control, kwargs, ratio_clip = PUBLISHED[model, method]
    _, training_args, model_args, _ = parse(CONFIGS / model / f"{method}.yaml")
    assert model_args.model_name_or_path.lower() == f"qwen/{model}"
    assert training_args.learning_rate == learning_rate
    assert training_args.entropy_control == control
    assert training_args.entropy_control_kwargs == kwargs
    assert training_args.ratio_clip() == ratio_clip
    # On the 32 GPUs that the file says: 32 prompts x 8 completions an update, 8 updates a rollout.
    completions = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * 32
    assert completions == 256
    assert training_args.steps_per_generation == 8 * training_args.gradient_accumulation_steps
    assert (training_args.num_generations, training_args.num_iterations) == (8, 1)
    assert (training_args.beta, training_args.entropy_coef, training_args.loss_type) == (0, 0, "dapo")
    assert (training_args.weight_decay, training_args.max_grad_norm) == (0, 1)
    assert (training_args.temperature, training_args.top_p, training_args.max_completion_length) == (1, 1, 8192)
    assert training_args.lr_scheduler_type == "constant"


def test_recipes_of_a_model_differ_in_the_method_only():
    """So that their runs can be compared."""
    method_keys = {"entropy_control", "entropy_control_kwargs", "entropy_control_pool", "epsilon", "epsilon_high"}
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / "qwen2.5-7b").glob("*.yaml"))]
    common = [{k: v for k, v in r.items() if k not in method_keys | {"output_dir"}} for r in recipes]
    assert all(recipe == common[0] for recipe in common)
    assert len({recipe["output_dir"] for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=name)
def test_accelerate_configs(path):
    """As accelerate reads them; tests/test_launch.py launches each."""
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "single_gpu" else 8)
    assert config.num_machines == 1  # `--num_machines` says otherwise
    assert config.mixed_precision == "no"
    kind = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        offload = "cpu" if path.stem.endswith("offload") else "none"
        assert f"zero{config.deepspeed_config['zero_stage']}" == path.stem.removesuffix("_offload")
        assert config.deepspeed_config["offload_optimizer_device"] == offload
        assert config.deepspeed_config["offload_param_device"] == offload
    assert (config.fsdp_config.get("fsdp_version") == 2) == (kind == "FSDP")
