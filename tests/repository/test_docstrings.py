"""Docstrings are in one dialect, Hugging Face's, and say what the code says."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "entropy_trl").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
DEFINITIONS = [
    (path, node)
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
]
CLASSES = {node.name for _, node in DEFINITIONS if isinstance(node, ast.ClassDef)}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
#: What a type begins with: code, a reference to a class, or a literal.
TYPE = re.compile(r"\[?`|\"")


def sections(docstring):
    """Yield each section's name and entries. An entry is a line and those below it that are indented further."""
    lines = docstring.split("\n")
    for start, line in enumerate(lines):
        if line.removesuffix(":") not in SECTIONS or not line.endswith(":"):
            continue
        entries = []
        for following in lines[start + 1 :]:
            if following and not following.startswith("    "):
                break
            if following.startswith("     ") and entries:
                entries[-1] += f"\n{following.strip()}"
            elif following:
                entries.append(following.strip())
        yield line.removesuffix(":"), entries


def parameters(node):
    """The names that a function takes, or that an instance of a class is made with."""
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        names = {each.arg for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
        starred = [("*", arguments.vararg), ("**", arguments.kwarg)]
        return names | {stars + each.arg for stars, each in starred if each}
    names = set()
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            names.add(part.target.id)
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            names |= parameters(part)
            names |= {
                each.attr
                for each in ast.walk(part)
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            }
    return names


def split_entry(entry):
    """Split `name (type): text` into its parts; the type may hold parentheses."""
    names = re.match(r"\*{0,2}\w+(?:, \*{0,2}\w+)*", entry)
    if not names:
        return "", "", entry
    rest, depth = entry[names.end() :], 0
    if not rest.startswith(" ("):
        return names[0], "", rest.removeprefix(":").strip()
    for place, letter in enumerate(rest):
        depth += (letter in "([") - (letter in ")]")
        if place and depth == 0:
            return names[0], rest[2:place], rest[place + 1 :].removeprefix(":").strip()
    return names[0], "", rest


def faults(node):
    for section, entries in sections(ast.get_docstring(node) or ""):
        if not entries:
            yield f"{section}: is empty"
        if section in ("Returns", "Yields"):
            # Its text may go on at the same indentation.
            kind, _, text = entries[0].partition(": ") if entries else ("", "", "")
            if not re.match(r"\[?`", kind):
                yield f"{section}: no `type`: {entries[0]}"
            texts, kinds = [text], [kind]
        elif section == "Raises":
            broken = [entry for entry in entries if not re.match(r"[A-Z][\w.]+(, [A-Z][\w.]+)*: |\w+\.[\w.]+", entry)]
            yield from (f"Raises: no error's name: {entry}" for entry in broken)
            texts, kinds = [entry.partition(": ")[2] for entry in entries], []
        else:
            parts = [split_entry(entry) for entry in entries]
            for names, kind, _ in parts:
                if not TYPE.match(kind):
                    yield f"{section}: {names or 'entry'} has no (`type`)"
                if re.search(r"defaults to [^`]", kind):
                    yield f"{section}: the default of {names} is not in code: {kind}"
                for name in names.split(", "):
                    if name not in parameters(node):
                        yield f"{section}: {name!r} is no parameter or field"
            texts, kinds = [text for *_, text in parts], [kind for _, kind, _ in parts]
        for kind in kinds:
            for name in re.findall(r"(?<!\[)`(\w+)`", kind):
                if name in CLASSES:
                    yield f"{section}: `{name}` is a class of the package: write [`{name}`]"
        for text in texts:
            if not text or re.match(r"[a-z]+[\s,;:]", text):
                yield f"{section}: the text begins with no capital letter: {text!r}"


def test_sections_of_docstrings():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {fault}"
        for path, node in DEFINITIONS
        for fault in faults(node)
    ]
    assert not found, "\n".join(found)


def test_references_in_docstrings():
    known = {node.name for _, node in DEFINITIONS} | {part for path in SOURCES for part in path.with_suffix("").parts}
    for tree in TREES.values():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            known |= {target.id for target in targets if isinstance(target, ast.Name)}
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                for name in re.findall(r"\[`~?([\w.]+)`\]", ast.get_docstring(node) or ""):
                    root, last = name.split(".")[0], name.split(".")[-1]
                    if (root == "entropy_trl" or "." not in name or root in CLASSES) and last not in known:
                        found.append(f"{path.relative_to(ROOT)}: [`{name}`]")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("Args:\n    x (`int`): The number.", None),
        ("Args:\n    x (`int`, *optional*):\n        The number.", None),
        ("Args:\n    x (`int`, *optional*, defaults to 3): The number.", "not in code"),
        ("Args:\n    x: The number.", "has no"),
        ("Args:\n    x (int): The number.", "has no"),
        ("Args:\n    y (`int`): The number.", "is no parameter"),
        ("Args:\n    x (`int`): the number.", "no capital letter"),
        ("Args:\n    x (`TokenBatch`): The tokens.", "write"),
        ("Returns:\n    The number.", "no `type`"),
        ("Returns:\n    `int`: The number.", None),
        ("Raises:\n    if it is wrong.", "no error's name"),
        ("Raises:\n    ValueError: If it is wrong.", None),
    ],
)
def test_a_fault_in_a_docstring_is_found(docstring, fault):
    (function,) = ast.parse("def f(x):\n    pass").body
    function.body = [ast.Expr(ast.Constant(f"Do it.\n\n{docstring}"))]
    found = list(faults(function))
    assert any(fault in each for each in found) if fault else not found
