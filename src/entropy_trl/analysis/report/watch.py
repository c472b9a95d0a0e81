"""Write the report again whenever a run that still trains has logged something."""

import time
from collections.abc import Callable, Sequence

from entropy_trl.analysis.logs.runs import Run
from entropy_trl.analysis.report.state import state_of


def watch(read: Callable[[], Sequence[Run]], write: Callable[[Sequence[Run]], object], interval: float) -> None:
    """Read the runs every few seconds, and write the page where they have grown, until all of them are finished.

    A log that cannot be read at the moment, because it does not exist yet or is being written, is told once and read
    again. Runs of trainers that do not say when they are over are watched until the process is interrupted.

    Args:
        read (`Callable[[], Sequence[Run]]`): Gives the runs; raises ValueError or OSError where it cannot.
        write (`Callable[[Sequence[Run]], object]`): Writes the page.
        interval (`float`): Seconds between two reads.
    """
    shown: object = None
    told = ""
    while True:
        try:
            runs = read()
        except (ValueError, OSError) as error:
            if str(error) != told:
                told = str(error)
                print(f"Waiting, because the log cannot be read yet: {told}", flush=True)
        else:
            told = ""
            states = [state_of(run) for run in runs]
            grown = [(run.name, len(run.log), *state) for run, state in zip(runs, states, strict=True)]
            if grown != shown:
                shown = grown
                write(runs)
                print(", ".join(f"{run.name} at step {state.step:,}" for run, state in zip(runs, states, strict=True)))
            if all(state.finished for state in states):
                print("All runs are finished.", flush=True)
                return
        time.sleep(interval)
