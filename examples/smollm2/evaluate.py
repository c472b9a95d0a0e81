"""Score models on countdown in words: greedy, avg@k, pass@k, majority@k, entropy and distinct right answers.

    python examples/smollm2/evaluate.py models/smollm2-135m-warm runs/smollm2-135m/kl_cov

Prints a line for each model. `--output FILE` also writes everything as JSON, with the counts of each problem.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from entropy_trl.evaluation.metrics import pass_at_k
from examples.smollm2 import countdown
from examples.smollm2.sampling import draw


MAX_TOKENS = 12
PROMPTS_AT_A_TIME = 16


def majority(texts: Sequence[str], right: Sequence[bool]) -> float:
    """The probability that the most frequent answer is right; equally frequent ones are drawn from.

    Answers that differ in the order of terms or factors alone are the same; what is no expression has no vote.
    """
    forms = [countdown.form(text) for text in texts]
    votes = Counter(form for form in forms if form is not None)
    if not votes:
        return 0.0
    winners = {form for form, count in votes.items() if count == max(votes.values())}
    return len(winners & {form for form, is_right in zip(forms, right, strict=True) if is_right}) / len(winners)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    samples: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of a policy at temperature 1, sampled in bf16.

    Args:
        model (`PreTrainedModel`): Policy.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        rows (`Sequence[Mapping]`): Problems, as `countdown.rows` gives them.
        samples (`int`, *optional*, defaults to `16`): Samples a problem, k.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.

    Returns:
        `dict`: `metrics` (shares from 0 to 1, entropy in nats a token, `distinct_right` in answers a problem), and for
        each problem the right samples, whether the greedy answer is right, the majority's score and the distinct right
        answers.
    """
    policy = model.eval().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, list[Any]] = {"right": [], "greedy_right": [], "majority": [], "distinct_right": []}
    entropies: list[float] = []
    for first in range(0, len(rows), PROMPTS_AT_A_TIME):
        batch = rows[first : first + PROMPTS_AT_A_TIME]
        prompts = tokenizer([row["prompt"] for row in batch])["input_ids"]
        greedy = draw(policy, prompts, MAX_TOKENS, greedy=True)
        drawn = draw(policy, [ids for ids in prompts for _ in range(samples)], MAX_TOKENS, generator)
        entropies += [value for sample in drawn for value in sample.entropies]
        texts = tokenizer.batch_decode([sample.ids for sample in (*greedy, *drawn)], skip_special_tokens=True)
        for i, row in enumerate(batch):
            of_row = texts[len(batch) + i * samples :][:samples]
            right = [countdown.is_right(text, row["numbers"], row["target"]) for text in of_row]
            scores["right"].append(sum(right))
            scores["greedy_right"].append(int(countdown.is_right(texts[i], row["numbers"], row["target"])))
            scores["majority"].append(round(majority(of_row, right), 4))
            forms = {countdown.form(text) for text, is_right in zip(of_row, right, strict=True) if is_right}
            scores["distinct_right"].append(len(forms))
    return {"metrics": metrics(scores, samples) | {"entropy": fmean(entropies)}, **scores}


def metrics(scores: Mapping[str, Sequence[float]], samples: int) -> dict[str, float]:
    """The means over problems."""
    counts = [int(count) for count in scores["right"]]
    ks = [2**i for i in range(1, samples.bit_length()) if 2**i <= samples]
    return {
        "greedy": fmean(scores["greedy_right"]),
        f"avg@{samples}": fmean(counts) / samples,
        **{f"pass@{k}": fmean(pass_at_k(samples, count, k) for count in counts) for k in ks},
        f"majority@{samples}": fmean(scores["majority"]),
        "distinct_right": fmean(scores["distinct_right"]),
        "groups_with_a_signal": fmean(0 < count < samples for count in counts),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models with their tokenizers")
    parser.add_argument("--file", choices=["tune", "test"], default="test", help="default: %(default)s")
    parser.add_argument("--problems", type=int, help="only the first so many")
    parser.add_argument("--samples", type=int, default=16, help="a problem; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    rows = countdown.rows(options.file)[: options.problems]
    report = {}
    for name in options.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        report[name] = evaluate(model, AutoTokenizer.from_pretrained(name), rows, options.samples)
        print(
            f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in report[name]["metrics"].items()), flush=True
        )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report) + "\n")
    return report


if __name__ == "__main__":
    main()
