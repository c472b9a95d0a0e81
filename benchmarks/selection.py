"""What a selection costs, by number of tokens, beside a straightforward implementation of the authors' formula.

    python benchmarks/selection.py                        # 2e4 to 1.6e7 tokens, about two minutes on one core
    python benchmarks/selection.py --tokens 5e6 --device cuda --output selection.json

The pool is synthetic: rows padded to 1024 to 8192 positions, completion lengths uniform between an eighth of that and
all of it (44% of the positions are padding), log-probabilities of a peaked policy (four tokens in five are nearly
certain), by which the pool is scored as a step pool is, one advantage a row, the mask in int64 as TRL has it, 1% of the
tokens already clipped by the ratio clip.

Measured, each from tensors on the device to a result on the device, by the wall clock, interleaved:

- `token_batch`: `TokenBatch(...)` of the raw tensors;
- `clip_cov`, `kl_cov`: `ClipCov().select(batch)` and `KLCov().select(batch)` of a ready `TokenBatch`;
- `clip_cov_formula`, `kl_cov_formula`: the same selection of the raw tensors, straight from the formula: the valid
  tokens by boolean indexing, on the CPU from there on, their means and products, `topk` (or the band and `randperm`),
  and the result by index assignment;
- `covariance_metrics`: the pool's table by quantile, which the trainer logs beside every selection;
- `clip_cov_with_metrics`, `kl_cov_with_metrics`: the selection and that table. The target is for these.

Every ratio is a median over the repeats of formula time / library time of the same repeat, also with the table and
with the time of the `TokenBatch`. `exponent` is the slope of log(time) over log(tokens), 1 being linear, over all
sizes; and `exponent_large` over the upper half of them, where fixed costs no longer hide the growth.

On a CPU, glibc takes every tensor of more than 32 MiB (8.4e6 float32 positions) from the system anew, and its page
faults cost more than the arithmetic: times jump there. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` in the
environment switches that off, for the library and the formula alike.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import entropy_trl
from entropy_trl import ClipCov, KLCov, TokenBatch, token_covariance
from entropy_trl.tokens.covariance import covariance_metrics


TOKENS = (20_000, 80_000, 320_000, 1_250_000, 5_000_000, 16_000_000)
TARGET_TOKENS, TARGET_SPEEDUP = 5_000_000, 3.0
TARGET_RATIOS = ("clip_cov_with_metrics", "kl_cov_with_metrics")
CLIP_COV, KL_COV = ClipCov(), KLCov()


def row_width(tokens: int) -> int:
    """Completion positions of a pool of `tokens`: 1024 in a small one, 4096 at 5e6 tokens, 8192 at 1.6e7."""
    return min(max(2 ** (round(math.log2(tokens) / 2) + 1), 1024), 8192)


def make_pool(tokens: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """The raw tensors of a pool of exactly `tokens` valid tokens, keyed as the arguments of [`TokenBatch`]."""
    generator = torch.Generator().manual_seed(seed)
    width = row_width(tokens)
    enough_rows = 2 * tokens // width + 8
    lengths = torch.randint(width // 8, width + 1, (enough_rows,), generator=generator)
    rows = int((lengths.cumsum(0) < tokens).sum()) + 1
    lengths = lengths[:rows]
    lengths[-1] -= lengths.sum() - tokens
    mask = torch.arange(width) < lengths[:, None]
    # Entropy of about 0.4 nats: an exponential surprisal, shrunk to almost nothing at four tokens in five.
    surprisal = torch.empty(rows, width).exponential_(generator=generator)
    surprisal.mul_(torch.rand(rows, width, generator=generator).lt_(0.2).mul_(1.8).add_(0.01))
    pool = {
        "logps": -surprisal,
        "advantages": torch.randn(rows, generator=generator),
        "mask": mask.long(),
        "clipped": torch.rand(rows, width, generator=generator) < 0.01,
    }
    pool = {name: value.to(device) for name, value in pool.items()}
    return pool | {"old_logps": pool["logps"]}  # a step pool is scored with the rollout's own log-probabilities


def formula_covariance(pool: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Eq. 10 of the valid tokens, on the CPU, and their flat indices."""
    valid = pool["mask"] > 0
    logps = pool["logps"][valid].detach().cpu()
    advantages = pool["advantages"].unsqueeze(1).expand_as(pool["logps"])[valid].detach().cpu()
    covariance = (logps - logps.mean()) * (advantages - advantages.mean())
    return covariance, valid.flatten().nonzero().squeeze(1).cpu()


def formula_kl_cov(pool: dict[str, Tensor]) -> Tensor:
    """Eq. 13 written down as it stands: the tokens with the highest covariance."""
    covariance, indices = formula_covariance(pool)
    k = max(int(KL_COV.fraction * covariance.numel()), 1)
    selected = torch.zeros_like(pool["mask"], dtype=torch.bool).flatten()
    selected[indices[covariance.topk(k).indices].to(selected.device)] = True
    return selected.view_as(pool["mask"])


def formula_clip_cov(pool: dict[str, Tensor]) -> Tensor:
    """Eq. 11 written down as it stands: a uniform draw from the covariance band, of tokens that are not clipped."""
    covariance, indices = formula_covariance(pool)
    clipped = pool["clipped"][pool["mask"] > 0].cpu()
    band = ((covariance > CLIP_COV.cov_low) & (covariance < CLIP_COV.cov_high) & ~clipped).nonzero().squeeze(1)
    n = min(max(int(CLIP_COV.fraction * covariance.numel()), 1), band.numel())
    selected = torch.zeros_like(pool["mask"], dtype=torch.bool).flatten()
    selected[indices[band[torch.randperm(band.numel())[:n]]].to(selected.device)] = True
    return selected.view_as(pool["mask"])


def agreement(pool: dict[str, Tensor]) -> dict[str, float]:
    """That library and formula do the same work: selected tokens of each, and the share of KL-Cov's that both have."""
    batch = TokenBatch(**pool)
    library, formula = KL_COV.select(batch).selected, formula_kl_cov(pool)
    return {
        "kl_cov_selected": int(library.sum()),
        "kl_cov_overlap": int((library & formula).sum()) / int(formula.sum()),
        "clip_cov_selected": int(CLIP_COV.select(batch).selected.sum()),
        "clip_cov_formula_selected": int(formula_clip_cov(pool).sum()),
    }


def with_metrics(control: ClipCov | KLCov, batch: TokenBatch) -> dict[str, Any]:
    """A selection, and the metrics that the trainer logs of it."""
    selection = control.select(batch)
    assert selection.covariance is not None
    return covariance_metrics(selection.covariance, batch.mask, selection.selected)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call by the wall clock, with the device idle before and after."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def measure(tokens: int, device: str, repeats: int) -> dict[str, Any]:
    """All timings at one size: seconds of each piece of work and the ratios formula / library, paired by repeat."""
    pool = make_pool(tokens, device)
    batch = TokenBatch(**pool)
    covariance = token_covariance(batch.logps, batch.advantages, batch.mask)
    selected = KL_COV.select(batch).selected
    work: dict[str, Callable[[], Any]] = {
        "token_batch": lambda: TokenBatch(**pool),
        "clip_cov": lambda: CLIP_COV.select(batch),
        "clip_cov_formula": lambda: formula_clip_cov(pool),
        "kl_cov": lambda: KL_COV.select(batch),
        "kl_cov_formula": lambda: formula_kl_cov(pool),
        "covariance_metrics": lambda: covariance_metrics(covariance, batch.mask, selected),
        "clip_cov_with_metrics": lambda: with_metrics(CLIP_COV, batch),
        "kl_cov_with_metrics": lambda: with_metrics(KL_COV, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(-1, repeats):  # the first round warms up
        for name, run in work.items():
            elapsed = timed(run, device)
            if repeat >= 0:
                seconds[name].append(elapsed)

    speedup = {}
    for name in ("clip_cov", "kl_cov"):
        pairs = zip(seconds[f"{name}_formula"], seconds[f"{name}_with_metrics"], strict=True)
        speedup[f"{name}_with_metrics"] = spread([formula / library for formula, library in pairs])
        triples = list(zip(seconds[f"{name}_formula"], seconds[name], seconds["token_batch"], strict=True))
        speedup[name] = spread([formula / library for formula, library, _ in triples])
        speedup[f"{name}_with_token_batch"] = spread([f / (library + build) for f, library, build in triples])
    return {
        "tokens": tokens,
        "shape": list(batch.mask.shape),
        "agreement": agreement(pool),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "speedup": speedup,
    }


def exponents(results: list[dict[str, Any]]) -> dict[str, float]:
    """Slope of log(median seconds) over log(tokens) of each piece of work."""
    tokens = np.log([result["tokens"] for result in results])
    return {
        name: float(np.polyfit(tokens, np.log([result["seconds"][name]["median"] for result in results]), 1)[0])
        for name in results[0]["seconds"]
    }


def print_table(report: dict[str, Any]) -> None:
    """Milliseconds by size, then the ratios and exponents."""
    names = list(report["results"][0]["seconds"])
    print(f"milliseconds, median of {report['repeats']}, on {report['device_name']}, {report['threads']} threads")
    print(f"{'tokens':>10} {'shape':>12}" + "".join(f"{name:>24}" for name in names))
    for result in report["results"]:
        cells = "".join(f"{1e3 * result['seconds'][name]['median']:>24.2f}" for name in names)
        print(f"{result['tokens']:>10} {'x'.join(map(str, result['shape'])):>12}{cells}")
    for key in ("exponent", "exponent_large"):
        if key in report:
            print(f"{key:>23}" + "".join(f"{report[key][name]:>24.2f}" for name in names))
    print("\nformula time / library time, median [quartiles]")
    for result in report["results"]:
        ratios = (f"{n} {s['median']:.1f} [{s['q1']:.1f}, {s['q3']:.1f}]" for n, s in result["speedup"].items())
        print(f"{result['tokens']:>10}  " + "  ".join(ratios))
    if report["target"] is not None:
        print(f"\ntarget, {TARGET_SPEEDUP:g} times faster on a CPU at {TARGET_TOKENS:,} tokens: {report['target']}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what `--output` writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=float, nargs="+", default=TOKENS, help="pool sizes, ascending")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds at each size")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    results = [measure(int(tokens), args.device, args.repeats) for tokens in args.tokens]
    on_cpu = torch.device(args.device).type == "cpu"
    at_target = [result["speedup"] for result in results if result["tokens"] == TARGET_TOKENS and on_cpu]
    report = {
        "benchmark": "selection",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "entropy_trl": entropy_trl.__version__,
        },
        "device": args.device,
        "device_name": platform.machine() if on_cpu else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "repeats": args.repeats,
        "results": results,
        "target": {n: at_target[0][n]["median"] >= TARGET_SPEEDUP for n in TARGET_RATIOS} if at_target else None,
    }
    if len(results) >= 2:
        report["exponent"] = exponents(results)
    if len(results) >= 4:
        report["exponent_large"] = exponents(results[len(results) // 2 :])
    print_table(report)
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
