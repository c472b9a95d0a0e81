"""Processes that `accelerate launch` starts from the files of configs/accelerate, for tests."""

import os
import subprocess
import sys
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


def accelerate_launch(name, processes, *arguments, timeout=240):
    """Launch a script, after options of the launcher if there are any; returns the process, which ended well."""
    command = [prepared_python(), "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", "0", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done
