"""The documents: the README's length, links and anchors, and that every command and file in them exists."""

import argparse
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from trl import ModelConfig, TrlParser

from entropy_trl import CovGRPOConfig
from entropy_trl.cli import COMMANDS
from entropy_trl.cli.parser import CommandParser, one_spelling
from entropy_trl.cli.train import make_parser, read_train_args
from entropy_trl.cli.train_arguments import CovGRPOScriptArguments


ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
PAGES = [page for page in PAGES if page.parent.name != "generated"]  # by `make docs`
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def prose(page):
    return FENCE.sub("", page.read_text())


@cache
def anchors(page):
    """The anchors that GitHub and the site give the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h).lower()).replace(" ", "-") for h in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


#: Pages whose prose is wrapped. Tables may be wider.
WRAPPED = (
    "ablations",
    "controls",
    "covariance",
    "data",
    "data_flow",
    "design",
    "distributed",
    "evaluation",
    "hub",
    "index",
    "law",
    "limitations",
    "methods",
    "metrics",
    "results",
    "report",
    "rewards",
    "scaling",
    "training",
    "troubleshooting",
    "vllm",
)


@pytest.mark.parametrize("name", WRAPPED)
def test_prose_is_wrapped(name):
    for line in prose(ROOT / "docs" / f"{name}.md").splitlines():
        assert len(line) <= 130 or line.startswith("|") or len(line.split()) == 1, line


@each_page
def test_links_and_anchors(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def commands(text):
    """The command lines in the code blocks of a page and in its backquotes, without the variables in front."""
    lines = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for language, block in FENCE.findall(text):
        if language in ("", "bash", "sh"):
            lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        command = re.sub(r"^(\w+=\S+ +)+", "", line.split(" #")[0].strip())
        if re.match(r"(entropy-trl|accelerate launch|torchrun|make|python3?) ", command):
            yield command


@cache
def options_of(command):
    parser = argparse.ArgumentParser(add_help=False)
    module = import_module(COMMANDS[command][0])
    module.add_arguments(parser)
    known = set(parser._option_string_actions) | {"--help", "--help-all", "--help_all"}
    if command in ("train", "plan"):
        known |= set(TrlParser((CovGRPOScriptArguments, CovGRPOConfig, ModelConfig))._option_string_actions)
        known |= {"--config"}
    return known


@each_page
def test_commands_exist(page):
    for line in commands(page.read_text()):
        words = shlex.split(line.replace("[", " ").replace("]", " "))
        if words[0] == "make":
            for word in words[1:]:
                if re.fullmatch(r"[a-z-]+", word):
                    assert re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            continue
        for word in words:
            if re.fullmatch(r"(benchmarks|examples|tests|configs)/[\w./-]+\.(py|yaml)", word):
                assert (ROOT / word).exists(), line
        command = words[1] if words[0] == "entropy-trl" else "train" if "train.py" in words else None
        if command is None:
            continue
        assert command in COMMANDS or command.isupper() or command.startswith("-"), line
        if command in COMMANDS:
            known = options_of(command)
            for word in words[words.index("train.py") if "train.py" in words else 2 :]:
                if word.startswith("--"):
                    (name,) = one_spelling([word.partition("=")[0]], known)
                    assert name in known or name == "--any_field", f"{word} of: {line}"


#: What stands for a value in a command of a page.
PLACEHOLDERS = {"FILE": "configs/smoke/dapo_math.yaml", "CONFIG.yaml": "configs/smoke/dapo_math.yaml"}
PLACEHOLDERS |= {"N": "8", "GB": "80", "S": "0"}


def filled_in(line):
    """The words of a command, with values for its placeholders, and without what it leaves open."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line.replace("--config ...", "--config FILE"))]
    return [word for word in words if word != "..."]


@each_page
def test_commands_are_accepted(page, monkeypatch):
    """The command's own parser reads each command line, and checks the configuration that it asks for."""
    monkeypatch.chdir(ROOT)
    for line in commands(page.read_text()):
        words = filled_in(line)
        if "train.py" in words:
            processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
            command, argv = "train", words[words.index("train.py") + 1 :]
        else:
            processes, command, argv = 1, words[1], words[2:]
        if command not in COMMANDS or (words[0] != "entropy-trl" and "train.py" not in words) or not argv:
            continue
        parser = CommandParser(prog=command, add_help=command != "train")
        import_module(COMMANDS[command][0]).add_arguments(parser)
        if command not in ("train", "plan"):
            parser.parse_args(argv)
            continue
        options, rest = parser.parse_known_args(argv)
        # This machine may have no GPU, where bf16 is refused unless the CPU is asked for.
        train_parser = make_parser(command, options.gpus if command == "plan" else processes)
        read_train_args(train_parser, [*rest, "--use_cpu", "true"])


#: What runs each command of the pages. Those of the recipes, of `vllm serve` and of SLURM need GPUs, and say so.
RUN_BY = {
    "entropy-trl train": "cli/test_smoke.py",
    "entropy-trl evaluate": "evaluation/test_evaluation.py",
    "entropy-trl plan": "plan/test_plan.py",
    "entropy-trl law": "analysis/test_law.py",
    "entropy-trl covariance": "analysis/test_covariance_analysis.py",
    "entropy-trl report": "analysis/test_report.py",
    "entropy-trl quickstart": "quickstart/test_quickstart.py",
    "entropy-trl env": "cli/test_cli.py",
    "python -m entropy_trl": "cli/test_cli.py",
    "python -m entropy_trl.saving.manifest": "controls/test_flexible_clip.py",
    "accelerate launch": "cli/test_launch.py",
}
NEEDS_GPUS = re.compile(r"train\.py --config (?!configs/(?:smoke|quickstart)/|FILE)|train --config (?:configs/)?qwen")


@each_page
def test_commands_are_run_by_a_test_or_need_a_gpu(page):
    text = page.read_text()
    for line in commands(text):
        if NEEDS_GPUS.search(line):
            assert re.search(r"\bneeds?\s+(?:a\s+)?GPUs?\b", text), f"say on the page that it needs a GPU: {line}"
            continue
        kind = " ".join(line.split()[: 3 if line.startswith("python -m") else 2])
        if kind.startswith("entropy-trl ") and kind.split()[1].isupper():
            continue
        if kind in RUN_BY:
            file = ROOT / "tests" / RUN_BY[kind]
            assert file.exists() and kind.split()[-1].rpartition(".")[2] in file.read_text(), kind
        elif script := re.search(r"(benchmarks|examples)/(\w+)\.py", line):
            assert any(script[2] in test.read_text() for test in (ROOT / "tests").rglob("test_*.py")), line
        else:
            assert kind.startswith("make "), line


@each_page
def test_files_in_backquotes_exist(page):
    if page.name == "CHANGELOG.md":  # it also names files that have moved
        return
    named = r"`((?:src|configs|docs|benchmarks|examples|tests)/[\w./-]+\.(?:py|yaml|md|sh|json|ipynb))`"
    for path in re.findall(named, prose(page)):
        assert "NAME" in path or (ROOT / path).exists(), path
