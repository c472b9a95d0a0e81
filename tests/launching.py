"""Processes that `accelerate launch` starts from the files of configs/accelerate, for tests."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import PYTHONPATH, ROOT
from prepared_python import prepared_python


def environment(**variables):
    """The environment of a launched process."""
    return (
        os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": PYTHONPATH,
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja, for DeepSpeed
        }
        | variables
    )


def _command(name, processes, *arguments):
    command = [prepared_python(), "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml")]
    return [*command, "--num_processes", str(processes), "--main_process_port", "0", *arguments]


def accelerate_launch(name, processes, *arguments, timeout=240):
    """Launch a script, after options of the launcher if there are any; returns the process, which ended well."""
    command = _command(name, processes, *arguments)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


class Workers:
    """Processes that stay and do one job after another: a script that loops over `jobs_of` its first argument.

    Args:
        name (`str`): The file of configs/accelerate, without its ending.
        processes (`int`): How many.
        arguments (`str`): Options of the launcher, and the script.
    """

    def __init__(self, name, processes, *arguments):
        self.processes, self.numbers = processes, itertools.count()
        self.folder = tempfile.TemporaryDirectory(prefix="jobs")
        self.queue = Path(self.folder.name)
        with open(self.queue / "log", "w") as log:
            self.launched = subprocess.Popen(
                _command(name, processes, *arguments, str(self.queue)),
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def run(self, out, job, timeout=240):
        """Do a job, at whose end each process leaves `rank*.pt` in the folder `out`."""
        new = self.queue / "new"
        new.write_text(json.dumps([str(out), job]))
        new.rename(self.queue / f"{next(self.numbers)}.json")
        end = time.monotonic() + timeout
        while not all((out / f"rank{rank}.pt").exists() for rank in range(self.processes)):
            assert self.launched.poll() is None and time.monotonic() < end, (self.queue / "log").read_text()[-4000:]
            time.sleep(0.02)

    def end(self):
        """Let the processes end; those that a failed job left hanging are killed."""
        (self.queue / "end").touch()
        try:
            self.launched.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.launched.kill()
            self.launched.wait()
        self.folder.cleanup()


def jobs_of(queue: Path) -> Iterator[tuple[Path, dict]]:
    """In a process of `Workers`: the jobs as they come."""
    for number in itertools.count():
        file = queue / f"{number}.json"
        while not file.exists():
            if (queue / "end").exists():
                return
            time.sleep(0.02)
        out, job = json.loads(file.read_text())
        yield Path(out), job
