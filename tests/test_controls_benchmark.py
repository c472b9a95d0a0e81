"""`benchmarks/controls.py`: the comparison of all controls, from tuning to tables, at a tiny size."""

import importlib
import json
import math

import numpy as np
import pytest
from scipy import stats
from test_benchmarks import BENCHMARKS

from entropy_trl import CovGRPOConfig
from entropy_trl.quickstart.recipe import RECIPES, training_arguments


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks, as when a script there is started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_methods_have_the_same_budget_and_valid_settings(load, tmp_path):
    cases = load("control_cases").CASES
    assert {case.group for case in cases.values()} == set(load("control_cases").GROUPS)
    assert len({case.label for case in cases.values()}) == len(cases)
    for name, case in cases.items():
        assert len(case.settings) == 4
        assert len({json.dumps(setting, sort_keys=True) for setting in case.settings}) == 4, name
        for setting in case.settings:
            CovGRPOConfig(**training_arguments("grpo", RECIPES["short"], 0, tmp_path) | setting)


def test_the_differences_are_those_of_a_paired_t_test(load):
    generator = np.random.default_rng(0)
    values, baseline = generator.normal(size=(2, 5)).tolist()
    mean, half = load("control_report").difference(values, baseline)
    interval = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    mean, half = load("control_report").difference([0.5], [0.25])
    assert mean == 0.25 and math.isnan(half)


def test_undominated(load):
    def seeds(*pairs):
        return {
            seed: {"final_entropy": entropy, "avg@16": accuracy, "pass@16": accuracy}
            for seed, (entropy, accuracy) in enumerate(pairs)
        }

    cell = {
        "sure": seeds((0.0, 0.9), (0.0, 0.9)),
        "open": seeds((0.6, 0.5), (0.4, 0.5)),
        "worse": seeds((0.5, 0.4), (0.5, 0.4)),  # as much entropy as "open", less accuracy
        "between": seeds((0.3, 0.6), (0.3, 0.6)),
        "twin": seeds((0.3, 0.6), (0.3, 0.6)),  # equal methods do not dominate each other
    }
    assert load("control_report").undominated(cell) == ["sure", "open", "between", "twin"]


def test_tuning_takes_the_best_mean_over_both_rates(load):
    controls = load("controls")

    def result(case, setting, rate, average, passed):
        return {"case": case, "setting": setting, "rate": rate, "avg@16": average, "pass@16": passed}

    results = [
        result("a", 0, 1e-4, 0.4, 0.9),
        result("a", 0, 6e-4, 0.4, 0.5),  # mean score .55
        result("a", 1, 1e-4, 0.5, 0.7),
        result("a", 1, 6e-4, 0.5, 0.7),  # .60
        result("b", 2, 1e-4, 0.1, 0.1),
        result("b", 3, 1e-4, 0.1, 0.1),  # equal: the first
    ]
    assert controls.tuned_settings(results) == {"a": 1, "b": 2}
    assert controls.tuned_rate(results) == 1e-4
    assert controls.tuned_rate(list(reversed(results[2:]))) == 6e-4


def test_curves_are_shortened_to_means(load):
    shorten = load("controls").shorten
    assert shorten([1.0, 2.0]) == [1.0, 2.0]
    values = np.random.default_rng(0).uniform(size=120)
    assert shorten(values.tolist()) == pytest.approx(values.reshape(40, 3).mean(1), abs=1e-4)
    assert len(shorten(values[:101].tolist())) == 40


def test_settings_are_described_by_what_differs(load):
    cases, describe = load("control_cases").CASES, load("control_report").describe
    assert describe(cases["grpo"].settings[0], cases["grpo"].settings) == "epsilon 0.2"
    kl_cov = cases["kl_cov"].settings
    assert describe(kl_cov[1], kl_cov) == "fraction 0.02, coef 1"
    flexible = cases["flexible_id"].settings
    assert describe(flexible[0], flexible) == "published"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("controls")


def arguments(folder, *more):
    sizes = ["--rollouts", "2", "--eval_prompts", "16", "--warm_start_steps", "30", "--seeds", "0", "1"]
    places = ["--folder", str(folder / "runs"), "--warm_start_dir", str(folder), "--report", str(folder / "report")]
    return ["--methods", "kl_cov", *sizes, *places, *more]


@pytest.mark.filterwarnings("ignore")
def test_runs_resumes_and_reports(load, folder, monkeypatch, capsys):
    controls, embedded = load("controls"), load("embedded")
    monkeypatch.setattr(controls, "RATES", (1e-5, controls.HOT))
    argv = arguments(folder)
    report = controls.main([*argv, "--recipes", "short"])
    tuned = report["tuned_rate"]
    cells = 1 if tuned == controls.HOT else 2
    assert len(report["tuning"]) == 2 * 4 * cells
    assert len(report["results"]) == 2 * 2 * cells
    assert set(report["chosen"]) == {"grpo", "kl_cov"}
    prompts = {result["seed"]: result["pass@16"] for result in report["results"] if result["case"] == "grpo"}
    assert set(prompts) == {0, 1}
    for result in report["results"]:
        assert result["rollouts"] == 2 and len(result["curve"]) == 2
        assert result["mean_entropy"] == pytest.approx(np.mean(result["curve"]), abs=1e-4)
        assert 0 <= result["avg@16"] <= result["pass@4"] <= result["pass@16"] <= 1 and result["cpu_seconds"] > 0

    files = sorted((folder / "runs").iterdir())
    before = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()  # as if it had been interrupted there
    made = []
    train = embedded.train
    monkeypatch.setattr(embedded, "train", lambda *args, **kwargs: made.append(kwargs) or train(*args, **kwargs))
    again = controls.main([*argv, "--recipes", "short"])
    assert len(made) == 1
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [files[0]]
    timing = ("cpu_seconds",)
    strip = lambda results: [{k: v for k, v in r.items() if k not in timing} for r in results]  # noqa: E731
    assert strip(again["results"]) == strip(report["results"])
    # What is not there, the long recipe, is left out when only reading is asked for.
    assert strip(controls.main([*argv, "--processes", "0"])["results"]) == strip(report["results"])

    written = json.loads((folder / "report" / "results.json").read_text())
    assert written["chosen"] == report["chosen"] and len(written["results"]) == len(report["results"])
    assert written["results"][0]["avg@16"] == pytest.approx(report["results"][0]["avg@16"], abs=1e-5)
    tables = (folder / "report" / "tables.md").read_text()
    assert tables.count("\n## ") == cells + 1 and "Seeds 0, 1." in tables
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith(("| KL-Cov", "| **KL-Cov"))]
    assert len(rows) == cells + 1
    cell = [r for r in report["results"] if r["rate"] == report["results"][0]["rate"]]
    pairs = {case: [r["pass@16"] for r in cell if r["case"] == case] for case in ("kl_cov", "grpo")}
    assert f"{np.mean(pairs['kl_cov']) - np.mean(pairs['grpo']):+.3f} [" in rows[0][9]
    for name in ("methods.png", "curves.png"):
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_another_setting_is_made_again(load, folder, tmp_path):
    """A stored run counts only for what it was made with."""
    controls = load("controls")
    parser_arguments = {"folder": tmp_path, "rollouts": 2, "eval_prompts": 16}
    args = type("Arguments", (), parser_arguments)
    run = controls.Run("kl_cov", 0, "short", controls.HOT, 0)
    (tmp_path / f"{run.name}.json").write_text(json.dumps(controls.key_of(run, args)))
    assert controls.stored(run, args) is not None
    args.rollouts = 3
    assert controls.stored(run, args) is None


def test_unknown_methods_are_refused(load, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("controls").main(["--methods", "kl-cov", "--folder", str(tmp_path)])
    assert "kl_cov" in capsys.readouterr().err
