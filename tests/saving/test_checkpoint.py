"""What is in a checkpoint: a rollout survives its file, and what is not complete is never taken for complete."""

import json
import logging
import os
import time
from dataclasses import asdict, replace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from entropy_trl.controls.targeted_clip_higher import TargetedClipHigher
from entropy_trl.files import write_json
from entropy_trl.loss.state import ControlState
from entropy_trl.rollout.sampling import PromptStream
from entropy_trl.saving import manifest as manifest_module
from entropy_trl.saving.checkpoint import (
    checkpoint_to_resume,
    last_complete_checkpoint,
    load_rollout,
    rollout_file,
    rotate,
    save_rollout,
    warn_of_another_run,
)
from entropy_trl.saving.manifest import (
    MANIFEST,
    UNFINISHED,
    Layout,
    file_digest,
    main,
    why_incomplete,
    write_manifest,
)


LAYOUT = Layout(
    processes=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    steps_per_generation=8,
    num_iterations=1,
    num_generations=4,
)
START = time.time() + 1e6  # younger than the manifests, as what an interruption leaves behind is


def test_round_trip(tmp_path):
    whole = torch.randn(6, 4)
    whole[0, 0] = float("-inf")
    buffer = [
        {
            "logps": whole[i : i + 2],
            "ids": torch.arange(2) + i,
            "half": whole[i : i + 2].bfloat16(),
            "num_items_in_batch": torch.tensor(12),
            "num_images": [1, i],
            "nothing": None,
        }
        for i in (0, 2, 4)
    ]
    path = rollout_file(tmp_path / "checkpoint-7", 3)
    save_rollout(path, 7, buffer)
    assert path.name == "rollout_rank3.safetensors"
    assert path.stat().st_size < 4000  # the views' own part, not the whole tensor three times
    step, loaded = load_rollout(path, torch.device("cpu:0"))  # as accelerate names it
    assert step == 7 and len(loaded) == 3
    for before, after in zip(buffer, loaded, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[key].dtype and torch.equal(value, after[key])
            else:
                assert value == after[key]


def test_a_failed_write_leaves_no_file(tmp_path):
    path = rollout_file(tmp_path, 0)
    with pytest.raises(TypeError):
        save_rollout(path, 0, [{"bad": object()}])
    assert not path.exists()


def test_a_write_is_seen_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"step": 1})

    def no_space(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 2})
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]
    assert json.loads(path.read_text()) == {"step": 1}


def test_a_manifest_does_not_name_what_an_interrupted_write_left(checkpoints):
    folder = checkpoints(1) / "checkpoint-1"
    (folder / "manifest.json.4711.part").write_text("{")
    write_manifest(folder, LAYOUT, False)
    (folder / "manifest.json.4711.part").unlink()
    assert why_incomplete(folder) is None


@pytest.fixture
def checkpoints(tmp_path):
    """Writes checkpoints of given steps, each younger than the one before; returns their folder."""

    def write(*steps, complete=(), unfinished=(), layout=LAYOUT, inside_rollout=False):
        for age, step in enumerate(steps):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
            torch.save({"state": torch.ones(3)}, folder / "optimizer.pt")
            (folder / "trainer_state.json").write_text("{}")
            if step in unfinished:
                (folder / UNFINISHED).touch()
            if step in complete:
                write_manifest(folder, layout, inside_rollout)
            os.utime(folder, (START + 10 * age, START + 10 * age))
        return tmp_path

    return write


def steps_left(folder):
    return {int(path.name.split("-")[1]) for path in folder.iterdir()}


def cut_off(path, size=20):
    os.truncate(path, size)


def test_the_newest_complete_checkpoint_is_found(checkpoints, caplog):
    folder = checkpoints(2, 9, 10, 11, complete=(2, 9, 10))
    assert last_complete_checkpoint(folder / "nothing here") is None
    cut_off(folder / "checkpoint-10" / "optimizer.pt")
    assert last_complete_checkpoint(folder) == folder / "checkpoint-9"  # by number, not by name
    assert "checkpoint-11 is passed over: it has no manifest.json" in caplog.text
    assert "checkpoint-10 is passed over: optimizer.pt has 20 of" in caplog.text
    (folder / "checkpoint-9" / "trainer_state.json").unlink()
    assert why_incomplete(folder / "checkpoint-9") == "trainer_state.json is missing"
    cut_off(folder / "checkpoint-2" / MANIFEST)
    assert why_incomplete(folder / "checkpoint-2") == "its manifest.json cannot be read"
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*checkpoint-2: its manifest.json cannot be read"):
        checkpoint_to_resume(True, folder, LAYOUT)


@pytest.mark.parametrize(
    ("steps", "complete", "unfinished", "limit", "left"),
    [
        # Written 2, 5 (interrupted), then from 2 again: 3 is the last complete one, though not the highest.
        ((2, 5, 3), (2, 3), (5,), 1, {3}),
        ((2, 5, 3), (2, 3), (5,), 2, {2, 3}),
        ((2, 5, 3), (2, 3), (5,), 3, {2, 3, 5}),
        # Stock TRL's have no manifest, which does not make them broken.
        ((1, 2, 3, 4), (2, 4), (), 2, {3, 4}),
        ((1, 2, 3, 4), (4,), (3,), 2, {2, 4}),
        ((1, 2, 3), (1, 2, 3), (), 2, {2, 3}),
        ((1, 2, 3), (1, 2, 3), (), None, {1, 2, 3}),
        ((1, 2, 3), (), (), 0, {1, 2, 3}),
    ],
)
def test_rotation_deletes_broken_checkpoints_first(checkpoints, steps, complete, unfinished, limit, left):
    folder = checkpoints(*steps, complete=complete, unfinished=unfinished)
    rotate(folder, limit, best=None)
    assert steps_left(folder) == left


def edit(checkpoint):
    (checkpoint / "trainer_state.json").write_text('{"edited": true}')


def cut_model(checkpoint):
    cut_off(checkpoint / "model.safetensors")


def lose(checkpoint):
    (checkpoint / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    ("change", "left"), [(edit, {2, 3}), (cut_model, {1, 3}), (lose, {1, 3})], ids=["edited", "cut off", "a file lost"]
)
def test_rotation_tells_edited_from_broken(checkpoints, change, left):
    folder = checkpoints(1, 2, 3, complete=(1, 2, 3))
    change(folder / "checkpoint-2")
    os.utime(folder / "checkpoint-2", (START + 10, START + 10))
    rotate(folder, 2, best=None)
    assert steps_left(folder) == left


@pytest.mark.parametrize("complete", [(1, 2, 3), (3,)], ids=["ours", "stock TRL's"])
@pytest.mark.parametrize("change", [None, edit, cut_model])
def test_rotation_keeps_the_best_in_any_state(checkpoints, complete, change):
    folder = checkpoints(1, 2, 3, complete=complete)
    if change is not None:
        change(folder / "checkpoint-1")
    rotate(folder, 2, best=str(folder / "checkpoint-1"), newest=folder / "checkpoint-3")
    assert steps_left(folder) == {1, 3}


def test_an_edited_checkpoint_can_be_accepted(checkpoints, capsys):
    checkpoint = checkpoints(2, complete=(2,)) / "checkpoint-2"
    (checkpoint / "trainer_state.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"json has 3 of 2 bytes. .*python -m entropy_trl.saving.manifest"):
        checkpoint_to_resume(str(checkpoint), checkpoint.parent, LAYOUT)
    assert main([str(checkpoint)]) == 0
    assert checkpoint_to_resume(True, checkpoint.parent, LAYOUT) == checkpoint
    cut_off(checkpoint / MANIFEST)
    assert main([str(checkpoint)]) == 1
    assert "its manifest.json cannot be read. Delete manifest.json" in capsys.readouterr().err


def test_the_run_that_saved_last_is_resumed(checkpoints, caplog):
    """A new run in a used folder: the old run's higher steps are not where it stands."""
    folder = checkpoints(90, 100, 5, 10, complete=(90, 100, 5, 10))
    assert checkpoint_to_resume(True, folder, LAYOUT) == folder / "checkpoint-10"
    assert "checkpoint-10 (run " in caplog.text and "checkpoint-90 (run " in caplog.text
    assert checkpoint_to_resume(str(folder / "checkpoint-100"), folder, LAYOUT) == folder / "checkpoint-100"


def older(checkpoint):
    """Makes a manifest that of an earlier version, without checksums, run and time."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in ("checksum", "digests", "run", "saved_at"):
        del manifest[name]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_checkpoints_of_earlier_versions_resume(checkpoints):
    folder = checkpoints(1, 3, 2, complete=(1, 3, 2))
    for checkpoint in folder.iterdir():
        older(checkpoint)
    assert checkpoint_to_resume("auto", folder, LAYOUT) == folder / "checkpoint-3"
    write_manifest(folder / "checkpoint-1", LAYOUT, False)
    assert checkpoint_to_resume("auto", folder, LAYOUT) == folder / "checkpoint-1"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["zeros", "bit"])
def test_damage_that_keeps_the_size_is_found(checkpoints, name, damage):
    checkpoint = checkpoints(2, complete=(2,)) / "checkpoint-2"
    data = bytearray((checkpoint / name).read_bytes())
    if damage == "zeros":
        data = bytearray(len(data))
    else:
        data[-2] ^= 16
    (checkpoint / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=f"is not complete: (its )?{name} (is not what was written|cannot be|is damaged)"
    ):
        checkpoint_to_resume(str(checkpoint), checkpoint.parent, LAYOUT)


def test_a_changed_value_of_a_manifest_is_found(checkpoints):
    checkpoint = checkpoints(2, complete=(2,)) / "checkpoint-2"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["layout"]["processes"] += 1
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert why_incomplete(checkpoint) == "its manifest.json is damaged (its checksum is another one)"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "7",
        '{"files": []}',
        json.dumps({"files": {"../x": 1}, "layout": asdict(LAYOUT), "inside_rollout": False}),
        json.dumps({"files": {"/etc/x": 1}, "layout": asdict(LAYOUT), "inside_rollout": False}),
        "\xff",
    ],
)
def test_a_manifest_of_anything_else_is_told_in_a_line(checkpoints, text):
    checkpoint = checkpoints(2, complete=(2,)) / "checkpoint-2"
    (checkpoint / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not complete: its manifest.json cannot be read. Delete manifest.json"):
        checkpoint_to_resume(str(checkpoint), checkpoint.parent, LAYOUT)


def test_large_files_are_checked_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "_WHOLE", 2**20)
    monkeypatch.setattr(manifest_module, "_BLOCK", 2**12)
    path = tmp_path / "shard.bin"
    path.write_bytes(os.urandom(3 * 2**20))
    first = file_digest(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([path.read_bytes()[-1] ^ 1]))
    os.utime(path, (1, 1))
    assert file_digest(path) != first
    path.write_bytes(bytes(3 * 2**20))
    assert file_digest(path) != first


def test_a_damaged_rollout_is_refused(tmp_path):
    path = rollout_file(tmp_path, 0)
    save_rollout(path, 3, [{"ids": torch.arange(5)}])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        load_rollout(path, torch.device("cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1", None, True])
def test_a_state_that_no_run_reaches_is_refused(tmp_path, value):
    state = ControlState(TargetedClipHigher(), "targeted_clip_higher")
    with pytest.raises(ValueError, match="'k' of the entropy control 'targeted_clip_higher' is"):
        state.load({"k": value}, tmp_path)


@pytest.mark.parametrize("position", [-1, 1.5, "3", True])
def test_a_position_that_is_no_count_is_refused(tmp_path, position):
    stream = PromptStream(Dataset.from_dict({"prompt": ["a", "b"]}), shuffle=False, seed=0)
    with pytest.raises(ValueError, match="the position in the prompts is"):
        stream.load({"position": position}, tmp_path)


def test_files_of_other_formats_are_not_called_truncated(checkpoints):
    """torch's older format and other programs' `.bin` files do not tell their end; a zip file does."""
    checkpoint = checkpoints(1) / "checkpoint-1"
    torch.save(torch.ones(9), checkpoint / "old.bin", _use_new_zipfile_serialization=False)
    (checkpoint / "vocabulary.bin").write_bytes(b"any bytes")
    (checkpoint / "global_step1.bin").mkdir()
    assert checkpoint_to_resume(str(checkpoint), checkpoint.parent, LAYOUT) == checkpoint
    (checkpoint / "vocabulary.bin").write_bytes(bytes(9))
    with pytest.raises(ValueError, match=r"vocabulary.bin is truncated"):
        checkpoint_to_resume(str(checkpoint), checkpoint.parent, LAYOUT)


def test_a_checkpoint_of_the_model_alone_goes_on_only_if_named(checkpoints, caplog):
    checkpoint = checkpoints(1) / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    write_manifest(checkpoint, LAYOUT, False)
    for choice in (True, "auto"):
        with pytest.raises(ValueError, match=r"no optimizer state \(`save_only_model`\).*model_name_or_path"):
            checkpoint_to_resume(choice, checkpoint.parent, LAYOUT)
    assert checkpoint_to_resume(str(checkpoint), checkpoint.parent, LAYOUT) == checkpoint
    assert "the learning-rate schedule and the optimizer would start afresh" in caplog.text


def test_a_checkpoint_that_was_cut_off_is_no_other_run(checkpoints, caplog):
    folder = checkpoints(1, 2, complete=(1,))
    (folder / "checkpoint-2" / UNFINISHED).touch()
    warn_of_another_run(folder, folder / "checkpoint-1")
    assert not caplog.text
    warn_of_another_run(folder)
    assert "already holds another run (checkpoint-2 is its last checkpoint, unknown run" in caplog.text


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_warns(checkpoints, caplog, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    folder = checkpoints(1, 2, complete=(1,))
    assert checkpoint_to_resume("auto", folder, LAYOUT) == folder / "checkpoint-1"
    assert ("checkpoint-2 is passed over" in caplog.text) == (rank == "0")


def test_a_named_checkpoint_is_checked(checkpoints, caplog):
    folder = checkpoints(1, 2, complete=(1,))
    assert checkpoint_to_resume(None, folder, LAYOUT) is None
    assert checkpoint_to_resume(False, folder, LAYOUT) is None
    assert checkpoint_to_resume("auto", folder / "nothing here", LAYOUT) is None
    assert checkpoint_to_resume("auto", folder, LAYOUT) == folder / "checkpoint-1"
    caplog.clear()
    named = {step: folder / f"checkpoint-{step}" for step in (1, 2)}
    assert checkpoint_to_resume(str(named[1]), folder, LAYOUT) == named[1]
    assert not caplog.records
    # Without a manifest (stock TRL's) the files themselves must do.
    assert checkpoint_to_resume(str(named[2]), folder, LAYOUT) == named[2]
    assert "checkpoint-2 has no manifest.json" in caplog.text
    for step, name in ((1, "model.safetensors"), (2, "model.safetensors"), (2, "optimizer.pt"), (2, "x.json")):
        path = named[step] / name
        before = path.read_bytes() if path.exists() else b"{}"
        path.write_bytes(before[: len(before) // 2])
        with pytest.raises(ValueError, match=f"is not complete: {name}"):
            checkpoint_to_resume(str(named[step]), folder, LAYOUT)
        path.write_bytes(before)
    (named[2] / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"is not a checkpoint \(it has no trainer_state.json\)"):
        checkpoint_to_resume(str(named[2]), folder, LAYOUT)


@pytest.mark.parametrize(
    ("inside_rollout", "changes", "words"),
    [
        # The same 16 completions a step and 64 a rollout, cut another way.
        (False, {"processes": 1, "per_device_train_batch_size": 8}, None),
        (False, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 16}, None),
        (True, {"processes": 1, "per_device_train_batch_size": 8}, "inside a rollout"),
        (True, {"processes": 4, "per_device_train_batch_size": 2}, "inside a rollout"),
        # Other amounts: the steps made so far would stand for other prompts.
        (False, {"processes": 1}, "processes x per_device_train_batch_size"),
        (False, {"gradient_accumulation_steps": 1}, "differ in the completions of a step"),
        (False, {"steps_per_generation": 16}, "differ in the completions of a step or of a rollout"),
        (True, {"num_iterations": 2}, "num_iterations 2"),
    ],
)
def test_another_layout_goes_on_or_is_refused(checkpoints, caplog, inside_rollout, changes, words):
    folder = checkpoints(3, complete=(3,), inside_rollout=inside_rollout)
    layout = replace(LAYOUT, **changes)
    if words is None:
        with caplog.at_level(logging.WARNING, logger="entropy_trl"):
            assert checkpoint_to_resume(True, folder, layout) == folder / "checkpoint-3"
        assert "was saved with processes 2" in caplog.text
    else:
        with pytest.raises(ValueError, match=words):
            checkpoint_to_resume(True, folder, layout)


def test_deepspeeds_shards_are_for_their_number_of_processes(checkpoints):
    folder = checkpoints(3)
    (folder / "checkpoint-3" / "latest").write_text("global_step3")
    write_manifest(folder / "checkpoint-3", LAYOUT, inside_rollout=False)
    with pytest.raises(ValueError, match="DeepSpeed's shards"):
        checkpoint_to_resume(True, folder, replace(LAYOUT, processes=1, per_device_train_batch_size=8))


def test_the_manifest_names_the_files_of_subfolders(checkpoints):
    folder = checkpoints(3) / "checkpoint-3"
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "shard.pt").write_bytes(bytes(10))
    write_manifest(folder, LAYOUT, inside_rollout=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["files"]["global_step3/shard.pt"] == 10
    assert MANIFEST not in manifest["files"]
    (folder / "global_step3" / "shard.pt").unlink()
    assert why_incomplete(folder) == "global_step3/shard.pt is missing"
