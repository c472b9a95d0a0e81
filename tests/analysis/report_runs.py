"""Runs with made-up logs and token records, for the tests of the report."""

import json
import math

import numpy as np

from entropy_trl.analysis.covariance.records import FOLDER, write_records


#: Names and values that would break a page, or matplotlib, if they were not treated as text.
HOSTILE = '<script>alert("x")</script>'
HOSTILE_NAMES = (f"{HOSTILE}&amp;", r"_$\frac{1}$", "'\"--><img src=x onerror=alert(1)>\x07")


def log_of(seed=0, collapse=0.05, updates=240, every=8, brief=False):
    """Entropy that falls to `collapse` and what goes with it, as the quickstart logs them; brief: two curves."""
    noise = np.random.default_rng(seed)
    entries = []
    for step in range(0, updates + 1, every):
        entropy = collapse + (0.8 - collapse) * math.exp(-step / 60)
        reward = 0.8 - 0.3 * math.exp(entropy)
        if step % 24 == 0:
            evaluation = {"held_out/entropy": entropy, "held_out/avg@16": reward + 0.004 * noise.standard_normal()}
            entries.append({"step": step, **evaluation} | ({} if brief else {"held_out/pass@16": 0.5 + entropy / 2}))
        if step and brief:
            entries.append({"step": step, "entropy": entropy})
        elif step:
            training = {
                "entropy": entropy + 0.002 * noise.standard_normal(),
                "reward": reward + 0.02 * noise.standard_normal(),
                "completions/mean_length": 7.0 - entropy / 10,
                "clip_ratio/region_mean": 0.02 * entropy,
                "grad_norm": 0.5 + noise.random(),
                "diversity/distinct_correct": 3 * entropy,
                "loss": 0.0,
            }
            entries.append(training | {"step": step, "epoch": step / 1000})
    return entries


def write_run(folder, seed=0, collapse=0.05, settings=None, finished=True, log=None):
    """A run folder as the quickstart writes it."""
    folder.mkdir(parents=True)
    log = log_of(seed, collapse) if log is None else log
    (folder / "train_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    stored = {"seed": seed, "max_steps": 240, "learning_rate": 6e-4} | (settings or {})
    (folder / "settings.json").write_text(json.dumps(stored))
    if finished:
        (folder / "result.json").write_text(json.dumps({"final_entropy": collapse, "greedy": 0.5 + seed / 10}))
    return folder


def write_token_records(
    run, seed=0, steps=(1, 81, 161, 241), texts=("+", "7", "\n", HOSTILE), length=6, control=None, prompt=HOSTILE
):
    """Records of 4 prompts with 4 completions each."""
    generator = np.random.default_rng(seed)
    completions = 16
    rows = completions * length
    for step in steps:
        row_id = np.repeat(np.arange(completions), length)
        reward = (generator.random(completions) < np.repeat([0.0, 0.4, 0.7, 1.0], 4)).astype(float)
        accuracy = reward.reshape(4, 4).mean(axis=1)
        advantage = np.repeat(reward - np.repeat(accuracy, 4), length)
        logp = -generator.exponential(0.4, rows)
        covariance = (logp - logp.mean()) * (advantage - advantage.mean()) if rows else logp
        token_id = generator.integers(0, len(texts), rows)
        entropy = generator.random(rows)
        columns = {
            "row_id": row_id,
            "group": row_id // 4,
            "position": np.tile(np.arange(length), completions),
            "token_id": token_id,
            "token": [texts[i] for i in token_id],
            "logp": logp,
            "old_logp": logp,
            "entropy": entropy,
            "entropy_after": entropy - 0.01 * generator.random(rows),
            "advantage": advantage,
            "covariance": covariance,
            "selected": covariance > np.quantile(covariance, 0.95) if control and rows else np.zeros(rows, bool),
            "reward": np.repeat(reward, length),
            "group_accuracy": np.repeat(np.repeat(accuracy, 4), length),
        }
        metadata = {
            "step": step,
            "learning_rate": 1e-4,
            "tokens": rows,
            "tokens_recorded": rows,
            "mean_covariance": float(covariance.mean()) if rows else 0.0,
            "mean_entropy": float(entropy.mean()) if rows else 0.0,
            "mean_entropy_after": float(columns["entropy_after"].mean()) if rows else None,
            "num_generations": 4,
            "control": control,
            "loss_type": "dapo",
            "prompts": {group: f"prompt {group} {prompt}" for group in range(4)},
        }
        write_records(run / FOLDER / f"step-{str(step).strip('<>').zfill(8)}.parquet", columns, metadata)
