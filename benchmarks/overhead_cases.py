"""The trainers that `overhead.py` measures, their model, and the rollouts that they replay."""

import argparse
import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from entropy_trl import CovGRPOConfig, CovGRPOTrainer


VOCABULARY = 151_936
PROMPT_LENGTH = 16
GENERATIONS = 4
RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Case:
    """One trainer to measure; `control="stock"` is TRL's own."""

    control: str | None
    pool: str = "step"
    on_policy: bool = False

    @property
    def name(self) -> str:
        name = self.control if self.control in ("stock", None) else f"{self.control}/{self.pool}"
        return (name or "off") + (" (on-policy)" if self.on_policy else "")

    @property
    def baseline(self) -> "Case":
        return Case("stock", on_policy=self.on_policy)


CASES = (
    Case("stock"),
    Case(None),
    Case("clip_cov", "step"),
    Case("clip_cov", "micro_batch"),
    Case("kl_cov", "step"),
    Case("kl_cov", "micro_batch"),
    Case("stock", on_policy=True),
    Case("clip_cov", "step", on_policy=True),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one word; the model's other token ids decode to nothing."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "word": 2}, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="word", padding_side="left"
    )


def build_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights; heads of 64 dimensions, two of keys and values."""
    torch.manual_seed(0)
    heads = max(args.hidden_size // 64, 1)
    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=round(args.hidden_size * 4864 / 896),
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)


def token_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Random but repeatable, so that advantages differ."""
    return [float(ids[0] % 7) if ids else 0.0 for ids in completion_ids]


def build_trainer(case: Case, model: Qwen2ForCausalLM, args: argparse.Namespace, folder: str) -> GRPOTrainer:
    """A trainer of a copy of `model`, ready to step."""
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": args.micro_batches,
        "steps_per_generation": args.micro_batches * (1 if case.on_policy else 2),
        "num_generations": GENERATIONS,
        "max_completion_length": args.completion_length,
        "learning_rate": 1e-6,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer_class: type[GRPOTrainer] = GRPOTrainer
    config: GRPOConfig = GRPOConfig(**settings)
    if case.control != "stock":
        trainer_class = CovGRPOTrainer
        config = CovGRPOConfig(**settings, entropy_control=case.control, entropy_control_pool=case.pool)
    trainer = trainer_class(
        model=copy.deepcopy(model),
        reward_funcs=token_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["word " * PROMPT_LENGTH] * 64}),
        processing_class=build_tokenizer(),
    )
    trainer.model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = args.micro_batches
    if trainer.accelerator.num_processes > 1:
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer._wrap_model(trainer.model))
    return trainer


def build_rollout(model: Qwen2ForCausalLM, args: argparse.Namespace, on_policy: bool) -> dict[str, Tensor]:
    """What TRL's rollout hands to its loss, of random tokens; with old log-probabilities unless `on_policy`."""
    generator = torch.Generator().manual_seed(RANK)
    rows, length = args.rows * args.micro_batches * (1 if on_policy else 2), args.completion_length
    lengths = torch.randint(max(length // 4, 1), length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    rollout = {
        "prompt_ids": torch.randint(2, args.vocab_size, (rows, PROMPT_LENGTH), generator=generator),
        "prompt_mask": torch.ones(rows, PROMPT_LENGTH, dtype=torch.long),
        "completion_ids": torch.randint(2, args.vocab_size, (rows, length), generator=generator) * mask,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    rollout = {name: value.to(args.device) for name, value in rollout.items()}
    if not on_policy:
        inputs = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        scores = []
        with torch.no_grad():
            for ids, seen in zip(inputs, attention, strict=True):
                logits = model(input_ids=ids[None], attention_mask=seen[None], logits_to_keep=length + 1).logits
                logps = logits[:, :-1].float().log_softmax(-1)
                scores.append(logps.gather(2, ids[None, -length:, None]).squeeze(2))
        rollout["old_per_token_logps"] = torch.cat(scores)
    return rollout
