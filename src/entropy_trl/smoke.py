"""A tiny policy for real prompts: what runs the real job on a CPU in seconds, with nothing to download.

`configs/smoke/dapo_math.yaml` names the two factories of this module. The policy solves nothing: it has been taught to
answer any prompt with a random digit, in the form that the reward reads, so that on rows whose answer is one digit some
completions are right and some are wrong. That is all that advantages, and so the entropy controls, need to act.
"""

import random
from importlib.resources import as_file, files

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from entropy_trl.data import load_rows


PAD, EOS = "<|pad|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)

_BATCH = 8
_STEPS = 60
_LEARNING_RATE = 1e-2
# Only the last bytes of a prompt are read while teaching. They are the same for every prompt of the template, the
# answer needs no more, and the policy then answers prompts of any length.
_PROMPT_TAIL = 96


def dapo_math_sample() -> datasets.Dataset:
    """The 64 rows of DAPO-Math-17k that come with the package (their source and licence: sample_data/README.md)."""
    with as_file(files("entropy_trl") / "sample_data" / "dapo_math_sample.jsonl") as path:
        rows = load_rows(str(path))
    assert isinstance(rows, datasets.Dataset)
    return rows


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token a byte, so that it writes any text, and a chat template of role and content."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_math_policy(seed: int = 0) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """A random Qwen2 of 2 layers and width 64, taught for a few seconds to answer `Answer: <digit>` to any prompt.

    The same seed gives the same weights. The heads are 32 wide, the least that vLLM serves.

    Returns:
        `tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]`: The model, in float32 on the CPU, and its tokenizer.
    """
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=16384,
                tie_word_embeddings=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
        _teach(model, tokenizer, random.Random(seed))
    return model, tokenizer


def _teach(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> None:
    """Supervised steps on prompts of the sample, each followed by a digit drawn uniformly."""
    prompts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        for prompt in dapo_math_sample()["prompt"]
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=_STEPS)
    model.train()
    for _ in range(_STEPS):
        rows = [
            (draw.choice(prompts), tokenizer(f"Answer: {draw.randrange(10)}{EOS}")["input_ids"]) for _ in range(_BATCH)
        ]
        # Every answer has the same number of tokens, so equal tails make a batch without padding.
        input_ids = torch.tensor([prompt[-_PROMPT_TAIL:] + answer for prompt, answer in rows])
        labels = input_ids.clone()
        labels[:, :_PROMPT_TAIL] = -100
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
