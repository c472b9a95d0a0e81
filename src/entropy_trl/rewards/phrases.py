r"""Words around an answer, by lists: what introduces it, what says the same as a symbol, choices, and moduli.

Only what is listed is taken for such words. `\text{at least } 5` stays what it is, which is no number.
"""

import re
from itertools import pairwise

from entropy_trl.rewards.tokens import Token, symbol, tokenize


_INTRODUCTION = re.compile(
    r"(?:(?:so|thus|hence|therefore|then),? )?"
    r"(?:(?:the|our|my)? ?(?:final|correct|required|desired)? ?(?:answer|result|solution|value|sum|product|total)s?"
    r"(?: (?:is|are|equals)(?: (?:given by|equal to))?)?|(?:we|i) (?:find|get|have|obtain|conclude)(?: that)?) ?:? ?"
)
_LABEL = re.compile(r"(?:[a-z]+ ){0,3}[a-z]{3,} : ")
_NEGATIONS = {"not", "no", "non", "wrong", "incorrect", "false", "except", "never", "neither", "unlike"}
_NEGATIONS |= {"case", "part", "if", "either", "first", "second"}  # it is one of several answers
_CHINESE_NEGATIONS = set("不非否没未无")
_MOST_WORDS = 9
_CHOICE = {"option", "choice", "answer"}
_LETTERS = "ABCDEFGH"
#: Left to maths, `ab` is `ba`; these stay words.
_SHORT_WORDS = {
    *("no", "on", "ten", "two", "one", "six", "yes", "odd", "all", "any", "non", "am", "pm", "so", "is", "not", "won"),
    *("own", "now", "sum", "max", "min", "red", "sun", "mon", "tue", "wed", "thu", "fri", "sat", "may", "cat", "dog"),
}
_SAME = {
    "nosolution": r"\emptyset",
    "nosolutions": r"\emptyset",
    "emptyset": r"\emptyset",
    "theemptyset": r"\emptyset",
    "allrealnumbers": r"\mathbb{R}",
    "allreals": r"\mathbb{R}",
    "realnumbers": r"\mathbb{R}",
    "therealnumbers": r"\mathbb{R}",
    "allrealx": r"\mathbb{R}",
    "allintegers": r"\mathbb{Z}",
}

_DOMAINS = {"mathbb Z": "Z", "Z": "Z", "mathbf Z": "Z", "mathbb N": "N", "N": "N"}

Tokens = tuple[Token, ...]


def without_introduction(tokens: Tokens) -> Tokens:
    """The tokens behind `The answer is`, `we find that` or a label with a colon; the same tokens without any."""
    if len(tokens) > 1 and tokens[0].text == "therefore" and tokens[0].kind == "command":
        tokens = tokens[1:]
    if len(tokens) > 1 and tokens[0].text.endswith(("为", "是")) and not _CHINESE_NEGATIONS & set(tokens[0].text):
        return tokens[1:]
    texts: list[str] = []
    for token in tokens[:_MOST_WORDS]:
        if token.kind != "letters" and token.text not in (":", ","):
            break
        texts.append(token.text.lower())
    for count in range(len(texts), 0, -1):
        text = " ".join(texts[:count]).replace(" ,", ",")
        is_introduction = _INTRODUCTION.fullmatch(text) or _LABEL.fullmatch(text + " ")
        if is_introduction and not _NEGATIONS & set(texts[:count]) and count < len(tokens):
            start = count + (count + 1 < len(tokens) and tokens[count].text == "=")
            return tokens[start:]
    return tokens


def as_symbol(tokens: Tokens) -> Tokens:
    """The tokens of the symbol that words such as `no solution` say."""
    if len(tokens) > 3 or any(token.kind != "letters" for token in tokens):
        return tokens
    same = _SAME.get("".join(token.text for token in tokens).lower())
    return tokenize(same) if same else tokens


def choice(tokens: Tokens) -> str | None:
    """The letters of a choice, of which there may be several: `(A)`, `A)`, `Option A`, `ABD`, `A, B, D`."""
    if len(tokens) > 16:
        return None
    if len(tokens) > 1 and tokens[0].kind == "letters" and tokens[0].text.lower() in _CHOICE:
        tokens = tokens[1:]
    texts = [token.text for token in tokens if token.text not in ("{", "}")]
    if texts[:1] in (["("], ["["]) and texts[2:] in ([")"], ["]"]):
        texts = texts[1:2]
    elif texts[1:] == [")"]:
        texts = texts[:1]
    letters = "".join(text for text in texts if text not in (",", "and"))
    if not letters or any(letter not in _LETTERS for letter in letters):
        return None
    if any(left >= right for left, right in pairwise(letters)):
        return None
    return letters if len(texts) == 1 or len(letters) > 1 else None


def labelled_choice(tokens: Tokens) -> str | None:
    r"""The letter in front of a choice, as in `\textbf{(C)}\ 5`; None where a second letter may follow."""
    texts = [token.text for token in tokens[:3]]
    if texts[::2] != ["(", ")"] or texts[1] not in _LETTERS or not tokens[1].upright or len(tokens) < 4:
        return None
    rest = tokens[3:]
    has_letters = any(token.kind == "letters" or token.text in ("(", ",", "or", "and") for token in rest)
    return None if has_letters else texts[1]


def with_notation(tokens: Tokens) -> Tokens:
    r"""The tokens of `3 \text{ to } 8` as a ratio, and of `]2, 5[` as an interval with parentheses."""
    if len(tokens) == 3 and tokens[1].text == "to" and tokens[1].kind == "letters":
        return (tokens[0], symbol(":"), tokens[2])
    texts = [token.text for token in tokens]
    brackets = [text for text in texts if text in ("[", "]", "(", ")")]
    is_pair = len(tokens) > 4 and brackets == [texts[0], texts[-1]] and texts.count(",") + texts.count(";") == 1
    if is_pair and brackets in (["]", "["], ["]", "]"], ["[", "["]):
        first, last = symbol("(" if texts[0] == "]" else "["), symbol(")" if texts[-1] == "[" else "]")
        return (first, *tokens[1:-1], last)
    return tokens


def split_domain(tokens: Tokens) -> tuple[Tokens, Token, str] | None:
    r"""Split `k\pi, k \in \mathbb{Z}` into the tokens in front, the index and its set."""
    texts = [token.text for token in tokens]
    if texts[-1:] == [")"] and texts[-5:-4] == ["("]:
        body, (index, relation, domain) = tokens[:-5], tokens[-4:-1]
    elif len(tokens) > 3:
        body, (index, relation, domain) = tokens[:-3], tokens[-3:]
    else:
        return None
    if body and body[-1].text in (",", ";"):
        body = body[:-1]
    if relation.text != "in" or domain.text not in _DOMAINS or index.kind != "letters" or index not in body:
        return None
    return body, index, _DOMAINS[domain.text]


def is_product(tokens: Tokens) -> bool:
    """Whether a reference of two or three letters is a product of unknowns, such as `ab`, and not a word."""
    text = "".join(token.text for token in tokens if token.kind == "letters")
    if any(token.upright for token in tokens) or len(text) not in (2, 3):
        return False
    return not text.isupper() and text.isascii() and text.lower() not in _SHORT_WORDS


def split_modulus(tokens: Tokens) -> tuple[Tokens, str] | None:
    r"""Split `7 \pmod{11}` and its other forms into the tokens in front and the modulus."""
    for start in range(max(1, len(tokens) - 8), len(tokens)):
        texts = [token.text for token in tokens[start:] if token.text not in ("{", "}")]
        if texts[:1] == ["("] and texts[-1] == ")":
            texts = texts[1:-1]
        if len(texts) == 2 and texts[0] in ("pmod", "mod", "bmod") and texts[1].isalnum():
            body = tuple(symbol("=") if token.text == "equiv" else token for token in tokens[:start])
            return body, texts[1]
    return None


def with_decimal_point(tokens: Tokens) -> Tokens | None:
    """The tokens of `3,14` with a point, where there is one such number; else None."""
    commas = [position for position, token in enumerate(tokens) if token.text == ","]
    if len(commas) != 1 or not 0 < commas[0] < len(tokens) - 1:
        return None
    if any(token.text not in ("-", "+", "\\$", "€", "£", "¥") for token in tokens[: commas[0] - 1]):
        return None  # (3,14) is a pair
    before, comma, after = tokens[commas[0] - 1 : commas[0] + 2]
    if comma.spaced or after.spaced or not (before.text.isdecimal() and after.text.isdecimal()):
        return None
    if not after.text.strip("0"):
        return None
    number = Token("number", f"{before.text}.{after.text}", before.upright, before.spaced)
    return (*tokens[: commas[0] - 1], number, *tokens[commas[0] + 2 :])
