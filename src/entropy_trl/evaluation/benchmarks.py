"""The benchmarks: where each comes from, how the paper samples it, and its problems as rows that TRL can evaluate on.

Protocol: arXiv 2505.22617 (AIME and AMC at temperature 0.6, averaged over 32 samples; the others greedy; completions of
up to 8,192 tokens, as in its training). GSM8K is not in its table and is greedy here, as is usual.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from entropy_trl.data import DEFAULT_TEMPLATE, final_result, load_splits
from entropy_trl.data.reading import SOLUTION_COLUMNS
from entropy_trl.evaluation import problems
from entropy_trl.templates import for_mathematics, get_template


logger = logging.getLogger(__name__)

MOST_SAMPLES = 100_000
LOWEST_TEMPERATURE = 0.01
"""vLLM takes none below, either."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        samples (`int`, *optional*, defaults to `1`): Completions of each problem.
        temperature (`float`, *optional*, defaults to `0.0`): 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`): The probability mass that is sampled from.
        max_tokens (`int`, *optional*, defaults to `8192`): The length at which a completion is cut.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_tokens < 1:
            raise ValueError(f"samples and max_tokens must be at least 1, got {self.samples} and {self.max_tokens}.")
        if self.samples > MOST_SAMPLES:
            raise ValueError(f"samples must be at most {MOST_SAMPLES:,}, got {self.samples:,}.")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy), or finite and at least {LOWEST_TEMPERATURE:g}, got "
                f"{self.temperature:g}: it must not be negative, and below that logits overflow."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p:g}.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"{self.samples} greedy samples are {self.samples} times the same: set a temperature.")


@dataclass(frozen=True)
class Benchmark:
    """A set of problems with verifiable answers.

    Attributes:
        name (`str`): What the options, files and tables call it.
        title (`str`): The head of its column.
        source (`str`): A hub data set, or a file.
        sampling ([`Sampling`]): The protocol it is published with.
        config (`str`, *optional*): The hub data set's configuration, if it has several.
        split (`str`, *optional*, defaults to `"test"`): The hub data set's split. A file has one.
        problem (`str`, *optional*): The column of the problem; None finds it (`problem` or `question`).
        answer (`str`, *optional*): The column of the answer; None finds it (the first of
            `data.reading.SOLUTION_COLUMNS`).
    """

    name: str
    title: str
    source: str
    sampling: Sampling
    config: str | None = None
    split: str = "test"
    problem: str | None = None
    answer: str | None = None


_AVERAGED = Sampling(samples=32, temperature=0.6)
_GREEDY = Sampling()
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "AIME24", "HuggingFaceH4/aime_2024", _AVERAGED, split="train", answer="answer"),
        Benchmark("aime25", "AIME25", "math-ai/aime25", _AVERAGED),
        # 83 problems of AMC 12 of 2022 and 2023; `math-ai/amc23` has the 40 of 2023 that others report.
        Benchmark("amc", "AMC", "AI-MO/aimo-validation-amc", _AVERAGED, split="train"),
        Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", _GREEDY, answer="answer"),
        Benchmark("omni_math", "OMNI-MATH", "KbsdJames/Omni-MATH", _GREEDY, answer="answer"),
        Benchmark("olympiadbench", "OlympiadBench", "math-ai/olympiadbench", _GREEDY, answer="final_answer"),
        Benchmark("minerva", "Minerva", "math-ai/minervamath", _GREEDY),
        Benchmark("gsm8k", "GSM8K", "openai/gsm8k", _GREEDY, config="main"),
    )
}
"""The benchmarks that are known by name."""

_PROBLEM_COLUMNS = ("problem", "question")


def get_benchmark(name: str) -> Benchmark:
    """The benchmark that `NAME`, `NAME=SOURCE` or a path means.

    `SOURCE` is a file, a folder or a hub data set that replaces the one known for `NAME`, with columns named as usual.
    Another name, or a path alone, is a benchmark of one's own: greedy, unless the options say otherwise.

    Raises:
        ValueError: A name alone that is not known.
    """
    source = ""
    if not Path(name).expanduser().exists():  # a path may have a `=` in it
        name, _, source = name.partition("=")
    if not source and name in BENCHMARKS:
        return BENCHMARKS[name]
    if not source:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(
                f"There is no benchmark {name!r}: use one of {', '.join(BENCHMARKS)}, a file, or NAME=FILE_OR_HUB_ID."
            )
        # `aime24/test.jsonl` is known by its folder's name.
        name, source = path.stem if path.stem not in ("test", "train") else path.absolute().parent.name, name
    if name in BENCHMARKS:
        return replace(BENCHMARKS[name], source=source, config=None, split="test", problem=None, answer=None)
    return Benchmark(name, name, source, _GREEDY)


def load_benchmark(
    benchmark: str | Benchmark, *, prompt_template: str | None = None, limit: int | None = None
) -> datasets.Dataset:
    """The problems of a benchmark, one row each, as TRL's trainers and rewards read them.

    All rows stay, in their order, since a published score is over all of them. (`load_rows`, which is for training,
    leaves out repeats and answers that are no result. `math_reward` compares an answer that it cannot parse literally.)

    Args:
        benchmark (`str | Benchmark`): A benchmark, or what `get_benchmark` reads.
        prompt_template (`str`, *optional*): A name of `templates.TEMPLATES` or a text with `{problem}`: the one the
            model was trained with. None: `data.DEFAULT_TEMPLATE`.
        limit (`int`, *optional*): Take the first so many problems only.

    Returns:
        `datasets.Dataset`: The columns `prompt`, `solution`, `answer_format`, `problem_id` and `data_source` (the
        name, by which `math_reward` logs the accuracy in a training).

    Raises:
        FileNotFoundError: The source is a path, and nothing is there.
        ValueError: The source has no such split or columns, no answers, or a row without a problem.
    """
    if isinstance(benchmark, str):
        benchmark = get_benchmark(benchmark)
    template = DEFAULT_TEMPLATE if prompt_template is None else for_mathematics(get_template(prompt_template))
    columns = _columns(benchmark)
    problem = _column(benchmark, "problem", _PROBLEM_COLUMNS, list(columns))
    answer = _column(benchmark, "answer", SOLUTION_COLUMNS, list(columns))
    texts = list(columns[problem])[:limit]
    solutions = [_solution(value) for value in list(columns[answer])[:limit]]
    ids = [str(i) for i in columns["id"]][:limit] if "id" in columns else []
    if len(set(ids)) != len(texts):
        ids = [str(row) for row in range(len(texts))]
    what = f"Benchmark {benchmark.name!r} ({benchmark.source!r})"
    if not any(solutions) or not all(texts):
        raise ValueError(f"{what} cannot be used: it has no answers, or a row without a problem.")
    for row, problem_text in enumerate(texts):
        if not isinstance(problem_text, str):
            raise ValueError(
                f"{what} cannot be used: the {problem} of row {row} is {str(problem_text)[:60]!r}, not a text."
            )
        for text in (problem_text, solutions[row], ids[row]):
            if not _is_unicode(text):
                raise ValueError(f"{what} cannot be used: row {row} has half of a surrogate pair.")
    if unanswerable := [row for row, solution in enumerate(solutions) if not solution]:
        logger.warning("%s: %d problems have no answer that a completion could match.", what, len(unanswerable))
    return datasets.Dataset.from_dict(
        {
            "data_source": [benchmark.name] * len(texts),
            "problem_id": ids,
            "prompt": [template.messages(text) for text in texts],
            "solution": solutions,
            "answer_format": [template.answer_format] * len(texts),
        }
    )


def _columns(benchmark: Benchmark) -> Mapping[str, Sequence[Any]]:
    """The columns of a benchmark's source. In a file of text numbers stay as they are written."""
    path = Path(benchmark.source).expanduser()
    if path.is_file() and path.suffix in problems.SUFFIXES:
        return problems.read_problems(path)
    loaded = load_splits(benchmark.source, benchmark.config, streaming=False)
    split = next(iter(loaded)) if len(loaded) == 1 else benchmark.split
    if split not in loaded:
        raise ValueError(f"{benchmark.source!r} has no split {split!r}: it has {', '.join(map(repr, loaded))}.")
    return {name: loaded[split][name] for name in loaded[split].column_names}


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _column(benchmark: Benchmark, part: str, usual: Sequence[str], columns: Sequence[str]) -> str:
    named = getattr(benchmark, part)
    for column in (named,) if named else usual:
        if column in columns:
            return str(column)
    raise ValueError(
        f"Benchmark {benchmark.name!r} ({benchmark.source!r}) has no column {named or ' or '.join(usual)} with the "
        f"{part}: its columns are {', '.join(map(repr, columns))}."
    )


def _solution(value: Any) -> str:
    """The reference answer; several of them are one answer, separated by commas."""
    if isinstance(value, Sequence) and not isinstance(value, str | Mapping):
        return ", ".join(final_result(part) for part in value)
    return final_result(value)
