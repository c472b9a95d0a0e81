"""Whether a run came to its end, as far as its log and its folder say."""

from pathlib import Path
from typing import NamedTuple

from entropy_trl.analysis.logs.entries import is_finite, mapping
from entropy_trl.analysis.logs.runs import Run


_STATE = "trainer_state.json"
#: The weights that `save_model` writes at the end of training, whole or in shards, or those of an adapter.
_FINAL_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


class State(NamedTuple):
    """How far a run has come.

    Attributes:
        step (`int`): The last step that is known of.
        planned (`int`, *optional*): The step at which the run ends; None if nothing says.
        finished (`bool`, *optional*): Whether it came to its end; None if nothing says.
    """

    step: int
    planned: int | None
    finished: bool | None

    @property
    def words(self) -> str:
        """The state as the page says it."""
        return {True: "finished", False: "not finished", None: "not known"}[self.finished]


class _Stored(NamedTuple):
    """What the newest `trainer_state.json` of a run says."""

    file: Path
    step: int
    planned: int | None


def state_of(run: Run) -> State:
    """How far a run has come, and whether that is its end.

    The end is a final evaluation, the `train_runtime` that the trainer logs last, the planned number of steps, or a
    model in the run's folder that is not older than its newest checkpoint.

    Args:
        run ([`Run`]): A run that was read.
    """
    stored = _stored(run.path)
    logged = max((int(entry["step"]) for entry in run.log), default=0)
    step = logged if stored is None else max(logged, stored.step)
    planned = _positive(run.config.get("max_steps"))
    if planned is None and stored is not None:
        planned = stored.planned
    ended = bool(run.results) or any({"train_runtime", "train/train_runtime"} & entry.keys() for entry in run.log)
    if ended or (planned is not None and step >= planned) or _has_final_model(run.path, stored):
        return State(step, planned, True)
    known = planned is not None or stored is not None  # transformers would have said that it is over
    return State(step, planned, False if known else None)


def _stored(path: Path | None) -> _Stored | None:
    """The newest state of the trainer; files that are cut off count as not there."""
    if path is None:
        return None
    found = []
    for file in [path] if path.name == _STATE else [path / _STATE, *path.glob(f"checkpoint-*/{_STATE}")]:
        if not file.is_file():
            continue
        try:
            content = mapping(file)
        except ValueError:  # reading the run has named it
            continue
        step = content.get("global_step")
        if step is not None and is_finite(step):
            found.append(_Stored(file, int(step), _positive(content.get("max_steps"))))
    return max(found, key=lambda stored: stored.step, default=None)


def _has_final_model(path: Path | None, stored: _Stored | None) -> bool:
    if path is None or not path.is_dir() or path.name.startswith("checkpoint-"):
        return False
    times = [file.stat().st_mtime for name in _FINAL_MODEL if (file := path / name).is_file()]
    # A run that goes on in the folder of a finished one writes checkpoints that are newer than the model.
    return bool(times) and (stored is None or max(times) >= stored.file.stat().st_mtime)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
