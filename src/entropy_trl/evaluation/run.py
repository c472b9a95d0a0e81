"""One benchmark, one model: draws what is missing, verifies it, keeps every completion, and sums up."""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import tqdm
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from entropy_trl.evaluation.benchmarks import Sampling
from entropy_trl.evaluation.engines import Engine
from entropy_trl.evaluation.metrics import bootstrap_means, group_sizes, interval, majority_at_k, pass_at_k
from entropy_trl.files import write_json
from entropy_trl.rewards import final_answer, math_reward


Record = dict[str, Any]


def evaluate_benchmark(
    engine: Engine,
    rows: datasets.Dataset,
    sampling: Sampling,
    file: Path,
    *,
    name: str,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    locked: bool = False,
) -> dict[str, Any]:
    """Evaluates a model on the rows of `load_benchmark`.

    Every completion becomes a line of `file` as soon as its batch is done. If the file is there from an interrupted run
    with the same settings, only what is missing is drawn. A completion depends on the seed, the benchmark's name, the
    row and the sample alone, not on what was drawn before.

    Args:
        engine ([`Engine`]): Draws the completions.
        rows (`datasets.Dataset`): The problems.
        sampling ([`Sampling`]): How to sample.
        file (`Path`): The JSONL file of completions; its settings go beside it, to `NAME.settings.json`.
        name (`str`): The benchmark's name.
        settings (`Mapping[str, Any]`, *optional*): What else must be the same for a file to be continued, such as the
            model.
        seed (`int`, *optional*, defaults to `0`): The seed of the sampling.
        overwrite (`bool`, *optional*, defaults to `False`): Start again where the settings differ, instead of refusing
            to.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
        locked (`bool`, *optional*, defaults to `False`): The caller is the [`only_writer`] of the file.

    Returns:
        `dict[str, Any]`: The scores, see `summarise`.

    Raises:
        ValueError: The file is from a run with other settings, or another process is writing it.
    """
    with nullcontext() if locked else only_writer(file):
        return _evaluate(engine, rows, sampling, file, name, settings, seed, overwrite, progress)


@contextmanager
def only_writer(file: Path) -> Iterator[None]:
    """Locks a file of completions against other processes. The lock ends with the process, however that ends.

    Raises:
        ValueError: Another process has the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is writing {file}: two writers would count completions twice. Wait for it, or use "
                "another output folder."
            ) from error
        yield


def _evaluate(
    engine: Engine,
    rows: datasets.Dataset,
    sampling: Sampling,
    file: Path,
    name: str,
    settings: Mapping[str, Any] | None,
    seed: int,
    overwrite: bool,
    progress: bool,
) -> dict[str, Any]:
    settings = dict(settings or {}) | run_settings(engine.name, rows, sampling, name, seed)
    if not overwrite:
        check_settings(file, settings)
    if not _has_settings(file, settings) or not file.exists():
        file.write_bytes(b"")
        write_json(_beside(file), settings)
    tasks = [(row, sample) for row in range(len(rows)) for sample in range(sampling.samples)]
    # Batches begin at the same completions whether or not there was an interruption, so that rounding is the same too.
    done = _count_whole(file, tasks)
    if done < len(tasks):
        done -= done % engine.batch_size
    _cut(file, done)
    prompts, solutions, formats = (list(rows[column]) for column in ("prompt", "solution", "answer_format"))
    with file.open("a") as lines, tqdm(total=len(tasks), initial=done, desc=name, disable=not progress) as bar:
        for start in range(done, len(tasks), engine.batch_size):
            batch = tasks[start : start + engine.batch_size]
            seeds = [_seed(seed, name, row, sample) for row, sample in batch]
            completions = engine.generate([prompts[row] for row, _ in batch], seeds, sampling)
            correct = math_reward(
                [completion.text for completion in completions],
                solution=[solutions[row] for row, _ in batch],
                answer_format=[formats[row] for row, _ in batch],
            )
            for (row, sample), completion, reward in zip(batch, completions, correct, strict=True):
                record = {
                    "problem": row,
                    "problem_id": rows[row]["problem_id"],
                    "sample": sample,
                    "text": completion.text,
                    "answer": final_answer(completion.text, formats[row]),
                    "solution": solutions[row],
                    "correct": reward == 1.0,
                    "length": completion.length,
                    "truncated": completion.truncated,
                    "entropy": completion.entropy,
                }
                lines.write(json.dumps(record) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(batch))
    return summarise(read_completions(file), name)


def _seed(seed: int, name: str, row: int, sample: int) -> int:
    return xxh3_64_intdigest(f"{seed}/{name}/{row}/{sample}".encode()) >> 1  # vLLM's are signed


def run_settings(engine: str, rows: datasets.Dataset, sampling: Sampling, name: str, seed: int) -> dict[str, Any]:
    """What decides about the completions, beside the model."""
    problems = json.dumps([list(rows[column]) for column in ("prompt", "solution", "answer_format")])
    return {
        "benchmark": name,
        "problems": len(rows),
        "problems_hash": xxh3_64_hexdigest(problems.encode(errors="surrogatepass")),
        "engine": engine,
        "samples": sampling.samples,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "max_tokens": sampling.max_tokens,
        "seed": seed,
    }


def check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Makes sure that a file of completions, if there is one, may be continued with these settings.

    Raises:
        ValueError: It was made with others.
    """
    before = _settings_of(file)
    if before == settings or not file.exists() or not file.stat().st_size:
        return
    changed = [
        f"{key} (then {before.get(key)!r}, now {settings.get(key)!r})"
        for key in before | dict(settings)
        if before.get(key) != settings.get(key)
    ]
    raise ValueError(
        f"{file} is from a run with other settings: {', '.join(changed)}. Use another output folder, or overwrite to "
        "start again."
    )


def _settings_of(file: Path) -> dict[str, Any]:
    return read_mapping(_beside(file)) if _beside(file).exists() else {}


def _has_settings(file: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a file of completions was made with these settings. It was not if what says so is damaged."""
    try:
        return _settings_of(file) == settings
    except ValueError:
        return False


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error}). Delete it, or restore it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(value).__name__}, not a mapping. Delete it.")
    return value


def _beside(file: Path) -> Path:
    return file.with_suffix(".settings.json")


def read_completions(file: Path) -> list[Record]:
    """The lines of a file of completions.

    Raises:
        ValueError: A line is damaged.
    """
    records = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            record = _read_record(line)
            if record is None:
                raise ValueError(
                    f"{file} is damaged: line {number} is no completion of an evaluation. Delete the file, and "
                    "evaluate that benchmark again."
                )
            records.append(record)
    return records


def _read_record(line: bytes) -> Record | None:
    """A line of a file of completions; None if it is torn or damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(record: Any) -> bool:
    """Whether a value has all that scores are made of."""
    if not isinstance(record, dict) or not all(type(record.get(key)) is bool for key in ("correct", "truncated")):
        return False
    if not all(isinstance(record.get(key), str) for key in ("text", "answer")):
        return False
    if not all(type(record.get(key)) is int and 0 <= record[key] < 2**53 for key in ("problem", "sample", "length")):
        return False
    return type(record.get("entropy", "")) in (int, float, type(None))


def _count_whole(file: Path, tasks: Sequence[tuple[int, int]]) -> int:
    """How many of the first completions are in a file. A kill may have torn its last line."""
    with file.open("rb") as lines:
        count = 0
        for line, task in zip(lines, tasks, strict=False):
            record = _read_record(line)
            if record is None or (record["problem"], record["sample"]) != task:
                break
            count += 1
        return count


def _cut(file: Path, count: int) -> None:
    """Leaves the first `count` lines of a file."""
    with file.open("rb+") as lines:
        for _ in range(count):
            lines.readline()
        if lines.read(1):
            lines.seek(-1, os.SEEK_CUR)
            lines.truncate()


def summarise(records: Sequence[Record], name: str) -> dict[str, Any]:
    """The scores of a benchmark.

    Returns:
        `dict[str, Any]`: `accuracy` (avg@n, a fraction) with its 95% interval `ci95` over problems, `pass@k` and
        `majority@k` for k = n and the powers of 2 below, `mean_length` in tokens, `truncated` and `unanswered`
        (fractions of completions), and `entropy` (nats a token, over all tokens; None if the engine gave none).
    """
    by_problem: dict[int, list[Record]] = {}
    for record in records:
        by_problem.setdefault(record["problem"], []).append(record)
    problems = list(by_problem.values())
    n = len(problems[0])
    if any(sorted(record["sample"] for record in problem) != list(range(n)) for problem in problems):
        raise ValueError(
            f"The completions of {name!r} are not {n} of each problem, each once: their scores would be wrong. Start "
            "again with --overwrite, or in another output folder."
        )
    right = [sum(record["correct"] for record in problem) for problem in problems]
    scores = [count / n for count in right]
    summary: dict[str, Any] = {
        "problems": len(problems),
        "samples": n,
        "accuracy": _mean(scores),
        "ci95": interval(bootstrap_means(scores, name)),
    }
    if n > 1:
        ks = [k for k in (2**power for power in range(1, n.bit_length())) if k < n] + [n]
        wrong = _wrong_groups(problems)
        for k in ks:
            summary[f"pass@{k}"] = _mean([pass_at_k(n, count, k) for count in right])
        for k in ks:
            counts = zip(right, wrong, strict=True)
            summary[f"majority@{k}"] = _mean([majority_at_k(n, count, groups, k) for count, groups in counts])
    lengths = [record["length"] for record in records]
    entropies = [record["entropy"] for record in records]
    return summary | {
        "mean_length": _mean(lengths),
        "truncated": _mean([record["truncated"] for record in records]),
        "unanswered": _mean([not record["answer"] for record in records]),
        "entropy": None
        if None in entropies or not all(map(math.isfinite, entropies))
        else sum(entropy * length for entropy, length in zip(entropies, lengths, strict=True)) / max(sum(lengths), 1),
    }


def _wrong_groups(problems: Sequence[Sequence[Record]]) -> list[list[int]]:
    """How often each wrong answer was given, for each problem. The right ones all equal the reference: one group."""
    answers = [[r["answer"] for r in problem if r["answer"] and not r["correct"]] for problem in problems]
    pairs = {
        (one, other)
        for wrong in map(list, map(dict.fromkeys, answers))
        for position, one in enumerate(wrong)
        for other in wrong[:position]
    }
    ordered = sorted(pairs)
    equal = math_reward(
        [rf"\boxed{{{one}}}" for one, _ in ordered],
        solution=[other for _, other in ordered],
        answer_format=["boxed"] * len(ordered),
    )
    same = {pair for pair, reward in zip(ordered, equal, strict=True) if reward == 1.0}
    return [group_sizes(wrong, lambda first, answer: (answer, first) in same) for wrong in answers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
