"""What dynamic sampling buys on the embedded task, per update and per generated token.

Each method trains with and without it, from one warm start, with the same seeds and updates. Per update: the held-out
metrics at the end. Per token: those on the way (fewer prompts), where the run with dynamic sampling has generated as
many tokens as the run without in all, interpolated between two evaluations.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_sampling.py --output dynamic_sampling.json
"""

import argparse
import json
from statistics import fmean
from typing import Any

import embedded
import numpy as np


CURVE = ("entropy", "avg@16", "pass@16")


def train(method: str, dynamic: bool, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once. `curve` has rows of (tokens generated or read, entropy, avg@16, pass@16)."""
    overrides = {"dynamic_sampling": dynamic, "dynamic_sampling_incomplete": "train"}
    metrics, log = embedded.train(method, seed, args, curve=True, **overrides)
    tokens = {0: 0.0} | {entry["step"]: entry["num_tokens"] for entry in log if "num_tokens" in entry}
    curve = [
        [tokens[entry["step"]], *(entry[f"held_out/{name}"] for name in CURVE)]
        for entry in log
        if "held_out/entropy" in entry
    ]
    rates = [entry["dynamic_sampling/acceptance_rate"] for entry in log if "dynamic_sampling/rounds" in entry]
    return {
        "method": method,
        "dynamic_sampling": dynamic,
        "seed": seed,
        **metrics,
        "tokens": tokens[max(tokens)],
        "acceptance_rate": fmean(rates) if rates else None,
        "curve": curve,
    }


def at_tokens(curve: list[list[float]], tokens: float) -> dict[str, float]:
    """The held-out metrics of a curve where so many tokens have been generated."""
    x, *columns = np.array(curve).T
    return {name: float(np.interp(tokens, x, y)) for name, y in zip(CURVE, columns, strict=True)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all combinations, print a line each, and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    embedded.add_arguments(parser, methods=["grpo", "clip_cov", "kl_cov"])
    args = parser.parse_args(argv)
    results = []
    for method in args.methods:
        for seed in args.seeds:
            without, with_it = (train(method, dynamic, seed, args) for dynamic in (False, True))
            without["at_equal_tokens"] = at_tokens(without["curve"], without["tokens"])
            with_it["at_equal_tokens"] = at_tokens(with_it["curve"], without["tokens"])
            for result in (without, with_it):
                results.append(result)
                values = " ".join(f"{name} {result[name]:.3f}" for name in embedded.METRICS)
                equal = " ".join(f"{name} {value:.3f}" for name, value in result["at_equal_tokens"].items())
                print(
                    f"{method} dynamic_sampling={result['dynamic_sampling']} seed {seed}: {values} tokens "
                    f"{result['tokens']:.3g}; at equal tokens: {equal}",
                    flush=True,
                )
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
