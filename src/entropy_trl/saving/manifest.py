"""The manifest of a checkpoint: the proof that it was written to its end, and what run it belongs to.

`python -m entropy_trl.saving.manifest FOLDER` accepts a checkpoint that you edited on purpose: it records the files as
they are now.
"""

import hashlib
import json
import os
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from entropy_trl._version import __version__
from entropy_trl.files import PART, sync, write_json


MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
#: In a checkpoint from the first file to the manifest: an interruption leaves it behind.
UNFINISHED = "unfinished"

#: Bytes. Larger files are checked by their size and by blocks, so that a check takes seconds for any model.
_WHOLE = 64 * 2**20
_BLOCK = 2**20
_BLOCKS = 16


class DamagedManifest(ValueError):
    """The manifest is not what was written."""


@dataclass(frozen=True)
class Layout:
    """How a run is cut into processes and micro-batches: what a checkpoint's counts and rollouts refer to."""

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
    num_generations: int

    @classmethod
    def of(cls, args: GRPOConfig) -> "Layout":
        """The layout that a configuration has in this launch."""
        return cls(
            processes=args.world_size,
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            steps_per_generation=args.steps_per_generation,
            num_iterations=args.num_iterations,
            num_generations=args.num_generations,
        )

    @property
    def amounts(self) -> tuple[int, int, int, int]:
        """Completions of an optimizer step, of a rollout, how often a rollout is used, and completions of a prompt."""
        rows = self.processes * self.per_device_train_batch_size
        return (
            rows * self.gradient_accumulation_steps,
            rows * self.steps_per_generation,
            self.num_iterations,
            self.num_generations,
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Run:
    """The run that a checkpoint belongs to. A resumed run keeps its identity.

    Args:
        id (`str`): A random name.
        started (`float`): When it began, seconds since 1970.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: float = field(default_factory=time.time)

    def __str__(self) -> str:
        return f"run {self.id}, begun {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.started))}"


def write_manifest(
    checkpoint: Path,
    layout: Layout,
    inside_rollout: bool,
    run: Run | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Declare a checkpoint complete, with all of it on the disk. Call it when every process has written its files."""
    manifest = {
        "entropy_trl": __version__,
        "layout": asdict(layout),
        "inside_rollout": inside_rollout,
        "run": asdict(run or Run()),
        "options": options or {},
        "saved_at": time.time(),
    }
    _write(checkpoint, manifest)
    (checkpoint / UNFINISHED).unlink(missing_ok=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked.

    Raises:
        FileNotFoundError: If there is none.
        DamagedManifest: If it is not what was written.
    """
    text = (checkpoint / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedManifest(f"its {MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict):
        raise DamagedManifest(f"its {MANIFEST} cannot be read")
    # Manifests of earlier versions have no checksums.
    checksum = manifest.pop("checksum", None)
    if checksum is not None and checksum != _checksum(manifest):
        raise DamagedManifest(f"its {MANIFEST} is damaged (its checksum is another one)")
    files, layout, digests = (manifest.get(key, {}) for key in ("files", "layout", "digests"))
    run = manifest.setdefault("run", {"id": "unknown", "started": 0.0})
    saved_at = manifest.setdefault("saved_at", 0.0)
    options = manifest.setdefault("options", {})
    valid = (
        isinstance(files, dict)
        and all(type(size) is int and _is_inside(name) for name, size in files.items())
        and isinstance(digests, dict)
        and isinstance(layout, dict)
        and layout.keys() == {part.name for part in fields(Layout)}
        and all(type(value) is int for value in layout.values())
        and type(manifest.get("inside_rollout")) is bool
        and isinstance(run, dict)
        and run.keys() == {part.name for part in fields(Run)}
        and type(run["started"]) is float
        and isinstance(run["id"], str)
        and type(saved_at) is float
        and isinstance(options, dict)
    )
    if not valid:
        raise DamagedManifest(f"its {MANIFEST} cannot be read")
    manifest["digests"] = digests
    return manifest


def why_incomplete(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; `None` if its manifest says that all of it is there, unchanged."""
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to the end, or not by CovGRPOTrainer"
    except DamagedManifest as error:
        return str(error)
    for name, size in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    for name, digest in manifest["digests"].items():
        if digest != file_digest(checkpoint / name):
            return f"{name} is not what was written (its checksum is another one)"
    return None


def how_to_accept(checkpoint: Path) -> str:
    """What to do about a checkpoint that differs from its manifest, if that is meant."""
    try:
        read_manifest(checkpoint)
    except FileNotFoundError:
        return f"Name it to use it all the same: --resume_from_checkpoint {checkpoint}"
    except DamagedManifest:
        return f"Delete {MANIFEST} and name the checkpoint, and its other files alone are checked"
    return f"If you edited it on purpose, accept it: python -m entropy_trl.saving.manifest {checkpoint}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file: of all of it up to 64 MiB, of 16 blocks spread over a larger one."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache  # the command line checks a checkpoint before the model is loaded, and the trainer does again
def _digest(path: Path, size: int, mtime: int) -> str:
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(_BLOCK):
                sha.update(block)
        else:
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                sha.update(file.read(_BLOCK))
    return sha.hexdigest()


def _write(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Complete a manifest with the files as they are, and write it in one move after all of them."""
    sizes, digests = {}, {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_dir():
            sync(path)
        elif path.is_file() and name not in (MANIFEST, UNFINISHED) and path.suffix != PART:
            # Opened, not only looked up: a network file system then asks for the size that the file really has.
            with path.open("rb") as file:
                sizes[name] = file.seek(0, 2)
                os.fsync(file.fileno())
            digests[name] = file_digest(path)
    manifest |= {"files": sizes, "digests": digests}
    sync(checkpoint)
    write_json(checkpoint / MANIFEST, manifest | {"checksum": _checksum(manifest)})
    sync(checkpoint.parent)


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def main(argv: list[str]) -> int:
    """Accept edited checkpoints: record their files as they are now. Returns the exit code."""
    if not argv:
        print("usage: python -m entropy_trl.saving.manifest CHECKPOINT...", file=sys.stderr)
        return 2
    for folder in map(Path, argv):
        try:
            manifest = read_manifest(folder)
        except (OSError, DamagedManifest) as error:
            print(f"{folder} cannot be accepted: {error}. {how_to_accept(folder)}.", file=sys.stderr)
            return 1
        _write(folder, manifest)
        print(f"{folder} is accepted as it is.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
