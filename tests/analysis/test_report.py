"""The report: what it computes, what it says of runs that are not whole, and that logs cannot break the page."""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from report_runs import HOSTILE, HOSTILE_NAMES, log_of, write_run, write_token_records

import entropy_trl.analysis
from entropy_trl import cli
from entropy_trl.analysis import figures
from entropy_trl.analysis.covariance import quantile_table
from entropy_trl.analysis.covariance.records import FOLDER, read_records
from entropy_trl.analysis.covariance.regions import entropy_regions
from entropy_trl.analysis.law import fit_law
from entropy_trl.analysis.logs.runs import Run, Series, read_runs
from entropy_trl.analysis.pages import printable
from entropy_trl.analysis.report import write_report
from entropy_trl.analysis.report.curves import _smoothed, curve
from entropy_trl.analysis.report.law import _mean_interval
from entropy_trl.analysis.report.state import state_of
from entropy_trl.analysis.svg import PAGE_COLOURS, page_element
from entropy_trl.analysis.tables import number, plain
from entropy_trl.analysis.verdict import verdict


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.pieces: list[str] = []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page on two methods with two and one seeds, and token records of two runs; also its numbers."""
    folder = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        write_run(folder / "runs" / f"grpo-seed{seed}", seed)
    control = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"coef": 1.0, "fraction": 0.1}}
    write_run(folder / "runs" / "kl_cov-seed0", 0, 0.3, control)
    write_token_records(folder / "runs" / "grpo-seed0")
    write_token_records(folder / "runs" / "kl_cov-seed0", 1, control="kl_cov")
    page = write_report(read_runs([str(folder / "runs")]), folder / "out", title="Two methods")
    return folder, Page(page), json.loads((folder / "out" / "report.json").read_text())


# --- what it shows


def test_page_is_whole(report):
    folder, page, _ = report
    assert page.text.lstrip().startswith("Two methods")
    assert len(page.of("h1")) == len(page.of("main")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.elements:
        for value in (attributes.get("href", ""), attributes.get("clip-path", "")):
            if "#" in value:
                assert value.strip("url()").removeprefix("#") in ids, (name, value)
    drawings = [attributes for attributes in page.of("svg") if attributes.get("role") == "img"]
    assert len(drawings) == len(page.of("figure")) == 15
    assert all(len(attributes["aria-label"]) > 20 for attributes in drawings)
    assert (folder / "out" / "report.html").stat().st_size < 2_000_000


def test_page_loads_nothing(report):
    _, page, _ = report
    allowed = {"viewport", "color-scheme"}
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & {name for name, _ in page.elements}
    assert page.of("link") == [{"rel": "icon", "href": "data:,"}]
    assert all(a["href"].startswith("#") for a in page.of("a"))
    assert {attributes["name"] for attributes in page.of("meta") if "name" in attributes} == allowed
    assert not re.search(r"url\((?!#)|@import|https?://", page.text)
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)


def test_figures_are_written(report):
    folder, page, _ = report
    names = {attributes["id"] for attributes in page.of("figure")}
    files = {path.name for path in (folder / "out" / "figures").iterdir()}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    svg = ElementTree.parse(folder / "out" / "figures" / "entropy.svg")
    words = [element.text for element in svg.iter() if element.tag.endswith("}text")]
    assert {"Policy entropy", "nats a token", "step", "grpo", "kl_cov"} <= set(words)  # text is text


def test_curve_is_mean_and_range_of_the_seeds(report):
    _, page, numbers = report
    logs = [log_of(seed, 0.05) for seed in (0, 1)]
    values = [[entry["entropy"] for entry in log if "entropy" in entry] for log in logs]
    line = numbers["curves"]["entropy"]["groups"]["grpo"]
    assert line["steps"] == list(range(8, 241, 8))
    assert line["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(*values, strict=True)], rel=1e-5)
    assert line["low"] == pytest.approx([min(pair) for pair in zip(*values, strict=True)], rel=1e-5)
    assert line["high"] == pytest.approx([max(pair) for pair in zip(*values, strict=True)], rel=1e-5)
    assert line["runs"]["seed 1"]["values"] == pytest.approx(values[1], rel=1e-5)
    first, last = (number((values[0][i] + values[1][i]) / 2) for i in (0, -1))
    assert f"grpo falls from {first} to {last}" in page.text
    # the reward is noisy: the mean of the last five logged points
    rewards = [entry["reward"] for entry in logs[0] if "reward" in entry]
    smoothed = numbers["curves"]["reward"]["groups"]["grpo"]["runs"]["seed 0"]["values"]
    assert smoothed[-1] == pytest.approx(sum(rewards[-5:]) / 5, rel=1e-5)
    assert smoothed[1] == pytest.approx(sum(rewards[:2]) / 2, rel=1e-5)
    assert "Running mean of 5 logged points." in page.text


def test_results(report):
    _, page, numbers = report
    rows = numbers["results"]["rows"]
    columns = numbers["results"]["columns"]
    assert columns == ["last entropy", "last reward", "last accuracy", "last pass@k", "final entropy", "final greedy"]
    assert list(rows) == ["grpo, mean of 2", "grpo, seed 0", "grpo, seed 1", "kl_cov, seed 0"]
    for i in range(len(columns)):
        assert rows["grpo, mean of 2"][i] == pytest.approx(
            (rows["grpo, seed 0"][i] + rows["grpo, seed 1"][i]) / 2, rel=1e-5
        )
    assert rows["grpo, seed 1"][-2:] == [0.05, 0.6]
    assert "still running" not in page.text


def test_verdict_comes_first(report):
    """It is that of the shared function, for each group, and stands before the results."""
    _, page, numbers = report
    logs = [log_of(seed, 0.05) for seed in (0, 1)]
    settings = {"seed": 0, "max_steps": 240, "learning_rate": 6e-4}
    series = [Run("grpo", log=log).series("entropy") for log in logs]
    expected = verdict(series, settings, metric="entropy")
    assert numbers["verdicts"]["grpo"] == expected.to_dict()
    assert (expected.sign, numbers["verdicts"]["kl_cov"]["sign"]) == ("collapsed", "healthy")
    for words in (f"{expected.sentence} {expected.why}", expected.advice):
        assert words.replace("`", "") in page.text  # names stand as code
    assert page.text.index("Entropy has collapsed.") < page.text.index("final entropy")
    assert [a["class"] for a in page.of("article")] == ["verdict collapsed", "verdict healthy"]


def test_no_verdict_without_entropy(tmp_path):
    runs = [Run("a", log=[{"step": step, "reward": step / 10} for step in range(9)])]
    page = Page(write_report(runs, tmp_path))
    assert not page.of("article") and "Verdict on a: no entropy was logged." in page.text


def test_law(report):
    _, page, numbers = report
    for run, (seed, collapse) in zip(numbers["law"], ((0, 0.05), (1, 0.05), (0, 0.3)), strict=True):
        evaluations = [entry for entry in log_of(seed, collapse) if "held_out/entropy" in entry]
        fit = fit_law([e["held_out/entropy"] for e in evaluations], [e["held_out/avg@16"] for e in evaluations])
        assert run["reward_metric"] == "held_out/avg@16"
        assert run["a"]["value"] == pytest.approx(fit.a, rel=1e-5)
        assert run["ceiling"]["low"] < fit.ceiling < run["ceiling"]["high"]
        assert f"ceiling {number(fit.ceiling)} [" in page.text
    assert "grpo, mean of 2" in page.text


def test_law_band_agrees_with_the_intervals():
    """At exp(H) = 1 the band is the ceiling's interval, and at 0, which no entropy has, that of b."""
    evaluations = [entry for entry in log_of(3, 0.05) if "held_out/entropy" in entry]
    fit = fit_law([e["held_out/entropy"] for e in evaluations], [e["held_out/avg@16"] for e in evaluations])
    inference = fit.inference()
    low, high = _mean_interval(inference)(np.array([1.0, 0.0]))
    assert low == pytest.approx([inference.ceiling.low, inference.b.low])
    assert high == pytest.approx([inference.ceiling.high, inference.b.high])
    middle = float(np.exp(fit.entropy).mean())
    low, high = _mean_interval(inference)(np.array([middle, middle + 1]))
    assert high[0] - low[0] < high[1] - low[1]


def test_covariance(report):
    folder, page, numbers = report
    found = numbers["covariance"]
    records = read_records(folder / "runs" / "grpo-seed0")
    assert found["runs"] == {"grpo": "seed 0", "kl_cov": "seed 0"}
    assert found["over_training"]["grpo"]["steps"] == [1, 81, 161, 241]
    assert found["over_training"]["grpo"]["mean"] == pytest.approx([r.mean_covariance for r in records], rel=1e-5)
    for stored, table in zip(found["quantiles"]["grpo"], quantile_table([records[0], records[-1]]), strict=True):
        assert stored["step"] == table.step
        assert [row["covariance"] for row in stored["rows"]] == pytest.approx(
            [row.covariance for row in table.rows], rel=1e-5
        )
    tokens = np.concatenate([record.table("covariance")["covariance"] for record in records])
    assert found["distribution"]["grpo"]["tokens"] == len(tokens) == 4 * 96
    assert found["distribution"]["grpo"]["highest"] == pytest.approx(tokens.max(), rel=1e-5)
    changes = [step["change"] for step in found["entropy_change"]["grpo"]["steps"]]
    assert changes == pytest.approx([r.mean_entropy_after - r.mean_entropy for r in records], rel=1e-4)
    assert found["tokens"]["kl_cov"]["chosen_by"] == "restrained by kl_cov"
    assert found["tokens"]["grpo"]["chosen_by"] == "top 2% covariance"
    completions = [a for a in page.of("section") if a.get("class") == "cov-completion"]
    assert len(completions) == 2 * 2 * 2  # groups, steps, completions


def test_regions(report):
    folder, page, numbers = report
    (aria,) = [a["aria-label"] for a in page.of("svg") if a.get("aria-label", "").startswith("Estimated entropy")]
    for group in ("grpo", "kl_cov"):
        stored = numbers["covariance"]["regions"][group]
        expected = entropy_regions(read_records(folder / "runs" / f"{group}-seed0"))
        assert [row["step"] for row in stored["steps"]] == [row.step for row in expected.steps]
        for found, row in zip(stored["means"], expected.means, strict=True):
            assert found["region"] == row.region
            for name in ("tokens", "restrained", "gradient", "entropy_change"):
                assert found[name] == pytest.approx(vars(getattr(row, name)), rel=1e-5)
            in_words = f"{number(row.entropy_change.mean)} in {row.region}"
            assert in_words in aria and in_words in page.text
            assert f"{100 * row.gradient.mean:.3g}%" in page.text
    assert any(row["restrained"]["mean"] > 0 for row in numbers["covariance"]["regions"]["kl_cov"]["means"])


def test_settings(report):
    _, page, numbers = report
    settings = numbers["settings"]
    assert settings["differences"] == [
        "seed",
        "entropy_control",
        "entropy_control_kwargs.coef",
        "entropy_control_kwargs.fraction",
    ]
    assert settings["groups"]["grpo"]["seed"] == ["0", "1"]
    assert settings["groups"]["kl_cov"]["entropy_control_kwargs.fraction"] == ["0.1"]
    assert "Where the groups differ" in page.text


# --- runs that are not whole


def test_partial_runs(tmp_path):
    """A half-written last line, NaN, no results; a checkpoint's state and nothing else; one entry."""
    log = [{k: e[k] for k in ("step", "entropy", "reward") if k in e} for e in log_of()[:20]]
    log[3]["reward"] = math.nan
    run = write_run(tmp_path / "cut-seed0", log=log, finished=False)
    with (run / "train_log.jsonl").open("a") as file:
        file.write('{"step": 400, "entr')
    state = tmp_path / "stock" / "checkpoint-40" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    entries = [{"step": step, "entropy": 0.5 - step / 200, "reward": step / 100} for step in (10, 20, 30, 40)]
    state.write_text(json.dumps({"global_step": 40, "log_history": entries}))
    begun = write_run(tmp_path / "begun", log=[{"step": 8, "entropy": 0.7}], finished=False)
    page = write_report(read_runs([str(run), str(tmp_path / "stock"), str(begun)]), tmp_path / "out")
    text = Page(page).text
    assert f"cut, seed 0: still running, or interrupted, at step {log[-1]['step']} of 240." in text
    assert "stock: still running, or interrupted, at step 40." in text
    assert "begun, seed 0: still running, or interrupted, at step 8 of 240." in text
    assert "begun is 0.700" in text
    assert "No fit for begun, seed 0" in text
    assert "Training reward: not logged by begun, seed 0." in text
    assert "KL divergence from the reference: not logged." in text
    assert "no token records" in text
    assert "No settings are stored with stock." in text
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["finished"] for run in numbers["runs"]] == [False, False, False]
    rewards = numbers["curves"]["reward"]["groups"]["cut"]["runs"]["seed 0"]
    assert len(rewards["steps"]) == sum(not math.isnan(entry.get("reward", math.nan)) for entry in log)


def test_state_of_a_run(tmp_path):
    log = [{"step": step, "entropy": 1.0 / step} for step in (1, 2, 3)]
    runs = [
        Run("ended", log=[*log, {"step": 3, "train_runtime": 5.0}]),
        Run("at its last step", log=log, config={"max_steps": 3}),
        Run("cut", log=log, config={"max_steps": 4}),
        Run("of another trainer", log=log),
    ]
    write_report(runs, tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert [run["finished"] for run in numbers["runs"]] == [True, True, False, None]


def write_state(folder, step, max_steps, logged=None):
    """A checkpoint as transformers writes it: without `train_runtime`, which is logged after the last one."""
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    log = [{"step": i, "entropy": 1.0 / i} for i in range(2, (logged or step) + 1, 2)]
    state = {"global_step": step, "max_steps": max_steps, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


STATES = {
    # a folder's checkpoints (step, planned), its files, its settings; the last step, whether finished
    "python api, at its end": ([(4, 8), (8, 8)], [], {}, 8, True),
    "python api, cut": ([(4, 8)], [], {}, 4, False),
    "last logged before the end": ([(9, 9)], [], {}, 9, True),
    "stopped early, model saved": ([(4, 8)], ["model.safetensors"], {}, 4, True),
    "adapter saved": ([(4, 8)], ["adapter_model.safetensors"], {}, 4, True),
    "resumed for longer": ([(8, 8)], [], {"config": {"max_steps": 20}}, 8, False),
    "epochs": ([(8, 8)], [], {"config": {"max_steps": -1}}, 8, True),
    "no planned step": ([(8, None)], [], {}, 8, False),
}


@pytest.mark.parametrize("case", STATES)
def test_a_folder_says_whether_its_run_is_over(tmp_path, case):
    checkpoints, files, settings, step, finished = STATES[case]
    folder = tmp_path / "run"
    for checkpoint in checkpoints:
        write_state(folder, *checkpoint)
    for name in files:
        (folder / name).write_bytes(b"x")
    if settings:
        (folder / "settings.json").write_text(json.dumps(settings))
    (run,) = read_runs([str(folder)])
    state = state_of(run)
    assert (state.step, state.finished) == (step, finished)


def test_a_model_that_is_older_than_the_checkpoint_is_of_an_earlier_run(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    write_state(tmp_path, 4, 8)
    (run,) = read_runs([str(tmp_path)])
    assert state_of(run).finished is False


@pytest.mark.parametrize("given", ["", "checkpoint-4", "checkpoint-4/trainer_state.json"])
def test_settings_of_a_training(tmp_path, given):
    """A training's `settings.json` is read from the run's folder, and its keys are masked."""
    folder = tmp_path / "kl_cov-seed3"
    write_state(folder, 4, 4)
    stored = {
        "config": {"entropy_control": "kl_cov", "seed": 3, "hub_token": "hf_abcdefghijklmnop"},
        "versions": {"trl": "1.16.0"},
        "command": ["entropy-trl", "train", "--config", "my run.yaml"],
        "commit": "0123abc",
    }
    (folder / "settings.json").write_text(json.dumps(stored))
    page = write_report(read_runs([str(folder / given)]), tmp_path / "out")
    settings = json.loads(page.with_suffix(".json").read_text())["settings"]["groups"]["kl_cov"]
    assert settings["entropy_control"] == ["kl_cov"] and settings["seed"] == ["3"]
    assert settings["versions.trl"] == ["1.16.0"] and settings["commit"] == ["0123abc"]
    assert settings["command"] == ["entropy-trl train --config 'my run.yaml'"]
    text = Page(page).text
    assert "No settings are stored" not in text and "hf_abc" not in text
    assert not any(name.startswith("config.") for name in settings)


def test_seeds_with_other_steps():
    """The mean goes as far as all seeds do; between its steps a seed is interpolated."""
    whole = Series(np.array([0, 10, 20, 30]), np.array([0.0, 1.0, 2.0, 3.0]))
    cut = Series(np.array([0, 15]), np.array([3.0, 0.0]))
    line = curve({"seed 0": whole, "seed 1": cut})
    assert line.steps.tolist() == [0, 10, 15]
    assert line.mean.tolist() == pytest.approx([1.5, 1.0, 0.75])
    assert line.low.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert line.high.tolist() == pytest.approx([3.0, 1.0, 1.5])
    apart = curve({"seed 0": whole, "seed 1": Series(np.array([40, 50]), np.array([1.0, 1.0]))})
    assert apart.steps.tolist() == []
    figures.curves({"grpo": line, "kl_cov": apart}, figures.styles(["grpo", "kl_cov"]), "nats")


# --- what is in a log cannot break the page


def test_hostile_text(tmp_path):
    runs = []
    for i, name in enumerate(HOSTILE_NAMES):
        settings = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "n": i}
        folder = write_run(tmp_path / f"run{i}", i, settings=settings, log=log_of(i, brief=True))
        if i == 0:
            write_token_records(folder)
        runs += read_runs([f"{name}={folder}"])
    page = Page(write_report(runs, tmp_path / "out", title=f"{HOSTILE} </title>"))
    assert not {"script", "img"} & {name for name, _ in page.elements}
    assert page.text.count(HOSTILE) > 10
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\x07" not in page.text
    assert "</title>" in page.text  # as text
    svg = ElementTree.parse(tmp_path / "out" / "figures" / "entropy.svg")
    words = [element.text for element in svg.iter() if element.tag.endswith("}text")]
    assert {figures.shortened(name) for name in HOSTILE_NAMES} <= set(words)  # the legend


@pytest.mark.parametrize("hostile", [*HOSTILE_NAMES, "\ud800\x1b[31m\x9b5m\u202e<b onclick='x()'>"])
def test_every_text_of_a_records_file_is_text(tmp_path, capsys, hostile):
    """Both pages show every field that a file of records may bring, and neither gets a tag, a script or a surrogate."""
    folder = write_run(tmp_path / "run", log=log_of(brief=True))
    write_token_records(folder, texts=(hostile.replace("\ud800", ""), "7"), control=hostile, prompt=hostile)
    assert cli.main(["covariance", str(folder), "--html", str(tmp_path / "tokens.html")]) == 0
    printed = capsys.readouterr().out
    assert not set("\x1b\x9b\u202e\x07\ud800") & set(printed)
    assert cli.main(["report", f"{hostile}={folder}", "--title", hostile, "--output", str(tmp_path)]) == 0
    for name in ("tokens.html", "report.html"):
        page = Page(tmp_path / name)
        allowed = {"style", "title", "class", "id", "href", "content"}
        assert not {"script", "img", "b"} & {tag for tag, _ in page.elements}
        assert not any(
            key.startswith("on") for _, attributes in page.elements for key in attributes if key not in allowed
        )
        assert not set("\x1b\x9b\u202e\x07") & set(page.text)
        (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert printable(hostile) in Page(tmp_path / "tokens.html").text  # the prompt


@pytest.mark.parametrize(
    ("setting", "secret"),
    [
        ({"hub_token": "SECRET"}, True),
        ({"env": {"WANDB_API_KEY": "SECRET"}}, True),
        ({"tracker": [{"apiKey": "SECRET"}], "password": "SECRET"}, True),
        ({"secrets": {"mine": "SECRET"}, "client_secret": "SECRET"}, True),
        ({"command": ["--x", "hf_SECRETabcdefgh123"], "url": "https://me:SECRET@host/x"}, True),
        ({"command": "WANDB_API_KEY='SECRET' train.py --hub_token SECRET", "argv": ["--hub_token", "SECRET"]}, True),
        ({"argv": ["--pad_token", "SECRET"], "text": "max_tokens=SECRET, the token is SECRET"}, False),
        ({"pad_token": "SECRET", "answer_key": "SECRET", "max_tokens": 5, "token_records": "SECRET"}, False),
    ],
)
def test_secrets_among_the_settings_are_masked(tmp_path, setting, secret):
    folder = write_run(tmp_path / "run", log=log_of(brief=True)[:6], settings=setting)
    page = write_report(read_runs([str(folder)]), tmp_path / "out")
    for file in (page, page.with_suffix(".json")):
        assert ("SECRET" not in file.read_text()) == secret
        assert ("*** (masked)" in file.read_text()) == secret


@pytest.mark.parametrize("empty", [(1,), (241,), (1, 81, 161, 241)])
def test_records_that_are_damaged_or_empty_cost_themselves_only(tmp_path, capsys, empty):
    """A step without a counted token, a damaged file and one with a text for a step are named; the rest is read."""
    folder = write_run(tmp_path / "run", log=log_of(brief=True))
    write_token_records(folder)
    for step in empty:
        write_token_records(folder, steps=(step,), length=0)
    (folder / FOLDER / "step-00000500.parquet").write_bytes(b"x")
    write_token_records(folder, steps=(600, "<script>"))
    flipped = folder / FOLDER / "step-00000600.parquet"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 4 : len(data) // 4 + 64] = bytes(64)
    flipped.write_bytes(data)
    command = ["covariance", str(folder), "--html", str(tmp_path / "x.html")]
    left = 4 - len(empty)
    assert cli.main(command) == (0 if left else 2)
    told = capsys.readouterr().err
    assert cli.main(["report", str(folder), "--output", str(tmp_path)]) == 0
    text = Page(tmp_path / "report.html").text
    for name in (
        "step-00000500",
        "step-00000600",
        "has the step '<script>'",
        f"Step {', '.join(map(str, empty))} has no counted token",
    ):
        assert name in told and name in text
    if left:
        stored = json.loads((tmp_path / "report.json").read_text())["covariance"]["over_training"]["run"]["steps"]
        assert stored == [step for step in (1, 81, 161, 241) if step not in empty]


def test_long_completions_are_cut(tmp_path):
    folder = write_run(tmp_path / "grpo-seed0", log=[{"step": 1, "entropy": 0.5}])
    write_token_records(folder, length=900, steps=(1,))
    page = Page(write_report(read_runs([str(folder)]), tmp_path / "out"))
    tokens = [attributes for attributes in page.of("span") if "title" in attributes]
    assert len(tokens) == 2 * 400
    assert re.search(r"tokens \d+ to \d+ of 900", page.text)


# --- options


def test_chosen_metrics(tmp_path):
    log = [{"step": s, "mine/h": 1.0 / s, "mine/r": 1 - math.exp(1 / s) / 4, "entropy": 5.0} for s in range(1, 9)]
    runs = [Run("mine", log=log)]
    write_report(runs, tmp_path / "page.html", entropy="mine/h", reward="mine/r", smooth=1)
    numbers = json.loads((tmp_path / "page.json").read_text())
    assert numbers["curves"]["entropy"]["metrics"] == ["mine/h"]
    assert numbers["curves"]["reward"]["groups"]["mine"]["mean"][-1] == pytest.approx(1 - math.exp(1 / 8) / 4, rel=1e-5)
    (law,) = numbers["law"]
    assert (law["reward_metric"], law["entropy_metric"]) == ("mine/r", "mine/h")
    assert law["a"]["value"] == pytest.approx(0.25)
    assert law["ceiling"]["value"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"did not log 'mine/x'; it has mine/"):
        write_report(runs, tmp_path, entropy="mine/x")
    with pytest.raises(ValueError, match="at least 1"):
        write_report(runs, tmp_path, smooth=0)
    with pytest.raises(ValueError, match="no runs"):
        write_report([], tmp_path)


def texts_of(file):
    return [element.text for element in ElementTree.parse(file).iter() if element.tag.endswith("}text")]


def test_axes_of_the_figures(tmp_path):
    """Steps are integers, a change of 1% fills no panel, and panels that are compared have one scale."""
    runs = []
    for i, top in enumerate((0.4, 0.9)):
        log = []
        for step in range(1, 8):
            h = top - step * top / 20
            log.append({"step": 500 * step, "entropy": h, "reward": 0.8 - 0.2 * math.exp(h)})
            log[-1] |= {"completions/mean_length": 6.9 + step / 70, "diversity/distinct_completions": 8 * top}
            log[-1] |= {"diversity/distinct_correct": top}
        runs.append(Run(f"run {'ab'[i]}", log=log))
    write_report(runs, tmp_path)
    words = texts_of(tmp_path / "figures" / "length.svg")
    assert {"1,000", "2,000", "3,000"} <= set(words)
    ticks = [float(word) for word in words if re.fullmatch(r"[\d.]+", word) and float(word) > 1]
    assert max(ticks) - min(ticks) >= 0.8
    for one, other in (("law-1", "law-2"), ("distinct", "distinct-correct")):
        numbers = [
            [word for word in texts_of(tmp_path / "figures" / f"{name}.svg") if re.fullmatch(r"[\d.,]+", word)]
            for name in (one, other)
        ]
        assert numbers[0] == numbers[1]


def test_short_runs_have_steps_that_are_integers(tmp_path):
    write_report([Run("a", log=[{"step": step, "entropy": 1.0 / step} for step in (1, 2, 3)])], tmp_path)
    words = texts_of(tmp_path / "figures" / "entropy.svg")
    assert not {"1.5", "2.5"} & set(words[: words.index("step")])


def test_no_ceiling_where_the_reward_falls_with_the_entropy(tmp_path):
    log = [{"step": s, "entropy": 1.0 - s / 20, "reward": 0.2 * math.exp(1.0 - s / 20)} for s in range(1, 16)]
    page = Page(write_report([Run("up", log=log), Run("down", log=log_of(0))], tmp_path))
    up, down = json.loads((tmp_path / "report.json").read_text())["law"]
    assert up["ceiling"] is None and down["ceiling"]["value"] > 0
    assert "no ceiling, since the reward does not rise as entropy falls" in page.text
    stars = [
        "*" in [line.get_marker() for line in figures.law([one], [lambda x: (x, x)], style).axes[0].lines]
        for style in [figures.styles(["a"])["a"]]
        for one in [fit_law([e["entropy"] for e in log], [sign * e["reward"] for e in log]) for sign in (1, -1)]
    ]
    assert stars == [False, True]


def test_the_histogram_shows_the_bulk():
    """One extreme token leaves the others more than one bar, and is counted in the last."""
    values = np.append(np.random.default_rng(0).normal(0, 0.1, 9_999), 50.0)
    axes = figures.histogram({"a": values}, figures.styles(["a"]), "x").axes[0]
    low, high = axes.get_xlim()
    assert -1 < low < high < 1
    heights = axes.patches[-1].get_data().values
    assert (heights > 1e-3).sum() > 15
    assert heights.sum() == pytest.approx(1, abs=0.01)


def test_many_groups_have_each_advice_once(tmp_path):
    log = [{"step": step, "entropy": 0.5} for step in range(8)]
    page = Page(write_report([Run(f"run {name}", log=log) for name in "abcdefghijkl"], tmp_path))
    assert page.text.count("Nothing has to change.") == 1 and len(page.of("article")) == 12
    assert "Run report: run a, run b, run c and 9 more" in page.text
    assert not page.of("tr") or not any(a.get("class") == "strong" for a in page.of("tr"))


def test_law_compares_like_with_like(tmp_path):
    """A run with few evaluations is fitted on them, as the run before it is, and not on its training reward."""
    runs = [Run("a", log=log_of(0, brief=True)), Run("b", log=log_of(1, brief=True)[:14])]
    write_report(runs, tmp_path)
    laws = json.loads((tmp_path / "report.json").read_text())["law"]
    assert {law["reward_metric"] for law in laws} == {"held_out/avg@16"}
    assert len(laws[1]["steps"]) == 4


def test_one_of_several_evaluation_sets(tmp_path, capsys):
    """TRL logs all of them under the same names, told apart by the name of the time they took only."""
    log = []
    for step in range(10, 70, 10):
        log.append({"step": step, "entropy": 5 / step})
        for name, reward in (("easy", 0.9), ("hard", 0.1)):
            log.append({"step": step, "eval_reward": reward - 1 / step, f"eval_{name}_runtime": 1.0})
    run = tmp_path / "run" / "checkpoint-60" / "trainer_state.json"
    run.parent.mkdir(parents=True)
    run.write_text(json.dumps({"global_step": 60, "log_history": log}))
    command = ["report", str(tmp_path / "run"), "--output", str(tmp_path)]
    assert cli.main(command) == 2
    assert "evaluated on easy, hard under the same names: choose one with --benchmark" in capsys.readouterr().err
    assert cli.main([*command, "--benchmark", "hard"]) == 0
    curves = json.loads((tmp_path / "report.json").read_text())["curves"]
    assert curves["accuracy"]["groups"]["run"]["mean"][0] == pytest.approx(0.1 - 1 / 10)


def test_a_named_metric_makes_an_unknown_log_known(tmp_path):
    (tmp_path / "other.csv").write_text("step,foo,bar\n1,2,3\n2,3,4\n")
    assert cli.main(["report", str(tmp_path / "other.csv"), "--entropy", "foo", "--output", str(tmp_path)]) == 0


def test_command(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"x{seed}", seed, log=log_of(seed, brief=True)[:8])
    specs = [f"mine={tmp_path / f'x{seed}'}" for seed in (0, 1)]
    assert cli.main(["report", *specs, "--output", str(tmp_path / "new" / "page.html"), "--title", "Mine"]) == 0
    assert f"The report of 2 runs is in {tmp_path / 'new' / 'page.html'}." in capsys.readouterr().out
    numbers = json.loads((tmp_path / "new" / "page.json").read_text())
    assert list(numbers["curves"]["entropy"]["groups"]) == ["mine"]
    assert numbers["title"] == "Mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "There is no file or folder"),
        (["run", "--entropy", "entrpy"], "did not log 'entrpy'; it has entropy"),
        (["run", "--smooth", "0"], "--smooth must be at least 1"),
        (["run", "--output", "run/settings.json/x"], "settings.json"),
        (["other.csv"], "'other.csv' has no metric that is known here (it has 'foo', 'bar')"),
        (["run", "other.csv"], "'other.csv' has no metric that is known here"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", log=[{"step": 1, "entropy": 0.5}])
    (tmp_path / "other.csv").write_text("step,foo,bar\n1,2,3\n2,3,4\n")
    assert cli.main(["report", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.rglob("*.html"))


# --- figures


def test_a_method_has_the_same_style_everywhere():
    styles = figures.styles(["KL-Cov", "mine", "grpo", "other"])
    assert styles["KL-Cov"] == figures.STYLES["kl_cov"]
    assert styles["grpo"] == figures.STYLES["grpo"]
    assert len(set(styles.values())) == 4
    many = figures.styles([f"run {chr(97 + i)}" for i in range(20)])
    assert len({(style.colour, style.line) for style in many.values()}) == 20


def test_page_element_refuses_a_colour_without_a_variable():
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><path d="M 0 0 L 1 1" style="stroke: {}"/></svg>'
    element = page_element(svg.format("#0072b2"), "x", "t", "f", (0, 0, 1, 1))
    assert "stroke:var(--blue)" in element
    with pytest.raises(ValueError, match=r"stroke: #123456 has no CSS variable"):
        page_element(svg.format("#123456"), "x", "t", "f", (0, 0, 1, 1))


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_thinning_keeps_the_extremes():
    generator = np.random.default_rng(0)
    steps, low = np.arange(100_000), generator.normal(size=100_000)
    high = low + 1
    low[54_321], high[77] = -50.0, 60.0
    thin_steps, thin_low, thin_high = figures.thinned(steps, low, high)
    assert len(thin_steps) <= 902
    assert thin_steps[0] == 0 and thin_steps[-1] == 99_999 and (np.diff(thin_steps) > 0).all()
    np.testing.assert_array_equal(thin_low, low[thin_steps])
    assert thin_low.min() == -50.0 and thin_high.max() == 60.0
    for start in range(0, 100_000, 10_000):  # and those of each part
        inside = (thin_steps >= start) & (thin_steps < start + 10_000)
        assert thin_low[inside].min() == low[start : start + 10_000].min()
    short = np.arange(300)
    assert figures.thinned(short)[0] is short


def test_figures_do_not_grow_with_the_points():
    steps = np.arange(200_000)
    h = np.linspace(1.0, 0.1, 200_000)
    noise = np.random.default_rng(0).normal(0, 0.02, 200_000)
    series = Series(steps, 0.5 - 0.2 * np.exp(h) + noise)
    styles = figures.styles(["grpo"])
    fit = fit_law(h, series.values)
    drawings = [
        figures.curves({"grpo": curve({"seed 0": series, "seed 1": series})}, styles, "R"),
        figures.law([fit], [_mean_interval(fit.inference())], styles["grpo"]),
        figures.scatter({"grpo": (h, series.values)}, styles, "H", "R"),
    ]
    for drawing in drawings:
        axes = drawing.axes[0]
        assert max(len(line.get_xdata()) for line in axes.lines) <= 602
        assert np.max([np.max(line.get_ydata()) for line in axes.lines]) >= series.values.max()


def test_contrast_of_the_page():
    css = (Path(entropy_trl.analysis.__file__).parent / "report" / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in css.split("@media")[:2])
    assert light.keys() == dark.keys()
    names = {value.removeprefix("var(--").rstrip(")") for value in PAGE_COLOURS.values()}
    assert names <= light.keys()
    for scheme in (light, dark):
        for name in names | {"link", "warn"}:
            lighter, darker = sorted((luminance(scheme[name]), luminance(scheme["page"])), reverse=True)
            least = {"ink": 7, "muted": 4.5, "link": 4.5, "warn": 4.5, "grid": 1.2}.get(name, 3)
            assert (lighter + 0.05) / (darker + 0.05) >= least, (name, scheme[name])


def test_what_is_not_read_is_on_the_page(tmp_path):
    """On stderr alone, a reader of the page would take the runs on it for all of them."""
    write_run(tmp_path / "runs" / "good")
    for name, content in (("cut", '{"step": 1, "entropy"'), (f"{HOSTILE[:40].replace('/', '')}", "")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "train_log.jsonl").write_text(content)
    csv = "step,entropy,reward\n" + "".join(f"{step},0.5,0.1\n" for step in range(20))
    (tmp_path / "x.csv").write_text(csv.replace("16,", '"16,'))
    assert cli.main(["report", str(tmp_path / "runs"), str(tmp_path / "x.csv"), "--output", str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    unread = json.loads((tmp_path / "report.json").read_text())["unread"]
    assert len(unread) == 3 and "cut" in unread[0] + unread[1] and "damaged after 16 rows" in unread[2]
    assert all(" ".join(text.split()) in page.text for text in unread)


@pytest.mark.parametrize("window", [1, 2, 10, 37, 100, 250])
def test_a_running_mean_forgets_a_spike(window):
    values = np.random.default_rng(0).normal(size=100)
    values[20] = 1e18
    means = _smoothed(Series(np.arange(100), values), window).values
    expected = [values[max(end - window, 0) : end].mean() for end in range(1, 101)]
    np.testing.assert_allclose(means, expected, rtol=1e-12, atol=1e-14)


def test_numbers():
    assert [number(-0.0), number(-0.0, ".2f")] == ["0", "0.00"]
    values = [None, math.nan, 0.0, 0.04942, 12.3456, 123456.7, -math.inf, 1.0, 3.7e-5, 99.96, -99.95, 99.94]
    expected = ["\u2013", "\u2013", "0", "0.0494", "12.3", "123,457", "-∞", "1.00", "3.70e-05", "100", "-100", "99.9"]
    assert [number(value) for value in values] == expected
    assert plain({1: np.array([1.0, math.nan]), "a": (np.float32(0.5), np.int64(3))}) == {
        "1": [1.0, None],
        "a": [0.5, 3],
    }


@pytest.mark.parametrize("metric", ["entropy", "reward", "kl"])
@pytest.mark.parametrize("value", [1.7e308, -1.7e308])
def test_a_value_near_the_largest_float_leaves_the_rest_of_the_page(tmp_path, metric, value):
    log = [{"step": i, "entropy": 0.8 - i / 40, "reward": i / 40, "kl": 0.1} for i in range(20)]
    log[7][metric] = value
    page = write_report([Run("run", log=log)], tmp_path)
    assert "<svg" in page.read_text()
