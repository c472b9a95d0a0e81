"""Logs: each format is written by the package whose format it is, and read back as what was logged."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pandas as pd
import pytest

from entropy_trl.analysis.logs.runs import METRIC_NAMES, Run, read_run, read_runs


#: What TRL logs: training entries, and an evaluation beside every second of them.
HISTORY = [
    entry
    for step in range(0, 60, 10)
    for entry in (
        {"entropy": 0.9 - step / 100, "reward": 0.1 + step / 200, "completions/mean_length": 7.0, "step": step},
        {"eval_entropy": 0.8 - step / 100, "eval_reward": 0.2 + step / 200, "eval_runtime": 1.5, "step": step},
    )
]

#: Writes entries with each tracker.
WRITE = """
import json, os, sys
from torch.utils.tensorboard import SummaryWriter
import trackio

history, folder = json.loads(sys.argv[1]), sys.argv[2]
writer = SummaryWriter(f"{folder}/out-seed7/runs/Nov21_host")
writer.add_text("args", json.dumps({"seed": 7, "learning_rate": 1e-6}))
for name in ("grpo-seed1", "grpo-seed2"):
    trackio.init(project="project", name=name, config={"seed": int(name[-1])}, embed=False)
    for entry in history:
        trackio.log(entry)
    trackio.finish()
for entry in history:
    for key, value in entry.items():
        writer.add_scalar(key, value, entry["train/global_step"])
writer.close()
from trackio.sqlite_storage import SQLiteStorage
SQLiteStorage.export_to_parquet()
"""


def tracked(entry):
    """An entry under the names that transformers gives it for trackers."""
    entry = {name: value for name, value in entry.items() if name != "step"}
    return {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value for name, value in entry.items()}


def test_names_are_those_of_transformers():
    rewrite_logs = pytest.importorskip("transformers.integrations.integration_utils").rewrite_logs
    for entry in HISTORY:
        assert rewrite_logs({name: value for name, value in entry.items() if name != "step"}) == tracked(entry)


@pytest.fixture(scope="module")
def trackers(tmp_path_factory):
    for package in ("tensorboard", "trackio"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "trackio").mkdir()
    environment = os.environ | {
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    entries = [tracked(entry) | {"train/global_step": entry["step"]} for entry in HISTORY]
    command = [sys.executable, "-c", WRITE, json.dumps(entries), str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    return folder


def check_history(run, prefix=True):
    names = ("train/entropy", "train/reward", "eval/entropy", "eval/reward")
    own = ("entropy", "reward", "eval_entropy", "eval_reward")
    for name, logged in zip(names if prefix else own, own, strict=True):
        series = run.series(name)
        entries = [entry for entry in HISTORY if logged in entry]
        assert series.steps.tolist() == [entry["step"] for entry in entries]
        np.testing.assert_allclose(series.values, [entry[logged] for entry in entries], rtol=1e-6)  # float32 in events
    assert run.find("entropy") == (names[0] if prefix else own[0])
    assert run.find("accuracy") == (names[3] if prefix else own[3])
    assert run.find("length") == ("train/completions/mean_length" if prefix else "completions/mean_length")


def test_tensorboard(trackers):
    run = read_run(trackers / "out-seed7")
    check_history(run)
    assert (run.name, run.group, run.seed) == ("out-seed7", "out", 7)
    assert run.config["learning_rate"] == 1e-6
    (file,) = (trackers / "out-seed7" / "runs" / "Nov21_host").iterdir()
    check_history(read_run(file))


def test_what_is_not_read_says_what_to_give_instead(tmp_path):
    (tmp_path / "offline-run-1").mkdir()
    (tmp_path / "offline-run-1" / "run-1.wandb").write_bytes(b":W&B")
    download = tmp_path / "downloads" / "run-.-tag-train_entropy.csv"
    download.parent.mkdir()
    download.write_text("Wall time,Step,Value\n1700000000.1,0,0.9\n")
    for path, instead in (("offline-run-1", "wandb sync"), ("downloads", "the folder with the event files")):
        with pytest.raises(ValueError, match=instead):
            read_run(tmp_path / path)


def test_trackio_store(trackers):
    runs = read_runs([str(trackers / "trackio" / "project.db")])
    assert [(run.name, run.group, run.seed) for run in runs] == [("grpo-seed1", "grpo", 1), ("grpo-seed2", "grpo", 2)]
    for run in runs:
        check_history(run)
    assert len(read_runs([str(trackers / "trackio")])) == 2  # the export beside the store is not read again
    assert read_run(trackers / "trackio" / "project.db", name="grpo-seed2").seed == 2
    with pytest.raises(ValueError, match=r"holds 2 runs \(grpo-seed1, grpo-seed2\)"):
        read_run(trackers / "trackio" / "project.db")


def test_trackio_and_wandb_parquet(trackers, tmp_path):
    rows = [{k: v for k, v in entry.items() if k != "step"} for entry in HISTORY]
    steps = [entry["step"] for entry in HISTORY]
    # W&B's history artifact: a column a metric, and W&B's own step, which counts the calls of `log`
    wandb_history = pd.DataFrame(rows).assign(_step=range(len(rows)), **{"train/global_step": steps})
    wandb_history.to_parquet(tmp_path / "history.parquet")
    check_history(read_run(tmp_path / "history.parquet"), prefix=False)
    assert read_run(tmp_path / "history.parquet").name == tmp_path.name
    # trackio's own export: the same, with the runs of a project
    runs = read_runs([str(trackers / "trackio" / "project.parquet")])
    assert [run.name for run in runs] == ["grpo-seed1", "grpo-seed2"]
    for run in runs:
        check_history(run)
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        read_run(tmp_path / "broken.parquet")


def test_trainer_state(tmp_path):
    """The newest checkpoint's, or that of the folder, whichever is further."""
    for step in (10, 50):
        folder = tmp_path / "grpo-seed4" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        log = [entry for entry in HISTORY if entry["step"] <= step]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    run = read_run(tmp_path / "grpo-seed4")
    check_history(run, prefix=False)
    assert (run.name, run.group, run.seed, run.config) == ("grpo-seed4", "grpo", 4, {})
    for path in ("checkpoint-50", "checkpoint-50/trainer_state.json"):
        assert read_run(tmp_path / "grpo-seed4" / path).name == "grpo-seed4"
    assert read_run(tmp_path / "grpo-seed4" / "checkpoint-10").series("reward").steps.tolist() == [0, 10]
    assert read_run(tmp_path / "grpo-seed4", name="mine").name == "mine"


def test_quickstart_folders(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / "short" / f"grpo-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "train_log.jsonl").write_text("\n".join(map(json.dumps, HISTORY)) + "\n")
        (folder / "settings.json").write_text(json.dumps({"seed": seed, "learning_rate": 6e-4}))
        (folder / "result.json").write_text(json.dumps({"avg@16": 0.5}))
    (tmp_path / "warm_start").mkdir()
    runs = read_runs([str(tmp_path)])
    assert [(run.name, run.group, run.seed) for run in runs] == [("grpo-seed0", "grpo", 0), ("grpo-seed1", "grpo", 1)]
    assert runs[0].results == {"avg@16": 0.5}
    assert runs[1].config["learning_rate"] == 6e-4
    named = read_runs([f"mine={tmp_path}"])
    assert [(run.name, run.group, run.seed) for run in named] == [("mine", "mine", 0), ("mine", "mine", 1)]


def test_runs_of_one_name_in_different_folders_are_told_apart(tmp_path):
    for parent in ("first", "second"):
        folder = tmp_path / parent / "grpo-seed0"
        folder.mkdir(parents=True)
        (folder / "train_log.jsonl").write_text('{"step": 1, "entropy": 0.5}\n')
    assert [run.name for run in read_runs([str(tmp_path)])] == ["first/grpo-seed0", "second/grpo-seed0"]


def test_csv(tmp_path):
    wide = pd.DataFrame(HISTORY).groupby("step").first().reset_index()
    wide.to_csv(tmp_path / "wide.csv", index=False)
    check_history(read_run(tmp_path / "wide.csv"), prefix=False)
    long = wide.melt(id_vars="step", var_name="metric")
    long.to_csv(tmp_path / "long.csv", index=False)
    check_history(read_run(tmp_path / "long.csv"), prefix=False)
    pd.concat([long.assign(run="a"), long.assign(run="b")]).to_csv(tmp_path / "runs.csv", index=False)
    for run, name in zip(read_runs([str(tmp_path / "runs.csv")]), "ab", strict=True):
        assert run.name == name
        check_history(run, prefix=False)


def test_wandb_chart_export(tmp_path):
    file = tmp_path / "chart.csv"
    file.write_text(
        '"Step","7b - seed 1 - train/entropy","7b - seed 1 - train/entropy__MIN","3b - train/entropy"\n'
        '"0","0.9","0.8",""\n"8","0.5","0.4","0.7"\n'
    )
    with pytest.raises(ValueError, match="holds 2 runs"):
        read_run(file)
    chart = {run.name: run for run in read_runs([str(file)])}
    assert chart["3b"].series("train/entropy").steps.tolist() == [8]
    assert chart["3b"].metrics == ["train/entropy"]


def test_verl_logs(tmp_path):
    """The file logger (nested under "data") and the console."""
    (tmp_path / "verl.jsonl").write_text(
        '{"step": 0, "data": {"val-core/math/acc/mean@8": 0.2}}\n'
        '{"step": 1, "data": {"actor/entropy": 0.6, "critic/rewards/mean": 0.1, "critic/score/mean": 0.2}}\n'
    )
    (tmp_path / "verl.log").write_text(
        "(TaskRunner pid=1) step:0 - val-core/math/acc/mean@8:np.float64(0.2)\nloading\n"
        "(TaskRunner pid=1) step:1 - actor/entropy:0.6 - critic/rewards/mean:1e-1 - critic/score/mean:0.2 - x:text\n"
    )
    for name in ("verl.jsonl", "verl.log"):
        run = read_run(tmp_path / name)
        assert run.find("entropy") == "actor/entropy"
        assert run.find("reward") == "critic/score/mean"
        assert run.find("accuracy") == "val-core/math/acc/mean@8"
        assert run.series("actor/entropy") == ([1], [0.6])
        assert run.series("critic/rewards/mean").values.tolist() == [0.1]


def test_json(tmp_path):
    rows = [{"_step": i, "entropy": value} for i, value in enumerate((0.5, "NaN", 0.3))]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    frame = pd.DataFrame({"_step": [0, 2], "entropy": [0.5, 0.3]})
    frame.to_json(tmp_path / "columns.json")
    point = {"timestamp": "", "step": 0, "value": 0.5}
    metric = {"run": "r", "metric": "entropy", "values": [point, {**point, "step": 2, "value": 0.3}]}
    (tmp_path / "trackio.json").write_text(json.dumps(metric))
    for name in ("list", "columns", "trackio"):
        series = read_run(tmp_path / f"{name}.json").series("entropy")
        assert (series.steps.tolist(), series.values.tolist()) == ([0, 2], [0.5, 0.3])


def test_steps_of_evaluations_under_their_own_name(tmp_path):
    """OpenRLHF has train/global_step in some entries, and eval/global_step in the others."""
    rows = [{"train/global_step": 4, "_step": 0, "train/reward": 0.1}, {"eval/global_step": 4, "eval/a_pass1": 0.3}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run(tmp_path / "log.jsonl")
    assert run.series("eval/a_pass1").steps.tolist() == [4]


def test_series():
    log = [
        {"step": 2, "entropy": 0.5, "text": "x", "on": True},
        {"step": 1, "entropy": math.nan},
        {"step": 2, "entropy": 0.4},  # a resumed run logs a step again
        {"step": 1, "entropy": 0.7, "broken": math.nan},
    ]
    run = Run("r", log=log)
    steps, values = run.series("entropy")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [0.7, 0.4])
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    assert run.metrics == ["entropy", "broken"]
    with pytest.raises(ValueError, match="did not log 'entrpy'; it has entropy"):
        run.series("entrpy")
    with pytest.raises(ValueError, match="as NaN only"):
        run.series("broken")


def test_find_prefers_the_trainers_own_names():
    run = Run(
        "r", log=[{"step": 0, "eval/entropy": 1.0, "train/entropy": 1.0, "held_out/avg@16": 0.1, "eval_reward": 0}]
    )
    assert run.find("entropy") == "train/entropy"
    assert run.candidates("accuracy") == ["held_out/avg@16", "eval_reward"]
    assert run.find("learning_rate") is None
    with pytest.raises(ValueError, match="unknown kind of metric 'temper'"):
        run.find("temper")
    for kind, names in METRIC_NAMES.items():
        logged = names[0].replace("*", "16")
        assert Run("r", log=[{"step": 0, logged: 1.0}]).find(kind) == logged


@pytest.mark.parametrize(
    ("name", "group", "seed"),
    [("grpo-seed0", "grpo", 0), ("a_seed=12", "a", 12), ("seed3", "seed3", 3), ("linseed", "linseed", None)],
)
def test_groups(tmp_path, name, group, seed):
    (tmp_path / f"{name}.jsonl").write_text('{"step": 1, "entropy": 0.5}\n')
    run = read_run(tmp_path / f"{name}.jsonl")
    assert (run.group, run.seed) == (group, seed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1 is not valid JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.jsonl", '{"entropy": 1}', "has no steps: one of step, "),
        ("a.jsonl", "", "has no entries"),
        ("a.json", "{}", "has no log_history"),
        ("a.json", "[1]", "entries that are not JSON objects"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "columns have different lengths"),
        ("a.csv", "step,entropy\n", "has no rows"),
        ("a.csv", "time,entropy\n1,2\n", "has no steps"),
        ("a.log", "hello", "verl's console log"),
        ("a.db", "hello", "is not a store of trackio"),
        ("a.pt", "hello", "has a format that is not known"),
    ],
)
def test_files_that_are_no_logs(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / name)


def test_folders_without_logs(tmp_path):
    with pytest.raises(ValueError, match=r"has no log that is known here"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="There is no file or folder"):
        read_runs([f"name={tmp_path / 'missing'}"])


GOOD = [{"step": 8 * i, "entropy": 0.8 - 0.015 * i, "reward": 0.1 + 0.008 * i} for i in range(40)]
LINES = "".join(json.dumps(entry) + "\n" for entry in GOOD)
TABLE = "step,entropy,reward\n" + "".join(f"{e['step']},{e['entropy']},{e['reward']}\n" for e in GOOD)


def state(log=GOOD, step=312):
    return json.dumps({"global_step": step, "log_history": log})


@pytest.mark.parametrize(
    ("name", "text", "points"),
    [
        ("log.jsonl", "".join(json.dumps(e | {"n": "a\u2028b\x85"}, ensure_ascii=False) + "\n" for e in GOOD), 40),
        ("log.jsonl", "\ufeff" + LINES, 40),
        ("log.csv", "\ufeff" + TABLE, 40),
        ("log.jsonl", LINES + '{"step": 400, "reward": 1' + "0" * 400 + "}\n", 40),
        ("log.jsonl", LINES + '{"step": 10000000000000000000000000, "entropy": 0.1}\n', 40),
        ("trainer_state.json", state(None), "entries that are not JSON objects"),
        ("trainer_state.json", state(step=None), "global_step None, which is not a number"),
        ("log.jsonl", LINES + '{"step": 400, "a": ' + "[" * 100000 + "]" * 100000 + "}\n", 40),
        ("log.jsonl", "\x00\n[]\n" + LINES, 40),
    ],
)
def test_odd_logs_are_read_or_refused_in_words(tmp_path, name, text, points):
    (tmp_path / name).write_text(text, encoding="utf-8")
    if isinstance(points, str):
        with pytest.raises(ValueError, match=points):
            read_runs([str(tmp_path)])
    else:
        (run,) = read_runs([str(tmp_path)])
        assert len(run.series("entropy").values) == points
        assert run.series("entropy").values[-1] == pytest.approx(GOOD[-1]["entropy"])


def test_what_is_left_unread_is_told(tmp_path, caplog):
    lines = TABLE.splitlines(keepends=True)
    (tmp_path / "x.csv").write_text("".join(('"' if i == 16 else "") + line for i, line in enumerate(lines)))
    (run,) = read_runs([str(tmp_path)])
    assert len(run.series("entropy").values) == 15
    assert "is damaged after 15 rows" in caplog.text


def test_a_bad_neighbour_costs_itself_only(tmp_path, caplog):
    """A results file, an empty log, token records alone, and a newest state that is cut off."""
    files = {
        "good/train_log.jsonl": LINES,
        "results/results.json": "{}",
        "empty/train_log.jsonl": "",
        "killed/_token_records/step-00000001.parquet": "x",
        "scores/samples.jsonl": '{"problem": 1}\n',
        "resumed/checkpoint-100/trainer_state.json": state(),
        "resumed/checkpoint-200/trainer_state.json": state()[:300],
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(run.name for run in read_runs([str(tmp_path)])) == ["good", "resumed"]
    for name in ("empty", "samples.jsonl", "checkpoint-200"):
        assert name in caplog.text


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_runs([str(tmp_path / "log.jsonl")])


def test_a_damaged_event_file_says_where_it_ends(tmp_path, caplog):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for entry in GOOD:
            writer.add_scalar("train/entropy", entry["entropy"], entry["step"])
    (file,) = tmp_path.glob("*tfevents*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])  # the run still writes it
    assert len(read_runs([str(tmp_path)])[0].log) == 39
    assert "damaged" not in caplog.text
    file.write_bytes(whole[:300] + bytes([whole[300] ^ 255]) + whole[301:])
    left = len(read_runs([str(tmp_path)])[0].log)
    assert left < 10
    assert f"is damaged after {left + 1} records" in caplog.text  # the first has the version
    assert f"of {len(whole)}: the rest is not read" in caplog.text


def test_damaged_rows_of_a_store_are_counted_and_left_out(tmp_path, caplog):
    with closing(sqlite3.connect(tmp_path / "project.db")) as store, store:
        store.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
        cells = [json.dumps({"step": i, "entropy": 1.0 - i / 10}) for i in range(9)]
        cells += ["{", "[1]", None, "[" * 100_000]
        rows = [("run", i, cell) for i, cell in enumerate(cells)]
        store.executemany("INSERT INTO metrics (run_name, step, metrics) VALUES (?, ?, ?)", rows)
    assert len(read_run(tmp_path / "project.db").series("entropy").steps) == 9
    assert "has 4 damaged rows of 13" in caplog.text


def test_a_damaged_part_of_a_parquet_file_is_counted_and_left_out(tmp_path, caplog):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "history.parquet"
    pd.DataFrame({"step": range(30), "entropy": np.random.default_rng(0).random(30)}).to_parquet(
        file, row_group_size=10, compression="gzip"
    )
    whole = file.read_bytes()
    with parquet.ParquetFile(file) as opened:
        column = opened.metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    file.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
    assert len(read_run(file).series("entropy").steps) == 20
    assert "has 10 damaged rows of 30" in caplog.text


def test_damaged_lines_are_counted(tmp_path, caplog):
    (tmp_path / "log.jsonl").write_text("\x00\n" + LINES[:600] + "\x00" + LINES[600:])
    (run,) = read_runs([str(tmp_path)])
    assert len(run.series("entropy").values) == 39
    assert "has 2 damaged lines of 41, which are not read: line 1 is not valid JSON" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"seed": ' + "[" * 100_000])
@pytest.mark.parametrize("name", ["settings.json", "result.json"])
def test_a_damaged_file_beside_a_log_does_not_refuse_it(tmp_path, caplog, name, content):
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "entropy": 0.5}\n')
    (tmp_path / name).write_text(content, encoding="latin-1")
    run = read_run(tmp_path)
    assert run.metrics == ["entropy"] and not run.config and not run.results
    assert "Left out:" in caplog.text and name in caplog.text
