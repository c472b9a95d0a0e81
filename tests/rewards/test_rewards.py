"""math_reward: what is read as the answer, which answers count, and processes that hang, crash and end."""

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from entropy_trl import CovGRPOTrainer
from entropy_trl.quickstart.task import build_dataset, build_tokenizer
from entropy_trl.rewards import ANSWER_FORMATS, MathReward, accepts_itself, final_answer, math_reward
from entropy_trl.rewards.equality import compare, verify


ROOT = Path(__file__).parents[2]
ENDLESS = "\\boxed{x^{999}}"  # where `endless_workers` is used
HARD = ("\\boxed{x + 1}", "1 + x")  # right, and a worker is needed to tell


def box(answer):
    return f"\\boxed{{{answer}}}"


def workers_of(process=None):
    """The worker processes of a process, by default this one."""
    children = psutil.Process(process).children()
    return [child for child in children if "entropy_trl.rewards.worker" in child.cmdline()]


def is_running(pid):
    """Not ended: an orphan that nobody waits for stays a zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


#: Nothing but a limit from outside ends this comparison: the arithmetic holds Python's lock.
HANG = """
    from entropy_trl.rewards import equality

    verify = equality.verify
    equality.verify = lambda answer, reference: str(9**9**9**9) if answer == "x^{999}" else verify(answer, reference)
"""


@pytest.fixture
def endless_workers(tmp_path, monkeypatch):
    """Worker processes hang in `ENDLESS`. No comparison does by itself, so they import a start-up file that does."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(HANG))
    monkeypatch.syspath_prepend(tmp_path)  # the workers find what this process finds
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # and so do those of a script


# What is read as the answer


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
    ("text", "boxed", "answer_line", "answer_tag", "any_"),
    [
        ("\\boxed{1}\nAnswer: 2\n<answer>3</answer>", "1", "2", "3", "3"),
        ("\\boxed{1}\nAnswer: 2", "1", "2", "", "1"),
        ("Answer: 2", "", "2", "", "2"),
        ("<think>\\boxed{4}</think><answer>\\boxed{5}</answer>", "5", "", "5", "5"),
        ("<answer>1</answer> no, <answer> 2\n</answer>", "", "", "2", "2"),
        ("<answer>1</answer> no, <answer>2", "", "", "1", "1"),  # the last tag is never closed
        ("</answer>1<answer>", "", "", "", ""),
        ("So \\boxed{1}. Answer: \\boxed{2}", "2", "2", "", "2"),  # a box on the line
        ("**Answer**: 7", "", "7", "", "7"),
        ("Six plus one.\nA: 7", "", "7", "", "7"),  # GSM8K
        ("A: 7\nB: 8", "", "", "", ""),  # a list of choices
        ("A: 7\nAnswer: 8", "", "8", "", "8"),
        ("7", "", "", "", ""),
        # Several boxes are one answer where a conjunction joins them; else the last one counts.
        ("\\boxed{1} and \\boxed{2}", "1, 2", "", "", "1, 2"),
        ("$\\boxed{1}$, $\\boxed{2} \\text{ or } \\boxed{3}$", "1, 2, 3", "", "", "1, 2, 3"),
        ("$x = \\boxed{1}$ and $y = \\boxed{2}$", "1, 2", "", "", "1, 2"),
        ("\\boxed{1} no no no no no \\boxed{2}", "2", "", "", "2"),
        ("\\boxed{x=2}, so it is \\boxed{2}", "2", "", "", "2"),
        ("\\boxed{2}.\n\n\\boxed{2}", "2", "", "", "2"),
        ("\\boxed{1}. Or rather, \\boxed{2}", "2", "", "", "2"),
        ("\\boxed{\\boxed{3}}", "3", "", "", "3"),
        ("\\\\boxed{3}", "3", "", "", "3"),  # backslashes escaped once more
        ("\\fbox{3} \\boxed {4}", "4", "", "", "4"),
        ("so \\fbox{\\frac{1}{2}}.", "\\frac{1}{2}", "", "", "\\frac{1}{2}"),
        ("Answer\uff1a 34", "", "34", "", "34"),
        ("} { \\boxed{\\{3\\}}", "\\{3\\}", "", "", "\\{3\\}"),
    ],
)
def test_answer_formats(text, boxed, answer_line, answer_tag, any_):
    """A text gives its answer in the format that its template asks for, and in no other."""
    expected = {"boxed": boxed, "answer_line": answer_line, "answer_tag": answer_tag, "any": any_}
    assert {name: final_answer(text, name) for name in ANSWER_FORMATS} == expected


def test_unknown_format():
    with pytest.raises(ValueError, match="no answer_format 'box': use one of boxed, answer_line, answer_tag, any"):
        math_reward(["\\boxed{1}"], ["1"], answer_format="box")


def test_the_formats_are_those_of_the_templates():
    from entropy_trl import templates

    assert set(ANSWER_FORMATS) == set(templates.ANSWER_FORMATS)


def test_the_format_is_a_column():
    text = "\\boxed{1}\nAnswer: 2\n<answer>3</answer>"
    formats = ["boxed", "answer_line", "answer_tag", "any", None]
    assert math_reward([text] * 5, ["1", "2", "3", "3", "3"], answer_format=formats) == [1.0] * 5
    assert math_reward([text] * 5, ["2", "3", "1", "1", "1"], answer_format=formats) == [0.0] * 5
    assert math_reward([text] * 2, ["1", "2"], answer_format="boxed") == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 14_000,
        "{" * 100_000,
        "\\" * 100_000,
        "\\boxed{1}," * 10_000,
        "\\boxed{" + "9" * 100_000 + "}",
        "Answer: " * 12_500,
        "answer" + " " * 100_000,
        "\nA:" + " " * 100_000 + "\nx",
        "<answer>" * 12_500 + "</answer>",
        "x" * 100_000 + "\\boxed{" + "(" * 900 + "}",
    ],
    ids=lambda text: text[:10].replace("\n", ""),
)
def test_long_texts_take_no_time(text):
    start = time.monotonic()
    assert math_reward([text] * 4, ["34"] * 4, answer_format=ANSWER_FORMATS) == [0.0] * 4
    assert time.monotonic() - start < 30  # the last one parses until the time limit; quadratic time would be minutes


# Which answers count


EQUAL = {
    "2": r"2.|$2$|\(2\)|**2**|x=2|02|+2|2.0|\mathbf{2}|\text{2}|{2}|(2)|\frac{4}{2}"
    r"|x = \frac{4}{2} = 2|x \approx 2|2!|f(1)=2",
    "-2": "\u22122|- 2|\u20132",
    "1000": r"1,000|1{,}000|1\,000|1 000|1.0 \times 10^3|1e3|1E+3|10^3|1,000.00|\$1,000",
    "2.7778e-6": r"2.7778 \times 10^{-6}|2.7778e-6|2.7778 \cdot 10^{-6}",
    "18": r"\$18|$18.00|€18|18 eggs|18 dollars|18\text{ cm}|18 \mathrm{~cm}^2|18cm|18 \text{ m/s}|18^{\circ}|18°|18\%",
    r"145^\circ": "145|145°|145^{\\circ}",
    r"\frac{1}{2}": r"\dfrac{1}{2}|\tfrac12|\frac1{2}|1/2|0.5|.5|\frac{2}{4}|50\%|50 percent|\frac{50}{100}",
    r"50\%": "50|0.5|50%|1/2",
    "0.333333": r"\frac{1}{3}",
    r"\frac{40}{9}": r"4\frac{4}{9}|4 \frac{4}{9}|4 4/9",
    r"-\frac{7}{2}": r"-3\frac{1}{2}|\frac{-7}{2}|-3.5",
    r"\sqrt{2}": r"\sqrt 2|2^{1/2}",
    "1,2": r"2,1|\{2,1\}|1 \text{ and } 2|2 or 1|x=1, x=2|x=2 \text{ or } x=1",
    r"1 \pm \sqrt{2}": r"1-\sqrt{2}, 1+\sqrt{2}",
    "(1,2)": r"(1, 2)|(x,y)=(1,2)|x=1,y=2|\left(1,2\right)",
    "(1,2),(3,4)": "(3,4),(1,2)",
    r"(-\infty,1)\cup(2,\infty)": r"(2,\infty) \cup (-\infty,1)",
    "[1,2)": r"\left[1,2\right)",
    "x=5": "5|x=5",
    "y=2x+1": "2x+1|y=1+2x",
    "x^2+2x+1": "(x+1)^2",
    "6+9i": "9i+6",
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}",
    "A": r"(A)|\text{A}|\textbf{(A)}|A.",
    r"\text{(A)}": "A",
    r"\text{Evelyn}": r"Evelyn|evelyn|\text{ Evelyn }",
    "Yes": r"\text{yes}",
    "110_2": "110_{2}",
    "$18 \\sqrt{6}$": r"18\sqrt6",
    r"so it is \boxed{7}.": "7",
    "1500000": r"1.5 million|\$1.5 \text{ million}|1.5\text{ Million dollars}|1500 thousand|15 hundred thousand",
    r"\$3 \text{ million}": "3 million|3,000,000",
    r"\emptyset": r"\varnothing|∅|\{\}",
    r"\{1,2\}": r"2,1|\{2, 1\}",
    r"\{(1,2),(3,4)\}": "(1,2),(3,4)",
}


@pytest.mark.parametrize("solution", EQUAL)
def test_other_ways_to_write_it(solution):
    answers = EQUAL[solution].split("|")
    rewards = math_reward([box(answer) for answer in answers], [solution] * len(answers), answer_format="boxed")
    assert dict(zip(answers, rewards, strict=True)) == dict.fromkeys(answers, 1.0)


DIFFERENT = {
    # Several guesses, or a guess among other text.
    "2": r"1 or 2|2 or 3|1,2,3|2, 3|1 \quad 2|2 \\ 3|1 2|\{1,2\}|(1,2)|[1,2]|\pm 2|1 \lor 2|x=1,x=2|x=1 \text{ or } x=2"
    r"|2 \text{ (or 3)}|2 \text{ or so}|2 \text{ maybe } 3 \text{ cm}|\text{1 or 2}|1=2|x=1=2|x \in \{1,2\}"
    r"|1 \le x \le 2|\ne 2|\neg 2|\le 2|1 \to 2|two"
    r"|the answer is not 2|How many of the 2 apples are left?|2 apples and 3 pears|2,\ldots"
    r"|| |{}|\|$|x|2x|\boxed{}|3{,}000|2.0000001|1.9999999|\begin{cases}2\\3\end{cases}|2 m|-2|20\%",
    # math-verify adds up numbers that stand side by side.
    "5": r"2 \quad 3|2 3|(2)(3)|2(3)|2\,3",
    # and looks for a variable's unit, drops an ellipsis, and multiplies letters.
    "2t": "2|2s",
    "1,2": r"1,2,\ldots|1|1,2,3",
    "No": "On|Not",
    r"\text{even}": r"\text{odd}|neve|even or odd|\text{even or odd}",
    "A": r"B|a|A,B|A \text{ or } B|AB|A. 5|(B) A",
    "0": r"|10^{-9}|0.0000001|\emptyset",
    "2.7778e-6": "0|3e-6|2.77e-6|2.7778",
    "1000": "1.000|1,00|1,0000|1 00",
    "0.5": r"0.5\%|5\%|.05",
    r"\frac{1}{3}": "0.33|0.3333|0.333333|33\\%",
    r"\frac{3}{2}": r"3\frac{1}{2}|1 3/6 6",
    "12": "11 6/6",
    "1500": "15 hundred thousand|15 thousand hundred",
    "3": "3 million|3 thousand|3 dozen|3 halves|3 squared|3 factorial|3 Million|3 hundredths",
    "(1,2)": r"(2,1)|[1,2]|(1,2]|2,1|(1,2,3)|\{1,2\}",
    r"\{1,2\}": "(1,2)|(2,1)|[2,1]",
    "(1,2),(3,4)": "(1,2)|(2,1),(3,4)|(1,2),(4,3)",
    "[1,2)": "(1,2)|[1,2]",
    "x=5": "y=5|x=6|6",
    "x^2+1": "y^2+1|x^2",
    "6+9i": "6-9i",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}|1,2",
    "110_2": "110_3|6|110",
    r"\frac{1}{2}": r"\frac{1}{2|\frac{2}{1}",
}


@pytest.mark.parametrize("solution", DIFFERENT)
def test_what_is_not_it(solution):
    answers = DIFFERENT[solution].split("|")
    rewards = math_reward([box(answer) for answer in answers], [solution] * len(answers), answer_format="boxed")
    assert dict(zip(answers, rewards, strict=True)) == dict.fromkeys(answers, 0.0)


def test_labelled_answers():
    """Answers of public reports and our own: none is wrongly accepted, and none of the right ones is rejected."""
    text = (ROOT / "tests" / "rewards" / "answers.jsonl").read_text(encoding="utf-8")
    cases = [json.loads(line) for line in text.split("\n") if line]
    columns = [[case[name] for case in cases] for name in ("completion", "solution", "answer_format")]
    rewards = math_reward(*columns)
    pairs = zip(cases, rewards, strict=True)
    assert len(cases) > 600
    assert [(case["solution"], case["completion"]) for case, reward in pairs if reward != case["expected"]] == []


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
        # A row without an answer.
        ("Answer: None", None, 0.0),
        ("Answer: nan", float("nan"), 0.0),
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
        [{"role": "assistant", "content": [{"type": "text", "text": None}]}],
    ]
    assert math_reward(completions, solution=[3] * 5, prompts=["?"] * 5, ability=["MATH"] * 5) == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "space", [*map(chr, (0x0B, 0x0C, 0x85, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x205F, 0x3000))]
)
def test_any_white_space_after_a_sign(space):
    assert math_reward([box(f"-{space}7"), box(f"-{space}7"), f"Answer: +{space}4"], ["-7", "8", "5"])[1:] == [0, 0]


@pytest.mark.parametrize("completion", [[], [{"role": "assistant", "tool_calls": []}], [{"content": ["Answer: 4"]}]])
def test_a_conversation_without_content_raises_nothing(completion):
    assert math_reward([completion], ["3"]) == [0.0]


@pytest.mark.parametrize(
    ("solution", "answer_format", "expected"),
    [
        ("34", "boxed", True),
        (34, "answer_line", True),
        ("-1.50", "answer_tag", True),
        ("\\frac{1}{2}", "answer_tag", True),
        ("so \\boxed{x+1}", "any", True),
        ("", "boxed", False),
        (None, "boxed", False),
        (float("nan"), "boxed", False),
        ("}{", "boxed", False),
        ("a\nb", "answer_line", False),
        ("9" * 1001, "boxed", False),
    ],
)
def test_accepts_itself(solution, answer_format, expected):
    assert accepts_itself(solution, answer_format) is expected


@pytest.mark.parametrize("path", ["tests/rewards/answers.jsonl", "src/entropy_trl/sample_data/dapo_math_sample.jsonl"])
def test_every_reference_accepts_itself(path):
    rows = [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").split("\n") if line]
    references = {row["solution"] if "solution" in row else row["reward_model"]["ground_truth"] for row in rows}
    assert [reference for reference in references if not accepts_itself(reference)] == []
    boxed = [box(reference) for reference in references]
    assert math_reward(boxed, list(references), answer_format="boxed") == [1.0] * len(references)


def test_length_mismatch_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        math_reward(["Answer: 3"], solution=["3", "4"])


def test_an_answer_is_as_right_alone_as_in_a_batch():
    """Equal pairs are compared once; order and number stay."""
    completions = [box("x+1"), box("1"), box("x+1"), "", box("x+2"), box("x+1")]
    solution = ["1+x", "1", "1+x", "1", "1+x", "x"]
    assert math_reward(completions, solution) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert math_reward([], []) == []


# Processes


def test_imports_no_torch():
    code = (
        "import sys, entropy_trl.rewards as r; r.math_reward([], []); print([m for m in sys.modules if 'torch' in m])"
    )
    code += "; print('trl' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False False"]


def test_a_comparison_that_hangs(endless_workers):
    """It earns nothing, is counted, and delays no other one by more than its limit."""
    metrics = {}
    reward = MathReward(workers=2, time_limit=1.5)
    completions = [HARD[0], ENDLESS, *(box(f"x + {n}") for n in range(6)), ENDLESS, "none", box("x+")]
    solution = [HARD[1], "2", *(f"{n} + x" for n in range(6)), "3", "2", "x"]
    rewards = reward(completions, solution, log_metric=metrics.__setitem__)
    assert rewards == [1.0, 0.0, *[1.0] * 6, 0.0, 0.0, 0.0]
    expected = {"no_answer": 1 / 11, "unparsed": 1 / 11, "timeouts": 2 / 11, "crashes": 0.0}
    assert metrics == pytest.approx({f"math_reward/{name}": value for name, value in expected.items()})
    start = time.monotonic()
    assert reward(*zip(HARD, strict=True)) == [1.0]  # the workers were replaced
    assert time.monotonic() - start < 30


def test_works_in_threads(endless_workers):
    """math-verify's own time limits raise ValueError there."""
    reward = MathReward(workers=2, time_limit=20)

    def call(n):
        return reward([box(f"x + {n}"), box("x"), ENDLESS if n == 2 else "0"], [f"{n} + x", "y", "2"])

    reward.time_limit = reward._pool.time_limit = 1.0
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, range(8))) == [[1.0, 0.0, 0.0]] * 8


def test_a_fault_of_the_comparison_is_counted(monkeypatch):
    """It is not one of the errors that unusual answers raise: it doesn't end a training, but it is no wrong answer."""
    monkeypatch.setattr("entropy_trl.rewards.equality.tokenize", None)
    assert compare("x+1", "1+x") is None
    with pytest.raises(TypeError):
        verify("x+1", "1+x")


def test_a_worker_that_is_killed(endless_workers):
    """While it compares: the sample earns nothing and is counted. While it is idle: nobody notices."""
    reward = MathReward(workers=1, time_limit=600)
    assert reward(*zip(HARD, strict=True)) == [1.0]
    (worker,) = [child for child in workers_of() if child.cmdline()[-1] == "600.0"]
    metrics = {}
    killer = threading.Timer(1.0, worker.kill)
    killer.start()
    completions, solution = zip((ENDLESS, "2"), HARD, strict=True)
    assert reward(completions, solution, log_metric=metrics.__setitem__) == [0.0, 1.0]
    assert metrics["math_reward/crashes"] == 0.5 and metrics["math_reward/timeouts"] == 0
    (replaced,) = [child for child in workers_of() if child.cmdline()[-1] == "600.0"]
    assert replaced.pid != worker.pid and not worker.is_running()
    replaced.kill()
    wait_until(lambda: not is_running(replaced.pid))
    assert reward([box("x + 2")], ["2 + x"], log_metric=metrics.__setitem__) == [1.0]
    assert metrics["math_reward/crashes"] == 0


def test_an_interrupted_call_leaves_no_stale_reply(endless_workers):
    """Ctrl-C while workers compare: the next call must not read the replies to this one."""
    reward = MathReward(workers=1, time_limit=60)
    assert reward(*zip(HARD, strict=True)) == [1.0]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            reward([ENDLESS], ["2"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert reward([box("y"), HARD[0]], ["x", HARD[1]]) == [0.0, 1.0]


def test_workers_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # they find no math-verify, as on a broken installation
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="3 in a row have ended or hung"):
        MathReward(workers=2)(*zip(HARD, strict=True))


def test_a_forked_process_starts_its_own_workers():
    reward = MathReward(workers=1)
    assert reward(*zip(HARD, strict=True)) == [1.0]
    before = {worker.pid for worker in workers_of()}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(reward([box("x + 3")], ["3 + x"]) != [1.0] or bool({w.pid for w in workers_of()} & before))
            [worker.kill() for worker in workers_of()]
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reward([box("x + 4")], ["4 + x"]) == [1.0]
    assert before <= {worker.pid for worker in workers_of()}  # the parent's are untouched


def test_in_process(monkeypatch):
    monkeypatch.setenv("ENTROPY_TRL_REWARD_WORKERS", "0")
    before = len(workers_of())
    reward = MathReward()
    assert reward.workers == 0
    assert reward([HARD[0], box("y")], [HARD[1], "x"]) == [1.0, 0.0]
    assert len(workers_of()) == before


def test_in_process_in_threads():
    """Each comparison has the digits that it asks for, whatever another thread compares meanwhile."""
    reward = MathReward(workers=0)
    near = [(rf"1+2^{{-{200 + n}}}\\sqrt{{2}}", rf"1+2^{{-{200 + n}}}\\sqrt{{3}}") for n in range(8)]
    same = [(rf"(x+\\sqrt{{{n + 2}}})^2", rf"x^2+2\\sqrt{{{n + 2}}}x+{n + 2}") for n in range(8)]
    cases = [case for pair in zip(near, same, strict=True) for case in pair] * 8
    with ThreadPoolExecutor(8) as threads:
        rewards = list(threads.map(lambda case: reward([box(case[0])], [case[1]])[0], cases))
    assert rewards == [0.0, 1.0] * 64


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "^".join("9" * 400),
        "(10^6)!",
        "((3!)!)!",
        r"\binom{10^9}{5 \cdot 10^8}",
        r"(1/3)!+10^{300}",
        "1e999" * 150,
        r"\pi^{10^9}+x^{10^{10}}",
        "0.\\overline{" + "1" * 900 + "}",
        "5" + " million" * 120,
        ",".join([r"\pm1\pm1\pm1\pm1"] * 60),
        ",".join(rf"\sqrt{{{n}}}" for n in range(55)),
        "+".join([r"10^{600}\sin(n!)"] * 50),
        "(a+b)^{1000}" * 80,
        r"\log_{10^{900}}(\pi)",
        "n!" * 400,
        r"\sum_{k=1}^{10^9} k",
        "\\sqrt" * 190 + "2",
        "(" * 499 + "1" + ")" * 499,
        "-" * 999 + "1",
        "x" * 1000,
        r"\begin{cases}" * 30 + "1" + r"\end{cases}" * 30,
        r"\frac{" * 100 + "1" + "}{2}" * 100,
    ],
    ids=lambda answer: answer[:12],
)
def test_no_answer_takes_long_without_workers(answer):
    """It is a wrong answer at once, with no limit from outside, whatever it is compared with."""
    references = ["9", "x", r"\sqrt2+x", "2," + answer, answer + "+2"]
    start = time.monotonic()
    assert MathReward(workers=0)([box(answer)] * 5, references, answer_format="boxed") == [0.0] * 5
    assert time.monotonic() - start < 30  # 0.1 s each on an idle machine; without a bound it never ends


def test_settings(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    monkeypatch.delenv("ENTROPY_TRL_REWARD_WORKERS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (MathReward().workers, MathReward().time_limit) == (4, 5.0)
    for processes, workers in {"8": 2, "16": 1, "64": 1}.items():
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert MathReward().workers == workers
    monkeypatch.setenv("ENTROPY_TRL_REWARD_WORKERS", "3")
    monkeypatch.setenv("ENTROPY_TRL_REWARD_TIME_LIMIT", "0.5")
    assert (MathReward().workers, MathReward().time_limit) == (3, 0.5)
    with pytest.raises(ValueError, match="workers >= 0"):
        MathReward(workers=-1)


def test_copies_have_workers_of_their_own():
    reward = MathReward(workers=1, time_limit=2.5)
    reward(*zip(HARD, strict=True))
    copied = pickle.loads(pickle.dumps(reward))
    assert (copied.workers, copied.time_limit, copied.__name__) == (1, 2.5, "math_reward")
    assert copied(*zip(HARD, strict=True)) == [1.0]
    assert pickle.loads(pickle.dumps(math_reward)) is math_reward
    pids = [child.pid for child in workers_of() if child.cmdline()[-1] == "2.5"]
    assert len(pids) == 2
    del reward, copied
    assert not any(map(psutil.pid_exists, pids))


#: No `if __name__ == "__main__"`: the workers do not import the script.
SCRIPT = """
    import os, signal, sys, threading, time
    from entropy_trl.rewards import MathReward, math_reward
    os.environ["ENTROPY_TRL_REWARD_WORKERS"] = "2"
    right = [(r"\\boxed{x + %d}" % n, "%d + x" % n) for n in range(4)]
    print(math_reward(*zip(*right)), flush=True)
    import psutil
    print([child.pid for child in psutil.Process().children()], flush=True)
"""


def start(code, *arguments, command=(), **options):
    script = textwrap.dedent(SCRIPT) + textwrap.dedent(code)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, *(command or ["-c", script]), *arguments], **options)


def read(process):
    """The rewards and the workers that a script prints."""
    return json.loads(process.stdout.readline()), json.loads(process.stdout.readline())


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('boom')", 1),
        ("threading.Thread(target=math_reward, args=([r'\\boxed{y}'], ['x'])).start()", 0),
        (f"threading.Thread(target=math_reward, args=([r'{ENDLESS}'], ['2']), daemon=True).start(); time.sleep(1)", 0),
    ],
    ids=["end", "exit", "error", "thread", "busy"],
)
def test_the_interpreter_ends_and_takes_its_workers_along(endless_workers, code, exit_code):
    process = start(code)
    rewards, pids = read(process)
    assert rewards == [1.0] * 4 and pids
    _, errors = process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert not any(map(psutil.pid_exists, pids))  # no zombie either
    assert "Exception ignored" not in errors and "ResourceWarning" not in errors


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_outlive_no_parent(endless_workers, signal_number):
    """Idle ones end at once, and one that is busy with what holds Python's lock shortly after its time limit."""
    environment = os.environ | {"ENTROPY_TRL_REWARD_TIME_LIMIT": "2"}
    process = start(f"print(math_reward([r'{ENDLESS}'], ['2']), flush=True)", env=environment)
    _, pids = read(process)
    time.sleep(0.5)  # it is at it
    process.send_signal(signal_number)
    assert process.wait(10) == -signal_number
    wait_until(lambda: not any(map(is_running, pids)), seconds=20)
    process.communicate()


def test_torchrun(tmp_path):
    """Each process has workers of its own; the script is imported by none of them."""
    # A file for each process: what two processes print comes out mixed.
    redirect = f"import os, sys; sys.stdout = open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w')\n"
    (tmp_path / "job.py").write_text(redirect + textwrap.dedent(SCRIPT))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", str(tmp_path / "job.py")]
    process = start("", command=command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    printed = [[json.loads(line) for line in (tmp_path / str(rank)).read_text().splitlines()] for rank in range(2)]
    assert all(rewards == [1.0] * 4 for rewards, _ in printed)
    pids = [pid for _, workers in printed for pid in workers]
    assert len(pids) == len(set(pids)) >= 2 and not any(map(is_running, pids))


# In a trainer


def test_metrics_of_a_trainer(tiny_model, make_config):
    """TRL calls it with the columns of the data and logs the shares, and the mean reward of each source."""
    rows = build_dataset(64)
    count = len(rows)
    rows = rows.remove_columns([name for name in rows.column_names if name != "prompt"])
    rows = rows.add_column("solution", ["1"] * count).add_column("answer_format", ["boxed"] * count)
    rows = rows.add_column("data_source", [("easy", "hard")[n % 2] for n in range(count)])
    trainer = CovGRPOTrainer(
        model=tiny_model,
        reward_funcs=math_reward,
        args=make_config(max_steps=1, log_completions=False),
        train_dataset=rows,
        processing_class=build_tokenizer(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/math_reward/mean"] == 0.0
    assert logged["math_reward/no_answer"] == 1.0
    assert logged["math_reward/timeouts"] == logged["math_reward/crashes"] == logged["math_reward/unparsed"] == 0.0
    assert logged.keys() & {"math_reward/easy", "math_reward/hard"}
    assert logged["math_reward/distinct_answers"] == 0.0


def test_distinct_answers_of_a_prompt():
    logged = []
    completions = [box("1/2"), box("0.5"), box("3"), box(" 3 "), "none", box(4), box(4), box(5)]
    prompts = [[{"role": "user", "content": text}] for text in "aaaaabbb"]
    arguments = {"log_metric": lambda name, value: logged.append((name, value)), "log_extra": lambda *_: None}
    math_reward(completions, ["0.5"] * 8, prompts=prompts, **arguments)
    # Two ways to write the right answer are one; a wrong one, twice, is one; no answer is none.
    assert [value for name, value in logged if name == "math_reward/distinct_answers"] == [2, 2]


def test_mean_reward_by_source():
    logged = []
    sources = ["easy", "hard", "easy", None]
    completions = [box(1), box(2), box(3), box(4)]
    arguments = {"log_metric": lambda name, value: logged.append((name, value)), "log_extra": lambda *_: None}
    math_reward(completions, ["1", "1", "1", "4"], data_source=sources, **arguments)
    assert [entry for entry in logged if entry[0] in ("math_reward/easy", "math_reward/hard")] == [
        ("math_reward/easy", 1.0),
        ("math_reward/hard", 0.0),
        ("math_reward/easy", 0.0),
    ]
    logged.clear()
    math_reward(completions, ["1", "1", "1", "4"], source=sources, **arguments)
    assert ("math_reward/hard", 0.0) in logged


def by_name(sources, reward=None):
    logged = {}
    arguments = {
        "log_metric": lambda name, value: logged.setdefault(name.removeprefix("math_reward/"), []).append(value)
    }
    (reward or MathReward(workers=0))([box(1)] * len(sources), ["1"] * len(sources), source=sources, **arguments)
    return logged


def test_sources_named_like_a_metric_do_not_mix_into_it():
    metrics = ["no_answer", "unparsed", "timeouts", "crashes", "distinct_answers", "other"]
    logged = by_name([*metrics, "source/timeouts", "source", "easy"])
    assert [logged[name] for name in ("no_answer", "unparsed", "timeouts", "crashes")] == [[0.0]] * 4
    assert "distinct_answers" not in logged and "other" not in logged  # no prompts are given, and no source is pooled
    named = [*(f"source/{name}" for name in metrics), "source/source/timeouts", "source", "easy"]
    assert [logged[name] for name in named] == [[1.0]] * len(named)


def test_most_sources_are_pooled(caplog):
    reward = MathReward(workers=0)
    frequent = [f"book {i}" for i in range(19)]
    logged = by_name([f"https://example.org/{i}" for i in range(900)] + frequent * 2, reward)
    assert len(logged) == 4 + 20 + 1
    assert all(logged[name] == [1.0] * 2 for name in frequent)
    assert len(logged["other"]) == 899
    by_name(["late", "book 3"], reward)
    assert set(by_name(["late", "book 3"], reward)) >= {"other", "book 3"}
    assert caplog.text.count("more than 20 sources") == 1
    assert "late" in by_name(["late"])  # another reward has names of its own


def test_overlong_punishment_follows_the_longest_completion(tmp_path):
    from entropy_trl.cli import parse_train_args
    from entropy_trl.cli.train_data import reward_functions

    script_args, *_ = parse_train_args(
        ["--config", str(ROOT / "configs/smoke/dapo_math.yaml"), "--reward_funcs", "get_soft_overlong_punishment"]
    )
    (punishment,) = reward_functions(script_args, 100)
    assert punishment(completion_ids=[[0] * length for length in (80, 90, 100)]) == [0.0, -0.5, -1.0]


# Recorded cases


@pytest.mark.skipif("ENTROPY_TRL_DATA" not in os.environ, reason="ENTROPY_TRL_DATA is not set")
@pytest.mark.parametrize("name", ["gsm8k_model_solutions", "math_verify_cases"])
def test_recorded_cases(name):
    """No wrong answer is accepted, and few right ones are rejected."""
    spec = importlib.util.spec_from_file_location("benchmark_rewards", ROOT / "benchmarks" / "rewards.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    cases = benchmark.read_cases(Path(os.environ["ENTROPY_TRL_DATA"]) / "reward_cases" / f"{name}.jsonl")
    cases = [case for group in cases.values() for case in group]
    labels = [case[2] for case in cases]
    ours = benchmark.our_reward(MathReward())(cases)
    assert [case for case, reward in zip(cases, ours, strict=True) if reward and not case[2]] == []
    theirs = [(reward or 0.0) for reward in benchmark.trl_reward(cases)]
    rejected = [
        sum(label and not reward for label, reward in zip(labels, rewards, strict=True)) for rewards in (ours, theirs)
    ]
    assert rejected[0] < rejected[1]
    # Many of the rejected ones are prose, chains with a wrong side, lists with other multiplicities, or rounded.
    assert rejected[0] <= {"gsm8k_model_solutions": 0, "math_verify_cases": 21}[name]


@pytest.mark.skipif("ENTROPY_TRL_DATA" not in os.environ, reason="ENTROPY_TRL_DATA is not set")
@pytest.mark.parametrize(
    "name",
    [
        *("aime24/test", "aime25/test", "amc23/test", "math500/test", "minerva_math/test", "olympiadbench/test"),
        *("omni_math_rule/test", "gsm8k/test", "gsm8k/train", "svamp/svamp", "mawps/mawps", "dapo_math_17k/train"),
    ],
)
def test_every_reference_of_the_benchmarks_is_its_own_answer(name):
    path = Path(os.environ["ENTROPY_TRL_DATA"]) / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows = [row["reward_model"]["ground_truth"] if "reward_model" in row else row["answer"] for row in rows]
    answers = sorted(set(map(str, rows)))
    refused = [answer for answer in answers if not accepts_itself(answer)]
    # The exceptions are truncated in the public files: `\\frac{11}{2^{20}`.
    assert [answer for answer in refused if answer.count("{") == answer.count("}")] == []
    right = math_reward([box(answer) for answer in answers], answers, answer_format="boxed")
    assert right.count(1.0) == len(answers) - len(refused)
    # Another row's answer is another answer, but for references that are equal.
    half = len(answers) // 2
    others = answers[half:] + answers[:half]
    wrong = math_reward([box(answer) for answer in others], answers, answer_format="boxed")
    assert len({(gold, other) for gold, other, reward in zip(answers, others, wrong, strict=True) if reward}) <= 1
