"""matplotlib's SVG as an element of a page: its colours become the page's variables, its text the page's font."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from entropy_trl.analysis.pages import printable


INK, MUTED, GRID = "#1b1b1b", "#595959", "#d9d9d9"

#: What a colour of a figure is in a page.
PAGE_COLOURS = {
    "#000000": "var(--ink)",
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    "#e69f00": "var(--orange)",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--vermilion)",
    "#56b4e9": "var(--sky)",
    "#cc79a7": "var(--purple)",
    "#009e73": "var(--green)",
}

#: The id of what is in the files of a figure and not in the page.
FILE_ONLY = "file-only"


def page_element(svg: str, name: str, title: str, finding: str, box: Sequence[float]) -> str:
    """matplotlib's SVG as an `<svg>` of an HTML page, with the page's colours and font.

    Args:
        svg (`str`): What matplotlib has written.
        name (`str`): Prefix of all ids, unique in the page.
        title (`str`): Short name of the figure.
        finding (`str`): The alternative text.
        box (`Sequence[float]`): The part that is shown: x, y, width and height, in points.

    Raises:
        ValueError: A colour has no variable in `PAGE_COLOURS`.
    """
    source = ElementTree.fromstring(svg)
    referenced = set(re.findall(r"#([\w.-]+)", " ".join(v for e in source.iter() for v in e.attrib.values())))
    attributes = {"viewBox": " ".join(f"{x:g}" for x in box), "role": "img", "aria-label": printable(finding)}
    root = ElementTree.Element("svg", attributes)
    ElementTree.SubElement(root, "title").text = printable(title)
    for child in source:
        _copy(child, root, name, referenced)
    return ElementTree.tostring(root, encoding="unicode")


def _copy(element: ElementTree.Element, parent: ElementTree.Element, name: str, referenced: set[str]) -> None:
    tag = _local(element.tag)
    if tag in ("metadata", "style") or element.get("id") == FILE_ONLY:
        return
    copy = ElementTree.SubElement(parent, tag)
    copy.text = element.text if tag == "text" else None
    for key, value in element.attrib.items():
        key = _local(key)
        if key == "id":
            if value in referenced:
                copy.set("id", f"{name}-{value}")
        elif key == "style":
            copy.set("style", _page_style(value))
        elif key == "href":
            copy.set("href", f"#{name}-{value.removeprefix('#')}")
        elif key == "clip-path":
            copy.set(key, value.replace("url(#", f"url(#{name}-"))
        elif key in ("d", "x", "y", "transform"):
            copy.set(key, _rounded(value))
        else:
            copy.set(key, value)
    for child in element:
        _copy(child, copy, name, referenced)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _page_style(style: str) -> str:
    declarations = []
    for declaration in style.split(";"):
        prop, _, value = (part.strip() for part in declaration.partition(":"))
        if prop == "font-family" or not prop:
            continue
        if value.startswith("#"):
            if value.lower() not in PAGE_COLOURS:
                raise ValueError(f"{prop}: {value} has no CSS variable; the colours that have one are {PAGE_COLOURS}.")
            value = PAGE_COLOURS[value.lower()]
        declarations.append(f"{prop}:{value}")
    return ";".join(declarations)


def _rounded(numbers: str) -> str:
    """Coordinates to a hundredth of a unit."""
    short = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(short.split())
