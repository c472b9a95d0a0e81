"""The architecture: imports point one way, and a control comes with all its parts."""

import ast
import re
from pathlib import Path

import pytest

import entropy_trl
from entropy_trl import CONTROLS


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "entropy_trl"

#: A module may import those of lower layers only (and, inside a folder, its siblings).
LAYERS = [
    {"ranks", "files", "_version"},
    {"types", "selection", "checkpoint", "sampling", "estimators", "templates", "hub", "diversity", "dotted_path"},
    {"covariance", "reduction", "metrics", "regions"},
    {"controls"},
    {"config", "analysis"},
    {"recorder", "callbacks", "model_card"},
    {"trainer", "rewards"},
    {"data"},
    {"evaluation"},
    {"quickstart", "smoke", "script_args", "plan"},
    {"cli"},
]


def layer(module):
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else names
        for name in names:
            if name.startswith("entropy_trl."):
                yield name.split(".")[1]


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imported(path):
        assert other == module or layer(other) < layer(module), f"{path.name} imports {other}"


def test_only_the_trainer_subclasses_grpo_trainer():
    subclassing = [p.name for p in modules() if re.search(r"\(GRPOTrainer\)", p.read_text())]
    assert subclassing == ["trainer.py"]


def test_core_needs_torch_only():
    for name in ("ranks", "types", "covariance", "selection", "reduction", "regions"):
        source = (PACKAGE / f"{name}.py").read_text()
        assert not re.search(r"^(from|import) (trl|transformers|accelerate|datasets)", source, re.MULTILINE)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_has_a_file_a_test_a_config_and_a_doc(name):
    assert (PACKAGE / "controls" / f"{name}.py").exists()
    assert CONTROLS[name].__name__ in entropy_trl.__all__
    assert (ROOT / "configs" / "quickstart" / f"{name}.yaml").exists()
    assert f"`{name}`" in (ROOT / "docs" / "methods.md").read_text()
    assert any(f"def test_{name}" in p.read_text() for p in (ROOT / "tests").glob("test_*.py"))


def test_every_public_name_is_documented():
    for name in entropy_trl.__all__:
        if name not in ("__version__", "CONTROLS"):
            assert getattr(entropy_trl, name).__doc__, name
