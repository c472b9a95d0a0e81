"""`benchmarks/controls.py`: the comparison of all controls, from tuning to tables, at a tiny size."""

import importlib
import json
import math
from argparse import Namespace
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from benchmark_runs import BENCHMARKS
from safetensors.torch import load_file, save_file
from scipy import stats

from entropy_trl import CovGRPOConfig
from entropy_trl.quickstart import held_out_prompts, task
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
    assert set(load("control_cases").FOLLOWED_UP) < set(cases)
    for name, case in cases.items():
        count = 1 if name in load("control_cases").UNTUNED else 4
        assert len(case.settings) == count
        assert len({json.dumps(setting, sort_keys=True) for setting in case.settings}) == count, name
        if case.null_of is not None:  # the same but for the draw
            for setting, tuned in zip(case.settings, cases[case.null_of].settings, strict=True):
                assert setting["entropy_control_kwargs"] == tuned["entropy_control_kwargs"] | {"selection": "random"}
        for setting in case.settings:
            CovGRPOConfig(**training_arguments("grpo", RECIPES["short"], 0, tmp_path) | setting)


def test_the_differences_are_those_of_a_paired_t_test(load):
    generator = np.random.default_rng(0)
    values, baseline = generator.normal(size=(2, 5)).tolist()
    found, test = load("control_data").mean_difference(values, baseline), stats.ttest_rel(values, baseline)
    interval = test.confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (interval.low, interval.high)
    )


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.5, 0.75, 1.0]])
def test_equal_differences_have_no_interval(load, values):
    """Not one of no width: accuracies are multiples of 1/1024, so that equal differences are chance."""
    baseline = [value - 0.25 for value in values]
    found = load("control_data").mean_difference(values, baseline)
    assert found.mean == 0.25 and math.isnan(found.half_width)
    methods = {"kl_cov": [{"greedy": v} for v in values], "grpo": [{"greedy": v} for v in baseline]}
    assert load("control_tables")._differences([("kl_cov", "grpo")], methods, "greedy") == ["+0.250"]


def result(case="grpo", seed=0, rate=1e-4, recipe="short", setting=0, **metrics):
    return {"case": case, "seed": seed, "rate": rate, "recipe": recipe, "setting": setting} | metrics


@pytest.mark.parametrize(
    ("by_cell", "behind", "ahead"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], False, False),
        ([[-0.02, -0.02], [-0.02, 0.02]], False, False),  # -.01 in the mean, -.02 in the first cell
        ([[-0.02, -0.03], [0.0, 0.0]], True, False),  # -.0125 in the mean
        ([[-0.02, -0.03], [0.04, 0.04]], True, False),  # -.025 in the first cell
        ([[0.03, 0.04], [0.0, 0.01]], False, False),  # above 0 in three of four pairs
        ([[0.03, 0.04, 0.03], [0.0, 0.01, 0.01]], False, True),  # in five of six
        ([[0.005, 0.015], [0.01, 0.01]], False, False),  # no more than the margin
    ],
)
def test_ahead_and_behind(load, by_cell, behind, ahead):
    margin = 0.01 + 1e-9
    assert load("control_data").is_behind(by_cell, margin) is behind
    assert load("control_data").is_ahead(by_cell, margin) is ahead


def cell_of(**methods):
    """A cell of three seeds with the same values each: (final entropy, avg@16, pass@16) by method."""
    names = ("final_entropy", "avg@16", "pass@16")
    return {method: [dict(zip(names, values, strict=True))] * 3 for method, values in methods.items()}


COLLAPSED = {"grpo": (0.05, 0.40, 0.45), "clip_random": (0.60, 0.60, 1.0)}  # a null that is better than all others


@pytest.mark.parametrize(
    ("methods", "best"),
    [
        ({"clip_cov": (0.35, 0.40, 0.95)}, ["clip_cov"]),
        ({"clip_cov": (0.35, 0.395, 0.95)}, ["clip_cov"]),  # within the margin of GRPO's accuracy
        ({"clip_cov": (0.35, 0.38, 0.95)}, []),  # at the price of accuracy
        ({"clip_cov": (0.07, 0.40, 0.95)}, []),  # not ahead in entropy
        ({"clip_cov": (0.35, 0.40, 0.46)}, []),  # not in pass@16
        ({"clip_cov": (0.35, 0.40, 0.95), "qae": (0.35, 0.41, 0.94)}, ["clip_cov", "qae"]),  # a tie
        ({"clip_cov": (0.35, 0.40, 0.95), "qae": (0.25, 0.40, 0.96)}, ["clip_cov"]),
        ({"clip_cov": (0.35, 0.40, 0.95), "qae": (0.30, 0.42, 0.97)}, []),  # neither has all
    ],
)
def test_a_preset_is_ahead_of_grpo_and_behind_none(load, methods, best):
    report = load("control_data")
    collapsed = cell_of(**COLLAPSED | methods)
    assert report.has_collapsed(collapsed)
    assert report.presets([collapsed]) == best
    assert report.presets_without_a_seed([collapsed]) == [best] * 3
    calm = dict.fromkeys(collapsed, (0.35, 0.4, 0.95))
    assert not report.has_collapsed(cell_of(**calm))
    assert report.presets([cell_of(**calm)]) == []  # nothing to cure
    if best:  # where nothing collapses it need not be better, but not worse either
        assert report.presets([collapsed, cell_of(**calm)]) == best
        worse = calm | dict.fromkeys(methods, (0.35, 0.37, 0.95))
        assert report.presets([collapsed, cell_of(**worse)]) == []


def test_a_seed_that_decides_is_seen(load):
    cell = cell_of(**COLLAPSED | {"clip_cov": (0.35, 0.40, 0.95)})
    cell["clip_cov"] = [*cell["clip_cov"][:2], {"final_entropy": 0.35, "avg@16": 0.34, "pass@16": 0.95}]
    report = load("control_data")
    assert report.presets([cell]) == []
    assert report.presets_without_a_seed([cell]) == [[], [], ["clip_cov"]]
    assert report.presets_without_a_seed([{method: of[:1] for method, of in cell.items()}]) == []


def test_a_cell_is_shown_when_all_its_runs_are_there(load):
    runs = [(1, "grpo"), (0, "kl_cov"), (0, "grpo"), (1, "kl_cov"), (2, "grpo")]
    report = {"chosen": {"grpo": 0, "kl_cov": 1}, "seeds": [0, 1]}
    results = [result(case, seed) for seed, case in runs]
    cells = load("control_data").by_cell(report | {"results": [*results, result("grpo", 0, recipe="long")]})
    assert list(cells) == [("short", 1e-4)]
    for method, of_method in cells["short", 1e-4].items():
        assert [(r["case"], r["seed"]) for r in of_method] == [(method, 0), (method, 1)]
    assert load("control_data").by_cell(report | {"results": results[1:]}) == {}
    hot = [result(case, seed, rate=6e-4) for seed, case in runs]
    both = load("control_data").by_cell(report | {"results": [*hot, *results]})
    assert {cell: {r["rate"] for of in both[cell].values() for r in of} for cell in both} == {
        ("short", 6e-4): {6e-4},
        ("short", 1e-4): {1e-4},
    }


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
    scores = load("control_data").tuning_scores(results)
    assert scores["clip_cov", 0] == pytest.approx({1e-4: 0.65, 6e-4: 0.4})
    results[-3]["pass@16"] = 0.52
    scores = load("control_data").tuning_scores(results)
    assert load("controls").tuned_settings(scores) == {"clip_cov": 1, "clip_random": 1, "qae": 2}
    assert load("controls").tuned_rate(results) == 1e-4
    assert load("controls").tuned_rate(list(reversed(results[2:]))) == 6e-4


def test_tuning_and_comparison_have_prompts_and_seeds_of_their_own(load):
    controls = load("controls")
    quickstart, tuning, comparison = (
        set(controls.prompts_of(use, 100)) for use in ("quickstart", "tuning", "comparison")
    )
    assert len(quickstart) == len(tuning) == len(comparison) == 100
    assert len(quickstart | tuning | comparison) == 300 and quickstart == set(held_out_prompts(100))
    assert not set(controls.SEEDS) & {*controls.TUNING_SEEDS, 0, 1, 2}


def test_what_a_policy_can_solve_that_looks_ahead_for_the_last_operators_only(load):
    # 2 3 5 7: 2+3-5 = 0, then 0+7 = 7, 0-7 = 3, 0*7 = 0; the chain -+- ends in 7 as +-+ does
    found = load("controls").solvable(["2357>7:", "2357>7:"])
    fixed = np.array(found["two operators fixed"]).reshape(3, 3)
    assert fixed[0, 1] == 1  # +-, and then +
    for row, first in enumerate("+-*"):
        for column, second in enumerate("+-*"):
            value = eval(f"({eval(f'2{first}3') % 10}{second}5) % 10")
            assert fixed[row, column] == any(eval(f"({value}{third}7) % 10") == 7 for third in "+-*")
    assert found["one operator fixed"] == fixed.max(axis=1).tolist()
    assert load("controls").solvable(["2357>7:", "0000>1:"])["two operators fixed"][1] == 0.5  # nothing makes 1 of 0


def answer(text):
    """Token ids of an answer, padded to the length of a whole one."""
    ids = [task.TOKEN_ID[character] for character in text]
    return ids + [task.PAD_ID] * (task.COMPLETION_LENGTH - len(ids))


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["+5-0+7"], 1.0),  # 2+3-5 = 0, and 0+7 = 7
        (["+0-0*0"], 1.0),  # its values are wrong and its third operator is, which are not looked at
        (["*6*0+7"], 1.0),  # 2*3*5 = 0
        (["+5+0-3"], 1.0),  # 2+3+5 = 0
        (["+5*5+2"], 0.0),  # (2+3)*5 = 5, and then 2, 8 or 5
        (["+5"], 0.0),  # there is no second operator
        (["+5-0+7", "+5"], 0.5),
    ],
)
def test_which_answers_can_be_completed(load, answers, share):
    tokens = torch.tensor([[answer(text) for text in answers]])
    before = tokens.clone()
    assert load("embedded").completable(["2357>7:"], tokens) == share
    assert torch.equal(tokens, before)
    other = load("embedded").completable(["2357>7:", "2357>7:"], torch.cat([tokens, tokens]))
    assert other == share


def test_foresight_asks_for_another_target(load, monkeypatch):
    """A policy that writes a good pair for its target has foresight, one that writes the same always has none."""
    embedded = load("embedded")
    pair_of = {"2357>7:": "+5-0", "2357>2:": "+5*5"}  # neither is good for the other one
    blind = {"2357>7:": "+5-0", "2357>2:": "+5-0"}
    prompts = list(pair_of)
    for table, expected in ((pair_of, (1.0, 0.0)), (blind, (0.5, 0.5))):
        asked = []

        def sample(model, prompts, samples, generator, table=table, asked=asked):
            asked.append(prompts)
            tokens = torch.tensor([[answer(table.get(prompt, "+5"))] * samples for prompt in prompts])
            return Namespace(tokens=tokens)

        # each target is turned into the other one
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([5, 5]))
        monkeypatch.setattr(embedded, "sample", sample)
        found = embedded.foresight(None, prompts)
        monkeypatch.undo()
        assert asked == [prompts, prompts[::-1]]
        assert (found["completable"], found["completable_blind"]) == expected


def test_curves_are_shortened_to_means(load):
    shorten = load("controls").shorten
    assert shorten([1.0, 2.0]) == [1.0, 2.0]
    values = np.random.default_rng(0).uniform(size=120)
    assert shorten(values.tolist()) == pytest.approx(values.reshape(40, 3).mean(1), abs=1e-4)
    assert len(shorten(values[:101].tolist())) == 40


def test_settings_are_described_by_what_differs(load):
    cases, describe = load("control_cases").CASES, load("control_tables").describe
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
    sizes = ["--rollouts", "2", "--eval_prompts", "16", "--warm_start_steps", "30", "--seeds", "6", "5"]
    places = ["--folder", str(folder / "runs"), "--warm_start_dir", str(folder), "--report", str(folder / "report")]
    return ["--methods", "kl_cov", *sizes, *places, "--warm_starts", "3", *more]


@pytest.fixture
def two_settings(load, monkeypatch):
    controls = load("controls")
    for method in ("grpo", "kl_cov", "kl_random"):
        case = controls.CASES[method]
        monkeypatch.setitem(controls.CASES, method, replace(case, settings=case.settings[:2]))
    return controls


@pytest.mark.filterwarnings("ignore")
def test_runs_resumes_and_reports(two_settings, load, folder, monkeypatch, capsys):
    controls, embedded = two_settings, load("embedded")
    monkeypatch.setattr(controls, "RATES", (controls.HOT,))  # then the hot rate is the tuned one
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
    starts = report["other_warm_starts"]
    followed = ("grpo", "kl_cov", "clip_cov_04", "clip_random_04")
    assert {(r["case"], r["warm_start"], r["seed"]) for r in starts["results"]} == set(product(followed, (3,), (23,)))
    assert starts["before"][0]["final_entropy"] != report["warm_start"]["final_entropy"]
    assert len({r["warm_start_weights"] for r in [*report["results"], *starts["results"]]}) == 2

    files = sorted((folder / "runs").iterdir())
    before = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()  # as if it had been interrupted there
    made = []
    train = embedded.train
    monkeypatch.setattr(embedded, "train", lambda *args, **kwargs: made.append(kwargs) or train(*args, **kwargs))
    repeated = controls.main([*argv, "--recipes", "short"])
    assert len(made) == 1
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [files[0]]
    timing = ("cpu_seconds",)
    strip = lambda results: [{k: v for k, v in r.items() if k not in timing} for r in results]  # noqa: E731
    assert strip(repeated["results"]) == strip(report["results"])
    # What is not there, the long recipe, is left out when only reading is asked for.
    assert strip(controls.main([*argv, "--processes", "0"])["results"]) == strip(report["results"])
    assert "long 0.0006: 0 of 6 runs" in capsys.readouterr().out

    written = json.loads((folder / "report" / "results.json").read_text())
    assert written["chosen"] == report["chosen"] and len(written["results"]) == len(report["results"])
    assert written["results"][0]["avg@16"] == pytest.approx(report["results"][0]["avg@16"], abs=1e-5)
    tables = (folder / "report" / "tables.md").read_text()
    titles = [line.removeprefix("## ") for line in tables.splitlines() if line.startswith("## ")]
    starts = ("Over all cells", "Short recipe", "Other warm starts", "Tuning")
    assert all(title.startswith(start) for title, start in zip(titles, starts, strict=True))
    cell = tables[tables.index("## Short recipe") : tables.index("## Other warm starts")]
    assert "Seeds 6, 5." in cell
    rows = [line.split(" | ") for line in cell.splitlines() if line.startswith("| KL-Cov")]
    assert [len(row) for row in rows] == [8, 5, 5]  # means, differences from GRPO and from its null
    of = {case: [r["final_entropy"] for r in written["results"] if r["case"] == case] for case in chosen}
    mean, low, high = (f"{value:.3f}".replace("0.", ".") for value in (np.mean(of["kl_cov"]), *of["kl_cov"]))
    assert rows[0][1] == f"{mean} [{low} {high}]"
    for row, other in zip(rows[1:], ("grpo", "kl_random"), strict=True):
        test = stats.ttest_rel(of["kl_cov"], of[other])
        interval = test.confidence_interval(0.95)
        expected = f"{np.subtract(of['kl_cov'], of[other]).mean():+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
        assert row[1] == expected
    assert len({row[1] for row in rows}) == 3
    ranks = stats.spearmanr(*([r[name] for r in written["results"]] for name in ("mean_entropy", "greedy")))
    expected = f"{ranks[0]:.3f}".replace("0.", ".", 1)  # nan where all are equal, in both
    assert f"over all 6 runs of all methods: {expected} with greedy" in cell
    for name in ("methods.png", "curves.png", "warm_starts.png"):
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")

    # one part alone leaves the other as it is
    fewer = controls.main([*argv, "--parts", "other_warm_starts", "--processes", "0", "--warm_starts", "4"])
    assert fewer["other_warm_starts"]["results"] == []
    again = json.loads((folder / "report" / "results.json").read_text())
    assert {**again, "other_warm_starts": None} == {**written, "other_warm_starts": None}
    tables = (folder / "report" / "tables.md").read_text()
    assert cell.strip() in tables and "## Other warm starts" not in tables
    assert not (folder / "report" / "warm_starts.png").exists()
    for part in controls.PARTS:
        with pytest.raises(SystemExit):
            controls.main([*argv, "--parts", part, "--eval_prompts", "8"])
        assert "--eval_prompts 8: the part that is kept has 16" in capsys.readouterr().err
    controls.main([*argv, "--recipes", "short", "--parts", "comparison", "--processes", "0"])
    assert json.loads((folder / "report" / "results.json").read_text()) == again


def test_the_documents_have_the_tables_of_their_data(load):
    folder = BENCHMARKS.parent / "docs" / "controls"
    report, cases = load("control_report"), load("control_cases").CASES
    kept = report.read(folder)
    assert (folder / "tables.md").read_text() == report.tables(kept)
    assert kept["settings"] == json.loads(json.dumps({case: cases[case].settings for case in kept["chosen"]}))


def test_each_part_trains_with_its_rate_length_seeds_and_prompts(two_settings, load, tmp_path, monkeypatch):
    controls, embedded = two_settings, load("embedded")
    made = []

    monkeypatch.setattr(controls, "weights_of", lambda config, folder: f"weights {config.seed}")

    def train(method, seed, args, held_out, warm_start, learning_rate, token_records, **overrides):
        made.append((args.rollouts, learning_rate, seed, warm_start, tuple(held_out)))
        metrics = dict.fromkeys((*embedded.METRICS, "completable", "completable_blind", "cpu_seconds"), 1.0)
        return metrics | {"avg@16": 1.0 if learning_rate == 2e-4 else 0.5}, [{"entropy": 1.0}]

    monkeypatch.setattr(embedded, "train", train)
    monkeypatch.setattr(embedded, "evaluate_warm_start", lambda *_: dict.fromkeys(embedded.METRICS, 0.0))
    argv = ["--methods", "kl_cov", "--seeds", "7", "8", "--warm_starts", "3", "4", "--eval_prompts", "8"]
    report = controls.main([*argv, "--folder", str(tmp_path)])
    tuning, comparison = (tuple(controls.prompts_of(part, 8)) for part in ("tuning", "comparison"))
    assert report["tuned_rate"] == 2e-4
    hot, tuned = controls.HOT, 2e-4
    first, second = controls.TUNING_SEEDS
    expected = {(120, rate, first, 0, tuning) for rate in controls.RATES}
    expected |= {(120, rate, seed, 0, tuning) for rate, seed in ((hot, first), (hot, second), (tuned, first))}
    expected |= {(n, rate, seed, 0, comparison) for n in (120, 400) for rate in (hot, tuned) for seed in (7, 8)}
    expected |= {(400, hot, 23, 3, comparison), (400, hot, 24, 4, comparison)}
    assert set(made) == expected
    # five rates, of which two are in the tuning of GRPO's first setting; three methods in each cell, four from each of
    # the other warm starts
    assert len(made) == 5 + 2 * 2 * 3 - 2 + 3 * 4 * 2 + 4 * 2
    assert report["other_warm_starts"]["seeds"] == [23, 24]
    assert list(load("control_data").by_cell(report)) == [
        ("short", hot),
        ("short", tuned),
        ("long", hot),
        ("long", tuned),
    ]


def test_another_setting_is_made_again(load, tmp_path, monkeypatch):
    """A stored run counts only for what it was made with."""
    controls = load("controls")
    args = Namespace(folder=tmp_path, rollouts=2, eval_prompts=16, warm_start_steps=1, warm_start_dir=tmp_path)
    run = controls.Run("kl_cov", 0, "short", controls.HOT, 0)
    (tmp_path / f"{run.name}.json").write_text(json.dumps(controls.key_of(run, args)))
    assert controls.stored(run, args) is not None
    for other in ({"rollouts": 3}, {"eval_prompts": 32}, {"warm_start_steps": 2}):
        assert controls.stored(run, Namespace(**vars(args) | other)) is None
    with monkeypatch.context() as patch:
        patch.setattr(controls, "VERSIONS", controls.VERSIONS | {"trl": "2.0"})
        assert controls.stored(run, args) is None
    assert controls.stored(run, args) is not None
    # the warm start of another machine: the same configuration, other weights
    for weights in tmp_path.glob("warm_start/seed0-*/model.safetensors"):
        tensors = load_file(weights)
        tensors["lm_head.weight"][0, 0] += 1e-3
        save_file(tensors, weights, {"format": "pt"})
    controls.weights_of.cache_clear()
    assert controls.stored(run, args) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "kl-cov"], "kl_cov"),
        (["--seeds", "10", "101"], "--seeds [10, 101]: give each once, and none of (100, 101)"),
        (["--seeds", "10", "10"], "--seeds [10, 10]: give each once"),
        (["--warm_starts", "1", "0"], "--warm_starts [1, 0]: give each once, and none of (0,)"),
        (["--processes", "0"], "no tuning of the learning rate"),
        (["--parts", "other_warm_starts"], "takes the settings from --report, and None has none"),
    ],
)
def test_mistakes_are_refused(load, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit):
        load("controls").main([*argv, "--folder", str(tmp_path), "--warm_start_dir", str(tmp_path)])
    assert not (tmp_path / "warm_start").exists()
    assert message in capsys.readouterr().err
