"""Check the files of a model's folder before anything is loaded from them."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from entropy_trl.evaluation.run import read_mapping


_JSON = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)


def check_model_files(folder: Path) -> None:
    """Check that the JSON files of a model's folder can be read, and that its weights are whole.

    Args:
        folder (`Path`): What `from_pretrained` would be given.

    Raises:
        FileNotFoundError: The folder has no configuration of a model or an adapter.
        ValueError: A file is damaged.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"--model: the folder {str(folder)!r} has no config.json or adapter_config.json.")
    for name in _JSON:
        if (folder / name).exists():
            read_mapping(folder / name)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header, and compares it with the size
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: its weights cannot be read ({error}). Restore it.") from error
