r"""The grammar of answers: tokens become a tree, and what has two readings is refused."""

from fractions import Fraction

from entropy_trl.rewards.atoms import (
    ACCENTS,
    AGGREGATES,
    FUNCTIONS,
    GREEK,
    MINUS_ONE,
    RELATIONS,
    WORDS,
    Atoms,
    Node,
    plain,
    ratio,
    signed,
)
from entropy_trl.rewards.tokens import Token, UnreadableError, symbol


_SUMS = {"+", "-", "pm", "mp"}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "Vmatrix", "smallmatrix", "array"}
_LINES = {"aligned", "align", "gather", "gathered", "split", "equation", "cases", "dcases"}
_VECTORS = ("\\vec ", "\\hat ", "bold ")
_DEEPEST = 40


def parse(tokens: tuple[Token, ...]) -> Node:
    """Return the tree of an answer.

    Raises:
        UnreadableError: The tokens are not in the grammar, or have more than one reading.
    """
    parser = _Parser(tokens)
    node = parser.with_stacks(())
    is_bracketed = tokens[:1] == (symbol("["),) and _closing_brackets(tokens) == [len(tokens) - 1]
    if is_bracketed and node[0] not in ("tuple", "matrix", "cup", "cap", "setminus"):
        raise UnreadableError("a number in brackets")
    if parser.position != len(parser.tokens):
        raise UnreadableError(f"{parser.peek()} is out of place")
    return node


class _Parser(Atoms):
    def sequence(self, ends: tuple[str, ...]) -> Node:
        """Elements between separators, as a list with its conjunction; one element stands for itself."""
        elements, words = [self.relation()], set()
        while self.peek() and self.peek() not in ends:
            separators = 0
            while self.peek() in (",", ";", "and", "or", "lor", "land"):
                separators += 1
                words.add({"lor": "or", "land": "and", ";": ","}.get(self.peek(), self.peek()))
                self.position += 1
            if not separators:
                break
            elements.append(self.relation())
        return ("list", elements, frozenset(words - {","})) if len(elements) > 1 else elements[0]

    def relation(self) -> Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UnreadableError("too deep")
        if self.peek() == "=" and self.position == 0:
            self.position += 1
        sides, operators = [self.union()], []
        while self.peek() in RELATIONS and not (self.in_set and self.peek() == ":"):
            operators.append(self.peek())
            self.position += 1
            sides.append(self.union())
        self.depth -= 1
        return ("relation", sides, operators) if operators else sides[0]

    def union(self) -> Node:
        node = self.sum()
        while (operator := self.peek()) in ("cup", "cap", "setminus", "U"):
            if operator == "U" and node[0] not in ("tuple", "cup"):
                break
            operator = "cup" if operator == "U" else operator
            self.position += 1
            node = (operator, node, self.sum())
        return node

    def sum(self) -> Node:
        terms: list[Node] = []
        sign = self.peek() if self.peek() in _SUMS else None
        if sign:
            self.position += 1
        terms.append(signed(sign, self.product()))
        while (sign := self.peek()) in _SUMS:
            self.position += 1
            terms.append(signed(sign, self.product()))
        return terms[0] if len(terms) == 1 else ("add", terms)

    def product(self) -> Node:
        factors = [self.factor()]
        kinds, after_slash = [self.last_kind], False
        while True:
            if self.peek() in ("*", "/"):
                is_division = self.take("/")
                if not is_division:
                    self.position += 1
                sign = self.peek() if self.peek() in ("+", "-") else None
                if sign:
                    self.position += 1
                factor = signed(sign, self.factor())
                factors.append(("power", factor, MINUS_ONE) if is_division else factor)
                kinds.append("group" if is_division else self.last_kind)
                after_slash = is_division
            elif self.begins_factor():
                token = self.token()
                assert token is not None
                if after_slash:
                    raise UnreadableError("a product after a slash")
                if token.kind in ("number", "repeating", "scientific"):
                    is_power = token.spaced and self.peek(1) == "^"
                    if kinds[-1] == "symbol" and not is_power and factors[-1] != ("symbol", "i"):
                        raise UnreadableError("a number after a name")
                    if kinds[-1] == "number":
                        factors[-1] = self.mixed(factors, token)
                        continue
                factor = self.factor()
                if self.last_kind == "fraction" and kinds[-1] == "number":
                    factors[-1] = _mixed_fraction(factors[-1], factor)
                    continue
                factors.append(factor)
                kinds.append(self.last_kind)
            else:
                break
        if sum(factor[0] == "symbol" and factor[1].startswith(_VECTORS) for factor in factors) > 1:
            raise UnreadableError("a product of vectors")  # a cross product depends on the order
        return factors[0] if len(factors) == 1 else ("multiply", factors)

    def mixed(self, factors: list[Node], token: Token) -> Node:
        """The mixed number `4 4/9`, of which the 4 is the last factor and `token` the numerator."""
        under = self.token(2)
        if not token.spaced or len(factors) > 1 or self.peek(1) != "/" or under is None or under.kind != "number":
            raise UnreadableError("numbers side by side")
        self.position += 3
        over_and_under = [("number", Fraction(part.text), "." in part.text) for part in (token, under)]
        return _mixed_fraction(factors[0], ratio(*over_and_under))

    def begins_factor(self) -> bool:
        token = self.token()
        if token is None:
            return False
        if token.kind in ("number", "repeating", "scientific", "name"):
            return True
        if token.kind == "begin":
            return token.text in _MATRICES
        if token.kind == "letters":
            return token.text not in ("and", "or", "choose") and not (token.text == "U" and self.is_between_brackets())
        if token.kind == "command":
            return token.text in (
                {"frac", "sqrt", "rootsign", "binom", "pi", "left", "lfloor", "lceil", "partial", "exp", "infty"}
                | {"sum", "prod"} | FUNCTIONS | GREEK | ACCENTS | AGGREGATES
            )  # fmt: skip
        return token.text in ("(", "[", "{") or (token.text == "|" and not self.bars and not self.in_set)

    def is_between_brackets(self) -> bool:
        return self.position > 0 and self.peek(-1) in (")", "]") and self.peek(1) in ("(", "[")

    def factor(self) -> Node:
        """An atom with its powers, factorials and degree sign."""
        node = self.atom()
        kind = self.last_kind
        while True:
            text = self.peek()
            if text in ("^", "**"):
                self.position += 1
                node, kind = ("power", node, self.exponent()), "power"
            elif text == "!":
                self.position += 1
                node, kind = ("factorial", node), "group"
            elif text == "degree" and self.peek(1) not in ("C", "F"):
                self.position += 1
                node, kind = ("multiply", [node, ("degree",)]), "group"
            else:
                break
        self.last_kind = kind
        return node

    last_kind = ""

    def exponent(self) -> Node:
        sign = self.peek() if self.peek() in ("-", "+") else None
        if sign:
            self.position += 1
        token = self.token()
        if token is not None and token.kind == "letters" and len(token.text) > 1 and token.text not in WORDS:
            self.split_letter()
        node = self.atom()
        while self.peek() in ("^", "**"):  # a tower, from the right
            self.position += 1
            node = ("power", node, self.exponent())
        if self.peek() == "!":
            raise UnreadableError("a factorial after a power")
        return signed(sign, node)

    def inner(self, tokens: tuple[Token, ...]) -> Node:
        return parse(tokens)

    def environment(self, name: str) -> Node:
        start, depth = self.position, 1
        while depth:
            token = self.token()
            if token is None:
                raise UnreadableError(f"{name} is not ended")
            depth += (token.kind == "begin") - (token.kind == "end")
            self.position += 1
        body = self.tokens[start : self.position - 1]
        self.last_kind = "group"
        rows = [row for row in _split(body, "\\\\") if row]
        if name in _MATRICES:
            return (
                "matrix",
                name in ("vmatrix", "Vmatrix"),
                [[parse(cell) for cell in _split(row, "&")] for row in rows],
            )
        if name not in _LINES:
            raise UnreadableError(name)
        if name in ("cases", "dcases") and any(len(_split(row, "&")) > 1 for row in rows):
            return ("piecewise", [[_piece(cell) for cell in _split(row, "&")] for row in rows])
        joined: list[Token] = []
        for row in rows:
            line = [token for token in row if token != symbol("&")]
            if joined and line and line[0].text not in RELATIONS and joined[-1] != symbol(","):
                joined.append(symbol(","))
            joined.extend(line)
        while joined and joined[-1].text in (",", ".", ";"):
            joined.pop()
        return parse(tuple(joined))

    def function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        while self.peek() in ("^", "_"):
            if self.take("_"):
                base = self.argument()
            else:
                self.position += 1
                power = self.exponent()
        if self.peek() in ("(", "[", "{"):
            argument = self.atom()
            if argument[0] in ("tuple", "set", "list"):
                raise UnreadableError("a function of several arguments")
        else:
            sign = self.peek() if self.peek() == "-" else None
            if sign:
                self.position += 1
            factors = [self.factor()]
            while self.begins_factor() and self.peek() not in FUNCTIONS and self.peek() not in ("(", "["):
                token = self.token()
                assert token is not None
                if token.kind == "number":
                    raise UnreadableError("numbers side by side")
                factors.append(self.factor())
            if self.peek() == "/":
                raise UnreadableError("a slash after a function without parentheses")
            argument = signed(sign, ("multiply", factors) if len(factors) > 1 else factors[0])
        self.last_kind = "group"
        if name == "exp":
            return ("power", ("symbol", "e"), argument)
        if base is not None:
            if name != "log":
                raise UnreadableError("a subscript of a function")
            node: Node = ("call", "log", [argument, base])
        else:
            node = ("call", name, [argument])
        if power is not None:
            if power == signed("-", ("number", Fraction(1), False)):
                return ("call", "arc" + name, [argument])
            node = ("power", node, power)
        return node


def _mixed_fraction(whole: Node, fraction: Node) -> Node:
    """The sum of an integer and a proper fraction of integers."""
    over, under = fraction[1][0], fraction[1][1][1]
    parts = [node[1] for node in (whole, over, under) if node[0] == "number" and not node[2]]
    if len(parts) != 3 or not parts[1] < parts[2] or any(part.denominator != 1 for part in parts):
        raise UnreadableError("no mixed number")
    return ("number", parts[0] + parts[1] / parts[2], False)


def _split(tokens: tuple[Token, ...], separator: str) -> list[tuple[Token, ...]]:
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.kind == "begin" or token.text == "{") - (token.kind == "end" or token.text == "}")
        if token == symbol(separator) and not depth:
            parts.append([])
        else:
            parts[-1].append(token)
    return [tuple(part) for part in parts]


def _closing_brackets(tokens: tuple[Token, ...]) -> list[int]:
    """The positions at which all square brackets are closed."""
    depth, ends = 0, []
    for position, token in enumerate(tokens):
        depth += (token.text == "[") - (token.text == "]")
        if not depth and token.text == "]":
            ends.append(position)
    return ends


def _piece(tokens: tuple[Token, ...]) -> Node:
    """A cell of a definition by cases: its value, or its condition, which may be text."""
    while tokens and (tokens[-1].text in (",", ".", ";")):
        tokens = tokens[:-1]
    while tokens and tokens[0].text in (",", "if", "for", "when"):
        tokens = tokens[1:]
    try:
        return parse(tokens)
    except UnreadableError:
        return ("word", plain(tokens))
