"""The wheel: what it holds, what it says of itself, and that it runs without the repository."""

import email
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from entropy_trl import __version__


REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of what the build reads, so that the repository stays clean."""
    source = tmp_path_factory.mktemp("source")
    files = ["setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "src", "configs", "tests"]
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
    assert all(name.startswith(metadata) for name in names - package)  # no tests, no configs
    assert metadata + "licenses/LICENSE" in names


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"entropy_trl-{__version__}.dist-info/METADATA"))
        entry_points = archive.read(f"entropy_trl-{__version__}.dist-info/entry_points.txt").decode()
    assert metadata["Name"] == "entropy-trl"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert "trl<1.17,>=1.16" in metadata.get_all("Requires-Dist")
    assert set(metadata.get_all("Provides-Extra")) >= {"vllm", "deepspeed", "peft", "plot", "test", "quality", "dev"}
    assert "entropy-trl = entropy_trl.cli:main" in entry_points


def test_version_is_said_once():
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"version: {__version__}\n" in citation


def test_runs_when_installed(wheel, tmp_path):
    """The console script and the shipped rows, with the wheel as the only source of the package."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(target / "bin" / "entropy-trl"), "--version"]
    result = subprocess.run(script, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == f"entropy-trl {__version__}\n"
    code = "import entropy_trl.smoke as s; print(s.__file__, len(s.dapo_math_sample()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == [str(target / "entropy_trl" / "smoke.py"), "64"]
