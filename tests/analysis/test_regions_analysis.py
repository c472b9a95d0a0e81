"""The entropy regions in token records: against plain-Python loops, and where there is nothing to divide by."""

import json
import math
import re
import statistics
from dataclasses import asdict

import numpy as np
import pytest

from entropy_trl import cli
from entropy_trl.analysis.covariance.records import FOLDER, read_records, write_records
from entropy_trl.analysis.covariance.regions import StepMean, entropy_regions
from entropy_trl.tokens.regions import REGIONS


SHARES = ("tokens", "restrained", "gradient", "entropy_change")


def write_step(folder, step, tokens, rank=""):
    """A step of tokens (logp, old_logp, entropy, advantage, selected)."""
    n = len(tokens)
    logp, old_logp, entropy, advantage, selected = np.array(tokens, np.float32).reshape(n, 5).T
    columns = {
        "row_id": np.arange(n),
        "group": np.arange(n),
        "position": np.zeros(n),
        "token_id": np.zeros(n),
        "token": ["x"] * n,
        "logp": logp,
        "old_logp": old_logp,
        "entropy": entropy,
        "advantage": advantage,
        "covariance": np.zeros(n),
        "selected": selected,
        "reward": np.full(n, 0.5),
        "group_accuracy": np.full(n, 0.5),
    }
    metadata = {
        "step": step,
        "learning_rate": 1e-3,
        "tokens": n,
        "tokens_recorded": n,
        "mean_covariance": 0.0,
        "mean_entropy": 0.5,
        "mean_entropy_after": None,
        "num_generations": 2,
        "control": "clip_cov",
        "loss_type": "dapo",
        "prompts": {},
    }
    write_records(folder / FOLDER / f"step-{step:08d}{rank}.parquet", columns, metadata)


def random_tokens(generator, n):
    """Log-probabilities that differ from the rollout's, some advantages of 0; as float32, which the records keep."""
    logp = -generator.exponential(size=n)
    columns = (
        logp,
        logp + 0.3 * generator.normal(size=n),
        generator.exponential(size=n),
        generator.normal(size=n) * (generator.random(n) < 0.9),
        generator.random(n) < 0.2,
    )
    return np.stack(columns, axis=1).astype(np.float32).tolist()


def region_of(logp, entropy, advantage):
    """The table of the paper; None for no region."""
    if advantage == 0 or -logp == entropy:
        return None
    if -logp < entropy:
        return "e1" if advantage > 0 else "e3"
    return "e2" if advantage > 0 else "e4"


def loop(tokens):
    """The four numbers of each region, by the definitions."""
    sums = {e: dict.fromkeys(("tokens", "restrained", "gradient", "change"), 0.0) for e in REGIONS}
    gradient = 0.0
    for logp, old_logp, entropy, advantage, selected in tokens:
        p, weight = math.exp(logp), advantage * math.exp(logp - old_logp)
        gradient += abs(weight) * (1 - p)
        region = region_of(logp, entropy, advantage)
        if region is not None:
            sums[region]["tokens"] += 1
            sums[region]["restrained"] += selected
            sums[region]["gradient"] += abs(weight) * (1 - p)
            sums[region]["change"] += -weight * p * (1 - p) * (logp + entropy)
    return {
        e: {
            "tokens": of["tokens"] / len(tokens),
            "restrained": of["restrained"] / of["tokens"],
            "gradient": of["gradient"] / gradient,
            "entropy_change": of["change"] / len(tokens),
        }
        for e, of in sums.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_regions_are_those_of_the_loop(tmp_path, seed):
    generator = np.random.default_rng(seed)
    steps = {step: random_tokens(generator, 100 + step) for step in (1, 9, 17)}
    for step, tokens in steps.items():  # of two processes
        write_step(tmp_path, step, tokens[:60])
        write_step(tmp_path, step, tokens[60:], rank="-rank1")
    result = entropy_regions(read_records(tmp_path))
    expected = {step: loop(tokens) for step, tokens in steps.items()}
    assert [(row.step, row.region) for row in result.steps] == [(step, e) for step in steps for e in REGIONS]
    for row in result.steps:
        for name in SHARES:
            assert getattr(row, name) == pytest.approx(expected[row.step][row.region][name], rel=1e-9), name
    for row, region in zip(result.means, REGIONS, strict=True):
        assert row.region == region
        for name in SHARES:
            values = [expected[step][region][name] for step in steps]
            assert getattr(row, name).mean == pytest.approx(statistics.mean(values), rel=1e-9)
            assert getattr(row, name).standard_error == pytest.approx(statistics.stdev(values) / 3**0.5, rel=1e-9)


def test_golden(tmp_path):
    # e1: p = 1/2 of a distribution with H = ln 4, r = 2, A = 1: gradient 2 * 1/2, change -2 * 1/2 * 1/2 * ln 2.
    # e4: p = 1/4 of one with H = ln 2, r = 1, A = -4: gradient 4 * 3/4, change 4 * 1/4 * 3/4 * -ln 2.
    ln2 = math.log(2)
    write_step(tmp_path, 1, [(-ln2, -2 * ln2, 2 * ln2, 1.0, 0), (-2 * ln2, -2 * ln2, ln2, -4.0, 1)])
    e1, e2, e3, e4 = entropy_regions(read_records(tmp_path)).steps
    assert [getattr(e1, name) for name in SHARES] == pytest.approx([1 / 2, 0, 1 / 4, -ln2 / 4], rel=1e-6)
    assert [getattr(e4, name) for name in SHARES] == pytest.approx([1 / 2, 1, 3 / 4, -3 * ln2 / 8], rel=1e-6)
    for empty in (e2, e3):  # of no tokens, none or all may be restrained
        assert [getattr(empty, name) for name in SHARES] == [0, None, 0, 0]


def test_a_step_without_advantages_has_no_gradient_to_share(tmp_path):
    tokens = random_tokens(np.random.default_rng(0), 50)
    write_step(tmp_path, 1, tokens)
    write_step(tmp_path, 2, [(*token[:3], 0.0, 0) for token in tokens])
    result = entropy_regions(read_records(tmp_path))
    first, second = result.steps[:4], result.steps[4:]
    assert [[getattr(row, name) for name in SHARES] for row in second] == [[0, None, None, 0]] * 4
    for row, mean in zip(first, result.means, strict=True):
        assert mean.tokens.mean == pytest.approx(row.tokens / 2)
        assert mean.entropy_change.mean == pytest.approx(row.entropy_change / 2)
        assert mean.restrained == StepMean(row.restrained, None)
        assert mean.gradient == StepMean(row.gradient, None)


def test_one_step_has_no_standard_error(tmp_path):
    write_step(tmp_path, 1, random_tokens(np.random.default_rng(0), 50))
    result = entropy_regions(read_records(tmp_path))
    for row, mean in zip(result.steps, result.means, strict=True):
        assert [getattr(mean, name) for name in SHARES] == [StepMean(getattr(row, name), None) for name in SHARES]


def test_a_step_without_tokens_has_no_shares(tmp_path):
    write_step(tmp_path, 1, [])
    result = entropy_regions(read_records(tmp_path))
    assert [[getattr(row, name) for name in SHARES] for row in result.steps] == [[None] * 4] * 4
    assert all(getattr(mean, name) == StepMean(None, None) for mean in result.means for name in SHARES)


def test_command(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for step in (1, 2):  # without e2
        tokens = [token for token in random_tokens(generator, 80) if region_of(token[0], *token[2:4]) != "e2"]
        write_step(tmp_path, step, tokens)
    assert cli.main(["covariance", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())["regions"]
    expected = entropy_regions(read_records(tmp_path))
    assert written == asdict(expected)
    printed = dict(re.findall(r"^(e[1-4]) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert list(printed) == list(REGIONS)
    assert printed["e2"].split() == ["0%", "-", "0%", "+0.00e+00", "0.0e+00"]
    e3 = expected.means[2]
    assert printed["e3"].split() == [
        *(f"{100 * share.mean:.3g}%" for share in (e3.tokens, e3.restrained, e3.gradient)),
        f"{e3.entropy_change.mean:+.2e}",
        f"{e3.entropy_change.standard_error:.1e}",
    ]
