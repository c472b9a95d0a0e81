"""A rollout survives a file: tensors bit for bit, and what is not a tensor."""

import pytest
import torch

from entropy_trl.checkpoint import load_rollout, rollout_file, save_rollout


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
