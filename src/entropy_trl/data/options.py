"""What to make of rows, and which to leave out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from entropy_trl.templates import TEMPLATES, get_template


DEFAULT_TEMPLATE = TEMPLATES["qwen_boxed"]
"""How a bare problem becomes a prompt where nothing else is asked for."""

Language = Literal["en", "zh"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    r"""What to make of rows, and which to leave out.

    Attributes:
        prompt_template (`str`, *optional*): A name of `templates.TEMPLATES`, or a text with `{problem}`. None: ready
            prompts stay as they are, and bare problems get `DEFAULT_TEMPLATE`.
        prompt_column (`str`, *optional*): The column of the problem or prompt; a dot leads into a structure. None: see
            the module.
        solution_column (`str`, *optional*): The column of the answer; likewise.
        language (`Language`, *optional*): Keep the problems in English ("en": those without a Han character) or
            Chinese ("zh": the others).
        exclude_overlap (`Sequence[str]`, *optional*, defaults to `()`): Files of evaluation problems: rows that
            overlap one of them are left out.
        overlap_threshold (`float`, *optional*, defaults to `0.3`): The share of an evaluation problem's 13-grams that
            a row must have to overlap it. The same words and digits overlap at any length.
        max_prompt_length (`int`, *optional*): The largest number of tokens of a prompt. Needs a tokenizer.
        tokenizer (`Any`, *optional*): What counts them, with its chat template, as TRL does.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*): What TRL passes to the chat template, if anything.
        max_bad_rows (`float`, *optional*, defaults to `0.01`): The largest fraction of different rows that cannot be
            used: more of them are an error.
        dropped_rows_file (`str`, *optional*): A file to write, one JSON line for each row left out that is not a mere
            repeat.
    """

    prompt_template: str | None = None
    prompt_column: str | None = None
    solution_column: str | None = None
    language: Language | None = None
    exclude_overlap: Sequence[str] = ()
    overlap_threshold: float = 0.3
    max_prompt_length: int | None = None
    tokenizer: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_bad_rows: float = 0.01
    dropped_rows_file: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_template is not None:
            get_template(self.prompt_template)
        if self.language not in (None, *get_args(Language)):
            raise ValueError(f"language {self.language!r} is not one of 'en', 'zh'.")
        if isinstance(self.exclude_overlap, str):
            raise ValueError(f"exclude_overlap is a list of files, got the text {self.exclude_overlap!r}.")
        if not 0 < self.overlap_threshold <= 1:
            raise ValueError(f"overlap_threshold must be above 0 and at most 1, got {self.overlap_threshold}.")
        if not 0 <= self.max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows is a fraction from 0 to 1, got {self.max_bad_rows}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}.")
        if self.max_prompt_length is not None and self.tokenizer is None:
            raise ValueError("max_prompt_length needs a tokenizer that counts the tokens.")


class RowFields(TypedDict, total=False):
    """The fields of `RowOptions` as keyword arguments: the types that a checker sees in `load_rows(source, ...)`."""

    prompt_template: str | None
    prompt_column: str | None
    solution_column: str | None
    language: Language | None
    exclude_overlap: Sequence[str]
    overlap_threshold: float
    max_prompt_length: int | None
    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any]
    max_bad_rows: float
    dropped_rows_file: str | None
