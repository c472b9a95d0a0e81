"""The wheel: what it holds, what it says of itself, and that it runs without the repository."""

import ast
import email
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from entropy_trl import __version__
from entropy_trl.cli.train_arguments import CovGRPOScriptArguments, TrainParser
from entropy_trl.recipes import find_recipe


REPOSITORY = Path(__file__).parents[2]
#: Imported only by what needs them, which names the missing package.
OPTIONAL = {"matplotlib", "peft", "scipy", "statsmodels", "tensorboard", "vllm", "wandb"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of what the build reads, so that the repository stays clean."""
    source = tmp_path_factory.mktemp("source")
    files = [
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "src",
        "configs",
        "tests",
    ]
    names = [name for name in files if (REPOSITORY / name).exists()]
    subprocess.run(["cp", "-r", *names, str(source)], cwd=REPOSITORY, check=True)
    output = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(output),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (path,) = output.glob("*.whl")
    return path


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("entropy_trl/")}
    assert package >= {
        "entropy_trl/py.typed",
        "entropy_trl/cli/main.py",
        "entropy_trl/controls/__init__.py",
        "entropy_trl/quickstart/__init__.py",
        "entropy_trl/sample_data/README.md",
        "entropy_trl/sample_data/dapo_math_sample.jsonl",
    }
    sources = {str(path.relative_to(REPOSITORY / "src")) for path in (REPOSITORY / "src").rglob("*.py")}
    assert {name for name in package if name.endswith(".py")} == sources
    metadata = f"entropy_trl-{__version__}.dist-info/"
    assert all(name.startswith(metadata) for name in names - package)  # no tests
    recipes = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*") if path.is_file()}
    assert {name for name in names if "/configs/" in name} == {f"entropy_trl/{name}" for name in recipes}
    assert metadata + "licenses/LICENSE" in names


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"entropy_trl-{__version__}.dist-info/METADATA"))
        entry_points = archive.read(f"entropy_trl-{__version__}.dist-info/entry_points.txt").decode()
    assert metadata["Name"] == "entropy-trl"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert "trl<1.17,>=1.13" in metadata.get_all("Requires-Dist")
    assert "Operating System :: POSIX" in metadata.get_all("Classifier")  # fcntl and resource
    assert not any("OWNER" in url or "example" in url for url in metadata.get_all("Project-URL"))
    assert set(metadata.get_all("Provides-Extra")) >= {"vllm", "deepspeed", "peft", "plot", "test", "quality", "dev"}
    assert "entropy-trl = entropy_trl.cli:main" in entry_points


def imported_modules():
    """The top-level modules that the package imports, wherever in a file."""
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0]


def test_every_package_that_is_imported_is_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"entropy_trl-{__version__}.dist-info/METADATA"))
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    always = {canonicalize_name(each.name) for each in requirements if each.marker is None}
    any_extra = {canonicalize_name(each.name) for each in requirements}
    distributions = importlib.metadata.packages_distributions()
    modules = set(imported_modules()) - set(sys.stdlib_module_names) - {"entropy_trl"}
    used = {canonicalize_name(name) for module in modules for name in distributions.get(module, [module])}
    assert {"torch", "trl", "pyyaml"} <= used  # or the search finds nothing
    assert used - OPTIONAL <= always
    assert used <= any_extra
    constraints = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in constraints if "==" in line}
    assert any_extra - {"vllm", "setuptools"} <= pinned


def test_version_is_said_once():
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"version: {__version__}\n" in citation


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the package as pip installs it from the wheel, and the environment that uses it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target, os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def run(installed, tmp_path, *command):
    result = subprocess.run(command, cwd=tmp_path, env=installed[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_runs_when_installed(installed, tmp_path):
    """The console script and the shipped rows, with the wheel as the only source of the package."""
    target, _ = installed
    assert run(installed, tmp_path, sys.executable, target / "bin" / "entropy-trl", "--version") == (
        f"entropy-trl {__version__}\n"
    )
    code = "import entropy_trl.smoke as s; print(s.__file__, len(s.dapo_math_sample()))"
    out = run(installed, tmp_path, sys.executable, "-c", code)
    assert out.split() == [str(target / "entropy_trl" / "smoke.py"), "64"]


def test_reads_recipes_when_installed(installed, tmp_path):
    """`--config` takes the name of a recipe, and a recipe finds the chat template that it names."""
    code = """
import entropy_trl.cli
for name in ("qwen2.5-7b/kl_cov", "configs/mistral-7b/kl_cov.yaml"):
    script, training, model, _ = entropy_trl.cli.parse_train_args(["--config", name, "--use_cpu", "true"])
    print(model.model_name_or_path, training.entropy_control_kwargs["fraction"], script.chat_template_path)
"""
    template = installed[0] / "entropy_trl" / "configs" / "chat_templates" / "r1_zero.jinja"
    assert run(installed, tmp_path, sys.executable, "-c", code).splitlines() == [
        "Qwen/Qwen2.5-7B 0.002 None",
        f"mistralai/Mistral-7B-v0.3 0.002 {template}",
    ]
    assert template.is_file()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("qwen2.5-7b/kl_cov", "configs/qwen2.5-7b/kl_cov.yaml"),
        ("qwen2.5-7b/kl_cov.yaml", "configs/qwen2.5-7b/kl_cov.yaml"),
        ("configs/accelerate/zero3.yaml", "configs/accelerate/zero3.yaml"),
        ("configs/chat_templates/r1_zero.jinja", "configs/chat_templates/r1_zero.jinja"),
        ("qwen2.5-7b", None),
        ("../configs/qwen2.5-7b/kl_cov", None),
        ("", None),
    ],
)
def test_recipes_have_names(name, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == (None if found is None else REPOSITORY / found)


def test_a_file_of_the_users_goes_before_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("qwen2.5-7b", "kl_cov.yaml")
    own.parent.mkdir()
    own.touch()
    assert find_recipe("qwen2.5-7b/kl_cov.yaml") == own
    with pytest.raises(FileNotFoundError, match=r"nearest one is qwen2.5-7b/kl_cov\)"):
        TrainParser([CovGRPOScriptArguments]).parse(["--config", "qwen2.5-7b/kl-cov"])
