r"""Whether two trees are one answer: lists by multiplicity, tuples in order, equations, inequalities, intervals, sets.

A name in front (`x = 5`) may be left out on either side, and has to be the same where both have one. The right side of
an equation is an answer only if the left side is a lone unknown.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from entropy_trl.rewards import shapes
from entropy_trl.rewards.atoms import MINUS_ONE, Node, ratio
from entropy_trl.rewards.budget import spend
from entropy_trl.rewards.tokens import UnreadableError
from entropy_trl.rewards.values import contains, count_signs, equal_values, number, proportional, signs, symbols


_MOST_ELEMENTS = 60
_CONSTANTS = {"pi", "e", "i"}
_STRUCTURES = {"list", "set", "tuple", "relation", "cup", "cap", "setminus", "builder", "matrix", "piecewise", "word"}
_STRUCTURES |= {"ratio", "bound"}
_POINTS = [("symbol", letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
_TURNED = {">": "<", "ge": "le"}
_INFINITY = shapes.INFINITY
_REALS: Node = ("tuple", "(", [("multiply", [MINUS_ONE, _INFINITY]), _INFINITY], ")", "order")


def equal(reference: Node, answer: Node, quick: bool = False) -> bool | None:
    """Whether an answer is the reference; with `quick`, None where more than small rational numbers are to be compared.

    Raises:
        UnreadableError: One of them has no single meaning.
    """
    wanted, given = _elements(reference), _elements(answer)
    if max(len(wanted.nodes), len(given.nodes)) > _MOST_ELEMENTS:
        raise UnreadableError("too many elements")
    by_name = _by_names(wanted, given, quick)
    if by_name is not NotImplemented:
        return by_name
    if len(wanted.nodes) == 1 and wanted.nodes[0][0] == "tuple" and wanted.kind == "one" and given.kind == "list":
        if "or" in given.joint or any(map(shapes.infinity, wanted.nodes[0][2])):
            return False
        return _all_same(wanted.nodes[0][2], given.nodes, quick) if wanted.nodes[0][1::2] == ("(", ")") else False
    if "tuple" in (wanted.kind, given.kind):
        return False
    if len(wanted.nodes) != len(given.nodes):
        return False
    if (
        len(wanted.nodes) > 1
        and any(map(shapes.is_order, [*wanted.nodes, *given.nodes]))
        and wanted.joint != given.joint
    ):
        return False  # `x < 1 and x > 3` is not `x < 1 or x > 3`
    return _same_in_any_order(wanted.nodes, given.nodes, quick)


class _Elements:
    def __init__(self, nodes: list[Node], kind: str, joint: frozenset[str]):
        self.nodes, self.kind, self.joint = nodes, kind, joint


def _elements(node: Node) -> _Elements:
    """The elements of an answer in their normal forms, without signs that stand for two."""
    kind, joint = "one", frozenset[str]()
    if node[0] == "list":
        nodes, kind, joint = list(node[1]), "list", node[2]
    elif node[0] == "set":
        nodes, kind = list(node[1]), "set"
    else:
        nodes = [node]
    expanded: list[Node] = []
    for part in nodes:
        if sum(count_signs(part)) > 1 and contains(part, {"tuple"}):
            raise UnreadableError("several signs in a tuple")
        parts = signs(part)
        kind = "list" if len(parts) > 1 and kind == "one" else kind
        for one in parts:
            form = _form(one)
            if form[0] == "cup":
                expanded.extend(_parts_of_union(form))
                kind, joint = "list", joint | {"or"}
            elif form[0] == "named" and form[2][-1][0] == "cup":
                expanded.extend(("named", form[1], [piece]) for piece in _parts_of_union(form[2][-1]))
                kind, joint = "list", joint | {"or"}
            elif form[0] == "named" and form[2][-1][0] in ("set", "list") and len(nodes) == 1:
                expanded.extend(("named", form[1], [_form(piece)]) for piece in form[2][-1][1])
                kind = "set"
            else:
                expanded.append(form)
    if joint == {"and"} and (between := shapes.interval(expanded)) is not None:
        return _Elements([between], "one", frozenset())
    return _Elements(shapes.grouped(expanded) if kind == "list" else expanded, kind, joint)


def _parts_of_union(node: Node) -> list[Node]:
    return [*_parts_of_union(node[1]), *_parts_of_union(node[2])] if node[0] == "cup" else [_form(node)]


# Normal forms


def _form(node: Node) -> Node:
    if node[0] == "relation":
        return _relation(node[1], node[2])
    if node[0] == "builder":
        return _builder(node[1], node[2])
    if node == ("symbol", "mathbb R"):
        return _REALS
    if node[0] == "multiply" and len(node[1]) == 2 and node[1][0] in _POINTS and node[1][1][0] == "tuple":
        return ("named", node[1][0], [node[1][1]])  # the point A(1, 2)
    return shapes.without_points(shapes.matrix(node), _form)


def _relation(sides: list[Node], operators: list[str]) -> Node:
    if ":" in operators and not contains(sides, _STRUCTURES):
        sides, operators = shapes.ratios(sides, operators)
        if not operators:
            return sides[0]
    kinds = set(operators)
    if kinds <= {"=", "approx"}:
        first, *rest = sides
        if _is_unknown(first) and not _names(first) & symbols(rest):
            return ("named", first, rest)
        if len(sides) == 2 and _is_unknown(rest[0]) and not _names(rest[0]) & symbols(first):
            return ("named", rest[0], [first])
        if not symbols(sides) and not contains(sides, _STRUCTURES):
            return ("chain", sides)
        if len(sides) == 2 and kinds == {"="} and not contains(sides, _STRUCTURES):
            return ("equation", *sides)
        return ("sides", operators, sides)
    if kinds <= {">", "ge"}:
        sides, operators = sides[::-1], [_TURNED[operator] for operator in reversed(operators)]
        kinds = set(operators)
    if kinds <= {"<", "le"}:
        if len(sides) == 2 and any(map(shapes.is_negated, sides)):
            sides = [shapes.negated(side) for side in reversed(sides)]
        brackets = ["(" if operator == "<" else "[" for operator in operators]
        if len(sides) == 3 and _is_unknown(sides[1]):
            closing = ")" if operators[1] == "<" else "]"
            return ("named", sides[1], [("tuple", brackets[0], [sides[0], sides[2]], closing, "order")])
        if len(sides) == 2 and _is_unknown(sides[0]) and not _is_unknown(sides[1]):
            minus = ("multiply", [("number", -1, False), _INFINITY])
            return ("named", sides[0], [("tuple", "(", [minus, sides[1]], ")" if "<" in kinds else "]", "order")])
        if len(sides) == 2 and _is_unknown(sides[1]):
            return ("named", sides[1], [("tuple", brackets[0], [sides[0], _INFINITY], ")", "order")])
        return ("sides", operators, sides)
    if operators == ["in"]:
        is_named = _is_unknown(sides[0]) and (sides[1][0] in _STRUCTURES or shapes.is_known_set(sides[1]))
        return ("named", sides[0], [_form(sides[1])]) if is_named else ("sides", operators, sides)
    if operators == ["ne"]:
        return ("sides", operators, sides)
    raise UnreadableError("several relations")


def _builder(head: Node, conditions: Node) -> Node:
    r"""The normal form of a set by a condition: `\{x \mid x > 2\}` is what `x > 2` is."""
    if head[0] == "relation" and head[2] == ["in"]:
        head = head[1][0]
    parts = [_form(part) for part in (conditions[1] if conditions[0] == "list" else [conditions])]
    if head[0] == "symbol":
        named = [part for part in parts if part[0] == "named" and part[1] == head]
        others = [part for part in parts if part not in named]
        if len(named) > 1 and not others and conditions[2] == frozenset({"or"}):
            union = named[0][2][-1]
            for part in named[1:]:
                union = ("cup", union, part[2][-1])
            return ("named", head, [union])
        if len(named) == 1 and not others:
            return ("named", head, named[0][2], "bound")
        if len(named) == 1 and named[0][2][-1][0] not in _STRUCTURES:
            return ("builder", named[0][2][-1], others)
    return ("builder", head, parts)


def _names(node: Node) -> frozenset[str]:
    """The names of an unknown; the argument of a function is none."""
    return frozenset({node[1]}) if node[0] == "apply" else symbols(node)


def _is_unknown(node: Node) -> bool:
    """Whether a node is a name: a variable, `f(x)`, `AB`, a word, or a tuple of variables."""
    if node[0] == "symbol":
        return node[1] not in _CONSTANTS
    if node[0] in ("apply", "word"):
        return True
    if node[0] == "ratio":
        return all(map(_is_unknown, node[1]))
    if node[0] == "tuple":
        return node[1::2] == ("(", ")") and all(part[0] == "symbol" for part in node[2])
    if node[0] == "call" and node[1] == "abs":
        node = node[2][0]
    if node[0] == "multiply" and len(node[1]) == 2 and node[1][1][0] == "power":  # a ratio of two lines
        return node[1][1][2][:2] == ("number", -1) and all(
            part[0] == "multiply" and _is_unknown(part) for part in (node[1][0], node[1][1][1])
        )
    return (
        node[0] == "multiply"
        and len(node[1]) == 2
        and all(part[0] == "symbol" and len(part[1]) == 1 and part[1].isupper() for part in node[1])
    )


# Comparisons


def _combined(results: Iterable[bool | None]) -> bool | None:
    """True if all are, False if one is, None if that is not known."""
    known: bool | None = True
    for result in results:
        if result is False:
            return False
        known = None if result is None else known
    return known


def _by_names(wanted: _Elements, given: _Elements, quick: bool) -> Any:
    """The comparison by names, where an answer gives values of several unknowns; else NotImplemented."""
    names, others = _values_by_name(wanted.nodes), _values_by_name(given.nodes)
    if names is not None and others is not None:
        if ("or" in wanted.joint) != ("or" in given.joint):
            return False
        if names.keys() != others.keys():
            return False
        return _combined(_same(names[name], others[name], quick) for name in names)
    if names is not None:
        values = list(names.values())
        if given.kind == "list" and not any(node[0] == "named" for node in given.nodes):
            return _all_same(values, given.nodes, quick)
        if len(given.nodes) == 1 and given.nodes[0][0] == "tuple" and given.nodes[0][1::2] == ("(", ")"):
            return _all_same(values, given.nodes[0][2], quick)
        return NotImplemented
    if others is not None and len(wanted.nodes) == len(given.nodes) == len(others):
        own = shapes.in_order(given.nodes)
        if own is not given.nodes and not any(node[0] == "named" for node in wanted.nodes):
            return _all_same(wanted.nodes, own, quick)
    if others is not None and len(wanted.nodes) == 1 and wanted.nodes[0][0] == "tuple":
        own = shapes.in_order(given.nodes) if len(given.nodes) == len(others) else given.nodes
        values = [node[2][-1] for node in own] if len(own) == len(others) else list(others.values())
        return _all_same(wanted.nodes[0][2], values, quick)
    return NotImplemented


def _values_by_name(nodes: list[Node]) -> dict[str, Node] | None:
    """The values of at least two unknowns, which have distinct names; else None."""
    if len(nodes) == 1 and nodes[0][0] == "named" and nodes[0][1][0] == "tuple":
        value = nodes[0][2][-1]
        if value[0] != "tuple" or len(value[2]) != len(nodes[0][1][2]):
            return None
        return {str(name): part for name, part in zip(nodes[0][1][2], value[2], strict=True)}
    if len(nodes) < 2 or any(node[0] != "named" for node in nodes):
        return None
    values = {str(node[1]): node[2][-1] for node in nodes}
    return values if len(values) == len(nodes) else None


def _all_same(wanted: Sequence[Node], given: Sequence[Node], quick: bool) -> bool | None:
    if len(wanted) != len(given):
        return False
    return _combined(_same(_form(a), _form(b), quick) for a, b in zip(wanted, given, strict=True))


def _same_in_any_order(wanted: list[Node], given: list[Node], quick: bool) -> bool | None:
    """Whether two lists have the same elements, each as often."""
    left, known = list(given), True
    for node in wanted:
        for other in left:
            result = _same(node, other, quick)
            if result:
                left.remove(other)
                break
            if result is None:
                known = False
        else:
            if known:
                return False
    return True if not left else (None if not known else False)


def _same(wanted: Node, given: Node, quick: bool) -> bool | None:
    """Whether two elements are one."""
    spend(5)
    if wanted[0] == "named" and given[0] == "named":
        if len(wanted) == len(given) == 4:  # sets, whose variable has any name
            given = shapes.substituted(given, given[1], wanted[1])
        renamed = _renamed(wanted[1], given)
        if renamed is None:
            return False
        return _combined(_same(_form(wanted[2][-1]), _form(value), quick) for value in renamed)
    if "equation" in (wanted[0], given[0]):
        return _same_equation(wanted, given, quick)
    if wanted[0] in ("named", "chain"):
        if wanted[0] == "named" and shapes.is_differential_equation(*wanted[1:3]):
            return False
        return _same(_form(_values(wanted)[-1]), given, quick)
    if given[0] in ("named", "chain"):
        if not _fits(wanted, given):
            return False
        return _combined(_same(wanted, _form(value), quick) for value in _values(given))
    if "ratio" in (wanted[0], given[0]):
        return _same_ratio(wanted, given, quick)
    if wanted[0] == given[0] == "based":
        return bool(wanted == given)
    if wanted[0] == "based":
        return False  # without the base the digits are another number
    handler = _HANDLERS.get(wanted[0])
    if handler is not None or given[0] in _HANDLERS:
        return handler(wanted, given, quick) if handler is not None and wanted[0] == given[0] else False
    infinite = [shapes.infinity(node) for node in (wanted, given)]
    if any(infinite):
        return infinite[0] == infinite[1]
    return equal_values(wanted, given, quick)


def _values(node: Node) -> Any:
    """The sides of a chain, without the name of what they are."""
    return node[2 if node[0] == "named" else 1]


def _fits(wanted: Node, given: Node) -> bool:
    """Whether an answer with a name may stand for a reference without: an interval for a point may not."""
    value = _values(given)[-1]
    if given[0] == "named" and given[1][0] == "apply" and value[0] != "symbol":
        arguments = symbols(given[1][2])
        if symbols(value) and not arguments & symbols(value):
            return False  # `f(y) = 2x + 3` does not say what f is
    if value[0] != "tuple" or len(value) < 5 or wanted[0] != "tuple":
        return True
    bounds: list[Any] = [None if shapes.infinity(part) else number(part) for part in wanted[2]]
    return len(bounds) == 2 and (any(bound is None for bound in bounds) or bool(bounds[0] < bounds[1]))


def _renamed(name: Node, given: Node) -> list[Node] | None:
    """The values of an answer in terms of the reference's variable, or None if it is about another unknown."""
    own, values = given[1], list(given[2])
    if own == name:
        return values
    if own[0] == name[0] == "word":
        return values if own[1].casefold() == name[1].casefold() else None
    if own[0] == name[0] == "apply" and own[1] == name[1] and own[2][0] == name[2][0] == "symbol":
        if name[2][1] in symbols(values):
            return None
        return [shapes.substituted(value, own[2], name[2]) for value in values]
    return None


def _same_equation(wanted: Node, given: Node, quick: bool) -> bool | None:
    sides = []
    for node in (wanted, given):
        if node[0] == "equation":
            sides.append(node[1:])
        elif node[0] == "named" and len(node[2]) == 1 and not contains(node, _STRUCTURES):
            sides.append((node[1], node[2][0]))
        elif node is wanted and node[0] == "number" and shapes.is_sum_of_unknowns(given[1]):
            return equal_values(wanted, given[2], quick)
        else:
            return False
    if len(symbols(sides[0])) < 2 and "equation" not in wanted[0]:
        return False  # `2x = 10` has not been solved
    if quick:
        return None
    differences = [("add", [left, ("multiply", [("number", -1, False), right])]) for left, right in sides]
    return proportional(*differences)


def _same_tuple(wanted: Node, given: Node, quick: bool) -> bool | None:
    return _all_same(wanted[2], given[2], quick) if wanted[1::2][:2] == given[1::2][:2] else False


def _same_set(wanted: Node, given: Node, quick: bool) -> bool | None:
    if len(wanted[1]) != len(given[1]):
        return False
    return _same_in_any_order([_form(part) for part in wanted[1]], [_form(part) for part in given[1]], quick)


def _same_ratio(wanted: Node, given: Node, quick: bool) -> bool | None:
    if given[0] != "ratio":
        return False  # a ratio is asked for
    sides = [node[1] if node[0] == "ratio" else [node, ("number", 1, False)] for node in (wanted, given)]
    if len(sides[0]) != len(sides[1]) or contains(sides, _STRUCTURES):
        return False
    target, value = [[ratio(part, parts[0]) for part in parts[1:]] for parts in sides]
    return _all_same(target, value, quick)


def _same_sides(wanted: Node, given: Node, quick: bool) -> bool | None:
    if wanted[1] != given[1]:
        return False
    straight = _all_same(wanted[2], given[2], quick)
    return (
        _all_same(wanted[2], given[2][::-1], quick) if straight is False and set(wanted[1]) <= {"ne", "="} else straight
    )


def _same_builder(wanted: Node, given: Node, quick: bool) -> bool | None:
    if len(wanted[2]) != len(given[2]):
        return False
    return _combined([_same(_form(wanted[1]), _form(given[1]), quick), _same_in_any_order(wanted[2], given[2], quick)])


def _same_rows(wanted: list[list[Node]], given: list[list[Node]], quick: bool) -> bool | None:
    if len(wanted) != len(given):
        return False
    return _combined(_all_same(row, other, quick) for row, other in zip(wanted, given, strict=True))


_HANDLERS: dict[str, Callable[[Node, Node, bool], bool | None]] = {
    "tuple": _same_tuple,
    "bound": lambda wanted, given, quick: wanted[1] == given[1] and _all_same(wanted[2], given[2], quick),
    "set": _same_set,
    "list": _same_set,
    "sides": _same_sides,
    "builder": _same_builder,
    "based": lambda wanted, given, quick: False,
    "matrix": lambda wanted, given, quick: wanted[1] == given[1] and _same_rows(wanted[2], given[2], quick),
    "piecewise": lambda wanted, given, quick: _same_rows(wanted[1], given[1], quick),
    "word": lambda wanted, given, quick: wanted[1].casefold() == given[1].casefold(),
    **dict.fromkeys(
        ("cap", "setminus", "cup"),
        lambda wanted, given, quick: _combined(_same(_form(wanted[n]), _form(given[n]), quick) for n in (1, 2)),
    ),
}
