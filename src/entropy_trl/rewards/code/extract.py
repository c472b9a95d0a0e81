"""Where a completion has its program."""

import re


CODE_FORMATS = ("fenced", "whole")
"""The values of `code_format`, by which a prompt template says in which form it asks for the program."""

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$")
_LANGUAGES = ("", "python", "python3", "py")


def final_program(text: str, code_format: str = "fenced") -> str:
    r"""What a completion gives as its program, or an empty string where it gives none.

    | `code_format` | the program                                                                              |
    |---------------|------------------------------------------------------------------------------------------|
    | `"fenced"`    | the last fenced block in `python`, `python3`, `py` or nothing, which may lack its end    |
    | `"whole"`     | the same where there is such a block, else all of the text                               |

    Args:
        text (`str`): The completion.
        code_format (`str`, *optional*, defaults to `"fenced"`): One of `CODE_FORMATS`.

    Raises:
        ValueError: There is no such format.

    Example:

    ```python
    >>> final_program("First:\n```python\nprint(1)\n```\nBetter:\n```python\nprint(2)\n```")
    'print(2)\n'
    ```
    """
    if code_format not in CODE_FORMATS:
        raise ValueError(f"Unknown code_format {code_format!r}: use one of {', '.join(CODE_FORMATS)}.")
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in [*text.splitlines(keepends=True), None]:
        fence = _FENCE.match(line.rstrip("\r\n")) if line is not None else None
        if opened is None:
            opened, lines = fence, []
        elif line is None or (fence and not fence[3] and fence[2].startswith(opened[2])):
            if opened[3].lower() in _LANGUAGES:
                blocks.append("".join(lines))
            opened = None
        else:
            indentation = opened[1]
            lines.append(line.removeprefix(indentation))
    programs = [block for block in blocks if block.strip()]
    if programs:
        return programs[-1]
    return text if code_format == "whole" else ""
