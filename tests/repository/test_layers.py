"""The architecture: imports point one way, and a control comes with all its parts."""

import ast
import re
from pathlib import Path

import pytest
from trl import GRPOTrainer

import entropy_trl
from entropy_trl import CONTROLS, CovGRPOTrainer


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "entropy_trl"

#: A module may import those of lower layers only (and, inside a folder, its siblings).
LAYERS = [
    {"trl_compat"},
    {
        "tokens",
        "rollout",
        "files",
        "templates",
        "dotted_path",
        "mistakes",
        "config_checks",
        "recipes",
        "_version",
    },
    {"controls"},
    {"loss"},
    {"config", "analysis"},
    {"saving", "monitor"},
    {"trainer", "rewards"},
    {"data"},
    {"evaluation"},
    {"quickstart", "smoke", "plan"},
    {"cli"},
    {"__main__"},
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


#: The same inside `analysis/`. A `command.py` stands above all of them.
ANALYSIS = [
    {"pages", "tables", "secrets"},
    {"logs"},
    {"law", "covariance", "verdict"},
    {"svg"},
    {"figures"},
    {"report"},
]


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "analysis").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE / "analysis"))
)
def test_analysis_is_layered_and_no_file_is_a_hall(path):
    assert len(path.read_text().splitlines()) <= 420
    if path.name == "command.py" or path == PACKAGE / "analysis" / "__init__.py":
        return
    own = path.relative_to(PACKAGE / "analysis").parts[0].removesuffix(".py")
    level = {name: i for i, names in enumerate(ANALYSIS) for name in names}
    for other in re.findall(r"from entropy_trl\.analysis\.(\w+)", path.read_text()):
        assert other == own or level[other] < level[own], f"{path.name} imports {other}"


def test_the_design_names_every_part_of_the_package():
    design = (ROOT / "docs" / "design.md").read_text()
    for name in set().union(*LAYERS):
        part = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        assert part in design, part


def test_the_trainer_is_one_chain_of_classes():
    chain = CovGRPOTrainer.__mro__[: CovGRPOTrainer.__mro__.index(GRPOTrainer) + 1]
    assert [cls.__name__ for cls in chain] == ["CovGRPOTrainer", "ResumingTrainer", "PushingTrainer", "GRPOTrainer"]
    subclassing = [p for p in modules() if re.search(r"\(GRPOTrainer\)", p.read_text())]
    assert subclassing == [PACKAGE / "saving" / "uploads.py"]


@pytest.mark.parametrize(
    "path", sorted([*(PACKAGE / "tokens").glob("*.py"), PACKAGE / "loss" / "reduction.py"]), ids=lambda p: p.stem
)
def test_core_needs_torch_only(path):
    assert not re.search(r"^(from|import) (trl|transformers|accelerate|datasets)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_has_a_file_a_test_a_config_and_a_doc(name):
    assert (PACKAGE / "controls" / f"{name}.py").exists()
    assert CONTROLS[name].__name__ in entropy_trl.__all__
    assert (ROOT / "configs" / "quickstart" / f"{name}.yaml").exists()
    assert f"`{name}`" in (ROOT / "docs" / "methods.md").read_text()
    assert any(f"def test_{name}" in p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))


def test_every_public_name_is_documented():
    for name in entropy_trl.__all__:
        if name not in ("__version__", "CONTROLS"):
            assert getattr(entropy_trl, name).__doc__, name
