"""Every recipe trains: one step of a tiny random model of the family that it is for, with its file as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from entropy_trl.cli import train_main
from entropy_trl.smoke import byte_tokenizer


ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "src" / "entropy_trl" / "sample_data" / "dapo_math_sample.jsonl"
FAMILIES = {
    "qwen2.5-7b/grpo": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2.5-7b/clip_cov": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2.5-32b/kl_cov": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2.5-0.5b/kl_cov_lora": (Qwen2Config, Qwen2ForCausalLM),
    "mistral-7b/kl_cov": (MistralConfig, MistralForCausalLM),
    "llama3.1-8b/kl_cov": (LlamaConfig, LlamaForCausalLM),
    "deepseek-math-7b/kl_cov": (LlamaConfig, LlamaForCausalLM),
}
#: What a CPU and a model of a few thousand parameters need; everything else is the recipe's.
SMALL = {
    "dataset_name": SAMPLE,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "max_completion_length": 8,
    "max_prompt_length": 4096,  # bytes are tokens here
    "max_generation_rounds": 1,
    "dynamic_sampling_incomplete": "train",  # a random model solves nothing
    "max_steps": 2,
    "use_vllm": "false",
    "bf16": "false",
    "use_cpu": "true",
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": "true",
    "dtype": "float32",
    "reward_funcs": "test_recipes.length_reward",
}


def length_reward(completions, **kwargs):
    """Differs between completions, unlike the recipe's reward of a random model."""
    return [len(completion[-1]["content"]) / 10 for completion in completions]


@pytest.mark.parametrize("recipe", FAMILIES)
def test_one_step(recipe, tmp_path, monkeypatch, capsys):
    config_class, model_class = FAMILIES[recipe]
    tokenizer = byte_tokenizer()
    if not recipe.startswith("qwen"):
        tokenizer.chat_template = None  # as the base models have it
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(ROOT)  # a recipe names files of the repository
    out = tmp_path / "out"
    settings = SMALL | {"model_name_or_path": tmp_path / "model", "output_dir": out}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert train_main(["--config", f"configs/{recipe}.yaml", *arguments]) == 0, capsys.readouterr().err
    if recipe.endswith("lora"):
        weights = load_file(out / "adapter_model.safetensors")
        assert max(float(w.abs().max()) for name, w in weights.items() if "lora_B" in name) > 0
    else:
        weights = load_file(out / "model.safetensors")
        assert any(
            not torch.equal(weight.cpu(), weights[name])
            for name, weight in model.state_dict().items()
            if name in weights
        )
