"""Prepared processes are processes like any other, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import JOBS


OWNER = """
import prepared_python, sys
prepared_python.MODULES = ()
for _ in sys.stdin:
    print(prepared_python.prepared_python(), flush=True)
"""


@pytest.fixture
def owner():
    """What stands for a test run: each line makes it call `prepared_python()`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=environment | {"PYTHONPATH": str(JOBS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def program_of(owner):
    owner.stdin.write("\n")
    owner.stdin.flush()
    return Path(owner.stdout.readline().strip())


def server_of(owner):
    (server,) = psutil.Process(owner.pid).children()
    return server


def started(program, code="import os, time; print(os.getpid(), flush=True); time.sleep(60)", **options):
    """A prepared process that sleeps, and its own number."""
    caller = subprocess.Popen(
        [program, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    return caller, psutil.Process(int(caller.stdout.readline()))


def test_it_is_a_process_like_any_other(owner, tmp_path):
    program = program_of(owner)
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['A'], sys.stdin.read()); sys.exit('reason')"
    done = subprocess.run(
        [program, "-c", code, "x"], cwd=tmp_path, env={"A": "1"}, input="given", capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "reason\n")
    assert done.stdout == f"['-c', 'x'] {tmp_path} 1 given\n"
    caller, process = started(program)
    caller.terminate()
    assert caller.wait(10) == -signal.SIGTERM and not process.is_running()


def test_a_killed_caller_ends_its_process_and_not_the_server(owner):
    program = program_of(owner)
    caller, process = started(program)
    caller.kill()
    process.wait(10)
    with subprocess.Popen([program, "-c", "0"]) as at_once:
        at_once.kill()
    assert subprocess.run([program, "-c", "0"]).returncode == 0


def test_a_killed_server_is_an_error_and_the_next_call_starts_another(owner):
    program = program_of(owner)
    caller, process = started(program)
    server_of(owner).kill()
    _, error = caller.communicate(timeout=10)
    assert caller.returncode == 1 and "server of prepared processes ended during" in error
    process.wait(10)
    assert subprocess.run([program, "-c", "0"], capture_output=True).returncode == 1
    assert program_of(owner) == program
    assert subprocess.run([program, "-c", "0"]).returncode == 0


def test_a_killed_owner_leaves_nothing(owner):
    program = program_of(owner)
    server, (_, process) = server_of(owner), started(program)
    owner.kill()  # not reaped yet: a zombie
    server.wait(10)
    process.wait(10)
    deadline = time.monotonic() + 10
    while program.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not program.parent.exists()


def test_an_owner_has_one_server_of_its_own(owner):
    program = program_of(owner)
    assert program_of(owner) == program and len(psutil.Process(owner.pid).children()) == 1
    assert str(owner.pid) in program.parent.name
