"""Check the files of a model's folder before anything is loaded from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
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
        folder (`Path`): what `from_pretrained` would be given.

    Raises:
        FileNotFoundError: the folder has no configuration of a model or an adapter.
        ValueError: a file is damaged.
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


@contextmanager
def told_of(what: str) -> Iterator[None]:
    """Say what failed where transformers, or a chat template, met values that it does not check itself.

    A model's files and the JSON of `--engine_kwargs` and `--chat_template_kwargs` are the user's. A wrong type or name
    in them comes out as one of these errors; a `ValueError` or `OSError` has a message for users as it is.

    Raises:
        ValueError: one of these errors happened.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, RuntimeError, StrictDataclassError, TemplateError) as error:
        raise ValueError(
            f"{what} ({type(error).__name__}: {error}). Check its files and the options; ENTROPY_TRL_DEBUG=1 shows "
            "where it failed."
        ) from error
