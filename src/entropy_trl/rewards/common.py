"""What the rewards of mathematics and of programs share."""

import os
from typing import Any


def processors() -> int:
    """The processors that this process may use: torchrun says how many processes share the machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def completion_text(completion: Any) -> str:
    """The text of a completion, which is plain or a conversation."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None  # a tool call has no content
    if isinstance(content, list):  # content in parts: only the parts of text can hold an answer
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    return content or ""
