"""Every shipped training configuration parses, with no unknown key, and says what it is named for."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from entropy_trl.cli import parse_train_args


CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN_CONFIGS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("accelerate", "quickstart"))
NONE = (float("inf"), float("inf"))
PUBLISHED = {  # (model, method): learning rate, control, its hyper-parameters, ratio clip
    ("qwen2.5-7b", "grpo"): (5e-7, None, None, (0.2, 0.2)),
    ("qwen2.5-7b", "clip_higher"): (5e-7, None, None, (0.2, 0.28)),
    ("qwen2.5-7b", "clip_cov"): (5e-7, "clip_cov", {"fraction": 2e-4, "cov_low": 1.0, "cov_high": 5.0}, (1.0, 1.0)),
    ("qwen2.5-7b", "kl_cov"): (5e-7, "kl_cov", {"fraction": 2e-3, "coef": 1.0}, NONE),
    ("qwen2.5-32b", "grpo"): (1e-6, None, None, (0.2, 0.2)),
    ("qwen2.5-32b", "clip_higher"): (1e-6, None, None, (0.2, 0.28)),
    ("qwen2.5-32b", "clip_cov"): (1e-6, "clip_cov", {"fraction": 2e-4, "cov_low": 1.0, "cov_high": 5.0}, (1.0, 1.0)),
    ("qwen2.5-32b", "kl_cov"): (1e-6, "kl_cov", {"fraction": 2e-4, "coef": 1.0}, NONE),
}
#: The paper's other models, at the values of Qwen2.5-7B, and LoRA on one GPU for the smallest.
OTHERS = {
    ("mistral-7b", "kl_cov"): "mistralai/Mistral-7B-v0.3",
    ("mistral-nemo", "kl_cov"): "mistralai/Mistral-Nemo-Base-2407",
    ("mistral-small-24b", "kl_cov"): "mistralai/Mistral-Small-24B-Base-2501",
    ("llama3.2-3b", "kl_cov"): "meta-llama/Llama-3.2-3B",
    ("llama3.1-8b", "kl_cov"): "meta-llama/Llama-3.1-8B",
    ("deepseek-math-7b", "kl_cov"): "deepseek-ai/deepseek-math-7b-base",
    ("qwen2.5-0.5b", "kl_cov_lora"): "Qwen/Qwen2.5-0.5B",
    ("qwen2.5-1.5b", "kl_cov_lora"): "Qwen/Qwen2.5-1.5B",
    ("qwen2.5-3b", "kl_cov_lora"): "Qwen/Qwen2.5-3B",
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
    found = {
        (path.parent.name, path.stem) for path in TRAIN_CONFIGS if path.parent.name not in ("smoke", "smollm2-135m")
    }
    assert found == PUBLISHED.keys() | OTHERS.keys()
    # The eleven models of the paper: two published, nine others.
    assert len({model for model, _ in found}) == 11


@pytest.mark.parametrize(("model", "method"), PUBLISHED)
def test_published_recipe(model, method):
    learning_rate, control, kwargs, ratio_clip = PUBLISHED[model, method]
    script_args, training_args, model_args, _ = parse(CONFIGS / model / f"{method}.yaml")
    assert model_args.model_name_or_path.lower() == f"qwen/{model}"
    assert training_args.learning_rate == learning_rate
    assert training_args.entropy_control == control
    assert training_args.entropy_control_kwargs == kwargs
    assert training_args.ratio_clip() == ratio_clip
    check_recipe(script_args, training_args)


@pytest.mark.parametrize(("model", "file"), OTHERS)
def test_recipe_of_another_model(model, file):
    script_args, training_args, model_args, _ = parse(CONFIGS / model / f"{file}.yaml")
    assert model_args.model_name_or_path == OTHERS[model, file]
    lora = file.endswith("lora")
    assert model_args.use_peft == lora
    assert (training_args.learning_rate, training_args.entropy_control) == (1e-5 if lora else 5e-7, "kl_cov")
    assert training_args.entropy_control_kwargs == {"fraction": 2e-3, "coef": 1.0}
    assert training_args.ratio_clip() == NONE
    check_recipe(script_args, training_args, gpus=1 if lora else 32, prompts=4 if lora else 32)
    if not model.startswith("qwen"):
        assert Path(script_args.chat_template_path).is_file()


def check_recipe(script_args, training_args, gpus=32, prompts=32):
    """What the published recipe has, whatever the method: `prompts` x 8 completions an update on that many GPUs."""
    completions = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * gpus
    assert completions == 8 * prompts
    assert training_args.steps_per_generation == 8 * training_args.gradient_accumulation_steps
    assert (training_args.num_generations, training_args.num_iterations) == (8, 1)
    assert (training_args.beta, training_args.entropy_coef, training_args.loss_type) == (0, 0, "dapo")
    assert (training_args.weight_decay, training_args.max_grad_norm) == (0, 1)
    assert (training_args.temperature, training_args.top_p) == (1, 1)
    lengths = script_args.max_prompt_length, training_args.max_completion_length
    assert sum(lengths) == training_args.vllm_max_model_length
    if prompts == 32 and training_args.vllm_max_model_length != 4096:  # the context of DeepSeek-Math
        assert lengths == (2048, 8192)
    assert (training_args.dynamic_sampling, training_args.max_generation_rounds) == (True, 10)
    assert training_args.dynamic_sampling_incomplete == "error"
    assert script_args.prompt_template == "r1_zero"
    # bf16 weights of more than 32 GB, 40% of a GPU of 80, do not fit into vLLM's share of one.
    large = any(size in training_args.output_dir for size in ("24b", "32b"))
    assert training_args.vllm_tensor_parallel_size == (4 if large else 1)
    assert training_args.lr_scheduler_type == "constant"


@pytest.mark.parametrize("model", ["qwen2.5-7b", "smollm2-135m"])
def test_recipes_of_a_model_differ_in_the_method_only(model):
    """So that their runs can be compared."""
    method_keys = {"entropy_control", "entropy_control_kwargs", "entropy_control_pool", "epsilon", "epsilon_high"}
    if model == "smollm2-135m":
        method_keys.add("beta")  # of kl_reference
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / model).glob("*.yaml"))]
    common = [{k: v for k, v in r.items() if k not in method_keys | {"output_dir"}} for r in recipes]
    assert all(recipe == common[0] for recipe in common)
    assert len({recipe["output_dir"] for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=name)
def test_accelerate_configs(path):
    """As accelerate reads them; tests/cli/test_launch.py launches each."""
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
