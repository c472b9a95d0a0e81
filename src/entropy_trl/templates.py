r"""Prompt templates: how a bare problem becomes a prompt, and with it where its answer will be found.

A wording and the rule that reads the answer belong together: a policy that was asked for `\boxed{}` and is read by its
last line learns nothing. So a template has both, and `data/` writes the rule into every row, as the column
`answer_format`, which the reward reads.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args


AnswerFormat = Literal["boxed", "answer_line", "answer_tag", "any"]
r"""Where an answer is: in the last `\boxed{}`, in a line `Answer: ...`, in `<answer>` tags, or wherever it is found."""
ANSWER_FORMATS: tuple[str, ...] = get_args(AnswerFormat)

_PLACE = "{problem}"
# What tells that a prompt says already how to answer, in words that no template here has.
_INSTRUCTION = re.compile(r"\\boxed|<answer>|\banswer\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class PromptTemplate:
    """A wording around a problem.

    Attributes:
        name (`str`): What `prompt_template` calls it; free for a wording of one's own.
        system (`str | None`): The system message; None leaves it to the model's chat template.
        user (`str`): The user message, in which `{problem}` stands for the problem.
        answer_format (`AnswerFormat`): Where the answer is then expected.
    """

    name: str
    system: str | None
    user: str
    answer_format: AnswerFormat

    def __post_init__(self) -> None:
        if self.user.count(_PLACE) != 1:
            number = "no" if _PLACE not in self.user else "more than one"
            raise ValueError(f"prompt_template {self.user!r} has {number} '{_PLACE}' to put the problem in.")
        if self.answer_format not in ANSWER_FORMATS:
            formats = ", ".join(map(repr, ANSWER_FORMATS))
            raise ValueError(f"answer_format {self.answer_format!r} is not one of {formats}.")

    @property
    def _around(self) -> tuple[str, str]:
        before, after = self.user.split(_PLACE)
        return before, after

    def messages(self, problem: str) -> list[dict[str, str]]:
        """The prompt, as a conversation."""
        before, after = self._around
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": f"{before}{problem}{after}"}]

    def problem_in(self, prompt: str | Sequence[Any]) -> str | None:
        """The problem in a prompt of this wording (the inverse of `messages`); None if it has another wording."""
        system, user = _parts(prompt)
        before, after = self._around
        if user is None or (self.system is not None and system != self.system):
            return None
        if len(user) < len(before) + len(after) or not (user.startswith(before) and user.endswith(after)):
            return None
        return user[len(before) : len(user) - len(after)]


TEMPLATES = {
    template.name: template
    for template in (
        # System text: the template of DeepSeek-R1-Zero (arXiv 2501.12948, table 1) up to its `User:`. User text: what
        # Open-Reasoner-Zero (arXiv 2503.24290) puts there, which asks for the answer in a box inside the tags.
        PromptTemplate(
            name="r1_zero",
            system="A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
            "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
            "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
            "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.",
            user="You must put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And "
            "your final answer will be extracted automatically by the \\boxed{} tag.\nThis is the problem:\n{problem}",
            answer_format="boxed",
        ),
        # The sentence of the model cards of Qwen2.5-Math and Qwen3 (and DeepSeek-R1), in the user message as in
        # SimpleRL-Zoo's prompt "qwen-boxed" (arXiv 2503.18892); Qwen2.5's chat template adds its own system message.
        PromptTemplate(
            name="qwen_boxed",
            system=None,
            user="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
            answer_format="boxed",
        ),
        # The wording of every row of BytedTsinghua-SIA/DAPO-Math-17k (arXiv 2503.14476).
        PromptTemplate(
            name="dapo",
            system=None,
            user="Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to "
            'put your answer on its own line after "Answer:".',
            answer_format="answer_line",
        ),
        PromptTemplate(name="raw", system=None, user="{problem}", answer_format="any"),
    )
}


def get_template(name_or_text: str) -> PromptTemplate:
    """The template of that name, or one made of a text with `{problem}`, whose answers are taken wherever they are.

    Raises:
        ValueError: It is neither.
    """
    if name_or_text in TEMPLATES:
        return TEMPLATES[name_or_text]
    if _PLACE not in name_or_text:
        raise ValueError(
            f"prompt_template {name_or_text!r} has no '{_PLACE}' to put the problem in, and is not one of the "
            f"templates {', '.join(TEMPLATES)}."
        )
    return PromptTemplate(name="text", system=None, user=name_or_text, answer_format="any")


def recognise(prompt: str | Sequence[Any]) -> tuple[PromptTemplate, str] | None:
    """The template whose wording a prompt has, and the problem in it; None for another wording or none at all."""
    for template in TEMPLATES.values():
        problem = None if template.user == _PLACE else template.problem_in(prompt)
        if problem is not None:
            return template, problem
    return None


def bare_problem(prompt: str | Sequence[Any]) -> str | None:
    """The problem in a prompt, without instructions; None if it has instructions of an unknown wording."""
    known = recognise(prompt)
    if known is not None:
        return known[1]
    system, user = _parts(prompt)
    if user is None or _INSTRUCTION.search(f"{system or ''}\n{user}"):
        return None
    return user


def _parts(prompt: Any) -> tuple[str | None, str | None]:
    """The system and the user message of a prompt; no user message where there is more, or other content than text."""
    if isinstance(prompt, str):
        return None, prompt
    roles = [message.get("role") for message in prompt]
    contents = [message.get("content") for message in prompt]
    if not all(isinstance(content, str) for content in contents):
        return None, None
    match roles:
        case ["user"]:
            return None, contents[0]
        case ["system", "user"]:
            return contents[0], contents[1]
        case _:
            return None, None
