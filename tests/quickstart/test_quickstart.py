"""The embedded task, its warm-up, its evaluation and the quickstart command."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from entropy_trl import CovGRPOConfig
from entropy_trl.analysis.logs.runs import Series
from entropy_trl.analysis.verdict import verdict
from entropy_trl.cli import main
from entropy_trl.quickstart import (
    METHODS,
    RECIPES,
    WarmStartConfig,
    build_dataset,
    build_model,
    build_tokenizer,
    countdown_reward,
    evaluate_policy,
    held_out_prompts,
    load_or_warm_up,
    train_prompts,
    training_arguments,
    warm_up,
)
from entropy_trl.quickstart import run as run_module
from entropy_trl.quickstart.evaluate import count_right, sample
from entropy_trl.quickstart.recipe import DEFAULT_METHODS, LABELS
from entropy_trl.quickstart.run import run_quickstart
from entropy_trl.quickstart.summary import describe, format_verdicts
from entropy_trl.quickstart.task import EOS_ID, PAD_ID, TOKEN_ID, VOCABULARY, is_held_out, verify
from entropy_trl.quickstart.warm_start import draw_batch


CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
TINY = ["--warm_start_steps", "20", "--eval_prompts", "8", "--recipe", "short"]
METRICS = {"final_entropy", "greedy", "avg@16", "pass@4", "pass@16", "seconds"}


def solutions(prompt):
    """All right answers, by trying the 27 chains; written apart from the verifier."""
    digits, target = [int(c) for c in prompt[:4]], int(prompt[5])
    right = set()
    for chain in product("+-*", repeat=3):
        text, value = "", digits[0]
        for operator, digit in zip(chain, digits[1:], strict=True):
            value = {"+": value + digit, "-": value - digit, "*": value * digit}[operator]
            while value < 0:
                value += 10
            value = int(str(value)[-1])  # the last digit of a number that is not negative
            text += operator + str(value)
        if value == target:
            right.add(text)
    return right


def ids_of(text):
    return [TOKEN_ID[character] for character in text]


def share_of_digits(completions, **kwargs):
    return [sum(map(str.isdigit, text)) / 7 for text in completions]


@pytest.fixture
def quickstart(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder: returns its exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    # Adding or editing a file of the package while the tests run must not make two calls differ.
    monkeypatch.setattr(run_module, "versions", lambda: {"code": "fixed"})
    # So short a warm-up solves nothing: a dense reward gives the training something to learn.
    monkeypatch.setattr(run_module.task, "countdown_reward", share_of_digits)

    def call(*options):
        code = main(["quickstart", *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# --- the task


@pytest.mark.parametrize("prompt", ["3758>4:", "0000>0:", "1999>3:", "9876>0:", "0909>1:", *held_out_prompts(20)])
def test_verifier_accepts_exactly_the_solutions(prompt):
    # every string with digits in the right places: 27 chains x 1000 values
    candidates = [
        "".join(o + v for o, v in zip(chain, values, strict=True))
        for chain in product("+-*", repeat=3)
        for values in product("0123456789", repeat=3)
    ]
    assert {text for text in candidates if verify(prompt, text)} == solutions(prompt)


def test_verifier_by_hand():
    # 3*7 = 21, 1-6... : 3-7 = -4 = 6, 6-5 = 1, 1-8 = -7 = 3 modulo 10
    assert verify("3758>3:", "-6-1-3")
    assert not verify("3758>4:", "-6-1-3")  # another target
    assert verify("3758>4:", "*1+6+4")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "*1+6+",
        "*1+6+4 ",
        "*1+6+4+4",
        "*1+6+4<eos>",
        "1*6+4+",
        "*1+6+5",
        "*2+6+4",
        "/1+6+4",
        "*1+6*4",
        "**1+64",
        "*-+6+4",
    ],
)
def test_verifier_refuses_malformed_answers(completion):
    assert verify("3758>4:", completion) is False


@pytest.mark.parametrize("prompt", ["", "3758>4", "375>44:", "3758>x:", "a758>4:", "3758>44:", "3758:4>"])
def test_verifier_names_a_malformed_prompt(prompt):
    with pytest.raises(ValueError, match="not a countdown prompt"):
        verify(prompt, "*1+6+4")


def test_reward_needs_eos():
    right = ids_of("*1+6+4")
    ids = [
        [*right, EOS_ID],
        right,  # stopped without <eos>
        [*right, PAD_ID],
        [*right, TOKEN_ID["+"]],
        [*right[:-1], EOS_ID],
        [*right[:3], PAD_ID, *right[3:], EOS_ID],  # decodes to the right text without special tokens
        [EOS_ID],
        [],
    ]
    n = len(ids)
    assert (
        countdown_reward(["3758>4:"] * n, ["*1+6+4"] * n, completion_ids=ids, trainer_state=None) == [1.0] + [0.0] * 7
    )
    # with texts alone, the end of the text is the end of the answer
    assert countdown_reward(["3758>4:"] * 2, ["*1+6+4", "*1+6+5"]) == [1.0, 0.0]


def test_prompts_have_solutions_and_the_hold_out_is_disjoint():
    train, held_out = train_prompts(2000, seed=1), held_out_prompts(500, seed=1)
    assert len(set(train)) == 2000
    assert len(set(held_out)) == 500
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    assert all(solutions(prompt) for prompt in train[:300] + held_out)


def test_prompts_depend_on_the_seed_only():
    assert train_prompts(100, seed=3) == train_prompts(500, seed=3)[:100]
    assert train_prompts(100, seed=3) != train_prompts(100, seed=4)
    with pytest.raises(ValueError, match="ask for fewer"):
        held_out_prompts(50_000)


def test_dataset():
    dataset = build_dataset()
    assert dataset.column_names == ["prompt"]
    assert len(dataset) == 12_800  # a prompt of the long recipe is seen once: 400 rollouts of 32
    assert dataset["prompt"][:50] == train_prompts(50)


def test_tokenizer_round_trip():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(VOCABULARY) == 20
    text = "3758>4:*1+6+4<eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [*ids_of("3758>4:*1+6+4"), EOS_ID]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text[:-5]
    assert tokenizer("3x7")["input_ids"][1] == tokenizer.unk_token_id
    padded = tokenizer(["3758>4:", "37"], padding=True)
    assert padded["input_ids"][1] == [PAD_ID] * 5 + ids_of("37")
    assert set(padded) == {"input_ids", "attention_mask"}


def test_model_is_small_and_seeded():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = build_model(seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) == 85_184
    again, other = build_model(seed=5), build_model(seed=6)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


# --- the warm-up


@pytest.mark.parametrize("noise", [0.0, 0.8, 1.0])
def test_warm_up_batches(noise):
    tokens = draw_batch(3000, noise, torch.Generator().manual_seed(0))
    assert tokens.shape == (3000, 14)
    texts = ["".join(VOCABULARY[i] for i in row) for row in tokens.tolist()]
    assert all(text.endswith("<eos>") for text in texts)
    assert not any(is_held_out(text[:7]) for text in texts)
    right = [verify(text[:7], text[7:13]) for text in texts]
    # the chain itself is always right: its own result as the target makes the verifier accept it
    assert all(verify(f"{text[:5]}{text[12]}:", text[7:13]) for text in texts)
    # A random digit is the result once in ten: 1 - 0.9 * noise, give or take 4 standard errors of 0.009. Removing
    # held-out prompts favours neither.
    assert sum(right) / 3000 == pytest.approx(1 - 0.9 * noise, abs=0.04)


def test_warm_up_is_deterministic():
    config = WarmStartConfig(seed=3, steps=6, noisy_steps=3, batch_size=16)
    first, again = warm_up(config), warm_up(config)
    other = warm_up(WarmStartConfig(seed=4, steps=6, noisy_steps=3, batch_size=16))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_warm_start_is_stored(tmp_path):
    config = WarmStartConfig(seed=3, steps=3, noisy_steps=1, batch_size=8)
    model, tokenizer, seconds = load_or_warm_up(config, tmp_path)
    (folder,) = (tmp_path / "warm_start").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again, _, same_seconds = load_or_warm_up(config, tmp_path)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert same_seconds == seconds
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert torch.equal(model.lm_head.weight, warm_up(config).lm_head.weight)
    assert len(tokenizer) == 20
    for name in ("warm_start.json", "model.safetensors", "config.json"):  # damaged by an interruption: made again
        (folder / name).write_bytes(b"{")
        again, _, _ = load_or_warm_up(config, tmp_path)
        assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    load_or_warm_up(WarmStartConfig(seed=3, steps=4, noisy_steps=1, batch_size=8), tmp_path)
    assert len(list((tmp_path / "warm_start").iterdir())) == 2


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"noisy_steps": 601}, {"noise": 1.5}, {"batch_size": 0}])
def test_warm_start_config_is_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WarmStartConfig(**wrong)


# --- the evaluation


def test_sampling_agrees_with_a_full_forward():
    """With the cache or without it: the same greedy tokens, and the entropy of the same distributions."""
    model, prompts = build_model(seed=0), held_out_prompts(6)
    drawn = sample(model, prompts, 3, torch.Generator().manual_seed(0))
    prompt_ids = torch.tensor([ids_of(prompt) for prompt in prompts]).repeat_interleave(3, dim=0)
    tokens = drawn.tokens.flatten(0, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt_ids, tokens], dim=1)).logits[:, 6:-1].double()
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    ended = (tokens == EOS_ID).cumsum(dim=1)
    mask = (ended == 0) | ((ended == 1) & (tokens == EOS_ID))  # up to and including the first <eos>
    assert 0 < mask.sum() < mask.numel()
    assert drawn.entropy == pytest.approx(entropies[mask].mean().item(), abs=1e-5)
    assert (tokens[~mask] == PAD_ID).all()

    greedy = sample(model, prompts, 1, None).tokens[:, 0]
    ids = torch.tensor([ids_of(prompt) for prompt in prompts])
    for position in range(7):
        with torch.no_grad():
            chosen = model(input_ids=ids).logits[:, -1].argmax(dim=-1)
        alive = ~(greedy[:, :position] == EOS_ID).any(dim=1)
        assert (greedy[alive, position] == chosen[alive]).all()
        ids = torch.cat([ids, greedy[:, position : position + 1]], dim=1)


def test_evaluation_leaves_the_training_alone():
    model = build_model(seed=0).train()
    state = torch.get_rng_state()
    metrics = evaluate_policy(model, held_out_prompts(8), samples=16, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert metrics == evaluate_policy(model, held_out_prompts(8), samples=16, seed=1)
    assert set(metrics) == METRICS - {"seconds"}


def test_count_right():
    prompts = ["3758>4:", "3758>3:"]
    right, wrong = [*ids_of("*1+6+4"), EOS_ID], [*ids_of("+0+5-7"), EOS_ID]
    assert count_right(prompts, torch.tensor([[right, wrong, right], [wrong, right, wrong]])) == [2, 0]


# --- the recipes and the shipped configurations


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid(method, recipe, tmp_path):
    config = CovGRPOConfig(**training_arguments(method, RECIPES[recipe], 0, tmp_path))
    assert config.generation_batch_size == 256
    assert config.max_steps % 8 == config.save_steps % 8 == 0
    published = {"kl_cov": (float("inf"), float("inf")), "kl_random": (float("inf"), float("inf"))}
    clip = {"clip_higher": (0.2, 0.28)} | published
    assert config.ratio_clip() == clip.get(method, (0.2, 0.2))


@pytest.mark.parametrize("method", DEFAULT_METHODS)
def test_shipped_configuration_is_the_recipe(method):
    expected = training_arguments(method, RECIPES["short"], 0, Path("runs/quickstart/train") / method)
    shipped = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())
    assert shipped == {
        "model_factory": "entropy_trl.quickstart.warm_start_policy",
        "dataset_factory": "entropy_trl.quickstart.build_dataset",
        "reward_funcs": ["entropy_trl.quickstart.countdown_reward"],
        **expected,
    }


# --- the command


def test_all_methods(quickstart, tmp_path):
    code, out, _ = quickstart(*TINY, "--rollouts", "1", "--methods", *METHODS)
    assert code == 0
    assert "KL-Cov" in out
    assert "With 1 seed, GRPO's entropy did not collapse" in out
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert list(summary["methods"]) == list(METHODS)
    for metrics in summary["methods"].values():
        assert set(metrics) == METRICS | {"per_seed"}
    assert set(summary["warm_start"]) == METRICS | {"seed"}
    assert {found["sign"] for found in summary["verdicts"].values()} == {"unknown"}  # one rollout
    assert summary["seeds"] == [0]
    assert summary["recipe"] == {"name": "short", "rollouts": 1, "learning_rate": 6e-4}
    assert summary["versions"] == {"code": "fixed"}
    assert (tmp_path / "runs/quickstart/quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "report.html" in out
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
    assert list(report["curves"]["entropy"]["groups"]) == list(report["covariance"]["runs"]) == list(LABELS.values())
    folder = tmp_path / "runs/quickstart/short/kl_cov-seed0"
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "held_out/pass@16" in entry] == [0, 8]
    assert [entry["step"] for entry in log if "entropy" in entry] == [8]
    assert (folder / "policy" / "model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))

    # one seed more: the first is kept, and the summary has the means of the two
    code, out, _ = quickstart(*TINY, "--rollouts", "1", "--methods", "grpo", "--seeds", "0", "1")
    assert "GRPO, seed 0: finished before, kept" in out
    grpo = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())["methods"]["grpo"]
    assert [run["seed"] for run in grpo["per_seed"]] == [0, 1]
    assert grpo["per_seed"][0] == summary["methods"]["grpo"]["per_seed"][0]
    entropies = [run["final_entropy"] for run in grpo["per_seed"]]
    assert entropies[0] != entropies[1]
    assert grpo["final_entropy"] == pytest.approx(sum(entropies) / 2)


def test_versions_name_the_libraries_and_the_code():
    found = run_module.versions()
    assert {"entropy_trl", "trl", "transformers", "torch", "python", "code"} == set(found)
    assert found["torch"] == torch.__version__


def test_interrupted_run_continues_exactly(quickstart, tmp_path, monkeypatch):
    """Interrupted in its second method, after a checkpoint: the same numbers as without the interruption."""
    options = [*TINY, "--no-plot", "--methods", "grpo", "clip_cov", "--rollouts", "5"]
    assert quickstart(*options, "--output_dir", "whole")[0] == 0

    on_step_end = run_module.HeldOutCurve.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if "clip_cov" in args.output_dir and state.global_step == 34:  # in the fifth rollout; saved after the third
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.HeldOutCurve, "on_step_end", interrupt)
        code, _, err = quickstart(*options, "--output_dir", "cut")
    assert code == 130
    assert "continues" in err
    cut = tmp_path / "cut" / "short"
    assert [path.name for path in cut.glob("*/checkpoint-*")] == ["checkpoint-24"]
    finished = (cut / "grpo-seed0" / "result.json").stat().st_mtime_ns

    code, out, _ = quickstart(*options, "--output_dir", "cut")
    assert code == 0
    assert "GRPO, seed 0: finished before, kept" in out
    assert "Clip-Cov, seed 0: continues from checkpoint-24" in out
    assert (cut / "grpo-seed0" / "result.json").stat().st_mtime_ns == finished
    for method in ("grpo", "clip_cov"):
        logs = [(tmp_path / folder / "short" / f"{method}-seed0" / "train_log.jsonl") for folder in ("whole", "cut")]
        whole, resumed = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
        for name in ("step", "reward", "entropy", "loss", "held_out/entropy", "held_out/pass@16"):
            assert [e[name] for e in whole if name in e] == [e[name] for e in resumed if name in e], name
        assert len({e["held_out/entropy"] for e in whole if "held_out/entropy" in e}) == 6  # it did learn
    for name in METRICS - {"seconds"}:
        results = [
            json.loads((tmp_path / folder / "short" / "clip_cov-seed0" / "result.json").read_text())[name]
            for folder in ("whole", "cut")
        ]
        assert results[0] == results[1], name


def test_other_settings_do_not_reuse_a_result(quickstart, tmp_path):
    options = [*TINY, "--no-plot", "--methods", "grpo"]
    assert quickstart(*options, "--rollouts", "1")[0] == 0
    _, out, _ = quickstart(*options, "--rollouts", "2")
    assert "GRPO, seed 0: stored with other settings (max_steps), starts again" in out
    _, out, _ = quickstart(*options, "--rollouts", "2", "--warm_start_seed", "1")
    assert "stored with other settings (warm_start), starts again" in out
    _, out, _ = quickstart(*options, "--rollouts", "2", "--warm_start_seed", "1")
    assert "finished before, kept" in out
    run = tmp_path / "runs/quickstart/short/grpo-seed0"
    (run / "settings.json").unlink()
    _, out, _ = quickstart(*options, "--rollouts", "2", "--warm_start_seed", "1")
    assert "GRPO, seed 0: stored with unknown settings, starts again" in out
    # Files that an interruption or a full disk damaged: what they hold is made again.
    settings = json.loads((run / "settings.json").read_text())
    for name, text in [("settings.json", "{"), ("settings.json", "[]"), ("settings.json", "[" * 100_000)]:
        (run / name).write_text(text)
        assert run_module._why_not_reusable(run, settings) == "stored with unknown settings"
    (run / "settings.json").write_text(json.dumps(settings))
    assert run_module._why_not_reusable(run, settings) is None
    for name, text in [
        ("train_log.jsonl", "{"),
        ("train_log.jsonl", "3\n"),
        ("result.json", "{}"),
        ("result.json", "["),
    ]:
        before = (run / name).read_text()
        (run / name).write_text(text)
        assert "stored with a damaged result" in run_module._why_not_reusable(run, settings)
        (run / name).write_text(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "klcov"], "unknown method 'klcov'"),
        (["--methods", "grpo", "grpo"], "name one of them twice"),
        (["--seeds", "-1"], "a seed is negative"),
        (["--seeds", "0", "0"], "name one of them twice"),
        (["--recipe", "medium"], "unknown recipe 'medium'"),
        (["--rollouts", "0"], "must be at least 1"),
        (["--eval_prompts", "0"], "must be at least 1"),
        (["--eval_prompts", "100000"], "ask for fewer"),
        (["--warm_start_steps", "0"], "must be positive"),
        (["--output_dir", "a_file"], "is a file"),
        (["--output_dir", "a_file/inside"], "nothing can be written there"),
        (["--seeds", "9" * 30], "above 4,294,967,295"),
        (["--warm_start_seed", "9" * 30], "above 4,294,967,295"),
        (["--rollouts", "9" * 30], "must be at most"),
        (["--warm_start_steps", "9" * 30], "must be at most"),
        (["--output_dir", "blocked"], "is a folder, and a file of that name is written"),
        (["--output_dir", "blocked", "--recipe", "long", "--no-plot"], "is a file, and a run goes to a folder"),
    ],
)
def test_bad_options(quickstart, tmp_path, options, message):
    (tmp_path / "a_file").write_text("")
    if options[-1] == "blocked":
        (tmp_path / "blocked" / "summary.json").mkdir(parents=True)
    elif "blocked" in options:
        (tmp_path / "blocked" / "long").mkdir(parents=True)
        (tmp_path / "blocked" / "long" / "grpo-seed0").write_text("")
    code, out, err = quickstart(*options)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_run_quickstart_refuses_bad_options(tmp_path):
    with pytest.raises(ValueError, match="no methods given"):
        run_quickstart(methods=[], output_dir=tmp_path)


# --- the closing sentence


def falling_to(entropy):
    """The entropy of a run from 0.6 nats down to a level, which it reaches in the middle."""
    return Series(np.arange(1, 41), np.r_[np.linspace(0.6, entropy, 20), np.full(20, entropy)])


def made_up(**methods):
    """A summary with (entropy, avg@16, pass@16) of each method, greedy 0.5, and a warm start of 0.6 nats."""
    names = ("final_entropy", "avg@16", "pass@16")
    return {
        "methods": {
            method: dict(zip(names, values, strict=True)) | {"greedy": 0.5} for method, values in methods.items()
        },
        "verdicts": {
            method: verdict([falling_to(values[0])], {"learning_rate": 6e-4}).to_dict()
            for method, values in methods.items()
        },
        "warm_start": {"final_entropy": 0.6},
        "seeds": [0],
    }


def test_sentence_says_what_was_seen():
    sentence = describe(made_up(grpo=(0.05, 0.5, 0.6), clip_higher=(0.06, 0.52, 0.61), kl_cov=(0.25, 0.49, 0.95)))
    assert "GRPO's entropy collapsed (0.60 to 0.05 nats)" in sentence
    assert "clip-higher did not keep clearly more (1.2 times GRPO's entropy, pass@16 +0.01" in sentence
    assert "KL-Cov kept more and solves more prompts in 16 tries (5.0 times GRPO's entropy, " in sentence
    assert sentence.endswith("pass@16 +0.35, avg@16 -0.01, greedy +0.00).")


def test_sentence_says_when_nothing_was_seen():
    assert "GRPO's entropy did not collapse (0.60 to 0.40 nats)" in describe(made_up(grpo=(0.4, 0.5, 0.6)))
    for kl_cov, words in [
        ((0.06, 0.5, 0.9), "KL-Cov did not keep clearly more (1.2"),
        ((0.25, 0.5, 0.62), "KL-Cov kept more, with no clear gain in pass@16 (5.0"),
        ((0.25, 0.5, 0.2), "KL-Cov kept more, with no clear gain in pass@16 (5.0 times GRPO's entropy, pass@16 -0.40"),
    ]:
        assert words in describe(made_up(grpo=(0.05, 0.5, 0.6), kl_cov=kl_cov))
    assert "nothing can be compared" in describe(made_up(kl_cov=(0.25, 0.5, 0.9)))


def test_the_verdict_is_that_of_the_report():
    lines = format_verdicts(made_up(grpo=(0.05, 0.5, 0.6), kl_cov=(0.5, 0.49, 0.95))).split("\n")
    found = verdict([falling_to(0.05)], {"learning_rate": 6e-4})
    assert lines[0] == f"GRPO: Entropy has collapsed. {found.why}"
    assert lines[1].strip() == found.advice and "No entropy control is on" in found.advice
    assert lines[2].strip().startswith("Confidence: moderate (one run")
    assert lines[3].startswith("KL-Cov: Entropy has fallen, and most of it is left. ")
    assert len(lines) == 5
