"""The units and nouns that may follow a number, by a list: a word that is not here changes the number, or hedges."""

# ruff: noqa: E501  # a word list
from entropy_trl.rewards.tokens import Token, symbol


_NAMES = """
m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|nm nanometer|um micrometer micron
in inch|ft foot feet|yd yard|mi mile|pc parsec|kpc|Mpc|AU|ly|Å angstrom|dm decimeter
g gram gramme|kg kilogram kilo|mg milligram|lb pound|oz ounce|ton tonne|amu
s sec second|ms millisecond|us microsecond|ns nanosecond|min minute|h hr hour|day|week|month|yr year|decade|century
L l liter litre|mL ml milliliter|cL cl|gal gallon|pint|quart|cup|tablespoon tbsp|teaspoon tsp
N newton|kN|J joule|kJ|MJ|eV|keV|MeV|GeV|erg|dyn dyne|W watt|kW|MW|Pa pascal|kPa|MPa|GPa|atm|bar|torr|cal calorie|kcal
V volt|mV|kV|A ampere amp|mA|C coulomb|F farad|uF|ohm Omega|T tesla|G gauss|H henry|Wb weber|Hz hertz|kHz|MHz|GHz
K kelvin|mol mole|M molar|rad radian|sr steradian|rpm|mph|kmh kph|bit|byte|KB|MB|GB|dB|cd|lm
$ dollar usd buck|cent|€ euro eur|£ gbp|¥ yen yuan 元 rmb|₹ rupee|rubles ruble rouble|peso|franc|coin
deg degree 度|unit|apple|orange|pear|banana|fruit|egg|cookie|cake|pie|pizza|slice|piece 块|candy candies|chocolate
student|teacher|pupil|child children|kid|boy|girl|man men|woman women|person people 人|friend|player|team|member|worker
employee|customer|guest|passenger|family families|group|class classes|school|book 本|page 页|pencil|pen|paper|card|ticket|toy
doll|ball|marble|stone|rock|bead|block|box boxes 盒|bag|basket|bottle|jar|can|glass glasses|plate|bowl|spoon|fork
car 辆|truck|bus buses|train|plane|boat|ship|bike bicycle|wheel|tire|seat|room|house|building|floor|door|window|chair|table
desk|bed|tree 棵|flower 朵|rose|tulip|plant|seed|leaf leaves|branch|garden|field|dog|cat|bird|fish|horse|cow|pig|sheep|chicken
duck|rabbit|mouse mice|frog|bee|ant|animal 只|pet|puppy puppies|kitten|lion|tiger|bear|monkey|elephant|snake|spider|leg
time 次|way 种|method|case|possibility possibilities|solution|root|value|number|digit 位|integer|factor|divisor|multiple
pair|triple|triplet|subset|element|set|function|polynomial|permutation|combination|arrangement|outcome|sequence|term
point 分|line|segment|edge|vertex vertices|face|side|angle|triangle|square|rectangle|circle|cube|region|area|tile|cell
row|column|step|move|game|match matches|round|turn|lap|trip|visit|question|problem|test|exam|word|letter|song|photo|picture
item|object|thing|shirt|shoe|sock|hat|dress dresses|pants|coat|jacket|ring|necklace|bracelet|button|gift|present|prize
package|packet|pack|crate|carton|roll|sheet|bar|stick|rope|ribbon|foot|stamp|sticker|balloon|crayon|marker|brick|nail
hotdog|sandwich sandwiches|burger|hamburger|muffin|cupcake|donut|brownie|bread|loaf loaves|potato potatoes|tomato tomatoes
carrot|onion|pepper|grape|strawberry strawberries|blueberry blueberries|cherry cherries|lemon|lime|melon|watermelon|peach peaches
mango mangoes|pumpkin|nut|pancake|waffle|fry fries|snack|meal|lunch lunches|dinner|breakfast|drink|soda|juice|milk|water|coffee|tea
soldier|sailor|driver|doctor|nurse|farmer|voter|citizen|resident|adult|senior|baby babies|sister|brother|cousin|grandchild
vote|seat|point|goal|touchdown|basket|win|hit|shot|jump|pushup|situp|mile|minute|shell|feather|penny pennies
nickel|dime|bill|tray|shelf shelves|drawer|bucket|tank|pool|pond|fence|post|lamp|light|bulb|battery batteries
phone|computer|laptop|tablet|movie|film|video|magazine|newspaper|article|chapter|story stories|poem|email|message|call
岁|个|天|小时|分钟|秒|米|千米|厘米|公里|千克|克|升|吨|平方米|平方厘米|立方米|条|张|件|個|名|年|月|倍|组|棵|支|枚
"""
UNITS: dict[str, str] = {}
for _entry in _NAMES.replace("\n", "|").split("|"):
    for _name in (_words := _entry.split()):
        UNITS.setdefault(_name, _words[0])
        if len(_name) > 3 and _name.isascii():
            UNITS.setdefault(_name + "s", _words[0])
            UNITS.setdefault(_name.capitalize(), _words[0])
            UNITS.setdefault(_name.capitalize() + "s", _words[0])
for _name in ("lb", "oz", "hr", "yr", "yd", "egg", "cow", "pig", "ant", "bee", "day", "cup", "ton", "cat", "dog", "pen", "car",
              "toy", "bag", "boy", "kid", "bus", "hat", "pie", "way", "row", "lap", "bed", "leg", "pet", "nut", "tie", "bar",
              "sec", "min", "amp", "bit", "pea", "can", "jar", "set", "box", "win", "hit", "gal"):  # fmt: skip
    UNITS.setdefault(_name, _name)
    UNITS.setdefault(_name + "s", UNITS[_name])
UNITS |= {"inches": "in", "feet": "ft", "people": "person", "meters": "m", "centuries": "century", "persons": "person"}
_CHINESE = {"米": "m", "千米": "km", "公里": "km", "厘米": "cm", "毫米": "mm", "分米": "dm", "千克": "kg", "公斤": "kg",
            "克": "g", "升": "L", "毫升": "mL", "吨": "ton", "小时": "h", "分钟": "min", "秒": "s", "天": "day", "年": "yr",
            "月": "month", "岁": "yr"}  # fmt: skip
UNITS |= {name: UNITS[unit] for name, unit in _CHINESE.items()}

MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
PERCENT = {"percent", "percentage", "pct"}
_SQUARE = {"square": 2, "sq": 2, "cubic": 3}
_GLUED = {"cm", "km", "mm", "kg", "ft"}
_ANGLES = {"sin", "cos", "tan", "cot", "sec", "csc"}
_MOST = 40
_COMPOSITE = {
    "mph": (("mi", 1), ("h", -1)),
    "kmh": (("km", 1), ("h", -1)),
    **{f"平方{name}": ((unit, 2),) for name, unit in _CHINESE.items() if unit.endswith("m")},
    **{f"立方{name}": ((unit, 3),) for name, unit in _CHINESE.items() if unit.endswith("m")},
}
UNITS |= {name: name for name in _COMPOSITE if name not in UNITS}
Unit = tuple[tuple[str, int], ...]


def split_unit(
    tokens: tuple[Token, ...], is_reference: bool = False, may_be_lone: bool = False
) -> tuple[tuple[Token, ...], Unit] | None:
    """Split a quantity into the tokens of its number and its unit, or None where there is no known unit at its end.

    A lone letter is a unit where `may_be_lone`: the reference has one. Letters of maths right behind a number may be variables (`2mg`), and in a reference they are.
    """
    tokens = _leading_currency(tokens)
    for start in range(max(1, len(tokens) - _MOST), len(tokens)):
        first = tokens[start]
        if first.kind == "letters" or first.text in ("degree", "frac", "\\$", "€", "£", "¥", "₹", "*", "Omega", "mu"):
            unit = parse_unit(tokens[start:], may_be_lone and first.spaced)
            is_glued = first.kind == "letters" and not first.upright and not first.spaced and len(first.text) < 3
            if is_glued and first.text.isascii() and (is_reference or first.text not in _GLUED):
                continue
            if unit is not None and ("deg", 1) in unit and any(token.text in _ANGLES for token in tokens[:start]):
                return None  # `\\cos 40^\\circ` is no number of degrees
            if unit is not None and _ends_a_number(tokens[start - 1]):
                return tokens[:start], unit
    return None


def _leading_currency(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """The tokens with a currency in front moved behind."""
    if len(tokens) > 1 and tokens[0].text == "US" and tokens[1].text == "\\$":
        tokens = tokens[1:]
    if len(tokens) > 1 and tokens[0].text == "USD":
        tokens = (Token("symbol", "\\$"), *tokens[1:])
    start = int(bool(tokens) and tokens[0].text in ("-", "+"))
    if len(tokens) > start + 1 and tokens[start].text in ("\\$", "€", "£", "¥", "₹"):
        last = [Token("letters", "dollar", True)] if tokens[-1].text in ("dollars", "dollar", "cents") else []
        if last and tokens[-1].text == "cents":
            return tokens
        body = tokens[:start] + tokens[start + 1 :]
        return body if last else (*body, tokens[start])
    return tokens


def _ends_a_number(token: Token) -> bool:
    return token.kind in ("number", "repeating", "scientific", "letters", "command", "name", "end") or token.text in (
        "}", ")", "]", "!", "'", "|", "\\}",
    )  # fmt: skip


def parse_unit(tokens: tuple[Token, ...], may_be_lone: bool = False) -> Unit | None:
    """The exponents of the units in a row of tokens, or None where something else is among them."""
    powers: dict[str, int] = {}
    if not _parse(tokens, powers, 1):
        return None
    after = (None, *tokens)
    bare = [
        token
        for before, token in zip(after, tokens, strict=False)
        if token.kind == "letters" and not token.upright and before != Token("command", "degree")
    ]
    if (
        not may_be_lone
        and any(len(token.text) == 1 and token.text.isascii() for token in bare)
        and sum(token.kind == "letters" for token in tokens) < 2
    ):
        return None  # a lone letter may be a variable
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def _parse(tokens: tuple[Token, ...], powers: dict[str, int], sign: int) -> bool:
    position, side, pending, is_factor = 0, sign, 1, False
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token.text == "/" or (token.kind == "letters" and token.text == "per"):
            if not is_factor:
                return False
            side, is_factor = -sign, False
        elif token.text in ("*", "."):
            if not is_factor and token.text == ".":
                return False
            side, is_factor = sign if token.text == "*" else side, False
        elif token.text in ("{", "(", "frac"):
            groups = []
            for _ in range(2 if token.text == "frac" else 1):
                start = position + (token.text == "frac")
                end = _closing(tokens, start, "}" if token.text != "(" else ")")
                if end is None:
                    return False
                groups.append(tokens[start:end])
                position = end + 1
            if not all(_parse(group, powers, side * (-1) ** n) for n, group in enumerate(groups)):
                return False
            is_factor = True
        else:
            name = _name_of(token)
            if token.text in _SQUARE and token.kind == "letters":
                pending = _SQUARE[token.text]
                continue
            if token.text in ("degree", "degrees") and position < len(tokens) and tokens[position].text in (
                "C", "F", "Celsius", "Fahrenheit", "celsius",
            ):  # fmt: skip
                name, position = "degree " + tokens[position].text[0].upper(), position + 1
            if token.text == "mu" and position < len(tokens) and tokens[position].upright:
                name, position = UNITS.get("u" + tokens[position].text), position + 1
            if name is None:
                return False
            if position < len(tokens) and tokens[position].text in ("squared", "cubed"):
                pending, position = 2 + (tokens[position].text == "cubed"), position + 1
            power, position = _power(tokens, position)
            if power is None:
                return False
            for part, exponent in _COMPOSITE.get(name, ((name, 1),)):
                powers[part] = powers.get(part, 0) + side * power * pending * exponent
            pending, is_factor = 1, True
            if side != sign and not (position < len(tokens) and tokens[position].text in ("*", ".")):
                side = sign if position < len(tokens) and tokens[position].text == "/" else side
    return is_factor


def _name_of(token: Token) -> str | None:
    if token.kind == "letters":
        if token.text in ("i", "e"):
            return None
        return UNITS.get(token.text)
    return {"degree": "deg", "\\$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "Omega": "ohm"}.get(token.text)


def _power(tokens: tuple[Token, ...], position: int) -> tuple[int | None, int]:
    if position >= len(tokens) or tokens[position] != symbol("^"):
        return 1, position
    part = tokens[position + 1 : position + 5]
    texts = [token.text for token in part]
    if texts[:1] == ["{"] and "}" in texts:
        end = texts.index("}")
        digits = "".join(texts[1:end])
        position += end + 2
    elif texts[:1] == ["-"]:
        digits, position = "".join(texts[:2]), position + 3
    else:
        digits, position = "".join(texts[:1]), position + 2
    return (int(digits), position) if digits in {str(n) for n in range(-9, 10)} else (None, position)


def _closing(tokens: tuple[Token, ...], start: int, closer: str) -> int | None:
    depth = 1
    for position in range(start, len(tokens)):
        depth += (tokens[position].text in ("{", "(")) - (tokens[position].text in ("}", ")"))
        if not depth:
            return position if tokens[position].text == closer else None
    return None
