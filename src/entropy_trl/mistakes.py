"""Turn errors of other libraries over the user's values into one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError


@contextmanager
def told_of(what: str) -> Iterator[None]:
    """Say what failed where transformers, or a chat template, met values that it does not check itself.

    A model's files and options that take JSON are the user's. A wrong type or name in them comes out as one of these
    errors; a `ValueError` or `OSError` has a message for users as it is.

    Args:
        what (`str`): What cannot be done, as the start of the message.

    Raises:
        ValueError: One of these errors happened.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        RuntimeError,
        StrictDataclassError,
        TemplateError,
    ) as error:
        raise ValueError(
            f"{what} ({type(error).__name__}: {error}). Check its files and the options; ENTROPY_TRL_DEBUG=1 shows "
            "where it failed."
        ) from error
