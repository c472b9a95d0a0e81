"""The benchmarks run from end to end at a tiny size and report figures that can be."""

import importlib
import json
from functools import partial

import pytest
from benchmark_runs import BENCHMARKS, run_benchmark

from entropy_trl import CovGRPOConfig
from entropy_trl.quickstart.recipe import RECIPES, training_arguments


@pytest.fixture
def run(monkeypatch):
    return partial(run_benchmark, monkeypatch)


def test_selection(run, tmp_path, capsys):
    sizes = [2_000, 20_000, 70_000, 80_000]
    report = run(
        "selection", ["--device", "cpu", "--tokens", *map(str, sizes), "--repeats", "2"], tmp_path / "selection.json"
    )
    assert [result["tokens"] for result in report["results"]] == sizes
    for result in report["results"]:
        rows, width = result["shape"]
        assert rows * width / 2.5 < result["tokens"] < rows * width
        # Library and formula do the same work: the same number of tokens, and KL-Cov the same tokens but for rounding.
        agreement = result["agreement"]
        assert agreement["kl_cov_selected"] == int(2e-3 * result["tokens"])
        assert agreement["kl_cov_overlap"] > 0.97
        assert agreement["clip_cov_selected"] == agreement["clip_cov_formula_selected"]
        assert {"clip_cov_with_metrics", "kl_cov_with_metrics"} <= result["speedup"].keys()
        for times in result["seconds"].values():
            assert 0 < times["q1"] <= times["median"] <= times["q3"]
    assert report["exponent"].keys() == report["exponent_large"].keys() == report["results"][0]["seconds"].keys()
    assert report["target"] is None  # 5e6 tokens were not measured
    assert "formula time / library time" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_overhead(run, tmp_path, capsys):
    sizes = {"vocab_size": 64, "hidden_size": 16, "layers": 1, "rows": 4, "completion_length": 6, "repeats": 2}
    argv = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    report = run("overhead", ["--device", "cpu", *argv], tmp_path / "overhead.json")
    cases = report["cases"]
    assert list(cases) == [
        "stock",
        "off",
        "clip_cov/step",
        "clip_cov/micro_batch",
        "kl_cov/step",
        "kl_cov/micro_batch",
        "stock (on-policy)",
        "clip_cov/step (on-policy)",
    ]
    for name in ("stock", "stock (on-policy)"):
        assert cases[name]["memory_ratio"] == cases[name]["time_ratio"]["wall"]["median"] == 1.0
    # Weights, gradients and the two moments of Adam: what no measurement of the peak can be below.
    parameters = 64 * 16 + 16 * (16 + 16 + 16 + 16) + 3 * 16 * round(16 * 4864 / 896)
    for case in cases.values():
        assert case["peak_bytes"] > 4 * 4 * parameters
        assert case["time_ratio"].keys() == case["seconds"].keys() == {"wall", "processor"}
        assert (case["added_ratio"] is None) == (case["added_seconds"] is None)
        assert all(seconds > 0 for seconds in case["seconds"].values())
    assert cases["kl_cov/step"]["added_seconds"] > 0 == cases["stock"]["added_seconds"]
    assert cases["clip_cov/step (on-policy)"]["added_seconds"] is None
    assert cases["off"]["memory_ratio"] == pytest.approx(1.0, abs=1e-3)  # TRL bit for bit
    assert "memory / stock" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_scores(run, tmp_path, capsys):
    argv = ["--methods", "kl_cov", "--seeds", "0", "--rollouts", "2", "--eval_prompts", "16"]
    argv += ["--warm_start_steps", "20", "--warm_start_dir", str(tmp_path)]
    rollout, current = run("scores", argv, tmp_path / "scores.json")
    assert (rollout["scores"], current["scores"]) == ("rollout", "current")
    assert len(rollout["overlap"]) > 1 and current["overlap"] == {}
    assert rollout["overlap"]["1"] == 1.0  # the policy is still the rollout's
    assert all(0 < value <= 1 for value in rollout["overlap"].values())
    assert capsys.readouterr().out.count("final_entropy") == 2


@pytest.mark.filterwarnings("ignore")
def test_dynamic_sampling(run, tmp_path, capsys):
    argv = ["--methods", "grpo", "--seeds", "0", "--rollouts", "2", "--eval_prompts", "16"]
    argv += ["--warm_start_steps", "40", "--warm_start_dir", str(tmp_path)]
    without, with_it = run("dynamic_sampling", argv, tmp_path / "dynamic_sampling.json")
    assert (without["dynamic_sampling"], with_it["dynamic_sampling"]) == (False, True)
    assert without["acceptance_rate"] is None and 0 < with_it["acceptance_rate"] <= 1
    assert with_it["tokens"] > without["tokens"] > 0
    assert [row[0] for row in without["curve"]] == sorted(row[0] for row in without["curve"])
    # The run without it has generated all its tokens at its end.
    last = dict(zip(("entropy", "avg@16", "pass@16"), without["curve"][-1][1:], strict=True))
    assert without["at_equal_tokens"] == pytest.approx(last)
    assert capsys.readouterr().out.count("at equal tokens") == 2


def test_rewards(run, tmp_path, capsys):
    gsm8k = {"gold": "7", "model_answer": "7", "solution": "3 + 4 = 7\nA: 7", "label": 1}
    wrong = {"gold": "8", "model_answer": "7", "solution": "3 + 4 = 7\nA: 7", "label": 0}
    recorded = {"gold": "$1+x$", "prediction": "$x+1$", "expected": 1, "pred_kind": "answer_only"}
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (gsm8k, wrong)))
    (tmp_path / "recorded.jsonl").write_text(json.dumps(recorded) + "\n")
    cases = [str(tmp_path / name) for name in ("gsm8k.jsonl", "recorded.jsonl")]
    arguments = [cases[0], "--cases", cases[1], "--workers", "1", "--repeats", "2"]
    report = run("rewards", arguments, tmp_path / "rewards.json")
    assert list(report["results"]) == ["gsm8k/answer_line", "gsm8k/boxed", "recorded/boxed"]
    mistakes = {
        (name, function): (row["false_negatives"], row["false_positives"])
        for name, result in report["results"].items()
        for function, row in result["functions"].items()
    }
    expected = dict.fromkeys(mistakes, (0, 0)) | {("gsm8k/answer_line", "trl"): (1, 0)}  # TRL reads no such line
    assert mistakes == expected
    assert all(value > 0 for speedup in report["speedup"].values() for value in speedup.values())
    assert "times TRL's speed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_entropy_target(monkeypatch, tmp_path, capsys):
    """Two runs, one of which was cut short while it was written, and a table; nothing is run twice."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("entropy_target")
    results, page = tmp_path / "results.jsonl", tmp_path / "tables.md"
    argv = ["--results", str(results), "--table", str(page), "--warm_start_dir", str(tmp_path)]
    argv += ["--cases", "clip_cov_target", "kl_cov_annealed", "--rates", "hot", "--warm_starts", "3"]
    argv += ["--rollouts", "2", "--eval_prompts", "4", "--warm_start_steps", "4"]
    first = module.main([*argv, "--limit", "1"])
    lines = results.read_text().splitlines()
    assert [json.loads(line) for line in lines] == first and len(first) == 1
    results.write_text(lines[0] + "\n" + lines[0][:100])
    both = module.main(argv)
    assert both[0] == first[0] and [run["case"] for run in both] == ["clip_cov_target", "kl_cov_annealed"]
    assert len(results.read_text().splitlines()) == 2
    assert module.main([*argv, "--limit", "0"]) == both
    half = both[0]["curve"][1:]
    assert both[0]["tracking_error"] == pytest.approx(abs(half[0] - 0.3) / 0.3, rel=1e-3)
    assert "saturated" in both[0] and "saturated" not in both[1]
    assert f"| Clip-Cov, target | 1 | 0 | {both[0]['tracking_error']:.0%} [" in page.read_text()
    assert "KL-Cov, annealed | 1 |" in page.read_text()


def test_every_case_of_the_entropy_target_is_a_valid_setting(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("entropy_target")
    assert module.CASES.keys() == module.LABELS.keys()
    for name, setting in module.CASES.items():
        config = CovGRPOConfig(**training_arguments("grpo", RECIPES["short"], 0, tmp_path) | setting)
        if name.endswith("_target") or name == "entropic":
            assert config.entropy_control_kwargs["entropy_target"] == module.TARGET
    found = module.tracking([1.0, 1.0, 0.3, 0.15])
    assert found == {"tracking_error": pytest.approx(0.25), "lowest": 0.15, "highest": 0.3}


def test_code_rewards(run, tmp_path, capsys):
    prompt = 'def twice(x):\n    """Twice."""\n'
    test = "def check(candidate):\n    for x in (1, 2):\n        assert candidate(x) == 2 * x\n"
    humaneval = {"prompt": prompt, "canonical_solution": "    return 2 * x\n", "test": test, "entry_point": "twice"}
    mbpp = {"code": "def sum(a, b):\r\n    return a + b", "test_setup_code": "", "challenge_test_list": []}
    wrong = {"task_id": 2, "test_list": ["assert sum(1, 2) == 4"]}
    (tmp_path / "humaneval.jsonl").write_text(json.dumps({"task_id": "HumanEval/0", **humaneval}) + "\n")
    rows = [{"task_id": 1, "test_list": ["assert sum(1, 2) == 3"], **mbpp}, mbpp | wrong]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [text for name in ("humaneval", "mbpp") for text in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    report = run("code_rewards", [*argv, "--time-limit", "30"], tmp_path / "report.json")
    for name, passing in (("humaneval", 1), ("mbpp", 1)):
        row = report[name]
        assert (row["pass_bare"], row["pass_both"]) == (passing, passing)
        assert row["pass_sandbox_only"] == row["pass_bare_only"] == row["mutated_score"] == []
    assert report["mbpp"]["outcomes"] == {"passed": 1, "wrong answer": 1}
    assert "| mbpp | 2 | 1 | 1 | 0 |" in capsys.readouterr().out
