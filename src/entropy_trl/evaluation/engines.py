"""What draws completions: transformers' `generate` (`hf`) and vLLM (`vllm`), behind one protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from entropy_trl.evaluation.benchmarks import Sampling


Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Completion:
    """One answer of a model.

    Attributes:
        text (`str`): The completion, without special tokens.
        length (`int`): Its tokens, the one that ends it included.
        truncated (`bool`): Whether it was cut at the limit instead.
        entropy (`float`, *optional*): The mean over its tokens of the entropy of the model's own next-token
            distribution (before temperature and top-p, so that greedy completions have one too), in nats; None where
            the engine does not give it.
    """

    text: str
    length: int
    truncated: bool
    entropy: float | None = None


class Engine(Protocol):
    """Draws one completion for each prompt, each from a random stream of its own."""

    name: str
    batch_size: int
    """How many prompts `generate` is best given at a time."""

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[Completion]: ...


@dataclass(frozen=True)
class Encoder:
    """Makes token ids of prompts, as TRL does; a tokenizer without a chat template gets the bare texts."""

    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) or self.tokenizer.chat_template is None:
            text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
            return list(self.tokenizer(text)["input_ids"])
        ids = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
        )
        return list(ids["input_ids"])


class HFEngine:
    """transformers' `generate`, with batches padded on the left.

    The model's own generation settings (penalties, top-k) are replaced: an evaluation samples by its protocol alone.
    """

    name = "hf"

    def __init__(self, model: Any, encode: Encoder, batch_size: int = 16):
        self.model, self.encode, self.batch_size = model.eval(), encode, batch_size
        tokenizer, own = encode.tokenizer, model.generation_config.eos_token_id
        eos = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        if not eos:
            raise ValueError("Neither the tokenizer nor the model has a token that ends a text (eos_token_id).")
        self.eos = sorted(eos)
        self.pad = self.eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=self.eos, pad_token_id=self.pad, do_sample=False)

    @classmethod
    def load(cls, name: str, encode: Encoder, batch_size: int | None = None, **options: Any) -> "HFEngine":
        """Loads a model onto the GPU, if there is one. `options` go to `from_pretrained`."""
        model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto"} | options)
        if "device_map" not in options and torch.cuda.is_available():
            model.to("cuda")
        return cls(model, encode, batch_size or 16)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        rows = [self.encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        input_ids = torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in rows])
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
        sampler = _Sampler(seeds, sampling, self.eos, width)
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            max_new_tokens=sampling.max_tokens,
            logits_processor=LogitsProcessorList([sampler]),
        )
        completions = []
        for ids, entropy in zip(output[:, width:].tolist(), sampler.entropies.tolist(), strict=True):
            end = next((i for i, token in enumerate(ids) if token in self.eos), None)
            ids = ids if end is None else ids[: end + 1]
            text = self.encode.tokenizer.decode(ids, skip_special_tokens=True)
            completions.append(Completion(text, len(ids), end is None, entropy / len(ids)))
        return completions


class _Sampler(LogitsProcessor):
    """Sums entropies, and draws the next token of each row by a random number of that row's own.

    `generate` draws all rows from one global stream, so that a completion would depend on its neighbours. Here each row
    has its uniform numbers in advance, and the token is where the cumulative probability exceeds the next of them; with
    all other tokens at minus infinity, greedy decoding then takes it. Nothing of size (tokens, vocabulary) is kept.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, eos: Sequence[int], prompt_width: int):
        self._eos, self._prompt_width = torch.tensor(eos), prompt_width
        self._alive = torch.ones(len(seeds), dtype=torch.bool)
        self.entropies = torch.zeros(len(seeds), dtype=torch.float64)
        self._warpers: list[LogitsProcessor] = []
        self._uniform: Tensor | None = None
        if sampling.temperature > 0:
            # Drawn on the CPU, so that they are the same on any device.
            self._uniform = torch.stack([_uniform(seed, sampling.max_tokens) for seed in seeds])
            self._warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def _move(self, device: torch.device) -> None:
        self._eos, self._alive, self.entropies = (
            tensor.to(device) for tensor in (self._eos, self._alive, self.entropies)
        )
        self._uniform = None if self._uniform is None else self._uniform.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self._prompt_width
        if position:
            self._alive &= torch.isin(input_ids[:, -1], self._eos, invert=True)
        else:
            self._move(scores.device)
        self.entropies += torch.special.entr(scores.float().softmax(dim=-1)).sum(dim=-1) * self._alive
        if self._uniform is None:
            return scores
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        token = torch.searchsorted(cumulative, self._uniform[:, position, None] * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class VLLMEngine:
    """vLLM's `LLM.generate`, with a seed for each request.

    vLLM has no entropies, only the log-probabilities of the most likely tokens. With `top_logprobs` of them the entropy
    is that of these tokens and one more, which stands for all the others: a lower bound, exact where they are the whole
    vocabulary. It is off by default, since each of them is a Python object for each token.
    """

    name = "vllm"

    def __init__(self, llm: Any, encode: Encoder, batch_size: int = 1024, top_logprobs: int = 0):
        self.llm, self.encode, self.batch_size, self.top_logprobs = llm, encode, batch_size, top_logprobs

    @classmethod
    def load(
        cls, name: str, encode: Encoder, batch_size: int | None = None, top_logprobs: int = 0, **options: Any
    ) -> "VLLMEngine":
        """Starts vLLM's engine. `options` go to `vllm.LLM`."""
        from vllm import LLM

        llm = LLM(model=name, logprobs_mode="raw_logprobs", max_logprobs=max(top_logprobs, 1), **options)
        return cls(llm, encode, batch_size or 1024, top_logprobs)

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        from vllm import SamplingParams

        requests = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed if sampling.temperature > 0 else None,
                logprobs=self.top_logprobs or None,
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": self.encode(prompt)} for prompt in prompts]
        outputs = [output.outputs[0] for output in self.llm.generate(inputs, requests, use_tqdm=False)]
        return [
            Completion(
                text=output.text,
                length=len(output.token_ids),
                truncated=output.finish_reason == "length",
                entropy=_entropy_of_top(output.logprobs) if output.logprobs else None,
            )
            for output in outputs
        ]


def _entropy_of_top(positions: Sequence[Mapping[int, Any]]) -> float:
    total = 0.0
    for position in positions:
        logprobs = [entry.logprob for entry in position.values()]
        rest = 1.0 - sum(map(exp, logprobs))
        total -= sum(exp(logprob) * logprob for logprob in logprobs if logprob > -torch.inf)
        total -= rest * log(rest) if rest > 1e-9 else 0.0  # less is what rounding leaves of nothing
    return total / len(positions)


def load_encoder(name: str, **chat_template_kwargs: Any) -> Encoder:
    """The encoder of the tokenizer that a model comes with."""
    return Encoder(AutoTokenizer.from_pretrained(name), chat_template_kwargs)
