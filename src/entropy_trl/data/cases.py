"""The tests of programming problems, from the forms that data sets have to the one that `code_reward` reads.

One reader serves tests of inputs and outputs: a structure of lists, or a list of structures, as values or as JSON text.
"""

import base64
import binascii
import json
import pickletools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_trl.data.dropped import (
    BROKEN_TESTS,
    LARGE_TESTS,
    MALFORMED_TESTS,
    NO_TESTS,
    PICKLED_TESTS,
    UNEQUAL_TESTS,
    UNKNOWN_TESTS,
)


# What judges offer to functions without an import. `math` has a `pow` that would hide the built-in one.
_IMPORTS = "".join(f"from {name} import *\n" for name in ("bisect", "collections", "functools", "heapq", "itertools"))
FUNCTION_PREFIX = f"from typing import *\n{_IMPORTS}import math\n"

_NAMES = {"inputs": ("inputs", "input"), "outputs": ("outputs", "output")}
_METHOD = re.compile(r"^\s+def\s+([A-Za-z_]\w*)\s*\(\s*self\b", re.MULTILINE)
# What a pickled text is made of. Nothing here imports, calls or builds an object.
_TEXT_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"}


class UnusableTests(Exception):
    """A row's tests cannot be used. The text is the reason, one of those in `dropped.py`."""


def decoded(value: Any, limit: int) -> Any:
    """Return the value of a JSON text of at most `limit` characters; any other value as it is.

    Raises:
        UnusableTests: The text is too long, or no JSON.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        return value
    if len(value) > limit:
        raise UnusableTests(LARGE_TESTS)
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UnusableTests(BROKEN_TESTS) from error


def compressed(value: Any, limit: int) -> Any:
    """Return the same, where a text may also be JSON in a pickled text, compressed by zlib, in base 64.

    Nothing is unpickled: the opcodes of the pickle are looked at, and only those of one text are taken.
    """
    if not isinstance(value, str) or value.lstrip()[:1] in ("", "[", "{", '"'):
        return decoded(value, limit)
    if len(value) > 2 * limit:
        raise UnusableTests(LARGE_TESTS)
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode("".join(value.split()), validate=True), limit + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise UnusableTests(BROKEN_TESTS) from error
    if len(data) > limit:
        raise UnusableTests(LARGE_TESTS)
    if not decompressor.eof:
        raise UnusableTests(BROKEN_TESTS)
    return decoded(_pickled_text(data) if data[:1] == b"\x80" else data, limit)


def _pickled_text(data: bytes) -> str:
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXT_OPCODES:
                texts.append(argument)
            elif opcode.name not in (*_HARMLESS, "STOP"):
                raise UnusableTests(PICKLED_TESTS)
    except ValueError as error:
        raise UnusableTests(BROKEN_TESTS) from error
    if len(texts) != 1:
        raise UnusableTests(PICKLED_TESTS)
    return str(texts[0])


def input_output(parts: Sequence[Any], function: str | None = None, starter: str = "") -> dict[str, Any]:
    """Read tests of inputs and outputs, which are for the standard streams or for a function.

    Args:
        parts (`Sequence[Any]`): Tests that belong together. Each is a structure of lists (`inputs`, `outputs`, perhaps
            `fn_name`), a list of structures (`input`, `output`, perhaps `testtype` and `fn_name`), or None.
        function (`str`, *optional*): The function, where the tests do not name it.
        starter (`str`, *optional*, defaults to `""`): Code whose first method is the function if nothing else says so.

    Returns:
        `dict[str, Any]`: The tests, as `code_reward` reads them.

    Raises:
        UnusableTests: They have no such form.
    """
    pairs: list[tuple[Any, Any]] = []
    kinds: set[str] = set()
    for part in parts:
        if isinstance(part, Mapping):
            pairs += _columns(part)
            function = _function(part, function)
            kinds.update(_kinds(part))
        elif isinstance(part, list | tuple):
            for case in part:
                if not isinstance(case, Mapping) or not ("input" in case and "output" in case):
                    raise UnusableTests(MALFORMED_TESTS if isinstance(case, Mapping) else UNKNOWN_TESTS)
                pairs.append((case["input"], case["output"]))
                function = _function(case, function)
                kinds.update(_kinds(case))
        elif part is not None:
            raise UnusableTests(UNKNOWN_TESTS)
    if not pairs:
        raise UnusableTests(NO_TESTS)
    if len(kinds) > 1:
        raise UnusableTests(UNKNOWN_TESTS)
    if kinds == {"function"} and not function:
        method = _METHOD.search(starter)
        if method is None:
            raise UnusableTests(MALFORMED_TESTS)
        function = method[1]
    if kinds == {"stdin"} or not function:
        return {"kind": "stdin", "cases": [{"input": _stream(given), "output": _stream(out)} for given, out in pairs]}
    cases = [_call(given, output) for given, output in pairs]
    return {"kind": "function", "prefix": FUNCTION_PREFIX, "entry_point": function, "cases": cases}


def _columns(part: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    lists = {}
    for name, names in _NAMES.items():
        found = next((other for other in names if part.get(other) is not None), None)
        lists[name] = [] if found is None else part[found]
        if not isinstance(lists[name], list | tuple):
            raise UnusableTests(MALFORMED_TESTS)
    if part and not any(name in part for names in _NAMES.values() for name in names):
        raise UnusableTests(UNKNOWN_TESTS)
    if len(lists["inputs"]) != len(lists["outputs"]):
        raise UnusableTests(UNEQUAL_TESTS)
    return list(zip(lists["inputs"], lists["outputs"], strict=True))


def _function(part: Mapping[str, Any], before: str | None) -> str | None:
    metadata = part.get("metadata")
    names = [part.get("fn_name"), metadata.get("func_name") if isinstance(metadata, Mapping) else None, before]
    name = next((name for name in names if name), None)
    if name is not None and not isinstance(name, str):
        raise UnusableTests(MALFORMED_TESTS)
    return name


def _kinds(part: Mapping[str, Any]) -> list[str]:
    kind = part.get("testtype") or part.get("type")
    if kind is None:
        return []
    known = {"stdin": "stdin", "stdin_stdout": "stdin", "functional": "function", "function_call": "function"}
    if not isinstance(kind, str) or kind not in known:
        raise UnusableTests(UNKNOWN_TESTS)
    return [known[kind]]


def _stream(value: Any) -> str:
    """The text of a standard stream, which may be given by lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return "\n".join(map(_stream, value))
    raise UnusableTests(MALFORMED_TESTS)


def _call(given: Any, output: Any) -> dict[str, Any]:
    if isinstance(given, str):  # an argument a line, each in JSON, and so is the output
        if not isinstance(output, str):
            raise UnusableTests(MALFORMED_TESTS)
        try:
            arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
            return {"args": arguments, "output": json.loads(output)}
        except (ValueError, RecursionError) as error:
            raise UnusableTests(BROKEN_TESTS) from error
    if given is None:
        raise UnusableTests(MALFORMED_TESTS)
    arguments = list(given) if isinstance(given, list | tuple) else [given]
    if isinstance(output, list | tuple) and len(output) == 1:  # sources wrap some results in a list, and others not
        return {"args": arguments, "any_of": [list(output), output[0]]}
    return {"args": arguments, "output": output}


def written(tests: Mapping[str, Any], limit: int) -> str:
    """Return the JSON text of tests.

    Raises:
        UnusableTests: It is longer than `limit`, or a value has no JSON.
    """
    try:
        text = json.dumps(tests, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which Arrow does not take
        text = json.dumps(tests)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnusableTests(MALFORMED_TESTS) from error
    if len(text) > limit:
        raise UnusableTests(LARGE_TESTS)
    return text
