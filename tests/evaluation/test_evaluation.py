"""Evaluation: metrics against brute force, scores against a scripted model, the real engine, interruption, training."""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import PYTHONPATH
from prepared_python import prepared_python
from transformers import GenerationConfig

from entropy_trl import CovGRPOTrainer, smoke
from entropy_trl.analysis import entropy_accuracy_pairs
from entropy_trl.cli import main
from entropy_trl.evaluation import BENCHMARKS, Sampling, command, get_benchmark, load_benchmark
from entropy_trl.evaluation.engines import Completion, Encoder, HFEngine, _entropy_of_top, _Sampler
from entropy_trl.evaluation.metrics import bootstrap_means, group_sizes, interval, majority_at_k, pass_at_k
from entropy_trl.evaluation.report import average, published, scores_table
from entropy_trl.evaluation.run import evaluate_benchmark, only_writer, read_completions, summarise
from entropy_trl.rewards import math_reward
from entropy_trl.smoke import dapo_math_sample


# Metrics


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 2), (6, 0), (6, 5), (7, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    samples = [i < c for i in range(n)]
    for k in range(1, n + 1):
        expected = statistics.fmean(any(subset) for subset in itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def majority(subset):
    """The expected score of a subset's most frequent answer: ties are drawn from, and None has no vote."""
    votes = [answer for answer in subset if answer is not None]
    best = max((votes.count(answer) for answer in votes), default=0)
    winners = {answer for answer in votes if votes.count(answer) == best}
    return winners.__contains__("right") / len(winners) if winners else 0.0


@pytest.mark.parametrize(
    "answers",
    [
        ["right"],
        [None, None],
        ["right", "a", None],
        ["right", "right", "a", "a", "b"],
        ["right", "a", "a", "b", "b", None, None],
        ["right"] * 3 + ["a"] * 3 + ["b"] * 2 + ["c"],
        ["a", "b", "c", "right", None, "right", "a", "d"],
    ],
)
def test_majority_at_k_is_the_mean_over_all_subsets(answers):
    wrong = [answers.count(answer) for answer in sorted({a for a in answers if a not in ("right", None)})]
    for k in range(1, len(answers) + 1):
        expected = statistics.fmean(map(majority, itertools.combinations(answers, k)))
        assert majority_at_k(len(answers), answers.count("right"), wrong, k) == pytest.approx(expected, abs=1e-12)


def test_majority_at_k_of_many_samples():
    """The counts of subsets are beyond the range of floats. Three samples have an answer, two of them the right one."""
    n, k = 1100, 550
    drawn = [math.comb(n - 3, k - j) / math.comb(n, k) for j in range(4)]  # a given set of j of the three, no other
    assert majority_at_k(n, 2, [1], k) == pytest.approx(drawn[3] + drawn[2] + 2 * drawn[1] + 2 * drawn[2] / 2)
    assert majority_at_k(2000, 3, [3], 2000) == 0.5
    assert majority_at_k(5000, 2000, [2000, 900], 5000) == 0.5  # at once: there is one subset


@pytest.mark.parametrize(
    "groups, size, unanswered, k", [(11, 100, 0, 256), (3, 360, 20, 512), (1090, 1, 10, 256), (40, 5, 900, 37)]
)
def test_majority_at_k_is_fast_and_exact_for_equally_frequent_answers(groups, size, unanswered, k):
    """The right answer is one of `groups` that are alike, so it wins each subset with an answer as often as another."""
    n = groups * size + unanswered
    expected = (1 - math.comb(unanswered, k) / math.comb(n, k)) / groups
    start = time.process_time()
    assert majority_at_k(n, size, [size] * (groups - 1), k) == pytest.approx(expected, abs=1e-11)
    assert time.process_time() - start < 1


def test_metrics_refuse_what_cannot_be_estimated():
    for n, c, k in ((4, 5, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError, match="must lie between"):
            pass_at_k(n, c, k)
        with pytest.raises(ValueError, match="must lie between"):
            majority_at_k(n, c, [], k)
    with pytest.raises(ValueError, match="more than 4 samples"):
        majority_at_k(4, 2, [3], 2)


def test_answers_are_grouped_by_equality():
    equal = lambda first, other: abs(first - other) <= 1  # noqa: E731
    assert group_sizes([1, 5, 2, 1, 9, 5], equal) == [3, 2, 1]
    assert group_sizes([], equal) == []


def test_bootstrap():
    scores = [1.0] * 30 + [0.0] * 70
    means = bootstrap_means(scores, "a")
    assert len(means) == 10_000 and np.array_equal(means, bootstrap_means(scores, "a"))
    assert not np.array_equal(means, bootstrap_means(scores, "b"))
    assert means.mean() == pytest.approx(0.3, abs=2e-3)
    assert means.std() == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.03)
    low, high = interval(means)
    assert low == pytest.approx(0.3 - 1.96 * 0.0458, abs=0.015) and high == pytest.approx(
        0.3 + 1.96 * 0.0458, abs=0.015
    )
    assert interval(bootstrap_means([1.0, 1.0], "a")) == (1.0, 1.0)


def test_entropy_of_top_logprobs():
    class Entry:
        def __init__(self, p):
            self.logprob = float(np.log(p)) if p else -np.inf

    whole = {i: Entry(p) for i, p in enumerate((0.5, 0.25, 0.25, 0.0))}
    assert _entropy_of_top([whole]) == pytest.approx(1.5 * np.log(2))
    # What is left out counts as one token.
    assert _entropy_of_top([whole, {0: Entry(0.5)}]) == pytest.approx((1.5 + 1) / 2 * np.log(2))


# Benchmarks


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_protocol_is_the_published_one():
    averaged = {name for name, benchmark in BENCHMARKS.items() if benchmark.sampling == Sampling(32, 0.6)}
    assert averaged == {"aime24", "aime25", "amc"}
    assert {b.sampling for name, b in BENCHMARKS.items() if name not in averaged} == {Sampling(1, 0.0)}
    assert list(BENCHMARKS) == [*published()["columns"], "gsm8k"]


def test_names_and_files(tmp_path):
    file = write_rows(tmp_path / "amc" / "test.jsonl", [{"problem": "1+1?", "answer": "2"}])
    mine = write_rows(tmp_path / "mine.jsonl", [{"question": "1+1?", "answer": "so #### 2", "id": "x"}])
    assert get_benchmark("gsm8k").source == "openai/gsm8k"
    assert get_benchmark(file).sampling.samples == 32
    assert get_benchmark(f"olympiadbench={file}").answer is None
    assert get_benchmark(mine).name == "mine"
    equals = write_rows(tmp_path / "lr=1" / "mine.jsonl", [{"question": "1+1?", "answer": "2"}])
    assert (get_benchmark(equals).name, get_benchmark(equals).source) == ("mine", equals)
    assert get_benchmark(f"amc={equals}").source == equals
    (row,) = load_benchmark(mine, prompt_template="dapo")
    assert row["solution"] == "2" and row["problem_id"] == "x" and row["data_source"] == "mine"
    assert row["answer_format"] == "answer_line" and "1+1?" in row["prompt"][0]["content"]
    # A template for programs stands for its counterpart for mathematics, as in the training's data.
    for training, here in (("code", "qwen_boxed"), ("r1_zero_code", "r1_zero")):
        assert load_benchmark(mine, prompt_template=training)[0] == load_benchmark(mine, prompt_template=here)[0]
    with pytest.raises(ValueError, match="no benchmark 'aime': use one of aime24"):
        get_benchmark("aime")
    with pytest.raises(FileNotFoundError):
        load_benchmark("aime24=missing.jsonl")
    with pytest.raises(ValueError, match=r"has no column answer or final_answer or .* or label or solution"):
        load_benchmark("aime24=" + write_rows(tmp_path / "bad.jsonl", [{"problem": "1+1?", "result": "2"}]))
    for row in ({"problem": "1+1?", "answer": ""}, {"problem": "", "answer": "2"}):
        with pytest.raises(ValueError, match="no answers, or a row without a problem"):
            load_benchmark(write_rows(tmp_path / "bad.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "text", "solutions"),
    [
        ("a.jsonl", '\ufeff{"problem": "p\u2028", "answer": 123456789012345678901}\n{"problem": "q", "answer": 0.50}',
         ["123456789012345678901", "0.50"]),
        ("a.jsonl", '{"problem": "p", "answer": [18446744073709551616, 7]}\n', ["18446744073709551616, 7"]),
        ("a.json", '[{"problem": "p", "answer": 9007199254740993}, {"problem": "q", "answer": "1/2"}]',
         ["9007199254740993", "1/2"]),
        ("a.json", '{"problem": ["p"], "answer": [1e400]}', ["1e400"]),
        ("a.csv", "problem,answer\np,123456789012345678901\n\"q\nr\",007\n", ["123456789012345678901", "007"]),
    ],
)  # fmt: skip
def test_numbers_stay_as_they_are_written(name, text, solutions, tmp_path):
    """Floats of 64 bits would make a reference that no answer equals."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = load_benchmark(str(tmp_path / name))
    assert rows["solution"] == solutions
    answers = [rf"\boxed{{{solution}}}" for solution in solutions]
    if name == "a.csv":
        assert math_reward(answers, solution=solutions, answer_format=["boxed"] * 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"problem": "p", "answer": 1}\n{', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"problem": "p", "answer": 1}\n[1]', "row or line 2 holds no fields"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"problem": {"a": 1}, "answer": 1}', "row 0 is .* not a text"),
        ("a.jsonl", b'{"problem": "\\ud800", "answer": 1}', "half of a surrogate pair"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"3", "row or line 1 holds no fields"),
        ("a.json", b'{"problem": ["a"], "answer": []}', "different lengths"),
        ("a.csv", b"problem,answer\n1,2,3\n", "line 2 is damaged"),
        ("a.csv", b'problem,answer\n"', "unexpected end of data"),
        ("a.csv", b" \n", "is empty"),
    ],
)
def test_a_damaged_file_of_problems_is_told(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_benchmark(str(tmp_path / name))


def test_no_problem_is_left_out(tmp_path, caplog):
    rows = [{"problem": "1+1?", "answer": "2"}] * 2 + [{"problem": "Why?", "answer": "no maths at all {"}]
    rows.append({"problem": "Solve.", "final_answer": ["1", "2"]})
    file = write_rows(tmp_path / "mine.jsonl", [{"answer": row.get("answer"), **row} for row in rows[:3]])
    assert load_benchmark(file)["problem_id"] == ["0", "1", "2"]
    assert len(load_benchmark(file, limit=2)) == 2
    rows[1] = {"problem": "Prove it.", "answer": ""}
    assert load_benchmark(write_rows(tmp_path / "other.jsonl", rows[:2]))["solution"] == ["2", ""]
    assert "1 problems have no answer" in caplog.text
    several = load_benchmark(write_rows(tmp_path / "several.jsonl", rows[3:]))
    assert several["solution"] == ["1, 2"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"samples": 0}, "at least 1"),
        ({"samples": 4}, "4 greedy samples"),
        ({"samples": 10**24, "temperature": 1}, "at most 100,000"),
        ({"temperature": -1}, "not be negative"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": float("inf")}, "finite"),
        ({"temperature": 1e-300}, "at least 0.01"),
        ({"temperature": 1, "top_p": float("nan")}, "top_p"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
    ],
)
def test_sampling_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


# A scripted model, whose score is known


class Scripted:
    """Answers sample s of problem i right if `right(i, s)`, and else with one of two numbers, in turn."""

    name = "scripted"

    def __init__(self, rows, right, batch_size=64):
        self.rows, self.right, self.batch_size = rows, right, batch_size
        self.task, self.prompts = 0, list(rows["prompt"])

    def generate(self, prompts, seeds, sampling):
        completions = []
        for prompt in prompts:
            row, sample = divmod(self.task, sampling.samples)
            self.task += 1
            assert prompt == self.prompts[row]
            wrong = f"{123456 + sample % 2}.5"
            answer = self.rows[row]["solution"] if self.right(row, sample) else wrong
            text = rf"It is not \boxed{{7}} but \boxed{{{answer}}}."
            completions.append(Completion(text, 10 + sample, sample == 0, None if sample else 0.5))
        assert len(set(seeds)) == len(seeds)
        return completions


def scripted_scores(rows, tmp_path, name, sampling, unanswerable=()):
    right = lambda row, sample: (row * 7 + sample * 3) % 5 < 2 and row not in unanswerable  # noqa: E731
    scores = evaluate_benchmark(
        Scripted(rows, right), rows, sampling, tmp_path / f"{name}.jsonl", name=name, progress=False
    )
    n = sampling.samples
    counts = [sum(right(row, sample) for sample in range(n)) for row in range(len(rows))]
    assert scores["problems"] == len(rows) and scores["samples"] == n
    assert scores["accuracy"] == pytest.approx(sum(counts) / n / len(rows), abs=1e-12)
    low, high = scores["ci95"]
    assert low <= scores["accuracy"] <= high
    assert scores["mean_length"] == pytest.approx(10 + (n - 1) / 2)
    assert scores["truncated"] == pytest.approx(1 / n)
    assert scores["unanswered"] == 0
    if n > 1:
        assert scores["entropy"] is None
        expected = statistics.fmean(pass_at_k(n, count, 2) for count in counts)
        assert scores["pass@2"] == pytest.approx(expected)
        picks = [["right" if right(row, sample) else sample % 2 for sample in range(n)] for row in range(len(rows))]
        assert scores[f"majority@{n}"] == pytest.approx(statistics.fmean(map(majority, picks)))
    else:
        assert scores["entropy"] == 0.5
    return scores


def test_scripted_model_gets_its_score(tmp_path):
    rows = load_benchmark(
        write_rows(
            tmp_path / "mine.jsonl", [{"problem": f"{i}?", "answer": f"\\frac{{{i}}}{{7}}"} for i in range(1, 30)]
        )
    )
    scripted_scores(rows, tmp_path, "greedy", Sampling())
    scripted_scores(rows, tmp_path, "averaged", Sampling(8, 0.6))


FILES = {
    "aime24": ("aime24", 30),
    "aime25": ("aime25", 30),
    "amc": ("amc23", 40),
    "math500": ("math500", 500),
    "omni_math": ("omni_math_rule", 2821),
    "olympiadbench": ("olympiadbench", 675),
    "minerva": ("minerva_math", 272),
    "gsm8k": ("gsm8k", 1319),
}


@pytest.mark.skipif("ENTROPY_TRL_DATA" not in os.environ, reason="ENTROPY_TRL_DATA is not set")
@pytest.mark.parametrize("name", FILES)
def test_scripted_model_on_the_real_files(name, tmp_path):
    folder, count = FILES[name]
    benchmark = get_benchmark(f"{name}={Path(os.environ['ENTROPY_TRL_DATA']) / folder / 'test.jsonl'}")
    rows = load_benchmark(benchmark)
    assert len(rows) == count
    # The braces of these references are not balanced (one is left open), so that no box can hold them.
    open_braces = [i for i, text in enumerate(rows["solution"]) if text.count("{") != text.count("}")]
    assert open_braces == ([183, 682, 710, 1469] if name == "omni_math" else [])
    scripted_scores(rows, tmp_path, name, benchmark.sampling, open_braces)


# The real engine


@pytest.fixture(scope="module")
def policy():
    return smoke.tiny_math_policy()


@pytest.fixture(scope="module")
def rows():
    sample = dapo_math_sample()
    return datasets.Dataset.from_dict(
        {
            "prompt": sample["prompt"][:6],
            "solution": sample["solution"][:6],
            "answer_format": sample["answer_format"][:6],
            "problem_id": list("abcdef"),
        }
    )


SAMPLING = Sampling(samples=4, temperature=1.0, max_tokens=16)


def evaluate(policy, rows, file, sampling=SAMPLING, batch_size=8, **options):
    engine = HFEngine(policy[0], Encoder(policy[1]), batch_size)
    return evaluate_benchmark(engine, rows, sampling, file, name="sample", progress=False, **options)


def test_same_seed_same_file_and_any_batch_size(policy, rows, tmp_path):
    scores = evaluate(policy, rows, tmp_path / "a.jsonl")
    assert evaluate(policy, rows, tmp_path / "b.jsonl") == scores
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    first = read_completions(tmp_path / "a.jsonl")
    for batch_size in (1, 24):
        evaluate(policy, rows, tmp_path / f"{batch_size}.jsonl", batch_size=batch_size)
        for record, other in zip(first, read_completions(tmp_path / f"{batch_size}.jsonl"), strict=True):
            assert other == record | {"entropy": pytest.approx(record["entropy"], abs=1e-5)}
    assert scores["samples"] == 4 and 0 < scores["entropy"] < np.log(258)
    assert len({record["text"] for record in first}) > 8
    evaluate(policy, rows, tmp_path / "seed.jsonl", seed=1)
    assert [r["text"] for r in read_completions(tmp_path / "seed.jsonl")] != [r["text"] for r in first]
    correct = math_reward([r["text"] for r in first], [r["solution"] for r in first], "answer_line")
    assert [float(record["correct"]) for record in first] == correct


def test_lengths_truncation_and_entropy_are_those_of_the_model(policy, rows):
    model, tokenizer = policy
    encode = Encoder(tokenizer)
    engine = HFEngine(model, encode)
    for sampling in (Sampling(temperature=0.7, max_tokens=9), Sampling(max_tokens=9), Sampling(1, 1.0, 0.8, 9)):
        completions = engine.generate(rows["prompt"], range(6), sampling)
        for prompt, completion in zip(rows["prompt"], completions, strict=True):
            ids, answer = encode(prompt), tokenizer(completion.text)["input_ids"]
            answer = answer if completion.truncated else [*answer, tokenizer.eos_token_id]
            assert completion.length == len(answer) <= 9
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            entropies = torch.distributions.Categorical(logits=logits).entropy()
            assert completion.entropy == pytest.approx(entropies.mean().item(), abs=1e-5)
            if sampling.temperature == 0:
                assert logits.argmax(dim=-1).tolist() == answer
    assert {
        completion.truncated for completion in engine.generate(rows["prompt"], range(6), Sampling(max_tokens=3))
    } == {True}


def test_own_generation_settings_do_not_leak(policy, rows):
    model, tokenizer = policy
    expected = HFEngine(model, Encoder(tokenizer)).generate(rows["prompt"], range(6), SAMPLING)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=0.1, top_k=1, repetition_penalty=3.0
    )
    assert HFEngine(model, Encoder(tokenizer)).generate(rows["prompt"], range(6), SAMPLING) == expected


def test_tokens_are_drawn_from_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    count = 20_000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        sampler = _Sampler(range(count), Sampling(1, temperature, top_p, 1), [4], prompt_width=3)
        drawn = sampler(torch.zeros(count, 3, dtype=torch.long), logits.expand(count, 5)).argmax(dim=-1)
        expected = (logits / temperature).softmax(dim=-1)
        if top_p < 1:
            expected = torch.where(torch.arange(5) < 2, expected, 0)
            expected /= expected.sum()
        frequencies = drawn.bincount(minlength=5) / count
        assert (frequencies - expected).abs().max() < 4 * 0.5 / count**0.5
        assert frequencies[4] == 0
        assert sampler.entropies[0] == pytest.approx(torch.special.entr(logits.softmax(-1)).sum().item(), abs=1e-5)


def test_prompts_without_a_chat_template(policy):
    _, tokenizer = policy
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert plain.decode(Encoder(plain)(prompt)) == "Be brief.\n\n1+1?"
    assert plain.decode(Encoder(plain)("1+1?")) == "1+1?"


# Interruption


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_evaluation import SAMPLING, HFEngine, Encoder, datasets, evaluate_benchmark
from entropy_trl.smoke import tiny_math_policy
rows = datasets.load_from_disk(sys.argv[2])
model, tokenizer = tiny_math_policy()
class Dying(HFEngine):
    def generate(self, *args):
        if file.exists() and len(file.read_text().splitlines()) == 16:
            with file.open("a") as lines:
                lines.write('{"problem": 4, "sample": 0, "te')
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(*args)
file = Path(sys.argv[3])
evaluate_benchmark(Dying(model, Encoder(tokenizer), 8), rows, SAMPLING, file, name="sample", progress=False)
"""


def test_killed_run_goes_on_to_the_same_file(policy, rows, tmp_path):
    rows.save_to_disk(tmp_path / "rows")
    file = tmp_path / "killed.jsonl"
    arguments = [str(Path(__file__).parent), str(tmp_path / "rows"), str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    process = subprocess.run([prepared_python(), "-c", KILLED, *arguments], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    torn = file.read_bytes()
    assert torn.count(b"\n") == 16 and not torn.endswith(b"\n")
    scores = evaluate(policy, rows, file)
    assert scores == evaluate(policy, rows, tmp_path / "whole.jsonl")
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_only_what_is_missing_is_drawn(rows, tmp_path):
    right = lambda row, sample: sample == row % 4  # noqa: E731
    file = tmp_path / "a.jsonl"
    options = {"name": "sample", "progress": False}
    rows = rows.remove_columns("answer_format").add_column("answer_format", ["boxed"] * len(rows))
    scores = evaluate_benchmark(Scripted(rows, right, 8), rows, SAMPLING, file, **options)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept, resumed_at in ((24, 24), (23, 16), (17, 16), (8, 8), (7, 0)):
        file.write_bytes(b"".join(lines[:kept]) + b"\0 torn")
        engine = Scripted(rows, right, 8)
        engine.task = resumed_at
        assert evaluate_benchmark(engine, rows, SAMPLING, file, **options) == scores
        assert engine.task == 24
        assert file.read_bytes() == whole


def test_other_settings_are_refused_or_start_again(policy, rows, tmp_path):
    file = tmp_path / "a.jsonl"
    evaluate(policy, rows, file)
    other = Sampling(samples=2, temperature=1.0, max_tokens=16)
    with pytest.raises(ValueError, match=r"other settings: samples \(then 4, now 2\)"):
        evaluate(policy, rows, file, other)
    with pytest.raises(ValueError, match=r"problems \(then 6, now 5\)"):
        evaluate(policy, rows.select(range(5)), file)
    with pytest.raises(ValueError, match=r"model \(then None, now 'b'\)"):
        evaluate(policy, rows, file, settings={"model": "b"})
    assert evaluate(policy, rows, file, other, overwrite=True)["samples"] == 2
    assert len(read_completions(file)) == 12


# The command


@pytest.fixture(scope="module")
def model_folder(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    policy[0].generation_config = GenerationConfig(eos_token_id=policy[1].eos_token_id)
    policy[0].save_pretrained(folder)
    policy[1].save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sample_file(tmp_path):
    """The shipped rows as benchmark files have them."""
    rows = (files("entropy_trl") / "sample_data" / "dapo_math_sample.jsonl").read_text().splitlines()[:5]
    problems = [json.loads(row) for row in rows]
    return write_rows(
        tmp_path / "sample.jsonl",
        [{"problem": r["prompt"][0]["content"], "answer": r["reward_model"]["ground_truth"]} for r in problems],
    )


def run(*argv):
    return main(["evaluate", "--engine", "hf", "--max_tokens", "12", *argv])


def test_command(model_folder, sample_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    common = ("--model", f"one={model_folder}", f"two={model_folder}", "--output_dir", out, "--prompt_template", "dapo")
    seven = [f"{name}={sample_file}" for name in published()["columns"]]
    assert run(*common, "--benchmarks", *seven, "--samples", "2", "--temperature", "1", "--parquet", "--compare") == 0
    printed = capsys.readouterr().out
    assert "Qwen2.5-7B, KL-Cov (published)" in printed and "| one " in printed and "as printed" in printed
    results = json.loads((tmp_path / "out" / "one" / "results.json").read_text())
    other = json.loads((tmp_path / "out" / "two" / "results.json").read_text())
    assert results["benchmarks"] == other["benchmarks"]
    assert results["benchmarks"]["aime24"]["sampling"] == {
        "samples": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 12,
        "seed": 0,
    }
    accuracies = [scores["accuracy"] for scores in results["benchmarks"].values()]
    assert results["average"]["accuracy"] == pytest.approx(statistics.fmean(accuracies))
    completions = tmp_path / "out" / "one" / "completions"
    table = datasets.Dataset.from_parquet(str(completions / "aime24.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table.to_list() == read_completions(completions / "aime24.jsonl")
    assert "\n## two\n" in (tmp_path / "out" / "results.md").read_text()

    # A later call adds to the results, and what is there is not drawn again.
    stamp = (completions / "aime24.jsonl").stat().st_mtime_ns
    assert run(*common, "--benchmarks", seven[0], sample_file, "--samples", "2", "--temperature", "1") == 0
    assert (completions / "aime24.jsonl").stat().st_mtime_ns == stamp
    assert len(json.loads((tmp_path / "out" / "one" / "results.json").read_text())["benchmarks"]) == 8
    capsys.readouterr()

    # So do other models, which then are in the tables once each.
    assert run("--model", f"three={model_folder}", "--output_dir", out, "--benchmarks", sample_file) == 0
    tables = (tmp_path / "out" / "results.md").read_text()
    assert all(tables.count(f"\n## {name}\n") == 1 for name in ("one", "two", "three"))
    assert tables.count("| one ") == 1 and "| one " not in capsys.readouterr().out

    assert main(["evaluate", "--compare", out]) == 0
    printed = capsys.readouterr().out
    assert "| one " in printed and "| two " in printed and "| Qwen2.5-32B, GRPO (published)" in printed


def test_processes_that_add_scores_at_a_time(tmp_path, monkeypatch):
    """As two do that evaluate a model on different benchmarks into one folder."""
    model = command.Model("m", "path", tmp_path / "m", encode=None, settings={"model": "path"})
    monkeypatch.setattr(command.report, "average", lambda *args: time.sleep(0.1))  # between reading and writing
    names = [f"b{i}" for i in range(4)]
    threads = [
        threading.Thread(target=command._add_scores, args=(model, name, {"accuracy": 1.0}, {})) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads((tmp_path / "m" / "results.json").read_text())["benchmarks"]) == names


def test_chat_template_of_a_base_model(model_folder, sample_file, tmp_path):
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }} Assistant:")
    argv = ("--model", f"m={model_folder}", "--benchmarks", sample_file, "--output_dir", str(tmp_path / "out"))
    assert run(*argv, "--chat_template", str(tmp_path / "template.jinja")) == 0
    settings = json.loads((tmp_path / "out" / "m" / "completions" / "sample.settings.json").read_text())
    assert settings["chat_template"].endswith("Assistant:")
    assert run(*argv) == 2


def test_compare_table_is_the_published_one():
    lines = scores_table([], compare=True).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:9]] == [BENCHMARKS[c].title for c in published()["columns"]]
    kl_cov = next(line for line in lines if "7B, KL-Cov" in line)
    assert [cell.strip() for cell in kl_cov.split("|")[2:-1]] == (
        ["22.6", "12.9", "61.4", "80.8", "29.1", "42.6", "38.2", "41.1", "40.6"]
    )
    averages = {row["model"]: [] for row in published()["rows"]}
    for row in published()["rows"]:
        averages[row["model"]].append(row["average"])
    assert averages == {"Qwen2.5-7B": [38.6, 38.8, 40.4, 40.6], "Qwen2.5-32B": [45.8, 47.2, 50.3, 52.2]}


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "No model: give --model"),
        (["--compare"], "Nothing to compare"),
        (["--compare", "nowhere"], "'nowhere' has no results.json"),
        (["--model", "./nowhere", "--benchmarks", "FILE"], "there is no folder './nowhere'"),
        (["--model", "MODEL", "--benchmarks", "aime"], "There is no benchmark 'aime'"),
        (["--model", "MODEL", "--benchmarks", "FILE", "FILE"], "--benchmarks has a name twice"),
        (["--model", "MODEL", "MODEL", "--benchmarks", "FILE"], "--model has a name twice"),
        (["--model", "MODEL", "--benchmarks", "FILE", "--samples", "4"], "4 greedy samples"),
        (["--model", "MODEL", "--benchmarks", "FILE", "--max_tokens", "20000"], "use --max_tokens 1"),
        (["--model", "MODEL", "--benchmarks", "FILE", "--prompt_template", "boxed"], "is not one of the templates"),
        (["--model", "MODEL", "--benchmarks", "FILE", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["--model", "MODEL", "--benchmarks", "FILE", "--top_logprobs", "5"], "--top_logprobs is for --engine vllm"),
        pytest.param(
            ["--model", "MODEL", "--benchmarks", "FILE", "--engine", "vllm"],
            "pip install 'entropy-trl[vllm]'",
            marks=pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed"),
        ),
    ],
)
def test_mistakes_are_one_line(argv, message, model_folder, sample_file, tmp_path, capsys):
    argv = [{"MODEL": model_folder, "FILE": sample_file}.get(word, word) for word in argv]
    assert run("--output_dir", str(tmp_path / "out"), *argv) == 2
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert all("examples/s" in bar for bar in bars)
    assert line.startswith("entropy-trl evaluate: error: ") and message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "org/name={model}"), "the name 'org/name' cannot be"),
        (("--model", "..={model}"), "the name '..' cannot be"),
        (("--model", "results.md={model}"), "the name 'results.md' cannot be"),
        (("--model", "a\x1b={model}"), "the name 'a\\x1b' cannot be"),
        (("--model", "x="), "'x=' names no model"),
        (("--output_dir", "{file}"), "nothing can be written there"),
        (("--output_dir", "{file}/inside"), "nothing can be written there"),
        (("--engine_kwargs", '{{"nope": 3}}'), "unexpected keyword argument 'nope'"),
        (("--engine_kwargs", '{{"name": "x"}}'), "--engine_kwargs cannot set name"),
        (("--chat_template_kwargs", '{{"tokenize": false}}'), "--chat_template_kwargs cannot set tokenize"),
        (("--chat_template_kwargs", '{{"tools": 3}}'), "chat template"),
        (("--chat_template", "nowhere"), "--chat_template 'nowhere' cannot be read"),
        (("--benchmarks", "../b={file}"), "the name '../b' cannot be"),
        (("--engine_kwargs", "[1]"), "'[1]' is not a JSON mapping"),
        (("--chat_template_kwargs", "[" * 100_000), "is not JSON"),
    ],
)
def test_names_and_mappings_are_checked_first(argv, message, model_folder, sample_file, tmp_path, capsys):
    argv = [text.format(model=model_folder, file=sample_file) for text in argv]
    given = ["--model", model_folder, "--benchmarks", sample_file, "--output_dir", str(tmp_path / "out"), *argv]
    try:
        code = run(*given)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.glob("**/*.jsonl")) == [Path(sample_file)]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "[" * 100_000, '{"name": 1}', '{"name": "x", "benchmarks": {"b": 3}, "average": null}', "9" * 5000,
     '{"name": "x", "benchmarks": {}, "average": {"accuracy": 1.63, "ci95": [0, 1]}}'],
)  # fmt: skip
def test_damaged_results_of_a_neighbour_are_told_first(text, model_folder, sample_file, tmp_path, capsys):
    file = tmp_path / "out" / "other" / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert run("--model", model_folder, "--benchmarks", sample_file, "--output_dir", str(tmp_path / "out")) == 2
    assert f"{file} is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/completions/*.jsonl"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adapter_config.json", "{", "adapter_config.json is damaged: it is not JSON"),
        ("adapter_config.json", "[]", "adapter_config.json is damaged: it holds a list"),
        ("adapter_config.json", '{"base_model_name_or_path": 3}', "names no base_model_name_or_path"),
        ("adapter_config.json", '{"base_model_name_or_path": "/nowhere"}', "there is no such folder"),
        ("config.json", "\0" * 9, "config.json is damaged"),
        ("config.json", '{"model_type": "qwen2", "hidden_size": "big"}', "expected int"),
        ("tokenizer.json", "{}", "KeyError: 'added_tokens'"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}', "makes no token of a prompt"),
        ("tokenizer_config.json", '{"tokenizer_class": 7}', "tokenizer cannot be loaded"),
        ("chat_template.jinja", "{% for", "TemplateSyntaxError"),
        ("model.safetensors", "\0" * 5000, "model.safetensors is damaged"),
    ],
)
def test_damaged_model_files_are_told_first(name, text, message, model_folder, sample_file, tmp_path, capsys):
    model = shutil.copytree(model_folder, tmp_path / "model")
    (model / name).write_text(text)
    assert run("--model", str(model), "--benchmarks", sample_file, "--output_dir", str(tmp_path / "out")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("entropy-trl evaluate: error: ") and message in line


def test_a_second_process_is_refused_before_it_loads_a_model(model_folder, sample_file, tmp_path, capsys):
    """However short after the first one it is started: the locks are held from the checks to the end."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    argv = [
        "--model",
        f"m={model_folder}",
        "--benchmarks",
        sample_file,
        "--output_dir",
        str(tmp_path),
        "--engine",
        "hf",
    ]
    options = parser.parse_args([*argv, "--max_tokens", "12"])
    first = command.prepare(options)
    assert run(*argv) == 2
    assert "Another process is writing" in capsys.readouterr().err
    assert command.run(first, options) == 0
    assert run(*argv) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_with_a_line(number, model_folder, sample_file, tmp_path, capsys, monkeypatch):
    argv = ("--model", str(model_folder), "--benchmarks", sample_file, "--output_dir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "generate", lambda *args, **kwargs: os.kill(os.getpid(), number))
        assert run(*argv) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == f"entropy-trl evaluate: interrupted by {number.name}."
    assert run(*argv) == 0  # no lock is left behind


def test_a_reader_that_stops_reading_costs_no_result(model_folder, sample_file, tmp_path, monkeypatch):
    models = [f"one={model_folder}", f"two={model_folder}"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("--model", *models, "--benchmarks", sample_file, "--output_dir", str(tmp_path)) == 141
    tables = (tmp_path / "results.md").read_text()
    assert all(f"\n## {name}\n" in tables for name in ("one", "two"))


@pytest.mark.parametrize("line", [b"{", b"[]\n", b'{"problem": 0, "sample": 0}\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_damaged_completions_of_another_benchmark_cost_the_mean_alone(line, tmp_path, caplog):
    columns = published()["columns"]
    record = {"problem": 0, "sample": 0, "correct": True, "answer": "1", "text": "1", "length": 1, "truncated": False}
    for name in columns:
        write_rows(tmp_path / "completions" / f"{name}.jsonl", [record | {"entropy": 0.5}])
    results = {"benchmarks": {name: {"accuracy": 1.0} for name in columns}}
    assert average(results, tmp_path)["accuracy"] == 1
    damaged = tmp_path / "completions" / "minerva.jsonl"
    damaged.write_bytes(damaged.read_bytes() + line)
    assert average(results, tmp_path) is None
    assert f"{damaged} is damaged: line 2" in caplog.text


def test_damaged_settings_start_again_with_overwrite(rows, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("x\n")
    file.with_suffix(".settings.json").write_text("{")
    rows = rows.remove_columns("answer_format").add_column("answer_format", ["boxed"] * len(rows))
    options = {"name": "sample", "progress": False}
    with pytest.raises(ValueError, match="is damaged: it is not JSON"):
        evaluate_benchmark(Scripted(rows, lambda row, sample: True, 8), rows, SAMPLING, file, **options)
    engine = Scripted(rows, lambda row, sample: True, 8)
    assert evaluate_benchmark(engine, rows, SAMPLING, file, overwrite=True, **options)["accuracy"] == 1


def test_one_process_writes_a_file_of_completions(tmp_path):
    file = tmp_path / "b.jsonl"
    with only_writer(file), pytest.raises(ValueError, match="Another process is writing"):
        evaluate_benchmark(None, None, SAMPLING, file, name="b")
    with only_writer(file):
        pass


def test_completions_that_count_twice_give_no_score():
    record = {"problem": 0, "sample": 0, "correct": True, "answer": "1", "length": 1, "truncated": False, "entropy": 0}
    assert summarise([record], "b")["accuracy"] == 1
    for other in (record, record | {"problem": 1, "sample": 1}):
        with pytest.raises(ValueError, match="each once"):
            summarise([record, other], "b")


def test_another_checkpoint_in_the_same_folder_is_refused(model_folder, sample_file, tmp_path, capsys):
    argv = ("--model", model_folder, "--benchmarks", sample_file, "--output_dir", str(tmp_path / "out"))
    assert run(*argv) == 0
    weights = Path(model_folder) / "model.safetensors"
    later = time.time() + 10
    os.utime(weights, (later, later))
    assert run(*argv) == 2
    assert "model_version (then" in capsys.readouterr().err
    assert run(*argv, "--overwrite") == 0


# In training


def test_a_training_logs_the_pairs_of_the_law(make_config, sample_file):
    """TRL's own evaluation logs entropy and accuracy; of which benchmark, the names of other metrics say."""
    model, tokenizer = smoke.tiny_math_policy()
    trainer = CovGRPOTrainer(
        model=model,
        reward_funcs=math_reward,
        args=make_config(
            max_completion_length=12,
            max_steps=2,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
            per_device_eval_batch_size=16,
            num_generations_eval=8,
        ),
        train_dataset=dapo_math_sample().select(range(8)),
        eval_dataset={
            # An answer that the policy often gives, and one that it never does.
            "one": dapo_math_sample().select(range(2)).map(lambda row: {"solution": "5", "answer_format": "any"}),
            "two": load_benchmark(sample_file, prompt_template="dapo", limit=2).map(lambda row: {"solution": "55"}),
        },
        processing_class=tokenizer,
    )
    trainer.train()
    history = trainer.state.log_history
    one, two = (entropy_accuracy_pairs(history, name) for name in ("one", "two"))
    for pairs, name in ((one, "one"), (two, "two")):
        assert [pair.step for pair in pairs] == [0, 1, 2]
        assert all(0 < pair.entropy < np.log(258) for pair in pairs)
        logs = [log for log in history if f"eval_{name}_loss" in log]
        assert pairs == [(log["step"], log["eval_entropy"], log["eval_rewards/math_reward/mean"]) for log in logs]
    assert len({pair.entropy for pair in one + two}) == 6
    assert any(pair.accuracy > 0 for pair in one) and not any(pair.accuracy for pair in two)
    with pytest.raises(ValueError, match="No evaluation on 'three' logged"):
        entropy_accuracy_pairs(history, "three")
    with pytest.raises(ValueError, match="No evaluation logged eval_entropy and eval_reward"):
        entropy_accuracy_pairs(history)
    single = [{key.replace("eval_one_", "eval_"): value for key, value in log.items()} for log in history]
    assert entropy_accuracy_pairs(single) == one
