"""The weights of a checkpoint, restored and compared with its files.

transformers restores by name and ignores names that it does not find. The files of mixture-of-experts models and of
some others have other names than the model in memory (transformers#48805), and of several adapters only those in
subfolders are read: training would go on from other weights.
"""

import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def restore_weights(model: nn.Module, checkpoint: Path) -> None:
    """Make sure that an unsharded model has a checkpoint's weights, after transformers restored them.

    Compares all names, and of each tensor the first, middle and last row, with the safetensors or `.bin` files, and
    loads what differs.

    Args:
        model (`nn.Module`): The model, unwrapped; a [`~peft.PeftModel`] gets its adapters.
        checkpoint (`Path`): The checkpoint folder.

    Raises:
        ValueError: If the model does not have the weights of the files after that.
    """
    if is_peft_model(model):
        _restore_adapters(model, checkpoint)
        return
    files = _weight_files(checkpoint)
    if not files:
        return
    names = {name for name, _ in _samples(files)}
    state = model.state_dict()
    present = {tensor.data_ptr() for name, tensor in state.items() if name in names}
    # Tied weights are in the file once.
    missing = [name for name, tensor in state.items() if name not in names and tensor.data_ptr() not in present]
    unknown = names - state.keys()
    if missing or unknown:
        _load_through_from_pretrained(model, checkpoint, sorted(unknown) or missing)
        return
    different = [name for name, sample in _samples(files) if not _same(_sample(state[name]), sample)]
    if different:
        raise ValueError(_refusal(checkpoint, different))


def _load_through_from_pretrained(model: nn.Module, checkpoint: Path, names: list[str]) -> None:
    """Load weights whose names in the file are not the model's: `from_pretrained` knows how to convert them."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(_refusal(checkpoint, names))
    logger.info(f"The weights of {checkpoint} have other names than the model ({names[0]}): they are converted.")
    dtype = torch.float32 if any(p.dtype == torch.float32 for p in model.parameters()) else model.dtype
    with torch.random.fork_rng(devices=[]):
        loaded: Any = type(model).from_pretrained(str(checkpoint), dtype=dtype, output_loading_info=True)
    copy, info = loaded
    wrong = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise ValueError(_refusal(checkpoint, wrong))
    model.load_state_dict(copy.state_dict())


def _restore_adapters(model: "PeftModel", checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict  # an optional package

    # PEFT saves the adapter "default" in the folder itself, and others in subfolders of their names.
    for name in model.peft_config:
        folder = checkpoint if name == "default" else checkpoint / name
        if (folder / ADAPTER_SAFE_WEIGHTS_NAME).exists():
            saved = load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME)
        elif (folder / ADAPTER_WEIGHTS_NAME).exists():
            saved = _load_bin(folder / ADAPTER_WEIGHTS_NAME)
        elif name in model.active_adapters:  # a checkpoint of a run without adapters
            raise ValueError(_refusal(checkpoint, [f"it has no adapter {name!r}"]))
        else:
            continue
        if _differing(model, name, saved):
            set_peft_model_state_dict(model, saved, adapter_name=name)
        if different := _differing(model, name, saved):
            raise ValueError(_refusal(checkpoint, different))


def _differing(model: "PeftModel", adapter: str, saved: dict[str, Tensor]) -> list[str]:
    from peft import get_peft_model_state_dict

    current = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return [name for name, tensor in current.items() if name not in saved or not _same([tensor], [saved[name]])]


def _weight_files(checkpoint: Path) -> list[Path]:
    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        index = checkpoint / index_name
        if index.exists():
            return [checkpoint / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (checkpoint / name).exists():
            return [checkpoint / name]
    return []


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A file of `torch.save`, without reading more of it than is used if its format allows that. Runs no code of it."""
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    return loaded


def _samples(files: list[Path]) -> Iterator[tuple[str, list[Tensor]]]:
    """Each tensor's name, and its first, middle and last row."""
    for path in files:
        if path.suffix == ".bin":
            for name, tensor in _load_bin(path).items():
                yield name, _sample(tensor)
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                part = file.get_slice(name)
                shape = part.get_shape()
                rows = _rows(shape[0]) if shape else []
                yield name, [part[row : row + 1] for row in rows] if shape else [file.get_tensor(name)]


def _sample(tensor: Tensor) -> list[Tensor]:
    return [tensor[row : row + 1] for row in _rows(len(tensor))] if tensor.ndim else [tensor]


def _rows(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1}) if count else []


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a, b.to(a.device, a.dtype), rtol=0, atol=0, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _refusal(checkpoint: Path, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"The weights of {checkpoint} do not fit the model ({shown}): training would go on from other weights. Resume "
        "with the model, adapter and versions that wrote the checkpoint, or start a new run from its weights "
        "(model_name_or_path)."
    )
