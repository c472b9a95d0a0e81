"""The equations in plain Python, one token at a time; shares nothing with the package.

A micro-batch is given by nested lists or (B, T) tensors; sums run over explicit loops. Where a gradient is wanted the
log-probabilities are 0-dimensional float64 tensors, so that autograd differentiates the loops.
"""

import math

import torch


def tokens(mask):
    return [(b, t) for b, row in enumerate(mask.tolist()) for t, valid in enumerate(row) if valid]


def advantage(advantages, b, t):
    return float(advantages[b]) if advantages.dim() == 1 else float(advantages[b, t])


def covariances(logps, advantages, mask):
    """arXiv 2505.22617, Eq. 10: {(b, t): (logp - mean logp) * (A - mean A)} over the valid tokens."""
    where = tokens(mask)
    if not where:
        return {}
    logps = logps.detach()
    mean_logp = sum(float(logps[b, t]) for b, t in where) / len(where)
    mean_advantage = sum(advantage(advantages, b, t) for b, t in where) / len(where)
    return {(b, t): (float(logps[b, t]) - mean_logp) * (advantage(advantages, b, t) - mean_advantage) for b, t in where}


def ratio_clipped(logps, old, advantages, mask, low, high):
    """The tokens where the clipped branch of the surrogate is the larger loss."""
    logps, clipped = logps.detach(), set()
    for b, t in tokens(mask):
        ratio = math.exp(float(logps[b, t]) - float(old[b, t]))
        a = advantage(advantages, b, t)
        if -a * min(max(ratio, 1 - low), 1 + high) > -a * ratio:
            clipped.add((b, t))
    return clipped


def clip_cov_candidates(cov, cov_low, cov_high, clipped=()):
    return {i for i, c in cov.items() if cov_low < c < cov_high and i not in clipped}


def clip_cov_count(fraction, n, candidates):
    return min(max(int(fraction * n), 1), candidates)


def kl_cov_selected(cov, fraction):
    """The max(1, int(N * fraction)) largest covariances; the first of equals."""
    if not cov:
        return set()
    k = max(1, int(len(cov) * fraction))
    return set(sorted(cov, key=lambda i: (-cov[i], i))[:k])


def loss(
    logps,
    inputs,
    loss_type,
    *,
    low=0.2,
    high=0.2,
    delta=None,
    dropped=(),
    penalised=(),
    coef=1.0,
    edited=None,
    added=None,
    sequence_level=False,
    beta=0.0,
    bias_correction=False,
    token_filter=None,
    off_policy_threshold=None,
    importance_ratio=None,
    temperatures=(1.0, 1.05),
    accumulation=1,
    max_completion_length=6,
    steps_per_generation=2,
):
    """TRL 1.16's GRPO losses as their papers define them, with tokens dropped (Clip-Cov) or penalised (KL-Cov).

    Of another control: `edited`, {(b, t): advantage}, and `added`, a function of (b, t, log ratio) to add to the loss.
    Returns a 0-dimensional tensor that is differentiable in `logps`.
    """
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    old = inputs.get("old_per_token_logps", logps.detach())
    advantages = inputs["advantages"]
    rows = mask.shape[0]
    per_row = []
    for b in range(rows):
        valid = [t for bb, t in tokens(mask) if bb == b]
        log_ratios = {t: logps[b, t] - old[b, t] for t in valid}
        mean_log_ratio = sum(log_ratios.values()) / max(len(valid), 1)
        keep_row = 1.0
        if off_policy_threshold is not None and valid:
            reference = inputs.get("sampling_per_token_logps", old)
            drift = sum(float(reference[b, t]) - float(logps[b, t].detach()) for t in valid) / len(valid)
            keep_row = 1.0 if advantage(advantages, b, valid[0]) >= 0 or drift <= off_policy_threshold else 0.0
        row_loss = []
        for t in valid:
            a = 0.0 if (b, t) in dropped else advantage(advantages, b, t) if edited is None else edited[b, t]
            ratio = torch.exp(mean_log_ratio if sequence_level else log_ratios[t])
            if loss_type == "cispo":
                value = -min(float(ratio.detach()), high) * a * logps[b, t]
            elif loss_type == "sapo":
                temperature = temperatures[0] if a > 0 else temperatures[1]
                value = -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * a
            elif loss_type == "vespo":
                # phi = e^lambda w^k e^(-lambda w), w the sequence ratio; (k, lambda) = (2, 3) for A >= 0, (3, 2) else.
                log_w = sum(float(x.detach()) for x in log_ratios.values())
                if importance_ratio is not None:
                    log_w += sum(math.log(float(importance_ratio[b, s])) for s in range(mask.shape[1]))
                k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
                value = -math.exp(lam + k * log_w - lam * math.exp(log_w)) * a * logps[b, t]
            else:
                bounded = ratio if delta is None else torch.clamp(ratio, max=delta)
                clipped = torch.clamp(ratio, 1 - low, 1 + high)
                value = torch.max(-bounded * a, -clipped * a)
            extra = coef * torch.abs(log_ratios[t]) if (b, t) in penalised else 0.0
            extra = extra if added is None else added(b, t, log_ratios[t])
            weight = keep_row * (1.0 if token_filter is None else float(token_filter[b, t]))
            correction = 1.0 if importance_ratio is None or loss_type == "vespo" else float(importance_ratio[b, t])
            value = weight * (correction * value + extra)
            if beta:
                d = inputs["ref_per_token_logps"][b, t] - logps[b, t]
                kl = torch.exp(d) - d - 1
                value = value + beta * kl * (ratio if bias_correction else 1.0)
            row_loss.append(value)
        per_row.append(row_loss)
    zero = 0.0 * logps[mask.bool()].sum()
    sums = [sum(row, zero) for row in per_row]
    count = sum(len(row) for row in per_row)
    if loss_type in ("grpo", "sapo"):
        return sum(s / max(len(row), 1) for s, row in zip(sums, per_row, strict=True)) / rows / accumulation
    if loss_type == "bnpo":
        return sum(sums) / max(count, 1) / accumulation
    if loss_type == "dr_grpo":
        return sum(sums) / (rows * max_completion_length) / accumulation
    if loss_type == "luspo":
        return sum(sums) / rows / accumulation
    items = max(int(inputs["num_items_in_batch"]), 1) * accumulation / steps_per_generation
    return sum(sums) / items
