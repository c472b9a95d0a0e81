"""Mask keys and tokens among stored settings: a report is made to be shared."""

import re
from collections.abc import Mapping
from typing import Any


MASKED = "*** (masked)"

_SECRET_NAME = re.compile(
    r"(?:^|[_.\-])(?:(?:[a-z0-9]*token)|(?:api|access|private|secret|account|auth|ssh|signing|encryption|service)"
    r"[_\-]?keys?|\w*secrets?|\w*passw(?:or)?ds?|passphrases?|pwd|credentials?|authorization|bearer|cookie)$",
    re.IGNORECASE,
)
_ENVIRONMENT_KEY = re.compile(r"[A-Z0-9_]+_(?:KEY|TOKEN|PAT)$")
#: Tokens of a vocabulary, which are settings and no secrets.
_VOCABULARY = re.compile(
    r"(?:^|[_.\-])(?:pad|eos|bos|unk|sep|cls|mask|image|video|audio|stop|start|end|special|think|boundary)[_\-]?token$",
    re.IGNORECASE,
)
#: Keys by the form that their issuers give them, and passwords in addresses.
_SECRET_VALUE = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{10,}|\bsk-[\w\-]{16,}|\b(?:gh[pousr]|github_pat|glpat|xox[abprs])[_\-][\w\-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"
)
#: `API_KEY=...` in a text, and `--hub_token ...` in a command line.
_ASSIGNED = re.compile(
    r"((?:^|(?<=[\s,;&\"'?{]))(?:--?)?[\w\-]*(?:api[_\-]?key|access[_\-]?key|secret|token|passw(?:or)?d)"
    r"\s*=\s*[\"']?|(?:^|\s)--[\w\-]*(?:api[_\-]key|secret|token|passw(?:or)?d)\s+)[^\s,;&\"']+",
    re.IGNORECASE,
)
_OPTION = re.compile(r"--[\w\-]+")


def masked(name: str, value: Any) -> Any:
    """The value of a setting as it may be shown.

    Args:
        name (`str`): Name of the setting; names such as `hub_token`, `api_key` or `password` mask the whole value.
        value (`Any`): Text in which a known form of key occurs is masked there. Lists and mappings are gone through.
    """
    if value is None or isinstance(value, bool) or value == "":
        return value
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # apiKey
    if _ENVIRONMENT_KEY.search(name) or (_SECRET_NAME.search(split) and not _VOCABULARY.search(split)):
        return MASKED
    if isinstance(value, Mapping):
        return {key: masked(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        options = ["", *(item if isinstance(item, str) and _OPTION.fullmatch(item) else "" for item in value)]
        return [masked(option.lstrip("-"), item) for option, item in zip(options, value, strict=False)]
    if not isinstance(value, str):
        return value
    return _ASSIGNED.sub(lambda match: match[1] + MASKED, _SECRET_VALUE.sub(MASKED, value))
