r"""Normal forms of what holds expressions: ratios, matrices that are added, and values of several unknowns in a row."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from entropy_trl.rewards.atoms import MINUS_ONE, Node
from entropy_trl.rewards.tokens import UnreadableError
from entropy_trl.rewards.values import contains, number, symbols


INFINITY: Node = ("infinity",)


def negated(node: Node) -> Node:
    """An expression with the other sign."""
    if node[0] == "multiply" and len(node[1]) == 2 and node[1][0] == MINUS_ONE:
        return tuple(node[1][1])
    return ("multiply", [MINUS_ONE, node])


def is_negated(node: Node) -> bool:
    return node[0] == "multiply" and len(node[1]) == 2 and node[1][0] == MINUS_ONE and node[1][1][0] == "symbol"


def ratios(sides: list[Node], operators: list[str]) -> tuple[list[Node], list[str]]:
    """Sides in which `a : b` is one, and the operators between them."""
    joined: list[list[Node]] = [[sides[0]]]
    rest: list[str] = []
    for side, operator in zip(sides[1:], operators, strict=True):
        if operator == ":":
            joined[-1].append(side)
        else:
            joined.append([side])
            rest.append(operator)
    return [("ratio", parts) if len(parts) > 1 else parts[0] for parts in joined], rest


def matrix(node: Node) -> Node:
    """The matrix that a sum of matrices, or a multiple of one, is; another node as it is."""
    if node[0] not in ("add", "multiply"):
        return node
    parts = [matrix(part) for part in node[1]]
    matrices = [part for part in parts if part[0] == "matrix"]
    if not matrices:
        return node
    if any(part[1] for part in matrices):
        raise UnreadableError("arithmetic with a determinant")
    if node[0] == "multiply":
        if len(matrices) > 1:
            raise UnreadableError("a product of matrices")
        factors = [part for part in parts if part[0] != "matrix"]
        rows = [[("multiply", [*factors, cell]) for cell in row] for row in matrices[0][2]]
        return ("matrix", False, rows)
    shapes = {tuple(map(len, part[2])) for part in matrices}
    if len(matrices) < len(parts) or len(shapes) > 1:
        raise UnreadableError("a sum of matrices of several shapes")
    rows = [
        [("add", list(cells)) for cells in zip(*same_row, strict=True)]
        for same_row in zip(*(part[2] for part in matrices), strict=True)
    ]
    return ("matrix", False, rows)


def grouped(nodes: list[Node]) -> list[Node]:
    """The solutions of `p=5, q=2; p=7, q=2`, each a tuple with its names; other nodes as they are."""
    if len(nodes) < 4 or any(node[0] != "named" or node[1][0] != "symbol" for node in nodes):
        return nodes
    names = [node[1] for node in nodes]
    size = names.index(names[0], 1) if names[0] in names[1:] else 0
    if size < 2 or len(nodes) % size or len(set(names[:size])) != size or names != names[:size] * (len(nodes) // size):
        return nodes
    return [
        (
            "named",
            ("tuple", "(", names[:size], ")"),
            [("tuple", "(", [node[2][-1] for node in nodes[start : start + size]], ")")],
        )
        for start in range(0, len(nodes), size)
    ]


def is_sum_of_unknowns(node: Node) -> bool:
    """Whether a node is `m + n` or the like, of which a problem asks the value; a line has `x` and `y`."""
    if node[0] != "add" or any(part[0] != "symbol" for part in node[1]):
        return False
    names = {part[1] for part in node[1]}
    return len(names) == len(node[1]) and all(len(name) == 1 and name not in "xyztei" for name in names)


def in_order(nodes: list[Node]) -> list[Node]:
    """Named values in the order of their names, where these are single letters; else as they are."""
    names = [node[1][1] for node in nodes if node[0] == "named" and node[1][0] == "symbol"]
    if len(names) != len(nodes) or any(len(name) > 1 for name in names):
        return nodes
    return sorted(nodes, key=lambda node: str(node[1][1]))


def substituted(node: Any, old: Node, new: Node) -> Any:
    """A tree with another node in place of one."""
    if node == old:
        return new
    if isinstance(node, tuple | list):
        return type(node)(substituted(part, old, new) for part in node)
    return node


def is_differential_equation(name: Node, values: list[Node]) -> bool:
    r"""Whether `\frac{dx}{dt} = 3x` stands here: its right side alone is no answer to what the equation is."""
    if name[0] != "symbol" or not name[1].startswith("derivative "):
        return False
    numerator = name[1].split()[1].removeprefix("d").removeprefix("partial")
    return numerator in symbols(values)


def without_points(node: Node, form: Callable[[Node], Node]) -> Node:
    r"""The union of intervals that `\mathbb{R} \setminus \{0\}` is; another node as it is."""
    if node[0] == "add" and len(node[1]) == 2 and is_negated_set(node[1][1]):
        node = ("setminus", node[1][0], node[1][1][1][1])
    if node[0] != "setminus" or node[1] != ("symbol", "mathbb R") or node[2][0] != "set" or not node[2][1]:
        return node
    points = [(number(point), point) for point in node[2][1]]
    if any(value is None for value, _ in points):
        return node
    lowest, highest = form(node[1])[2]
    bounds = [lowest, *(point for _, point in sorted(points, key=lambda pair: pair[0])), highest]
    pieces: list[Node] = [("tuple", "(", list(pair), ")", "order") for pair in pairwise(bounds)]
    union = pieces[0]
    for piece in pieces[1:]:
        union = ("cup", union, piece)
    return union


def is_negated_set(node: Node) -> bool:
    return node[0] == "multiply" and len(node[1]) == 2 and node[1][0] == MINUS_ONE and node[1][1][0] == "set"


def is_known_set(node: Node) -> bool:
    r"""Whether a node is `\mathbb{R}` or the like, or a part of it such as `\mathbb{Z}^+`."""
    return any(name.startswith("mathbb ") for name in symbols(node))


def interval(nodes: list[Node]) -> Node | None:
    """The interval that `x > 1` and `x < 2` are together, or None where two nodes are not such bounds."""
    if len(nodes) != 2 or nodes[0][:2] != nodes[1][:2] or nodes[0][0] != "named":
        return None
    ends: dict[str, tuple[str, Node]] = {}
    for node in nodes:
        value = node[2][-1]
        if len(value) < 5 or value[0] != "tuple":
            return None
        lower, upper = value[2]
        if upper == ("infinity",):
            ends["lower"] = (value[1], lower)
        elif contains(lower, {"infinity"}):
            ends["upper"] = (value[3], upper)
    if len(ends) < 2:
        return None
    least, most = number(ends["lower"][1]), number(ends["upper"][1])
    if least is None or most is None or least >= most:
        return None
    bounds = [ends["lower"][1], ends["upper"][1]]
    return ("named", nodes[0][1], [("tuple", ends["lower"][0], bounds, ends["upper"][0], "order")])


def infinity(node: Node) -> int:
    """1 or -1 for an infinity with that sign, 0 for anything else."""
    if node == INFINITY:
        return 1
    if node[0] == "multiply" and len(node[1]) == 2 and node[1][0][0] == "number" and node[1][0][1] == -1:
        return -1 if node[1][1] == INFINITY else 0
    return 0


def is_order(node: Node) -> bool:
    """Whether a node is an interval or an inequality."""
    value = node[2][-1] if node[0] == "named" else node
    if value[0] != "tuple":
        return bool(value[0] == "sides")
    return len(value) > 4 or value[1::2][:2] != ("(", ")") or any(map(infinity, value[2]))
