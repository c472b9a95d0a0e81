"""The command `entropy-trl evaluate`: its options, what it checks before a model is loaded, and what it writes."""

import argparse
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig
from xxhash import xxh3_64_hexdigest

from entropy_trl._version import __version__
from entropy_trl.data import DEFAULT_TEMPLATE
from entropy_trl.evaluation import report
from entropy_trl.evaluation.benchmarks import BENCHMARKS, Benchmark, Sampling, get_benchmark, load_benchmark
from entropy_trl.evaluation.engines import Encoder, Engine, HFEngine, VLLMEngine, load_encoder
from entropy_trl.evaluation.model_files import check_model_files
from entropy_trl.evaluation.run import (
    check_settings,
    evaluate_benchmark,
    only_writer,
    read_completions,
    read_mapping,
    run_settings,
)
from entropy_trl.files import check_writable, replacing, write_json, write_text
from entropy_trl.mistakes import told_of
from entropy_trl.templates import TEMPLATES


TABLES = "results.md"

DESCRIPTION = (
    "Score models on maths benchmarks by the protocol of arXiv 2505.22617. A run that was interrupted goes on where it "
    "stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `entropy-trl evaluate`."""
    paper = report.published()["columns"]
    parser.add_argument("--model", nargs="+", default=[], metavar="[NAME=]MODEL", help="folders or hub ids")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        default=paper,
        metavar="NAME[=SOURCE]",
        help=f"out of {', '.join(BENCHMARKS)} (default: all but gsm8k), each from its hub data set or from SOURCE (a "
        "file with the columns problem and answer, or a hub id); or files",
    )
    parser.add_argument("--output_dir", default="runs/evaluation", help="one folder in it for each model")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="what generates")
    parser.add_argument(
        "--prompt_template",
        default=DEFAULT_TEMPLATE.name,
        help=f"the one the model was trained with: {', '.join(TEMPLATES)}, or a text with {{problem}}",
    )
    own = "the protocol of each benchmark"
    parser.add_argument("--samples", type=int, help=f"completions a problem ({own})")
    parser.add_argument("--temperature", type=float, help=f"0 is greedy ({own})")
    parser.add_argument("--top_p", type=float, help=f"({own}: 1)")
    parser.add_argument("--max_tokens", type=int, help=f"longest completion ({own}: 8192)")
    parser.add_argument("--limit", type=int, help="the first so many problems of each benchmark only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--batch_size", type=int, help="completions at a time, and between two writes (hf: 16, vllm: 1024)"
    )
    parser.add_argument(
        "--engine_kwargs", type=_mapping, default={}, help="JSON for vllm.LLM, or from_pretrained with --engine hf"
    )
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja file to use instead of the model's own template")
    parser.add_argument(
        "--chat_template_kwargs", type=_mapping, default={}, help='JSON, such as {"enable_thinking": false}'
    )
    parser.add_argument(
        "--top_logprobs", type=int, default=0, help="vllm: a lower bound of the entropy from so many log-probabilities"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again where completions have other settings")
    parser.add_argument("--parquet", action="store_true", help="write the completions as Parquet too")
    parser.add_argument(
        "--compare", nargs="*", metavar="RUN", help="print the paper's table with ours, and earlier RUNs"
    )


def _mapping(text: str) -> dict[str, Any]:
    """The type of an option that takes JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a JSON mapping")
    return value


_RESERVED = {
    "chat_template_kwargs": {"conversation", "add_generation_prompt", "tokenize", "return_dict"},
    "engine_kwargs": {"name", "model", "pretrained_model_name_or_path", "encode", "batch_size", "top_logprobs"},
}
"""What an option that takes JSON cannot set."""


def _check_names(option: str, names: list[str]) -> None:
    """Raises ValueError unless each name is that of a folder or file in the output folder."""
    for name in names:
        # A hidden folder would not be found again, nor would one of the name of the table beside it.
        hidden = not name or name.startswith(".") or not name.isprintable() or name == TABLES
        if hidden or "/" in name or len(name.encode(errors="surrogatepass")) > 200:
            raise ValueError(
                f"{option}: the name {name!r} cannot be that of a folder in --output_dir. Use a short name without "
                "'/' and '.' in front, such as NAME=PATH."
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{option} has a name twice: {', '.join(names)}.")


@dataclass
class Job:
    """What is to be evaluated, read and checked."""

    options: argparse.Namespace
    models: list["Model"]
    benchmarks: list[tuple[Benchmark, Sampling, datasets.Dataset]]
    earlier: list[report.Results]
    engine: Engine | None = None
    """That of the first model: loaded with the checks, since its errors may be the user's too."""
    locks: ExitStack = field(default_factory=ExitStack)
    """Of all files of completions, from the checks to the end."""


@dataclass
class Model:
    """One model, and where its results go."""

    name: str
    path: str
    folder: Path
    encode: Encoder
    settings: dict[str, Any]


def prepare(options: argparse.Namespace) -> Job:
    """Reads the problems and the models' configurations, and checks all that can be checked before a model is loaded.

    Raises:
        ValueError, OSError: A mistake of the user's, in one line.
    """
    if not options.model and options.compare is None:
        raise ValueError("No model: give --model (a folder or a hub id), or --compare RUN to print earlier results.")
    for option, reserved in _RESERVED.items():
        if given := reserved & getattr(options, option).keys():
            raise ValueError(f"--{option} cannot set {', '.join(sorted(given))}: the evaluation sets it itself.")
    if options.top_logprobs < 0:
        raise ValueError(f"--top_logprobs must not be negative, got {options.top_logprobs}.")
    for option in ("batch_size", "limit"):
        if getattr(options, option) is not None and getattr(options, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(options, option)}.")
    earlier = [results for run in options.compare or () for results in report.load_results(run)]
    if not options.model:
        if not earlier:
            raise ValueError("Nothing to compare: give --compare the output folder of an evaluation, or --model.")
        return Job(options, [], [], earlier)
    if options.top_logprobs and options.engine != "vllm":
        raise ValueError("--top_logprobs is for --engine vllm: hf has exact entropies.")
    if options.engine == "vllm" and not _version("vllm"):
        raise ValueError(
            "--engine vllm needs vLLM, which is not installed. Run `pip install 'entropy-trl[vllm]'`, or use "
            "--engine hf."
        )
    overrides = {
        name: getattr(options, name)
        for name in ("samples", "temperature", "top_p", "max_tokens")
        if getattr(options, name) is not None
    }
    for text in options.model:
        _check_names("--model", [_name_and_path(text)[0]])
    output_dir = Path(options.output_dir)
    check_writable(output_dir, "--output_dir")
    if (output_dir / TABLES).is_dir():
        raise ValueError(f"--output_dir {options.output_dir!r}: {TABLES} in it is a folder. Use another one.")
    benchmarks = []
    for text in options.benchmarks:
        benchmark = get_benchmark(text)
        rows = load_benchmark(benchmark, prompt_template=options.prompt_template, limit=options.limit)
        benchmarks.append((benchmark, replace(benchmark.sampling, **overrides), rows))
    names = [benchmark.name for benchmark, _, _ in benchmarks]
    _check_names("--benchmarks", names)
    for file in sorted(output_dir.glob(f"*/{report.RESULTS}")):  # they join the table at the end
        report.read_results(file)
    models = [_model(text, options) for text in options.model]
    _check_names("--model", [model.name for model in models])
    job = Job(options, models, benchmarks, earlier)
    with ExitStack() as locks:
        for model in models:
            check_writable(_completions(model, "").parent, "--output_dir")
            for name in names:
                locks.enter_context(only_writer(_completions(model, name)))
            _check(job, model)
        with told_of(f"--model {models[0].path!r} cannot be loaded by --engine {options.engine}"):
            job.engine = _load_engine(options, models[0])
        job.locks = locks.pop_all()
    return job


def _name_and_path(text: str) -> tuple[str, str]:
    """What `[NAME=]MODEL` names."""
    name, _, path = text.rpartition("=") if not Path(text).exists() else ("", "", text)
    if not path:
        raise ValueError(f"--model {text!r} names no model: give NAME=MODEL, with a folder or a hub id.")
    return name or re.sub(r"[^\w.-]+", "-", path).strip("-."), path


def _model(text: str, options: argparse.Namespace) -> Model:
    name, path = _name_and_path(text)
    local = Path(path).expanduser()
    if path.startswith(("/", ".", "~")) and not local.is_dir():
        raise FileNotFoundError(f"--model: there is no folder {path!r}.")
    if local.is_dir():
        check_model_files(local)
        path = str(local)
    with told_of(f"--model {path!r}: its configuration and tokenizer cannot be loaded"):
        encode = load_encoder(path, **options.chat_template_kwargs)
        version_of_it = _fingerprint(local) if local.is_dir() else AutoConfig.from_pretrained(path)._commit_hash
    if options.chat_template is not None:
        encode.tokenizer.chat_template = _read_template(options.chat_template)
    return Model(
        name=name,
        path=path,
        folder=Path(options.output_dir) / name,
        encode=encode,
        settings={
            "model": path,
            "model_version": version_of_it,
            "prompt_template": options.prompt_template,
            "chat_template": None if options.chat_template is None else encode.tokenizer.chat_template,
            "chat_template_kwargs": options.chat_template_kwargs,
            "engine_kwargs": options.engine_kwargs,
            "top_logprobs": options.top_logprobs,
        },
    )


def _read_template(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat_template {file!r} cannot be read ({error}).") from error


def _fingerprint(folder: Path) -> str:
    """What changes when a checkpoint is written again, without reading gigabytes."""
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja")
    ]
    return xxh3_64_hexdigest(repr(stats).encode())


def _check(job: Job, model: Model) -> None:
    """That completions fit into the model's context, and that those on disk may be continued."""
    base = model.path
    adapter = Path(base) / "adapter_config.json"
    if adapter.exists():
        if job.options.engine == "vllm":
            raise ValueError(f"{base!r} is an adapter: merge it into its model first, or use --engine hf.")
        named = read_mapping(adapter).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise ValueError(
                f"{adapter} is damaged: it names no base_model_name_or_path, the model that the adapter is for."
            )
        if Path(named).is_absolute() and not Path(named).is_dir():
            raise FileNotFoundError(f"{adapter} names the model {named!r}, and there is no such folder.")
        base = named
    with told_of(f"The configuration of {base!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(base).get_text_config()
    context, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    for benchmark, sampling, rows in job.benchmarks:
        with told_of(f"The chat template of {model.path!r} cannot be applied to a prompt of {benchmark.name}"):
            encoded = [model.encode(prompt) for prompt in rows["prompt"]]
        if not all(encoded):
            raise ValueError(f"The tokenizer of {model.path!r} makes no token of a prompt of {benchmark.name}.")
        highest, longest = max(map(max, encoded)), max(map(len, encoded))
        if vocabulary is not None and highest >= vocabulary:
            raise ValueError(
                f"The tokenizer of {model.path!r} is not the model's: it has a token {highest}, and the model "
                f"{vocabulary} tokens."
            )
        if context is not None and longest + sampling.max_tokens > context:
            raise ValueError(
                f"{benchmark.name} has prompts of up to {longest} tokens, which leave no {sampling.max_tokens} in the "
                f"context of {model.path!r} ({context})"
                + (f": use --max_tokens {context - longest}." if longest < context else ".")
            )
        settings = model.settings | run_settings(job.options.engine, rows, sampling, benchmark.name, job.options.seed)
        completions = _completions(model, benchmark.name)
        if completions.exists() and not completions.is_file():
            raise ValueError(f"{completions} is not a file: completions cannot be written there. Move it away.")
        if not job.options.overwrite:
            check_settings(completions, settings)


def _completions(model: Model, benchmark: str) -> Path:
    return model.folder / "completions" / f"{benchmark}.jsonl"


def run(prepared: Job, options: argparse.Namespace) -> int:
    """Evaluates, writes and prints. Returns the exit code."""
    runs = list(prepared.earlier)
    closed: BrokenPipeError | None = None
    with prepared.locks:
        for model in prepared.models:
            runs.append(_evaluate(prepared, model))
            try:
                print(f"{model.name}\n\n{report.details_table(runs[-1])}\n", flush=True)
            except BrokenPipeError as error:  # `| head` has seen enough; the other models and the table are to come
                closed = error
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # libraries flush it too
    table = report.scores_table(runs, compare=options.compare is not None)
    if prepared.models:
        output_dir = Path(options.output_dir)
        with _alone(output_dir):
            # With the models of earlier calls, and of other processes, that are in the folder too.
            evaluated = {model.name for model in prepared.models}
            others = [of for of in report.load_results(str(output_dir)) if of["name"] not in evaluated]
            runs += [of for of in others if of not in runs]  # --compare may have named them
            tables = [report.scores_table(runs, compare=options.compare is not None)]
            tables += [f"## {of['name']}\n\n{report.details_table(of)}" for of in runs]
            write_text(output_dir / TABLES, "\n\n".join(tables) + "\n")
    if closed is not None:
        raise closed
    print(table)
    return 0


def _evaluate(job: Job, model: Model) -> report.Results:
    """One model on all benchmarks."""
    engine, job.engine = job.engine or _load_engine(job.options, model), None
    for benchmark, sampling, rows in job.benchmarks:
        completions = _completions(model, benchmark.name)
        scores = evaluate_benchmark(
            engine,
            rows,
            sampling,
            completions,
            name=benchmark.name,
            settings=model.settings,
            seed=job.options.seed,
            overwrite=job.options.overwrite,
            locked=True,
        )
        scores |= {"source": benchmark.source, "sampling": asdict(sampling) | {"seed": job.options.seed}}
        results = _add_scores(model, benchmark.name, scores, _versions(job.options.engine))
        if job.options.parquet:
            with replacing(completions.with_suffix(".parquet")) as part:
                datasets.Dataset.from_list(read_completions(completions)).to_parquet(part)
    return results


def _add_scores(model: Model, benchmark: str, scores: dict[str, Any], versions: dict[str, Any]) -> report.Results:
    """Adds a benchmark to what earlier calls with this model, or other processes, have written."""
    file = model.folder / report.RESULTS
    with _alone(model.folder):
        results: report.Results = read_mapping(file) if file.exists() else {}
        if results.get("model") != model.settings:
            results = {"benchmarks": {}}
        results = {"name": model.name, "model": model.settings, "versions": versions} | {
            "benchmarks": results["benchmarks"] | {benchmark: scores}
        }
        results["average"] = report.average(results, model.folder)
        write_json(file, results)
    return results


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps the other processes that evaluate into a folder waiting, so that none writes over another's scores."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load_engine(options: argparse.Namespace, model: Model) -> Engine:
    if options.engine == "hf":
        return HFEngine.load(model.path, model.encode, options.batch_size, **options.engine_kwargs)
    return VLLMEngine.load(model.path, model.encode, options.batch_size, options.top_logprobs, **options.engine_kwargs)


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _versions(engine: str) -> dict[str, str | None]:
    packages = ["torch", "transformers", "math-verify", *(["vllm"] if engine == "vllm" else [])]
    return {"entropy-trl": __version__} | {package: _version(package) for package in packages}
