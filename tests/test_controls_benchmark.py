"""`benchmarks/controls.py`: the comparison of all controls, from tuning to tables, at a tiny size."""

import importlib
import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import stats
from test_benchmarks import BENCHMARKS

from entropy_trl import CovGRPOConfig
from entropy_trl.quickstart import held_out_prompts
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
        if case.null_of is not None:  # the same but for the draw
            for setting, tuned in zip(case.settings, cases[case.null_of].settings, strict=True):
                assert setting["entropy_control_kwargs"] == tuned["entropy_control_kwargs"] | {"selection": "random"}
        for setting in case.settings:
            CovGRPOConfig(**training_arguments("grpo", RECIPES["short"], 0, tmp_path) | setting)


def test_the_differences_are_those_of_a_paired_t_test(load):
    generator = np.random.default_rng(0)
    values, baseline = generator.normal(size=(2, 5)).tolist()
    found, test = load("control_report").difference(values, baseline), stats.ttest_rel(values, baseline)
    interval = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue)
    one = load("control_report").difference([0.5], [0.25])
    assert one.mean == 0.25 and math.isnan(one.half) and one.p == 1
    same = load("control_report").difference([0.5, 0.7], [0.5, 0.7])
    assert (same.mean, same.half, same.p) == (0, 0, 1)


def test_bold_is_what_survives_holm_over_the_column(load):
    generator = np.random.default_rng(0)
    grpo = generator.normal(size=4)
    shifts = {"clip_cov": 3.0, "kl_cov": 0.33, "qae": 0.0}
    methods = {"grpo": [{"greedy": value} for value in grpo]}
    methods |= {
        m: [{"greedy": v} for v in grpo + shift + 0.2 * generator.normal(size=4)] for m, shift in shifts.items()
    }
    cells = load("control_report")._differences([(method, "grpo") for method in shifts], methods, "greedy")
    ps = [stats.ttest_rel([r["greedy"] for r in methods[m]], grpo).pvalue for m in shifts]
    assert ps[0] < 0.05 / 3 and 0.05 / 2 < ps[1] < 0.05  # the second one is found alone, but not among three
    assert [cell.startswith("**") for cell in cells] == [True, False, False]


def result(case="grpo", seed=0, rate=1e-4, recipe="short", setting=0, **metrics):
    return {"case": case, "seed": seed, "rate": rate, "recipe": recipe, "setting": setting} | metrics


def test_undominated(load):
    def seeds(*pairs):
        return [{"final_entropy": entropy, "avg@16": accuracy, "pass@16": accuracy} for entropy, accuracy in pairs]

    cell = {
        "sure": seeds((0.0, 0.9), (0.0, 0.9)),
        "open": seeds((0.6, 0.5), (0.4, 0.5)),
        "worse": seeds((0.5, 0.4), (0.5, 0.4)),  # as much entropy as "open", less accuracy
        "between": seeds((0.3, 0.6), (0.3, 0.6)),
        "twin": seeds((0.3, 0.6), (0.3, 0.6)),  # equal methods do not dominate each other
    }
    assert load("control_report").undominated(cell) == ["sure", "open", "between", "twin"]


def test_a_cell_is_shown_when_all_its_runs_are_there(load):
    runs = [(1, "grpo"), (0, "kl_cov"), (0, "grpo"), (1, "kl_cov"), (2, "grpo")]
    report = {"chosen": {"grpo": 0, "kl_cov": 1}, "seeds": [0, 1]}
    results = [result(case, seed) for seed, case in runs]
    cells = load("control_report").by_cell(report | {"results": [*results, result("grpo", 0, recipe="long")]})
    assert list(cells) == [("short", 1e-4)]
    for method, of_method in cells["short", 1e-4].items():
        assert [(r["case"], r["seed"]) for r in of_method] == [(method, 0), (method, 1)]
    assert load("control_report").by_cell(report | {"results": results[1:]}) == {}


def test_tuning_takes_the_best_mean_over_both_rates(load):
    def made(case, setting, rate, average, passed):
        return result(case, setting=setting, rate=rate) | {"avg@16": average, "pass@16": passed}

    results = [
        made("clip_cov", 0, 1e-4, 0.4, 0.9),
        made("clip_cov", 0, 6e-4, 0.4, 0.5),  # the two seeds at this rate count as one
        made("clip_cov", 0, 6e-4, 0.4, 0.3),  # (.65 + .40) / 2 = .525
        made("clip_cov", 1, 1e-4, 0.5, 0.6),
        made("clip_cov", 1, 6e-4, 0.5, 0.5),
        made("clip_cov", 1, 6e-4, 0.5, 0.5),  # .525, but for the last of them
        made("qae", 2, 1e-4, 0.1, 0.1),
        made("qae", 3, 1e-4, 0.1, 0.1),  # equal: the first
    ]
    scores = load("control_report").tuning_scores(results)
    assert scores["clip_cov", 0] == pytest.approx({1e-4: 0.65, 6e-4: 0.4})
    results[-3]["pass@16"] = 0.52
    scores = load("control_report").tuning_scores(results)
    assert load("controls").tuned_settings(scores) == {"clip_cov": 1, "clip_random": 1, "qae": 2}
    assert load("controls").tuned_rate(results) == 1e-4
    assert load("controls").tuned_rate(list(reversed(results[2:]))) == 6e-4


def test_tuning_and_comparison_have_prompts_and_seeds_of_their_own(load):
    controls = load("controls")
    tuning, other, comparison = (
        set(controls.prompts_of(controls.Run("grpo", 0, "short", 1e-4, seed), 100))
        for seed in (*controls.TUNING_SEEDS, controls.SEEDS[0])
    )
    assert len(tuning) == len(comparison) == 100 and tuning == other
    assert not tuning & comparison and not (tuning | comparison) & set(held_out_prompts(100))
    assert not set(controls.SEEDS) & {*controls.TUNING_SEEDS, 0, 1, 2}


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
    targeted = cases["targeted_clip_higher"].settings
    assert describe(targeted[2], targeted) == "epsilon 0.1, entropy_target 0.3"
    flexible = cases["flexible_id"].settings
    assert describe(flexible[0], flexible) == "defaults"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("controls")


def arguments(folder, *more):
    sizes = ["--rollouts", "2", "--eval_prompts", "16", "--warm_start_steps", "30", "--seeds", "5", "6"]
    places = ["--folder", str(folder / "runs"), "--warm_start_dir", str(folder), "--report", str(folder / "report")]
    return ["--methods", "kl_cov", *sizes, *places, *more]


@pytest.mark.filterwarnings("ignore")
def test_runs_resumes_and_reports(load, folder, monkeypatch, capsys):
    controls, embedded = load("controls"), load("embedded")
    monkeypatch.setattr(controls, "RATES", (controls.HOT,))  # then the hot rate is the tuned one
    for method in ("grpo", "kl_cov", "kl_random"):  # two settings are enough here
        case = controls.CASES[method]
        monkeypatch.setitem(controls.CASES, method, replace(case, settings=case.settings[:2]))
    argv = arguments(folder)
    report = controls.main([*argv, "--recipes", "short"])
    assert report["tuned_rate"] == controls.HOT
    assert len(report["tuning"]) == 2 * 2 * 2
    assert len(report["results"]) == 3 * 2
    chosen = report["chosen"]
    assert set(chosen) == {"grpo", "kl_cov", "kl_random"} and chosen["kl_random"] == chosen["kl_cov"]
    assert {(result["case"], result["seed"]) for result in report["results"]} == set(product(chosen, (5, 6)))
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
    assert tables.count("\n## ") == 2 and "Seeds 5, 6." in tables
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| KL-Cov")]
    assert [len(row) for row in rows] == [8, 5, 5, 3]  # means, differences, from its null; the tuning
    of = {case: np.array([r["pass@16"] for r in report["results"] if r["case"] == case]) for case in chosen}
    assert f"{(of['kl_cov'] - of['grpo']).mean():+.3f} [" in rows[1][4]
    assert f"{(of['kl_cov'] - of['kl_random']).mean():+.3f} [" in rows[2][4]
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "kl-cov"], "kl_cov"),
        (["--seeds", "10", "101"], "one of the tuning"),
        (["--processes", "0"], "no tuning of the learning rate"),
    ],
)
def test_mistakes_are_refused(load, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit):
        load("controls").main([*argv, "--folder", str(tmp_path)])
    assert message in capsys.readouterr().err
