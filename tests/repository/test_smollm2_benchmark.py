"""The comparison on SmolLM2: a run from training to tables, with a tiny model; what is chosen; what is not repeated."""

import importlib
import json

import pytest
import torch
from benchmark_runs import BENCHMARKS
from conftest import ROOT
from prepared_python import prepared_python
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_trl.smoke import byte_tokenizer


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # as when the script is started
        names = ("smollm2", "smollm2_tables", "smollm2_cases")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model in the warm start's place."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(modules, start, tmp_path_factory):
    """One run, of one rollout, and what it was asked with."""
    root = tmp_path_factory.mktemp("benchmark")
    arguments = ["--report", str(root / "report"), "--folder", str(root / "runs"), "--model", str(start)]
    arguments += ["--rollouts", "1", "--problems", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", prepared_python())
        modules["smollm2"].main([*arguments, "--max_runs", "1"])
    return root, arguments


def test_a_run(modules, report):
    root, _ = report
    files = {path.name for path in (root / "report/runs").iterdir()}
    assert files == {"grpo-0-1e-05-seed100.json", "warm_start-test.json", "warm_start-tune.json"}
    run = json.loads((root / "report/runs/grpo-0-1e-05-seed100.json").read_text())
    assert (run["method"], run["rate"], run["seed"], run["problems"]) == ("GRPO", 1e-5, 100, "tune")
    assert run["versions"]["torch"] == torch.__version__
    assert [len(run["curve"][name]) for name in ("entropy", "reward")] == [1, 1]
    assert run["cpu_seconds"] is not None  # it was not resumed
    assert {len(run[name]) for name in ("right", "greedy_right", "majority", "distinct_right")} == {3}
    assert set(modules["smollm2_tables"].METRICS) <= run["metrics"].keys()
    assert not list((root / "runs").glob("*/*"))  # model and checkpoints are gone
    text = (root / "report/tables.md").read_text()
    assert "| 1e-05 | " in text and "## The comparison" not in text


def test_a_finished_run_is_not_repeated(modules, report):
    root, arguments = report
    before = {path: path.stat().st_mtime_ns for path in (root / "report/runs").iterdir()}
    modules["smollm2"].main([*arguments, "--max_runs", "0"])
    assert {path: path.stat().st_mtime_ns for path in (root / "report/runs").iterdir()} == before
    with pytest.raises(SystemExit, match="was made with other settings"):
        modules["smollm2"].main([*arguments, "--max_runs", "0", "--rollouts", "3"])


def made_up(modules, name, setting, rate, seed, right, samples=16):
    metrics = {"entropy": 0.1, "greedy": 0.5, "majority@16": 0.5, "distinct_right": 1.0}
    metrics |= {"avg@16": sum(right) / len(right) / samples, "pass@16": sum(map(bool, right)) / len(right)}
    scores = {"right": right, "greedy_right": [0] * len(right), "majority": [0.5] * len(right)}
    return scores | {
        "method": modules["smollm2_cases"].CASES[name].label,
        "case": name,
        "setting": setting,
        "rate": rate,
        "seed": seed,
        "samples": samples,
        "problems": "test",
        "trajectory_entropy": 0.2,
        "distinct_right": [1] * len(right),
        "metrics": metrics,
    }


def test_choices(modules):
    make = lambda *case: made_up(modules, *case)  # noqa: E731
    rates = [make("grpo", 0, rate, 100, right) for rate, right in ((1e-5, [4, 4]), (3e-5, [8, 8]), (6e-5, [16, 0]))]
    assert modules["smollm2"].tuned_rate(rates) == 3e-5  # the first of equal ones
    settings = [make("kl_cov", i, 3e-5, 100, right) for i, right in enumerate(([16, 0], [8, 4], [2, 2]))]
    assert modules["smollm2"].tuned_setting(settings) == 1  # pass@16 counts as much: .375 + 1 against .5 + .5


def test_differences(modules):
    """By hand: KL-Cov is ahead by 2 of 16 samples in each problem of one seed, by 6 in the other's."""
    difference = modules["smollm2_tables"].difference
    grpo = [made_up(modules, "grpo", 0, 3e-5, seed, [4, 8]) for seed in (10, 11, 12)]
    kl_cov = [made_up(modules, "kl_cov", 0, 3e-5, seed, [4 + more, 8 + more]) for seed, more in ((11, 6), (10, 2))]
    # Student's 97.5% quantile for one degree of freedom is 12.706; the standard error of .125 and .375 is .125.
    assert difference(kl_cov, grpo, "avg@16") == "+0.250 ± 1.588 [+0.250, +0.250]"
    assert difference(kl_cov[:1], grpo, "avg@16") == "+0.375"
    text = modules["smollm2_tables"].tables([*grpo, *kl_cov])
    assert "| KL-Cov | 2 | fraction 0.1 | 0.200 | 0.100 | 0.500 | 0.625 |" in text
    assert "## Differences from GRPO" in text


def test_every_case_has_its_recipe(modules):
    cases = modules["smollm2_cases"].CASES
    recipes = {path.stem for path in (ROOT / "configs/smollm2-135m").glob("*.yaml")}
    assert {case.config for case in cases.values()} == recipes
    assert {len(case.settings) for name, case in cases.items() if name != "grpo"} == {3}
    assert all(case.null_of is None or cases[case.null_of].config == case.config for case in cases.values())
