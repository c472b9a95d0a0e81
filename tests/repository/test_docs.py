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
from entropy_trl.cli.parser import one_spelling
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
    "controls",
    "covariance",
    "data_flow",
    "design",
    "index",
    "law",
    "limitations",
    "methods",
    "results",
    "troubleshooting",
)


@pytest.mark.parametrize("name", WRAPPED)
def test_prose_is_wrapped(name):
    for line in prose(ROOT / "docs" / f"{name}.md").splitlines():
        assert len(line) <= 130 or line.startswith("|"), line


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


@each_page
def test_files_in_backquotes_exist(page):
    if page.name == "CHANGELOG.md":  # it also names files that have moved
        return
    named = r"`((?:src|configs|docs|benchmarks|examples|tests)/[\w./-]+\.(?:py|yaml|md|sh|json|ipynb))`"
    for path in re.findall(named, prose(page)):
        assert "NAME" in path or (ROOT / path).exists(), path
