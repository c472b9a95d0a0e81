"""Prompt templates: what they make of a problem, and recognising their wording in ready prompts."""

import pytest

from entropy_trl.rewards import final_answer
from entropy_trl.smoke import dapo_math_sample
from entropy_trl.templates import ANSWER_FORMATS, TEMPLATES, PromptTemplate, bare_problem, get_template, recognise


PROBLEM = "Let $S = \\{1, \\ldots, 9\\}$.\n\nHow many {problems} has it?"


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_problem_is_put_in_and_found_again(template):
    messages = template.messages(PROBLEM)
    assert [message["role"] for message in messages] == (["user"] if template.system is None else ["system", "user"])
    assert PROBLEM in messages[-1]["content"]
    assert template.problem_in(messages) == PROBLEM
    assert bare_problem(messages) == PROBLEM
    assert template.answer_format in ANSWER_FORMATS
    if template.name != "raw":
        assert recognise(messages) == (template, PROBLEM)


def test_wording_and_answer_format_agree():
    """The answer is read where the words ask for it."""
    for template in TEMPLATES.values():
        words = template.user + (template.system or "")
        assert ("\\boxed{}" in words) == (template.answer_format == "boxed"), template.name
        assert ("Answer:" in words) == (template.answer_format == "answer_line"), template.name
    assert "<think> </think> and <answer> </answer>" in TEMPLATES["r1_zero"].system


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("r1_zero", "<think> 3 + 4 </think> <answer> It is \\boxed{7}. </answer>"),
        ("qwen_boxed", "So it is \\boxed{7}."),
        ("dapo", "3 + 4 = 7.\nAnswer: 7"),
        ("raw", "Answer: 7"),
        ("raw", "\\boxed{7}"),
    ],
)
def test_the_reward_finds_an_answer_of_that_format(template, completion):
    assert final_answer(completion, TEMPLATES[template].answer_format) == "7"


def test_real_prompts_are_recognised():
    for prompt in dapo_math_sample()["prompt"]:
        template, problem = recognise(prompt)
        assert template is TEMPLATES["dapo"]
        assert template.messages(problem) == prompt
        assert "Answer" not in problem
        assert recognise(prompt[0]["content"]) == (template, problem)  # as a text, too


def test_what_is_no_known_wording():
    assert recognise(user("1 + 1?")) is None
    assert recognise("1 + 1?") is None
    assert recognise([*user(TEMPLATES["dapo"].messages("?")[0]["content"]), *user("more")]) is None
    # Half of a wording, and the halves with nothing between them, overlapping.
    before, _ = TEMPLATES["dapo"].user.split("{problem}")
    assert recognise(user(before + "1 + 1?")) is None
    assert PromptTemplate("x", None, "aba{problem}aba", "any").problem_in(user("ababa")) is None
    # R1-Zero's user message after another system message.
    other = [{"role": "system", "content": "Be brief."}, TEMPLATES["r1_zero"].messages("?")[1]]
    assert recognise(other) is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("1 + 1?", "1 + 1?"),
        (user("1 + 1?"), "1 + 1?"),
        ([{"role": "system", "content": "You are a helpful assistant."}, *user("1 + 1?")], "1 + 1?"),
        ([{"role": "system", "content": "Put it in \\boxed{}."}, *user("1 + 1?")], None),
        (user("1 + 1? Put it in \\boxed{}."), None),
        (user("1 + 1? End with Answer: $Answer."), None),
        ("1 + 1? Write <answer> and </answer> around it.", None),
        ([*user("1 + 1?"), {"role": "assistant", "content": "2"}, *user("2 + 2?")], None),
        (user([{"type": "text", "text": "1 + 1?"}]), None),
        (user(None), None),
    ],
)
def test_bare_problem(prompt, expected):
    assert bare_problem(prompt) == expected


def test_a_text_is_a_template_of_its_own():
    template = get_template("Solve {problem}!")
    assert template.messages("x") == user("Solve x!")
    assert template.answer_format == "any"
    assert get_template("dapo") is TEMPLATES["dapo"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Solve!", r"has no '\{problem\}' .* r1_zero, qwen_boxed, dapo, raw"),
        ("r1zero", r"has no '\{problem\}' .* r1_zero, qwen_boxed, dapo, raw"),
        ("{problem} {problem}", r"more than one '\{problem\}'"),
    ],
)
def test_mistaken_templates(text, expected):
    with pytest.raises(ValueError, match=expected):
        get_template(text)
    with pytest.raises(ValueError, match="answer_format 'box' is not one of 'boxed', 'answer_line'"):
        PromptTemplate("mine", None, "{problem}", "box")
