"""`entropy-trl report --watch`: the page grows with the run, and the watch ends with it, or with Ctrl-C."""

import json
import os
import signal
import threading
import time
from contextlib import redirect_stdout
from io import StringIO

import pytest
from report_runs import log_of, write_run

from entropy_trl import cli


def wait_for(file, step):
    """Wait until the numbers of the report reach a step."""
    for _ in range(600):
        if file.exists() and json.loads(file.read_text())["runs"][0]["last_step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"the report did not reach step {step}")


def in_background(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_page_grows_with_the_run_and_the_watch_ends_with_it(tmp_path):
    """The folder is empty at first, then a run logs into it in two parts, and ends."""
    folder, log, numbers = tmp_path / "run", log_of(brief=True), tmp_path / "out" / "report.json"
    folder.mkdir()
    printed = StringIO()

    def train():
        while "Waiting" not in printed.getvalue():
            time.sleep(0.02)
        write_run(tmp_path / "new", log=log[:12], finished=False)
        (tmp_path / "new" / "train_log.jsonl").rename(folder / "train_log.jsonl")
        try:
            wait_for(numbers, log[11]["step"])
            with (folder / "train_log.jsonl").open("a") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in log[12:]))
            wait_for(numbers, log[-1]["step"])
        finally:  # or the watch would not end
            (folder / "result.json").write_text(json.dumps({"final_entropy": 0.05}))

    trainer = in_background(train)
    command = ["report", str(folder), "--watch", "--interval", "0.05", "--output", str(tmp_path / "out")]
    with redirect_stdout(printed):
        assert cli.main(command) == 0
    trainer.join()
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("The report will be in ") and "Ctrl-C" in lines[0]
    assert lines[1].startswith("Waiting, because the log cannot be read yet: ") and "has no log" in lines[1]
    assert lines[2] == f"run at step {log[11]['step']}" and lines[-2:] == ["run at step 240", "All runs are finished."]
    assert len(lines) <= 7
    assert "not finished" not in (tmp_path / "out" / "report.html").read_text()


def test_ctrl_c_ends_the_watch_with_one_line(tmp_path, capsys):
    write_run(tmp_path / "run", log=log_of(brief=True)[:6], finished=False)

    def interrupt():
        wait_for(tmp_path / "report.json", 1)
        os.kill(os.getpid(), signal.SIGINT)

    other = in_background(interrupt)
    command = ["report", str(tmp_path / "run"), "--watch", "--interval", "30", "--output", str(tmp_path)]
    assert cli.main(command) == 130
    other.join()
    assert capsys.readouterr().err.strip() == "entropy-trl report: interrupted by SIGINT."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "There is no file or folder 'nowhere' to watch"),
        (["run", "--interval", "0"], "--interval must be a number of seconds above 0, got 0."),
        (["run", "--interval", "nan"], "--interval must be"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", log=[{"step": 1, "entropy": 0.5}])
    assert cli.main(["report", *options, "--watch"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
