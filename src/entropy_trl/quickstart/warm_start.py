"""Supervised warm-up of the tiny policy: it learns to write valid chains, and keeps latent skill for RL to bring out.

In the first steps the target in the prompt is the result of the chain that the policy imitates. In the last steps it is
mostly a random one, so that the policy forgets half-way to look at it: it still solves the task sometimes (pass@16 is
much larger than pass@1), which is what RL with verifiable rewards needs, and its entropy is high enough to collapse.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from entropy_trl.quickstart import task


DEFAULT_OUTPUT_DIR = Path("runs/quickstart")
INFO_FILE = "warm_start.json"


@dataclass(frozen=True)
class WarmStartConfig:
    """Everything that the user can choose about the warm-up.

    Attributes:
        seed (`int`, *optional*, defaults to `0`): Seed of the initial weights and of the warm-up data.
        steps (`int`, *optional*, defaults to `600`): Optimizer steps.
        noisy_steps (`int`, *optional*, defaults to `80`): How many of the last steps use noisy targets.
        noise (`float`, *optional*, defaults to `0.8`): Probability that the target of a row is replaced by a uniform
            random digit in these steps.
        batch_size (`int`, *optional*, defaults to `256`): Rows a step.
        peak_lr (`float`, *optional*, defaults to `0.004`): Peak of the one-cycle learning rate, reached after a tenth
            of the steps.
        weight_decay (`float`, *optional*, defaults to `0.01`): AdamW's.
        max_grad_norm (`float`, *optional*, defaults to `1.0`): Gradient clip.
    """

    seed: int = 0
    steps: int = 600
    noisy_steps: int = 80
    noise: float = 0.8
    batch_size: int = 256
    peak_lr: float = 4e-3
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps={self.steps} and batch_size={self.batch_size} must be positive")
        if not 0 <= self.noisy_steps <= self.steps:
            raise ValueError(f"noisy_steps={self.noisy_steps} must lie between 0 and steps={self.steps}")
        if not 0.0 <= self.noise <= 1.0:
            raise ValueError(f"noise={self.noise} is a probability and must lie in [0, 1]")


def draw_batch(batch_size: int, noise: float, generator: torch.Generator) -> Tensor:
    """A batch of whole sequences, prompt and completion: (batch_size, 14) token ids. No prompt in it is held out.

    Args:
        batch_size (`int`): Rows.
        noise (`float`): Probability that a row's target is replaced by a uniform random digit.
        generator (`torch.Generator`): Source of all randomness.
    """
    kept: list[Tensor] = []
    missing = batch_size
    while missing > 0:
        digits, operators = task.draw_chains(2 * batch_size, generator)
        values = task.running_values(digits, operators)
        random_targets = torch.randint(10, (2 * batch_size,), generator=generator)
        noisy = torch.rand(2 * batch_size, generator=generator) < noise
        targets = torch.where(noisy, random_targets, values[:, -1])
        rows = _encode(digits, targets, operators, values)
        # the test comes after the noise, which could turn a training prompt into a held-out one
        rows = rows[~task.held_out_table()[task.digits_as_number(digits), targets]][:missing]
        kept.append(rows)
        missing -= len(rows)
    return torch.cat(kept)


def _encode(digits: Tensor, targets: Tensor, operators: Tensor, values: Tensor) -> Tensor:
    """(B, 14) token ids of `dddd>t:ovovov<eos>`; digits and operators have consecutive ids."""
    first_digit, first_operator = task.TOKEN_ID["0"], task.TOKEN_ID[task.OPERATORS[0]]
    n = len(digits)
    chain = torch.stack([operators + first_operator, values + first_digit], dim=2).reshape(n, -1)
    return torch.cat(
        [
            digits + first_digit,
            torch.full((n, 1), task.TOKEN_ID[">"]),
            (targets + first_digit).unsqueeze(1),
            torch.full((n, 1), task.TOKEN_ID[":"]),
            chain,
            torch.full((n, 1), task.EOS_ID),
        ],
        dim=1,
    )


def warm_up(config: WarmStartConfig) -> Qwen2ForCausalLM:
    """Train the tiny model from its random weights. Deterministic in `config` on one machine and thread count."""
    model = task.build_model(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.peak_lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.peak_lr, total_steps=config.steps, pct_start=0.1
    )
    model.train()
    for step in range(config.steps):
        noise = config.noise if step >= config.steps - config.noisy_steps else 0.0
        tokens = draw_batch(config.batch_size, noise, generator)
        labels = tokens.clone()
        labels[:, : task.PROMPT_LENGTH] = -100  # learn the completion, given the prompt
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
    return model.eval()


def warm_start_key(config: WarmStartConfig) -> str:
    """Ten hexadecimal digits over what determines a warm start: its configuration, its code, torch and transformers."""
    digest = hashlib.sha256()
    digest.update(json.dumps(asdict(config), sort_keys=True).encode())
    digest.update(f"torch {torch.__version__} transformers {transformers.__version__}".encode())
    for source in (Path(task.__file__), Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:10]


def load_or_warm_up(
    config: WarmStartConfig, output_dir: Path = DEFAULT_OUTPUT_DIR
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, float]:
    """The warm start of `config`, from `output_dir/warm_start/` if it is there, else made and saved there.

    Returns:
        `tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, float]`: The model, its tokenizer and the seconds that the
        warm-up took when it was made.
    """
    tokenizer = task.build_tokenizer()
    folder = output_dir / "warm_start" / f"seed{config.seed}-{warm_start_key(config)}"
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        model = warm_up(config)
        info = {"config": asdict(config), "seconds": time.perf_counter() - start}
        folder.parent.mkdir(parents=True, exist_ok=True)
        # a complete folder appears at once, so that neither an interruption nor a second process leaves half of one
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            (made / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")
            if not folder.exists():
                os.replace(made, folder)
    # always loaded from the file, so that a first run and a later one start from the same object
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    seconds = float(json.loads((folder / INFO_FILE).read_text())["seconds"])
    return model, tokenizer, seconds


def _is_whole(folder: Path) -> bool:
    """Whether a stored warm start is there and can be read; it is made again if not."""
    try:
        seconds = json.loads((folder / INFO_FILE).read_text())["seconds"]
        Qwen2Config.from_pretrained(folder)
        with safe_open(folder / "model.safetensors", framework="pt"):
            return type(seconds) is float
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def warm_start_policy() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of the default warm start (seed 0), kept under `runs/quickstart/`: a factory for configs."""
    model, tokenizer, _ = load_or_warm_up(WarmStartConfig())
    return model, tokenizer
