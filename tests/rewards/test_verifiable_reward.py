"""One reward for rows of mathematics and of programs."""

import json
from collections import defaultdict

import pytest

from entropy_trl.rewards import VerifiableReward, math_reward, verifiable_reward
from entropy_trl.rewards.code import CODE_FORMATS, CodeReward
from entropy_trl.templates import CODE_FORMATS as TEMPLATE_FORMATS


TESTS = json.dumps({"kind": "asserts", "cases": ["assert f(1) == 2", "assert f(2) == 4"]})
RIGHT, HALF = "```python\ndef f(x):\n    return 2 * x\n```", "```python\ndef f(x):\n    return 2\n```"


def rows(**changes):
    return {
        "completions": [RIGHT, "\\boxed{4}", HALF, "\\boxed{5}"],
        "prompts": ["f", "2 + 2", "f", "2 + 2"],
        "tests": [TESTS, None, TESTS, ""],
        "solution": [None, "4", None, "4"],
        "answer_format": [None, "boxed", None, "boxed"],
        "code_format": ["fenced", None, "fenced", None],
        "data_source": ["mbpp", "gsm8k", "mbpp", "gsm8k"],
    } | changes


def test_each_row_goes_to_its_reward():
    metrics, extras = defaultdict(list), {}
    rewards = verifiable_reward(
        **rows(), log_metric=lambda name, value: metrics[name].append(value), log_extra=extras.__setitem__
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0]
    assert extras["final_answer"] == [None, "4", None, "5"]  # a value for each completion
    assert [outcome is None for outcome in extras["code_outcome"]] == [False, True, False, True]
    assert (metrics["verifiable_reward/math"], metrics["verifiable_reward/code"]) == ([1.0, 0.0], [1.0, 0.0])
    assert metrics["math_reward/no_answer"] == [0.0]  # of its own rows: programs have no answer
    assert metrics["code_reward/no_program"] == [0.0]
    assert metrics["math_reward/gsm8k"] == [1.0, 0.0]
    assert metrics["code_reward/mbpp"] == [1.0, 0.0]
    assert "math_reward/mbpp" not in metrics


def test_a_batch_of_one_kind_logs_the_columns_of_both():
    extras = {}
    given = {"completions": ["\\boxed{4}"] * 2, "tests": [None] * 2, "solution": ["4"] * 2}
    assert verifiable_reward(**given, log_extra=extras.__setitem__) == [1.0] * 2
    assert extras == {"final_answer": ["4"] * 2, "code_outcome": [None] * 2}
    assert verifiable_reward(["\\boxed{4}"], solution=["4"]) == [1.0]  # no tests in the data at all
    assert verifiable_reward([], tests=[], solution=[]) == []


def test_the_verifier_goes_before_the_tests():
    given = {"completions": ["\\boxed{4}"], "tests": [TESTS], "solution": ["4"]}
    assert verifiable_reward(**given) == [0.0]
    assert verifiable_reward(**given, verifier=["math"]) == [1.0]
    assert verifiable_reward(**given, verifier=["code"]) == [0.0]


def test_other_rewards():
    reward = VerifiableReward(math_reward, CodeReward(partial=True))
    assert reward(**rows()) == [1.0, 1.0, 0.5, 0.0]
    assert reward.__name__ == "verifiable_reward"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"solution": [None] * 4}, "Row 1 of the batch has no tests and no solution"),
        ({"solution": None}, "Row 1 of the batch has no tests and no solution"),
        ({"verifier": [None, "code", None, None]}, "Row 1 of the batch has no tests:"),
        ({"verifier": [None, None, "rule", None]}, "Row 2 of the batch has the verifier 'rule'"),
    ],
)
def test_rows_that_cannot_be_judged(changes, expected):
    with pytest.raises(ValueError, match=expected):
        verifiable_reward(**rows(**changes))


def test_templates_ask_for_formats_that_the_reward_reads():
    assert TEMPLATE_FORMATS == CODE_FORMATS
