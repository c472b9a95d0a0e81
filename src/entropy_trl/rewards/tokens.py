# ruff: noqa: RUF001
r"""One pass over the LaTeX of an answer: a list of tokens, in which spaces, sizes and styles have become flags.

Nothing is deleted from the text. What has no meaning (`\,`, `\left`, `$`) ends the token before it, so that `1\,2` is
two numbers and never twelve. A number with separators of thousands is one token.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache


class UnreadableError(ValueError):
    """A text that is not in the grammar, or that has more than one reading."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer.

    Args:
        kind (`str`): `number`, `repeating`, `letters`, `command`, `symbol`, `begin`, `end` or `name` (a letter in a
            font that has a meaning).
        text (`str`): What it says, without its backslash.
        upright (`bool`, *optional*, defaults to `False`): Whether it stands in `\\text` or `\\mathrm`, so that letters
            may be a word or a unit.
        spaced (`bool`, *optional*, defaults to `False`): Whether space or the edge of a group is before it.
    """

    kind: str
    text: str
    upright: bool = False
    spaced: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and (self.kind, self.text) == (other.kind, other.text)

    def __hash__(self) -> int:
        return hash((self.kind, self.text))


def symbol(text: str) -> Token:
    return Token("symbol", text)


_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ"
_PLAIN = "0123456789+-ni"
_RAISED, _LOWERED = re.compile(f"[{_SUPERSCRIPTS}]+"), re.compile(f"[{_SUBSCRIPTS}]+")
_FROM_SCRIPT = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, _PLAIN * 2)
_NOT_EQUAL = re.compile(r"\\not\s*=")
_VECTOR = re.compile(r"\\(?:vec|overrightarrow|hat)(?![a-zA-Z])|\\(?:mathbf|boldsymbol|bm)\s*\{?[a-zA-Z]")
_CROSS = re.compile(r"(?<![\d\s])\s*\\times(?![a-zA-Z])|(?<=[^\d\s]\s)\\times(?![a-zA-Z])")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau",
    "φ": "varphi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta",
    "Λ": "Lambda", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega", "∞": "infty", "∪": "cup", "∩": "cap",
    "≤": "le", "≥": "ge", "≠": "ne", "≈": "approx", "∈": "in", "±": "pm", "∓": "mp", "×": "times", "·": "cdot",
    "⋅": "cdot", "∙": "cdot", "÷": "div", "°": "degree", "℃": "degree C", "∅": "emptyset", "√": "rootsign",
    "⟨": "langle", "⟩": "rangle", "∖": "setminus", "∣": "mid", "→": "to", "…": "ldots", "ℝ": "mathbb R",
    "ℤ": "mathbb Z", "ℕ": "mathbb N", "ℚ": "mathbb Q", "ℂ": "mathbb C", "∠": "angle", "∂": "partial", "∑": "sum",
    "∫": "int", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "º": "degree", "∛": "sqrt[3]",
    "∜": "sqrt[4]", "∨": "lor", "∧": "land", "⩽": "le", "⩾": "ge",
}  # fmt: skip
_CHARACTERS = str.maketrans(
    {character: f"\\{name} " for character, name in _GREEK.items()}
    | dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\uff0d", "-")
    | dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060\u00ad", " ")
    | {"。": ".", "、": ",", "；": ";", "和": r" \text{and} ", "或": r" \text{or} ", "′": "'", "’": "'"}
)
_SIMPLER = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le",
    "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "varnothing": "emptyset",
    "lbrace": "\\{", "rbrace": "\\}", "{": "\\{", "}": "\\}", "lvert": "|", "rvert": "|", "vert": "|",
    "langle": "(", "rangle": ")", "lparen": "(", "rparen": ")", "lbrack": "[", "rbrack": "]", "ast": "*",
    "times": "*", "cdot": "*", "div": "/", "colon": ":", "cdots": "ldots", "dots": "ldots", "dotsc": "ldots",
    "%": "%", "$": "\\$", "rightarrow": "to", "vee": "lor", "wedge": "land", "smallsetminus": "setminus",
    "degrees": "degree", "backslash": "setminus", "|": "\\|", "lfloor": "lfloor", "Vert": "\\|", "prime": "'",
    "arcsin": "arcsin", "varepsilon": "epsilon", "thickapprox": "approx", "simeq": "approx", "owns": "ni",
    "textdegree": "degree", "widehat": "hat", "widetilde": "tilde", "overrightarrow": "vec", "overline": "bar",
    "newline": "\\\\", "cr": "\\\\", "&": "\\&", "#": "\\#", "_": "\\_",
}  # fmt: skip
_SPACES = {
    *(",", ";", ":", "!", " ", ">", "(", ")", "[", "]", "/", "quad", "qquad", "thinspace", "enspace", "displaystyle"),
    *("textstyle", "limits", "nolimits", "left", "right", "middle", "rm", "bf", "it", "scriptstyle", "nonumber"),
    *("large", "Large", "LARGE", "huge", "Huge", "small", "normalsize", "footnotesize", "tiny", "boldmath"),
    *(f"{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")),
}
_TEXT = {"text", "textrm", "textnormal", "textit", "textbf", "textsf", "mbox", "hbox", "operatorname", "mathrm"}
_STYLES = _TEXT | {"mathbf", "mathit", "mathsf", "mathnormal", "boldsymbol", "bm", "pmb", "underline", "boxed", "fbox"}
_BOLD = {"mathbf", "boldsymbol", "bm", "pmb", "textbf"}
_FONTS = {"mathbb", "mathcal", "mathfrak", "mathscr", "Bbb"}
_COMPARISONS = {"<=": "le", ">=": "ge", "!=": "ne"}
_DOUBLED = r"(?:d?frac|sqrt|text|pi|cdot|times|infty|left|right|mathrm)(?![a-zA-Z])"

_PART = re.compile(
    rf"(?P<space>\s+|~)|(?P<command>\\q?quad|\\\\(?={_DOUBLED})[a-zA-Z]+|\\(?:[a-zA-Z]+\*?|.|$))"
    r"|(?P<repeating>\d*\.\d*(?:\\(?:overline|bar)\s*(?:\{\s*\d+\s*\}|\d)|\(\d+\)"
    r"|\\dot\s*(?:\{\d\}|\d)(?:\d*\\dot\s*(?:\{\d\}|\d))?))"
    r"|(?P<grouped>[1-9]\d{0,2}(?:(?:(?:\{,\}|\\,|\\!?\s|~|[ ]|\\;|,\\!\s?)\d{3})+|(?:,\d{3})+)(?!\d)(?:\.\d+)?)"
    r"|(?P<scientific>(?:\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3}(?![\d.a-zA-Z]))"
    r"|(?P<number>\d+(?:\.\d+|\.(?=\s?[/*+^-]\s?\d))?|\.\d+)|(?P<letters>[a-zA-Z]+|[\u4e00-\u9fff]+)|(?P<symbol>\*\*|[<>!]=|.)",
    re.DOTALL | re.ASCII,
)
_GROUP = re.compile(r"\s*\{([^{}]*)\}")
_OPEN = re.compile(r"\s*\{")
_ENDS = {symbol(text) for text in ".,;:*"} | {symbol("**"), symbol("\\\\")}


@lru_cache(maxsize=1024)
def tokenize(text: str) -> tuple[Token, ...]:
    """Return the tokens of an answer, without punctuation and markdown at its ends.

    Raises:
        UnreadableError: Its braces do not match, or it has a command of layout that is not known.
    """
    text = _RAISED.sub(lambda match: "^{" + match[0].translate(_FROM_SCRIPT) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + match[0].translate(_FROM_SCRIPT) + "}", text)
    if _VECTOR.search(text):
        text = _CROSS.sub(r"\\crossproduct ", text)
    text = _VULGAR.sub(lambda match: _vulgar(match[0]), text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    tokens = _degrees(_scan(_NOT_EQUAL.sub(r"\\ne ", text)))
    start, end = 0, len(tokens)
    if tokens[-2:] == [symbol("."), symbol(".")]:
        return tuple(tokens)  # an ellipsis
    if tokens[-1:] == [symbol("*")] and not text.rstrip(" .,").endswith("*"):
        return tuple(tokens)  # a product without an end, no markdown
    while end > start and tokens[end - 1] in _ENDS:
        end -= 1
    while start < end and tokens[start].text in ("*", "**"):
        start += 1
    return tuple(tokens[start:end])


def _vulgar(character: str) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _scan(text: str) -> list[Token]:
    tokens: list[Token] = []
    closers: list[tuple[bool, bool, bool]] = []  # of each open brace: whether it is a token, and the style before it
    upright, bold, spaced, brackets, position = False, False, False, 0, 0
    while position < len(text):
        match = _PART.match(text, position)
        assert match is not None and match.lastgroup is not None  # its last part takes any character
        kind, part = match.lastgroup, match[0]
        if kind == "grouped" and brackets and "," in part.replace("{,}", "").replace(",\\!", ""):
            match = re.compile(r"\d+").match(text, position)  # in a list (1,000) has two elements
            assert match is not None
            kind, part = "number", match[0]
        position = match.end()
        if kind == "space" or part == "$":
            spaced = "\n" not in part  # a number of two lines is none
            continue
        if kind == "command":
            name = part.lstrip("\\").rstrip("*") if part[-1].isalpha() or part[1:2].isalpha() else part[1:]
            if not name:
                if part == "\\":  # the rest of a `\ ` whose blank has been stripped
                    continue
                name = "\\"
            if name in _SPACES:
                spaced = True
                if name in ("left", "right", "middle") and text[position : position + 1] == ".":
                    position += 1
                continue
            if name in ("textcolor", "color", "colorbox"):
                position = _skip_group(text, position, name)
                opening = _OPEN.match(text, position)
                if opening is not None:
                    position = opening.end()
                    closers.append((False, upright, bold))
                spaced = True
                continue
            if name in ("begin", "end"):
                group = _GROUP.match(text, position)
                if group is None:
                    raise UnreadableError(name)
                position = group.end()
                environment = group[1].strip().rstrip("*")
                if environment == "array" and name == "begin":
                    position = _skip_group(text, position, name)
                tokens.append(Token(name, environment, False, True))
                spaced = True
                continue
            if name in _FONTS:
                group = _GROUP.match(text, position) or re.compile(r"\s*([A-Za-z])").match(text, position)
                if group is None:
                    raise UnreadableError(name)
                position = group.end()
                tokens.append(Token("name", f"{name.replace('Bbb', 'mathbb')} {group[1].strip()}", False, spaced))
                spaced = False
                continue
            if name in _STYLES:
                opening = _OPEN.match(text, position)
                if opening is not None:
                    position = opening.end()
                    closers.append((False, upright, bold))
                    upright, bold = upright or name in _TEXT, bold or name in _BOLD
                spaced = True
                continue
            name = _SIMPLER.get(name, name)
            kind, part = ("command", name) if name[0].isalpha() else ("symbol", "\\\\" if name == "\\" else name)
        elif part == "{":
            closers.append((True, upright, bold))
        elif part == "}":
            if not closers:
                raise UnreadableError("a brace that opens nothing")
            is_token, upright, bold = closers.pop()
            if not is_token:
                spaced = True
                continue
        elif kind == "grouped":
            kind, part = "number", re.sub(r"[^\d.]", "", part)
        elif part in _COMPARISONS:
            kind, part = "command", _COMPARISONS[part]
        if part in ("(", "[", "\\{"):
            brackets += 1
        elif part in (")", "]", "\\}"):
            brackets -= 1
        if kind == "letters" and bold and part in ("i", "j", "k", "e"):
            kind, part = "name", f"bold {part}"  # a unit vector
        tokens.append(Token(kind, part, upright, spaced))
        spaced = False
    if closers:
        raise UnreadableError("a brace that is not closed")
    return tokens


def _skip_group(text: str, position: int, name: str) -> int:
    group = _GROUP.match(text, position)
    if group is None:
        raise UnreadableError(name)
    return group.end()


_CIRC, _DEGREE = Token("command", "circ"), Token("command", "degree")


def without_braces(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """The tokens without braces around a single letter or digit, so that `x^{2}` is `x^2`."""
    result: list[Token] = []
    for token in tokens:
        if token == symbol("}") and result[-2:-1] == [symbol("{")] and len(result[-1].text) == 1:
            del result[-2]
        else:
            result.append(token)
    return tuple(result)


def _degrees(tokens: list[Token]) -> list[Token]:
    r"""The tokens with one for `^\circ` and `^{\circ}`, and for `^{\prime}`."""
    result: list[Token] = []
    position = 0
    while position < len(tokens):
        if tokens[position] == symbol("^"):
            if tokens[position + 1 : position + 2] in ([_CIRC], [_DEGREE]):
                position += 2
                result.append(_DEGREE)
                continue
            if tokens[position + 1 : position + 4] == [symbol("{"), _CIRC, symbol("}")]:
                position += 4
                result.append(_DEGREE)
                continue
            if tokens[position + 1 : position + 4] == [symbol("{"), symbol("'"), symbol("}")]:
                position += 4
                result.append(symbol("'"))
                continue
        result.append(tokens[position])
        position += 1
    return result


_EATEN = re.compile(
    "\t(?=(?:ext(?:bf|rm|it)?|imes|frac|heta|an|au)(?![a-z]))|\f(?=(?:rac|box)(?![a-z]))|\x08(?=(?:inom|oxed|eta|ar)(?![a-z]))"
    "|\r(?=(?:ight|ho|angle)(?![a-z]))|\n(?=(?:eq|eg)(?![a-z]))|\x0b(?=(?:ec|arphi|ert)(?![a-z]))|\x07(?=(?:lpha|pprox|st)(?![a-z]))"
)
_ESCAPES = {"\t": r"\t", "\f": r"\f", "\x08": r"\b", "\r": r"\r", "\n": r"\n", "\x0b": r"\v", "\x07": r"\a"}


def restore_escapes(text: str) -> str:
    r"""Put back the commands of which JSON or Python ate the first two characters: a tab and `ext` is `\text`."""
    return _EATEN.sub(lambda match: _ESCAPES[match[0]], text)
