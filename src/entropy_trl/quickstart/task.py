"""Modular countdown: a task on which entropy collapse shows on a CPU in minutes, with nothing to download.

A prompt is four digits and a target, `3758>4:`. The policy chooses three operators among `+ - *`, applies them from
left to right modulo 10, and writes the running value after each: `op v op v op v <eos>`, seven tokens. A right answer
to `3758>4:` is `*1+6+4` (3*7 = 21, 1+5 = 6, 6+8 = 14), and `*1-6+4` is another. A prompt has 27 operator chains and
most have several right ones, so that a policy can keep several strategies alive or collapse onto one.

The prompts with `crc32(prompt) % 10 == 0` are held out of the warm-up and of the training.
"""

import zlib
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


DIGITS = "0123456789"
OPERATORS = "+-*"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY: tuple[str, ...] = (PAD, EOS, *DIGITS, *OPERATORS, ">", ":", UNK, "<spare0>", "<spare1>")
TOKEN_ID: dict[str, int] = {token: index for index, token in enumerate(VOCABULARY)}
PAD_ID, EOS_ID = TOKEN_ID[PAD], TOKEN_ID[EOS]

N_DIGITS = 4
N_OPERATORS = N_DIGITS - 1
PROMPT_LENGTH = N_DIGITS + 3  # the digits, ">", the target, ":"
COMPLETION_LENGTH = 2 * N_OPERATORS + 1  # an operator and a value, three times, then <eos>
HELD_OUT_MODULUS = 10
DEFAULT_DATASET_SIZE = 12_800  # the prompts of the long recipe: 400 rollouts of 32


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 20 tokens in all, left padding; decoding is the exact inverse of encoding."""
    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_ID), unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts a space between two tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(seed: int) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of 85,184 parameters in float32. The global random state is left as it was."""
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def running_values(digits: Tensor, operators: Tensor) -> Tensor:
    """Running values modulo 10 of chains of operators.

    Args:
        digits (`Tensor`): (B, 4) integers from 0 to 9.
        operators (`Tensor`): (B, 3) indices into `OPERATORS`.

    Returns:
        `Tensor`: (B, 3) integers from 0 to 9: the value after each operator. The modulus is never negative: 3 - 7
        gives 6.
    """
    value = digits[:, 0]
    values = []
    for i in range(N_OPERATORS):
        operand = digits[:, i + 1]
        results = torch.stack([value + operand, value - operand, value * operand], dim=1)
        value = results.gather(1, operators[:, i : i + 1]).squeeze(1) % 10
        values.append(value)
    return torch.stack(values, dim=1)


def format_prompt(digits: Sequence[int], target: int) -> str:
    """`3758>4:` for the digits 3, 7, 5, 8 and the target 4."""
    return "".join(map(str, digits)) + f">{target}:"


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept out of the warm-up and of the training: about one in ten, by its CRC-32."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_MODULUS == 0


@cache
def held_out_table() -> Tensor:
    """(10000, 10) booleans: `is_held_out` of every pair (four digits read as a number, target)."""
    rows = [
        [is_held_out(format_prompt(digits, target)) for target in range(10)]
        for digits in product(range(10), repeat=N_DIGITS)
    ]
    return torch.tensor(rows)


def digits_as_number(digits: Tensor) -> Tensor:
    """(B, 4) digits to (B,) numbers from 0 to 9999: the row of `held_out_table`."""
    return (digits * torch.tensor([1000, 100, 10, 1])).sum(dim=1)


def draw_chains(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform random digits (n, 4) and operator indices (n, 3)."""
    digits = torch.randint(10, (n, N_DIGITS), generator=generator)
    operators = torch.randint(len(OPERATORS), (n, N_OPERATORS), generator=generator)
    return digits, operators


def _draw_prompts(n: int, seed: int, held_out: bool) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    prompts: dict[str, None] = {}  # a dict keeps the order of insertion, a set does not
    attempts = 0
    while len(prompts) < n:
        attempts += 1
        if attempts > 200:
            raise ValueError(
                f"only {len(prompts)} different {'held-out' if held_out else 'training'} prompts were found, {n} were "
                "asked for; ask for fewer"
            )
        digits, operators = draw_chains(4096, generator)
        targets = running_values(digits, operators)[:, -1]
        keep = held_out_table()[digits_as_number(digits), targets] == held_out
        for row, target in zip(digits[keep].tolist(), targets[keep].tolist(), strict=True):
            prompts[format_prompt(row, target)] = None
    return list(prompts)[:n]


def train_prompts(n: int = DEFAULT_DATASET_SIZE, seed: int = 0) -> list[str]:
    """`n` different training prompts. Each has a solution: its target is the result of a random chain of operators."""
    return _draw_prompts(n, seed, held_out=False)


def held_out_prompts(n: int = 1024, seed: int = 0) -> list[str]:
    """`n` different held-out prompts, drawn as the training prompts are. About 8,000 exist."""
    return _draw_prompts(n, seed, held_out=True)


def build_dataset(size: int = DEFAULT_DATASET_SIZE, seed: int = 0) -> Dataset:
    """The training prompts as a dataset with one column, `prompt`."""
    return Dataset.from_dict({"prompt": train_prompts(size, seed)})


def verify(prompt: str, completion: str) -> bool:
    """Whether `completion`, without its `<eos>`, is a right answer to `prompt`.

    Right means: exactly `op v op v op v`, with every running value right modulo 10 and the last one equal to the
    target. A malformed answer is wrong; a malformed prompt is an error, since no answer to it has a meaning.
    """
    if not (
        len(prompt) == PROMPT_LENGTH
        and prompt[N_DIGITS] == ">"
        and prompt[-1] == ":"
        and all(character in DIGITS for character in prompt[:N_DIGITS] + prompt[-2])
    ):
        raise ValueError(
            f"{prompt!r} is not a countdown prompt; expected four digits, '>', a digit and ':' ('3758>4:')"
        )
    if len(completion) != COMPLETION_LENGTH - 1:
        return False
    value = int(prompt[0])
    for i in range(N_OPERATORS):
        operator, written = completion[2 * i], completion[2 * i + 1]
        operand = int(prompt[i + 1])
        if operator == "+":
            value += operand
        elif operator == "-":
            value -= operand
        elif operator == "*":
            value *= operand
        else:
            return False
        value %= 10
        if written != str(value):
            return False
    return completion[-1] == prompt[-2]


def verify_ids(prompt: str, completion_ids: Sequence[int]) -> bool:
    """`verify` on the sampled token ids, which must be the six tokens of the answer and `<eos>`, and nothing else."""
    if len(completion_ids) != COMPLETION_LENGTH or completion_ids[-1] != EOS_ID:
        return False
    return verify(prompt, "".join(VOCABULARY[token] for token in completion_ids[:-1]))


def countdown_reward(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    **kwargs: Any,
) -> list[float]:
    """TRL reward function: 1.0 for a right answer that ends in `<eos>`, else 0.0.

    TRL decodes completions without special tokens, so that `<eos>` can be seen in `completion_ids` only. When these are
    not given, a completion is taken to have ended where its text ends.

    Args:
        prompts (`list[str]`): B prompts such as `3758>4:`.
        completions (`list[str]`): B decoded completions.
        completion_ids (`list[list[int]]`, *optional*): B lists of sampled token ids up to and including `<eos>`, as
            TRL passes them.
        **kwargs (`Any`): The other columns and hooks that TRL passes; not used.

    Returns:
        `list[float]`: Rewards of shape (B,), 0.0 or 1.0.
    """
    if completion_ids is None:
        return [float(verify(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]
    return [float(verify_ids(prompt, ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]
