"""What the site has beyond the pages of this folder: reference pages from the code, contents, docstrings as reST."""

import argparse
import dataclasses
import inspect
import os
import re
import textwrap
from importlib import import_module
from pathlib import Path

from entropy_trl import CONTROLS, CovGRPOConfig
from entropy_trl.cli import COMMANDS
from entropy_trl.cli.parser import CommandParser
from entropy_trl.cli.train_arguments import CovGRPOScriptArguments


ROOT = Path(__file__).parents[1]


def write_pages(folder: Path) -> None:
    """Write the pages that are made from the code and from files of the repository."""
    folder.mkdir(exist_ok=True)
    pages = {
        "config": config_page(),
        "commands": commands_page(),
    }
    for source, name in PAGES.items():
        pages[name] = relocate((ROOT / source).read_text(), source, f"docs/generated/{name}.md")
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:  # an untouched page is not built again
            path.write_text(text)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. Cells are one line, and a bar in them is escaped."""
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def described(cls: type) -> dict[str, str]:
    """What the `Args:` of a class's docstring say of each argument."""
    parts = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    found = re.split(r"^(\w+) \([^\n]*?\): ?", textwrap.dedent(parts), flags=re.MULTILINE)[1:]
    texts = {name: " ".join(text.split()) for name, text in zip(found[::2], found[1::2], strict=True)}
    return {name: re.sub(r"\[(`[^`]+`)\]", r"\1", text) for name, text in texts.items()}


def field_rows(cls: type, names: list[str] | None = None) -> list[list[str]]:
    """A row for each field of a dataclass, or for each of `names`: name, default, meaning."""
    texts, fields = described(cls), {field.name: field for field in dataclasses.fields(cls)}
    rows = []
    for name in names or fields:
        field = fields[name]
        default = field.default
        if not isinstance(field.default_factory, dataclasses._MISSING_TYPE):
            default = field.default_factory()
        rows.append([f"`{name}`", f"`{default}`", texts.get(name) or field.metadata.get("help", "")])
    return rows


def config_page() -> str:
    own = [name for name in CovGRPOConfig.__annotations__ if not name.startswith("_")]
    parts = [
        "# Configuration",
        "Options of `CovGRPOConfig`, in Python, in a configuration file and on the command line. All options of TRL's "
        "`GRPOConfig` are accepted too.",
        table(["option", "default", "meaning"], field_rows(CovGRPOConfig, own)),
        "## Hyper-parameters of the controls",
        "They go into `entropy_control_kwargs`. [Methods](../methods.md#controls) has the equations.",
    ]
    for name, control in CONTROLS.items():
        parts += [f"### {name}", table(["hyper-parameter", "default", "meaning"], field_rows(control))]
    return "\n\n".join(parts)


def commands_page() -> str:
    parts = [
        "# Commands",
        "`entropy-trl COMMAND --help` prints the same. Hyphens and underscores in option names are equivalent.",
    ]
    for name, (module, _) in COMMANDS.items():
        command = import_module(module)
        parser = CommandParser(prog=f"entropy-trl {name}", description=command.DESCRIPTION, add_help=False)
        command.add_arguments(parser)
        formatter = parser._get_formatter()
        rows = []
        for action in parser._actions:
            if action.help == argparse.SUPPRESS:
                continue
            spelled = formatter._format_action_invocation(action).replace("\n", " ")
            rows.append([f"`{spelled}`", formatter._expand_help(action) if action.help else ""])
        parts += [f"## entropy-trl {name}", " ".join(command.DESCRIPTION.split())]
        parts += [table(["option", "meaning"], rows)] if rows else []
        if name == "train":
            parts += [
                "`train` takes the options below, those of [CovGRPOConfig](config.md), and TRL's options of the "
                "model. `--config FILE` reads them from a YAML file.",
                table(["option", "default", "meaning"], field_rows(CovGRPOScriptArguments)),
            ]
    return "\n\n".join(parts)


#: Files outside this folder that are pages of the site.
PAGES = {
    "README.md": "start",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "examples/reproduce_paper.md": "reproduce_paper",
    "examples/smollm2/README.md": "smollm2",
}
#: Code that the site has a page for. In the repository, where there is no such page, links lead to the code.
CODE_PAGES = {"src/entropy_trl/config.py": "config", "src/entropy_trl/cli/main.py": "commands"}
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[\w-]+)?\)")


def relocate(text: str, source: str, page: str) -> str:
    """The text of a file of the repository, with its links as the site's page of it must have them."""

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
        if own := (PAGES | CODE_PAGES).get(target):
            target = f"docs/generated/{own}.md"
        return f"]({os.path.relpath(target, os.path.dirname(page))}{match[2] or ''})"

    return LINK.sub(link, text)


def add_contents(app: object, name: str, source: list[str]) -> None:
    """Link to the site's own pages, and make the tables of contents of the groups of links in `index.md`."""
    if not name.startswith("generated/"):
        source[0] = relocate(source[0], f"docs/{name}.md", f"docs/{name}.md")
    if name == "index":
        contents = ""
        for title, group in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", source[0], re.MULTILINE | re.DOTALL):
            pages = re.findall(r"^- \[([^]]+)\]\(([\w/.-]+)\.md\)", group, re.MULTILINE)
            entries = "\n".join(f"{text} <{page}>" for text, page in pages)
            if pages:  # a section without a list of pages is text of the page itself
                contents += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{entries}\n```\n"
        source[0] += contents


def to_rst(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """The docstrings' Markdown as reST: code in double backquotes, fenced and indented blocks as literal ones."""
    text = "\n".join(lines)
    text = re.sub(
        r"^( *)```\w*\n(.*?)^ *```$",
        lambda m: f"{m[1]}::\n\n" + textwrap.indent(m[2], "    "),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    text = re.sub(r"\[`~?([^`]+)`\](\([\w.]+\))?", r"`\1`", text)
    # A code span that goes over two lines becomes one line: reST ends it at the indentation of the second.
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda m: "``" + re.sub(r"\n *", " ", m[1]) + "``", text)
    # A paragraph at the margin, an empty line, an indented one: a block of code in Markdown, a quotation in reST.
    text = re.sub(r"^(\S[^\n]*)\n\n(?=    )", r"\1\n\n::\n\n", text, flags=re.MULTILINE)
    lines[:] = text.split("\n")
