"""math_reward: which answers count, and what is read as the answer."""

import threading

import pytest

from entropy_trl.rewards import final_answer, math_reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{34}.", "34"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),  # escaped braces are text
        ("\\boxed{7} and \\boxed{8", "7"),  # the last box is never closed
        ("\\boxed{7}\nAnswer: 8", "7"),  # a box goes before the line
        ("Answer: 3\nAnswer: 4", "4"),
        ("**Answer:** $34$.", "$34$"),
        ("Answer: 5\nand some more", "5"),
        ("Answer: 5 Answer: 6", "6"),
        ("Answer:\n7", ""),  # the answer is asked for on the same line
        ("34", ""),
        ("", ""),
        ("\\boxed{}", ""),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "solution", "reward"),
    [
        ("Answer: 34", "34", 1.0),
        ("Answer: 34.0", "34", 1.0),
        ("Answer: $34$", "34", 1.0),
        ("Answer: -3", "-3", 1.0),
        ("Answer: 3", "-3", 0.0),
        ("Answer: 1,000", "1000", 1.0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("\\boxed{1 + x^2}", "x^2 + 1", 1.0),
        ("\\boxed{35}", "34", 0.0),
        # Hedging earns nothing: the answer is one expression, not any number in it.
        ("34 is it. Answer: 35", "34", 0.0),
        ("Answer: 33 or 34", "34", 0.0),
        ("Answer: 33, 34", "34", 0.0),
        ("Answer: 1 2 34", "34", 0.0),
        # Nothing to compare.
        ("34", "34", 0.0),
        ("", "34", 0.0),
        ("Answer: ", "34", 0.0),
        ("Answer: }{ \\frac", "34", 0.0),
        ("Answer: thirty-four", "34", 0.0),
        ("Answer: \x00\ufffd", "34", 0.0),
        ("Answer: 34", "", 0.0),
    ],
)
def test_reward(text, solution, reward):
    assert math_reward([text], [solution]) == [reward]


def test_conversations_other_columns_and_numbers():
    """The last message of a conversation counts; TRL passes every other column as well; solutions may be numbers."""
    completions = [
        [{"role": "assistant", "content": "Answer: 3"}],
        [{"role": "assistant", "content": "Answer: 3"}, {"role": "assistant", "content": "Answer: 4"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "Answer: 3"}]}],
        [{"role": "assistant", "content": None}],
    ]
    assert math_reward(completions, solution=[3, 3, 3, 3], prompts=["?"] * 4, ability=["MATH"] * 4) == [1, 0, 1, 0]


def test_length_mismatch_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        math_reward(["Answer: 3"], solution=["3", "4"])


def test_works_outside_the_main_thread():
    """math-verify's default time limits raise ValueError there."""
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(math_reward(["\\boxed{1/2}", "x"], ["0.5", "1"])))
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0]
