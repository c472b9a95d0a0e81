r"""The atoms of the grammar: numbers, names, brackets, fractions and roots.

A node is a tuple whose first item names it: `number`, `symbol`, `add`, `multiply`, `power` or `call` for expressions,
and `list`, `set`, `tuple`, `relation`, `cup`, `matrix` or `builder` for what holds expressions. The name of a symbol
keeps its case, subscripts and accents.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

from entropy_trl.rewards.tokens import Token, UnreadableError, symbol


Node = tuple[Any, ...]

FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan"),
    *("log", "ln", "lg", "exp"),
}
AGGREGATES = {"max", "min", "gcd", "lcm"}
_UNKNOWN_FUNCTIONS = set("fghFGH") | {"phi", "varphi", "psi", "Phi", "Psi", "Gamma", "zeta"}
GREEK = {
    *(
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
    ),
    *("rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "varphi", "vartheta", "Gamma", "Delta", "Theta"),
    *("Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "hbar", "ell", "varrho", "emptyset"),
}
ACCENTS = {
    *("vec", "hat", "bar", "tilde", "dot", "ddot", "overarc"),
    *("angle", "triangle"),
}
WORDS = {"and", "or", "inf", "infinity", "infty", "sqrt", "pi", "theta", "choose"} | FUNCTIONS | AGGREGATES
RELATIONS = {"=", "<", ">", "le", "ge", "ne", "in", "approx", "equiv", ":"}
_CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",)}
MINUS_ONE: Node = ("number", Fraction(-1), False)


def plain(tokens: tuple[Token, ...]) -> str:
    """The tokens as one text, by which names and untyped parts are compared."""
    return " ".join(token.text for token in tokens if token.text not in ("{", "}"))


class Atoms(ABC):
    """Reads atoms from a row of tokens, and leaves what they hold to the grammar."""

    last_kind = ""  # of the last factor: what may stand behind it depends on it

    def __init__(self, tokens: tuple[Token, ...]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0  # how many absolute values are open: a bar then closes one
        self.in_set = 0

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    def token(self, ahead: int = 0) -> Token | None:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def take(self, text: str) -> bool:
        if self.peek() != text:
            return False
        self.position += 1
        return True

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise UnreadableError(f"{text} is missing at {self.peek()!r}")

    def split_letter(self) -> None:
        token = self.tokens[self.position]
        if token.text in WORDS or (token.upright and len(token.text) > 1):
            return
        self.tokens = (
            *self.tokens[: self.position],
            Token("letters", token.text[0], token.upright, token.spaced),
            Token("letters", token.text[1:], token.upright),
            *self.tokens[self.position + 1 :],
        )

    def group(self) -> tuple[Token, ...]:
        """The tokens of a group in braces, or the next one."""
        if not self.take("{"):
            token = self.token()
            if token is None:
                raise UnreadableError("a group is missing")
            if token.kind == "letters" and len(token.text) > 1 and not token.upright:
                self.split_letter()
            self.position += 1
            return (self.tokens[self.position - 1],)
        start, depth = self.position, 1
        while depth:
            if not self.peek():
                raise UnreadableError("a group is not closed")
            depth += (self.peek() == "{") - (self.peek() == "}")
            self.position += 1
        return self.tokens[start : self.position - 1]

    def argument(self, is_root: bool = False) -> Node:
        r"""What follows `\frac` or `\sqrt`: a group, one digit or one letter."""
        token = self.token()
        if token is None:
            raise UnreadableError("an argument is missing")
        if token.kind == "number" and len(token.text) > 1:
            if is_root or not token.text.isdigit():  # TeX draws the root of 50 as that of 5 in front of a 0
                raise UnreadableError("a number without braces")
            rest = Token("number", token.text[1:], token.upright)
            self.tokens = (
                *self.tokens[: self.position], Token("number", token.text[0]), rest, *self.tokens[self.position + 1 :]
            )  # fmt: skip
        elif token.kind == "letters" and len(token.text) > 1:
            self.split_letter()
        elif token.text in ("-", "+"):
            raise UnreadableError("a sign without braces")
        return self.atom(is_argument=True)

    def atom(self, is_argument: bool = False) -> Node:
        token = self.token()
        if token is None:
            raise UnreadableError("it ends too early")
        self.last_kind = "group"
        self.position += 1
        if token.kind in ("number", "scientific", "repeating"):
            return self.number(token)
        if token.kind == "name":
            return self.named(token.text)
        if token.kind == "letters":
            return self.letters(token, is_argument)
        if token.kind == "begin":
            return self.environment(token.text)
        text = token.text
        if text == "{":
            node = self.braced()
            self.last_kind = "group"
            return node
        if text in _CLOSERS:
            return self.bracket(text)
        if text == "|":
            self.bars += 1
            node = ("call", "abs", [self.sum()])
            self.bars -= 1
            self.expect("|")
            self.last_kind = "group"
            return node
        if token.kind == "command":
            return self.command(text)
        raise UnreadableError(f"{text} is out of place")

    def number(self, token: Token) -> Node:
        self.last_kind = "number"
        text = token.text
        if token.kind == "repeating":
            self.last_kind = "group"
            return ("number", _repeating(text), False)
        if self.peek() == "_":
            self.position += 1
            self.last_kind = "group"
            return ("based", text, plain(self.group()))
        if self.peek() in ("x", "X") and self.peek(1) == "10" and self.peek(2) in ("^", "**"):
            self.tokens = (*self.tokens[: self.position], symbol("*"), *self.tokens[self.position + 1 :])
        return ("number", Fraction(text), "." in text or token.kind == "scientific")

    def letters(self, token: Token, is_argument: bool = False) -> Node:
        text = token.text
        if text in ("sqrt",):
            return self.command("sqrt")
        if text in ("pi", "theta", "infty", "infinity", "inf"):
            return self.command({"inf": "infty", "infinity": "infty"}.get(text, text))
        if text in FUNCTIONS or text in AGGREGATES:
            return self.command(text)
        if len(text) == 1:
            return self.named(text)
        if token.upright or len(text) > 4 or not text.isascii():
            if self.peek() in ("=", "approx") or self.position == 1:
                return ("word", text)
            raise UnreadableError(f"a word, {text}")
        self.position -= 1
        self.split_letter()
        self.position += 1
        return self.named(text[0])

    def named(self, name: str) -> Node:
        """A symbol with its subscript and primes, or a function of that name with its arguments."""
        head = name
        if self.take("_"):
            name += "_" + plain(self.group())
        while self.take("'"):
            name += "'"
        self.last_kind = "symbol"
        if (head in _UNKNOWN_FUNCTIONS or name.endswith("'")) and self.peek() == "(":
            self.position += 1
            arguments = self.sequence((")",))
            self.expect(")")
            self.last_kind = "group"
            return ("apply", name, arguments)
        return ("symbol", name)

    def with_stacks(self, ends: tuple[str, ...]) -> Node:
        r"""A sequence, or two of them with `\choose` or `\over` between, which take all of a group."""
        node = self.sequence((*ends, "choose", "over"))
        operator = self.peek()
        if operator in ("choose", "over"):
            self.position += 1
            other = self.sequence(ends)
            node = ("call", "binom", [node, other]) if operator == "choose" else ratio(node, other)
        return node

    def braced(self) -> Node:
        node = self.with_stacks(("}",))
        self.expect("}")
        return ("set", node[1]) if node[0] == "list" else node

    def bracket(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        closers = _CLOSERS[opening]
        self.in_set += opening == "\\{"
        is_empty = self.peek() in closers
        node: Node = ("list", [], frozenset()) if is_empty else self.sequence((*closers, "|", "mid", ":"))
        if opening == "\\{" and self.peek() in ("|", "mid", ":"):
            self.position += 1
            node = ("builder", node, self.sequence(closers))
        closing = self.peek()
        if closing not in closers:
            raise UnreadableError(f"{opening} is not closed")
        self.position += 1
        self.in_set -= opening == "\\{"
        self.bars = bars
        self.last_kind = "group"
        if node[0] == "builder":
            return node
        elements = node[1] if node[0] == "list" else [node]
        if opening == "\\{":
            return ("set", elements)
        if len(elements) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return node
        return ("tuple", opening, elements, closing)

    def command(self, name: str) -> Node:
        if name == "frac":
            return self.fraction()
        if name in ("sqrt", "rootsign"):
            degree: Node = ("number", Fraction(2), False)
            if name == "sqrt" and self.take("["):
                degree = self.sum()
                self.expect("]")
            node = ("call", "root", [self.argument(is_root=True) if name == "sqrt" else self.atom(), degree])
            self.last_kind = "group"
            return node
        if name == "binom":
            node = ("call", "binom", [self.argument(), self.argument()])
            self.last_kind = "group"
            return node
        if name == "pi":
            self.last_kind = "symbol"
            return ("symbol", "pi")
        if name == "infty":
            return ("infinity",)
        if name == "emptyset":
            return ("set", [])
        if name in ("lfloor", "lceil"):
            node = ("call", name, [self.sum()])
            self.expect("r" + name[1:])
            self.last_kind = "group"
            return node
        if name in ACCENTS:
            return self.named(f"\\{name} {plain(self.accented())}")
        if name in GREEK:
            return self.named(name)
        if name in FUNCTIONS:
            return self.function(name)
        if name in ("sum", "prod") and self.take("_"):
            return self.bound(name)
        if name in AGGREGATES and self.take("("):
            arguments = self.sequence((")",))
            self.expect(")")
            return ("call", name, arguments[1] if arguments[0] == "list" else [arguments])
        raise UnreadableError(f"\\{name}")

    def bound(self, name: str) -> Node:
        """A sum or a product over an index, from its first to its last value."""
        index = self.group()
        if len(index) < 3 or index[0].kind != "letters" or len(index[0].text) > 1 or index[1] != symbol("="):
            raise UnreadableError(f"\\{name} without an index")
        self.expect("^")
        upper = self.exponent()
        lower, body = self.inner(index[2:]), self.product()
        self.last_kind = "group"
        return ("bound", (name, index[0].text), [lower, upper, body])

    def accented(self) -> tuple[Token, ...]:
        token = self.token()
        if token is not None and token.kind == "letters":  # \angle ABC
            self.position += 1
            return (token,)
        return self.group()

    def fraction(self) -> Node:
        start = self.position
        numerator, denominator = self.group_text(), self.group_text()
        if _is_differential(numerator) and _is_differential(denominator):
            if len(numerator) == 1 and numerator[0].text in ("d", "partial"):
                raise UnreadableError("an operator")
            if len(numerator) > 1 and numerator[1] == symbol("^") and len(numerator) <= 5:
                raise UnreadableError("a higher derivative")
            names = ["".join(plain(part).split()) for part in (numerator, denominator)]
            return self.named("derivative {} by {}".format(*names))
        self.position = start
        over, under = self.argument(), self.argument()
        is_plain = over[0] == under[0] == "number"
        self.last_kind = "fraction" if is_plain else "group"
        return ratio(over, under)

    def group_text(self) -> tuple[Token, ...]:
        token = self.token()
        if token is not None and token.text == "{":
            return self.group()
        if token is not None:
            self.position += 1
        return (token,) if token is not None else ()

    @abstractmethod
    def sequence(self, ends: tuple[str, ...]) -> Node:
        """Elements between separators."""

    @abstractmethod
    def sum(self) -> Node:
        """An expression."""

    @abstractmethod
    def product(self) -> Node:
        """A term of a sum."""

    @abstractmethod
    def inner(self, tokens: tuple[Token, ...]) -> Node:
        """The tree of tokens that have been taken out."""

    @abstractmethod
    def exponent(self) -> Node:
        """What follows a caret."""

    @abstractmethod
    def environment(self, name: str) -> Node:
        """What is between `begin` and `end`."""

    @abstractmethod
    def function(self, name: str) -> Node:
        """A function with its argument."""


def signed(sign: str | None, node: Node) -> Node:
    if sign in (None, "+"):
        return node
    if sign == "-":
        return ("multiply", [MINUS_ONE, node])
    return ("multiply", [("sign", sign), node])


def ratio(over: Node, under: Node) -> Node:
    return ("multiply", [over, ("power", under, MINUS_ONE)])


def _repeating(text: str) -> Fraction:
    """The value of `0.1\\overline{6}`, `0.(12)` or `0.\\dot{1}\\dot{2}`."""
    whole, _, rest = text.partition(".")
    digits = "".join(character if character.isdigit() else " " for character in rest).split()
    fixed = digits.pop(0) if rest[:1].isdigit() else ""
    cycle = "".join(digits)
    value = Fraction(int(whole + fixed or "0")) + Fraction(int(cycle), 10 ** len(cycle) - 1)
    return value / 10 ** len(fixed)


def _is_differential(tokens: tuple[Token, ...]) -> bool:
    """Whether tokens are `dx`, `d^2 y`, `\\partial f` and the like."""
    if not tokens or not (tokens[0].text == "partial" or (tokens[0].kind == "letters" and tokens[0].text[0] == "d")):
        return False
    return all(token.kind in ("letters", "command", "number") or token.text in ("^", "_", "{", "}") for token in tokens)
