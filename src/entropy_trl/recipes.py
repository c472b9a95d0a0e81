"""The recipes: the files of `configs/`, which a wheel carries inside the package."""

from pathlib import Path


_PACKAGE = Path(__file__).parent
#: `setup.py` copies `configs/` into the package when it builds a wheel. A source tree has it at its top level.
_FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parents[1] / "configs"


def find_recipe(name: str) -> Path | None:
    """
    Find the file that a `--config` or a path inside a recipe names.

    A file relative to the working directory goes first. Otherwise the name is one of a recipe, with or without
    `configs/` before it and `.yaml` after it.

    Args:
        name (`str`):
            Path of a file, or name of a recipe.

    Returns:
        `Path` or `None`: The file, or None if there is neither such a file nor such a recipe.

    Example:

    ```python
    >>> find_recipe("qwen2.5-7b/kl_cov").name
    'kl_cov.yaml'
    ```
    """
    if Path(name).is_file():
        return Path(name)
    files = {file.relative_to(_FOLDER).as_posix(): file for file in _FOLDER.rglob("*") if file.is_file()}
    recipe = name.removeprefix("configs/")
    return files.get(recipe) or files.get(f"{recipe}.yaml")


def recipe_names() -> list[str]:
    """List the training recipes, as `--config` takes them."""
    files = [path for path in _FOLDER.glob("*/*.yaml") if path.parent.name != "accelerate"]
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in files)
