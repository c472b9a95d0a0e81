"""Dynamic sampling: rollouts of prompts with a signal, the same ones on any number of processes, and none lost."""

import json
import random
import re
import threading
from itertools import islice

import pytest
import torch
from conftest import digit_reward
from datasets import Dataset
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template
from trl.trainer.utils import pad

from entropy_trl import CovGRPOTrainer
from entropy_trl.loss.window import StepWindow
from entropy_trl.quickstart.task import build_dataset, build_model
from entropy_trl.rollout.rounds import GenerationRounds, make_prompt_stream
from entropy_trl.rollout.sampling import NoSignalError, PromptStream, check_prompts, fill_rollout, has_signal
from entropy_trl.smoke import byte_tokenizer


# The stream of prompts


def rows(n=7):
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(n)]})


def prompts(taken):
    return [row["prompt"] for row in taken]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_stream_has_each_row_once_an_epoch_and_goes_on_from_any_position(streamed, shuffle):
    def make():
        return PromptStream(rows().to_iterable_dataset() if streamed else rows(), shuffle, seed=3)

    stream = make()
    taken = prompts(stream.take(21))
    assert stream.position == 21
    epochs = [taken[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(rows()["prompt"]) for epoch in epochs)
    assert (epochs[0] != epochs[1]) == shuffle
    assert (epochs[0] == rows()["prompt"]) != shuffle
    for position in (0, 1, 6, 7, 8, 20):
        resumed = make()
        resumed.position = position
        assert prompts(resumed.take(5)) == (taken + prompts(make().take(26))[21:])[position : position + 5]
        assert resumed.position == position + 5


@pytest.mark.parametrize("streamed", [False, True])
def test_data_smaller_than_a_rollout_is_an_error_before_the_first_one(make_config, make_trainer, streamed):
    """A rollout has 4 prompts: 8 x 2 completions, 4 each. Before it trains, a trainer may evaluate on anything."""
    few, enough = (rows(n).to_iterable_dataset() if streamed else rows(n) for n in (3, 4))
    args = make_config()
    check_prompts(args, enough)
    trainer = make_trainer()
    trainer.train_dataset = few
    assert trainer.evaluate(build_dataset(2))["eval_reward"] >= 0
    with pytest.raises(
        ValueError, match=r"has 3 rows, and a rollout needs 4 different prompts \(generation_batch_size=16"
    ):
        trainer.train()


def test_the_check_of_a_stream_draws_no_random_numbers_of_the_training(make_trainer):
    def draw(row):
        return {"prompt": row["prompt"] if torch.rand(1).item() < 0.5 else row["prompt"][::-1]}

    def rewards(*classes, **options):
        trainer = make_trainer(*classes, accelerator_config={"dispatch_batches": False}, **options)
        trainer.train_dataset = build_dataset(8).to_iterable_dataset().map(draw)
        trainer.train()
        return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]

    assert rewards(entropy_control=None) == rewards(GRPOTrainer, GRPOConfig)


def test_rows_that_are_put_back_come_again():
    stream = PromptStream(rows(), False, seed=0)
    taken = stream.take(5)
    stream.put_back(taken[3:])
    assert stream.position == 3
    assert prompts(stream.take(6)) == ["p3", "p4", "p5", "p6", "p0", "p1"]
    assert stream.epoch == pytest.approx(9 / 7)


def test_a_stream_without_rows_is_an_error():
    empty = rows(1).to_iterable_dataset().skip(1)
    with pytest.raises(ValueError, match="has no rows"):
        PromptStream(empty, False, seed=0).take(1)


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ([1.0, 1.0, 1.0], False),
        ([1.0, 0.0, 1.0], True),
        ([0.3, 0.1 + 0.2, 0.3], False),  # rounding
        ([float("nan"), 1.0, 1.0], False),
        ([float("nan"), 1.0, 0.0], True),
        ([float("nan")] * 3, False),
        ([[1.0, 0.0], [1.0, 0.5], [1.0, 0.0]], True),
        ([[1.0, 0.5], [1.0, 0.5]], False),
    ],
)
def test_signal(rewards, signal):
    assert has_signal(torch.tensor(rewards)) is signal


# The rounds, on simulated processes


class Processes:
    """Threads that gather as processes do: everyone's values in one list, by process."""

    def __init__(self, n):
        self.n, self.values, self.barrier = n, [None] * n, threading.Barrier(n, timeout=20)

    def gather(self, rank, values):
        self.values[rank] = values
        self.barrier.wait()
        together = [value for part in self.values for value in part]
        self.barrier.wait()
        return together

    def run(self, function):
        results = [None] * self.n

        def call(rank):
            try:
                results[rank] = function(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def simulate(signals, processes, each, max_rounds=10, train_on_incomplete=False):
    """Fill a rollout from prompts 0, 1, ... of which `signals` says which have a signal; a result a process."""
    together = Processes(processes)

    def fill(rank):
        taken = [0]

        def generate(n):
            first = taken[0] + rank * n
            taken[0] += processes * n
            return [[{"prompt": i}] for i in range(first, first + n)]

        return fill_rollout(
            generate,
            lambda group: signals[group[0]["prompt"]],
            lambda flags: together.gather(rank, flags),
            lambda groups: together.gather(rank, groups),
            rank=rank,
            processes=processes,
            groups_per_process=each,
            max_rounds=max_rounds,
            train_on_incomplete=train_on_incomplete,
        )

    return together.run(fill)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.2, 0.05])
def test_a_rollout_has_the_first_prompts_with_a_signal(processes, share):
    generator = torch.Generator().manual_seed(processes)
    signals = (torch.rand(4000, generator=generator) < share).tolist()
    results = simulate(signals, processes, 12 // processes, max_rounds=100)
    expected = list(islice((i for i, signal in enumerate(signals) if signal), 12))
    assert all(len(result.groups) == 12 // processes for result in results)
    assert sorted(group[0]["prompt"] for result in results for group in result.groups) == expected
    for result in results:
        assert result.used == expected[-1] + 1 <= result.generated
        assert result.with_signal == sum(signals[: result.generated]) >= 12
        assert result.rounds == results[0].rounds
    if share == 1.0:
        assert results[0].rounds == 1 and results[0].generated == 12


def test_one_process_may_have_all_the_signal():
    signals = [True, True, False, False] * 3  # of 4 prompts a round, those of the first process
    first, second = simulate(signals, 2, 2)
    assert [group[0]["prompt"] for group in first.groups] == [0, 1]
    assert sorted(group[0]["prompt"] for group in second.groups) == [4, 5]


@pytest.mark.parametrize("processes", [1, 2])
def test_too_little_signal(processes):
    signals = [i % 10 == 0 for i in range(1000)]
    errors = simulate(signals, processes, 4, max_rounds=2)
    assert all(isinstance(error, NoSignalError) for error in errors)
    assert "after 2 rounds" in str(errors[0]) and "dynamic_sampling_incomplete" in str(errors[0])
    results = simulate(signals, processes, 4, max_rounds=2, train_on_incomplete=True)
    kept = sorted(group[0]["prompt"] for result in results for group in result.groups)
    assert all(len(result.groups) == 4 for result in results)
    with_signal = [i for i in range(results[0].generated) if signals[i]]
    assert set(with_signal) <= set(kept)
    assert len(kept) == 4 * processes


# The trainer


def one_digit_reward(completions, **kwargs):
    """1 if a completion has the digit 7: few of a random model's have, so that many groups have no signal."""
    return [float("7" in completion) for completion in completions]


@pytest.fixture
def make(make_trainer):
    def make(reward=one_digit_reward, **overrides):
        trainer = make_trainer(**({"dynamic_sampling": True, "max_steps": 4, "temperature": 1.0} | overrides))
        trainer.reward_funcs = [reward]
        return trainer

    return make


def train_recorded(trainer, **kwargs):
    """Train; returns the rollouts as TRL's loss gets them."""
    rollouts = []
    generate = trainer._generate_and_score_completions

    def record(inputs):
        output = generate(inputs)
        rollouts.append({"rows": list(inputs), **output})
        return output

    trainer._generate_and_score_completions = record
    trainer.train(**kwargs)
    return rollouts


def logs(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("control", ["clip_cov", None])
def test_every_group_has_a_signal(make, control):
    trainer = make(entropy_control=control)
    rollouts = train_recorded(trainer)
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert len(rollout["completion_ids"]) == 16
        advantages = rollout["advantages"].view(-1, 4)
        assert (advantages.amax(1) > advantages.amin(1)).all()
        assert rollout["num_items_in_batch"] == rollout["completion_mask"].sum()
        groups = [rollout["rows"][i : i + 4] for i in range(0, 16, 4)]
        assert all(row["prompt"] == group[0]["prompt"] for group in groups for row in group)
    assert logs(trainer, "frac_reward_zero_std") == [0.0, 0.0]
    rounds, rates, generated = (
        logs(trainer, f"dynamic_sampling/{n}") for n in ("rounds", "acceptance_rate", "prompts")
    )
    assert max(rounds) > 1 and min(rates) < 1
    assert trainer._prompt_stream.position <= sum(generated)
    # One value a rollout of what TRL logs in each round, and each kept completion once.
    assert all(len(logs(trainer, name)) == 2 for name in ("completions/mean_length", "completions/max_length"))
    tokens = [int(n) for n in logs(trainer, "num_tokens")]
    assert tokens[-1] > sum(int(r["completion_mask"].sum()) for r in rollouts)  # what was dropped counts as well


def test_what_is_logged_belongs_to_the_kept_completions(make):
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("text", list(completions))
        log_metric("asked", 1.0)
        return one_digit_reward(completions)

    trainer = make(reward=reward, max_steps=1, log_completions=True)
    kept = {}
    log = trainer.log

    def keep(*args, **kwargs):  # before TRL prints and clears them
        if len(trainer._logs["prompt"]):
            kept.update({name: list(trainer._logs[name]) for name in ("prompt", "completion", "advantages")})
            kept["extra"] = {name: list(values) for name, values in trainer._logs["extra"].items()}
            kept["rewards"] = {name: list(values) for name, values in trainer._logs["rewards"].items()}
        return log(*args, **kwargs)

    trainer.log = keep
    (rollout,) = train_recorded(trainer)
    assert logs(trainer, "dynamic_sampling/rounds")[0] > 1
    texts = trainer.processing_class.batch_decode(rollout["completion_ids"], skip_special_tokens=True)
    assert kept["completion"] == texts == kept["extra"]["text"]
    assert kept["prompt"] == [row["prompt"] for row in rollout["rows"]]
    assert kept["rewards"]["digit_reward"] == one_digit_reward(texts)
    assert kept["advantages"] == pytest.approx(rollout["advantages"].tolist())
    assert logs(trainer, "asked") == [1.0]


@pytest.mark.parametrize("control", ["kl_cov", None])
def test_a_resumed_run_is_the_same_run(make, tmp_path, control):
    overrides = {"entropy_control": control, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    through = make(**overrides)
    rollouts = train_recorded(through)
    for checkpoint in (1, 2, 3, 5):
        resumed = make(**overrides)
        again = train_recorded(resumed, resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        left = rollouts[-len(again) :] if again else []
        assert len(again) == 3 - (checkpoint + 1) // 2
        assert all(torch.equal(a["completion_ids"], b["completion_ids"]) for a, b in zip(again, left, strict=True))
        assert resumed._prompt_stream.position == through._prompt_stream.position
        assert all(
            torch.equal(a, b) for a, b in zip(through.model.parameters(), resumed.model.parameters(), strict=True)
        )


@pytest.mark.parametrize("checkpoint", [2, 4, 5])
def test_prompts_that_draw_random_numbers_resume(make, tmp_path, caplog, checkpoint):
    """Also those that were read and put back before the checkpoint."""

    def reverse(batch):
        return {"prompt": [prompt if torch.rand(1).item() < 0.5 else prompt[::-1] for prompt in batch["prompt"]]}

    ends = []
    for choice in (None, str(tmp_path / "out" / f"checkpoint-{checkpoint}")):
        trainer = make(max_steps=6, entropy_control="kl_cov", save_strategy="steps", save_steps=1)
        trainer.train_dataset = trainer._prompt_stream.dataset = build_dataset(16).with_transform(reverse)
        rollouts = train_recorded(trainer, resume_from_checkpoint=choice)
        ends.append([[row["prompt"] for row in rollout["rows"]] for rollout in rollouts])
        ends[-1].append([parameter.tolist() for parameter in trainer.model.parameters()])
        assert trainer._prompt_stream.position < sum(logs(trainer, "dynamic_sampling/prompts"))  # some were put back
    assert ends[1] == ends[0][-len(ends[1]) :]
    assert not caplog.text


# What decides which groups are kept


def right(completions, **kwargs):
    return [float("7" in completion) for completion in completions]


def length_punishment(completions, completion_ids, **kwargs):
    return [-0.5 * (len(ids) >= 6) for ids in completion_ids]


def only_even(completions, **kwargs):
    """As a verifier of another task: it scores no completion here."""
    return [None] * len(completions)


def kept_rewards(trainer):
    """Train; returns each kept group's rewards, (groups, completions, functions)."""
    kept, generate = [], trainer._generate_and_score_completions

    def record(inputs):
        output = generate(inputs)
        kept.append(trainer._rewards.view(-1, 4, trainer._rewards.shape[1]).clone())
        return output

    trainer._generate_and_score_completions = record
    trainer.train()
    return torch.cat(kept)


@pytest.mark.parametrize(
    ("reward_funcs", "options", "decider"),
    [
        ([right, length_punishment], {}, 0),
        ([length_punishment, right], {"dynamic_sampling_reward": "right"}, 1),
        ([length_punishment, right], {}, 0),
        ([right, length_punishment], {"multi_objective_aggregation": "normalize_then_sum"}, 0),
        ([only_even, right], {}, 1),
    ],
)
def test_one_reward_function_decides_which_groups_are_kept(make_trainer, reward_funcs, options, decider):
    trainer = make_trainer(reward_funcs=reward_funcs, dynamic_sampling=True, max_steps=4, temperature=1.0, **options)
    kept = kept_rewards(trainer)
    assert len(kept) == 8
    assert (kept[:, :, decider].amax(1) > kept[:, :, decider].amin(1)).all()


def test_a_reward_without_weight_decides_nothing_alone(make_trainer):
    """The verifier is logged only: a group in which the trained reward does not differ teaches nothing."""
    options = {"dynamic_sampling": True, "max_steps": 4, "temperature": 1.0, "reward_weights": [0.0, 1.0]}
    kept = kept_rewards(make_trainer(reward_funcs=[right, length_punishment], **options))
    assert (kept.amax(1) > kept.amin(1)).all()


@pytest.mark.parametrize(
    ("reward_funcs", "name", "words"),
    [
        ([right, length_punishment], "wright", "'wright'` is not a reward function.* one of 'right', 'length_punish"),
        ([right, right], "right", "more than one"),
    ],
)
def test_a_wrong_name_of_the_deciding_reward_is_refused(make_trainer, reward_funcs, name, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(reward_funcs=reward_funcs, dynamic_sampling=True, dynamic_sampling_reward=name)


def test_without_a_group_baseline_equal_rewards_are_kept(make_trainer):
    options = {"dynamic_sampling": True, "advantage_estimator": "reinforce_pp", "temperature": 1.0, "max_steps": 4}
    with pytest.warns(UserWarning, match="drops no prompt for equal rewards"):
        trainer = make_trainer(reward_funcs=right, **options)
    rewards = kept_rewards(trainer)[:, :, 0]
    assert (rewards.amax(1) == rewards.amin(1)).any()
    rewards = kept_rewards(make_trainer(reward_funcs=right, dynamic_sampling_reward="right", **options))[:, :, 0]
    assert (rewards.amax(1) > rewards.amin(1)).all()  # as asked for


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "quantile"])
@pytest.mark.filterwarnings("ignore:.*drops no prompt:UserWarning")
def test_a_group_without_a_token_in_the_loss_is_dropped(make, estimator):
    options = {"mask_truncated_completions": True, "max_completion_length": 4, "max_generation_rounds": 40}
    trainer = make(digit_reward, advantage_estimator=estimator, **options)
    for rollout in train_recorded(trainer):
        learns = (rollout["advantages"].abs() > 1e-6) & rollout["completion_mask"].any(1)
        assert learns.view(-1, 4).any(1).all()
        assert not rollout["completion_mask"].any(1).all()  # some completions are truncated


def test_logged_metrics_of_rounds_are_weighted_by_their_completions(make):
    rounds = []

    def reward(completions, log_metric, **kwargs):
        rounds.append(len(completions))
        log_metric("round", float(len(rounds)))
        return one_digit_reward(completions)

    trainer = make(reward=reward, max_steps=1)
    trainer.train()
    assert len(set(rounds)) > 1
    expected = sum(n * size for n, size in enumerate(rounds, 1)) / sum(rounds)
    assert logs(trainer, "round") == pytest.approx([expected])


def test_a_checkpoint_without_a_stream_is_said(make, make_trainer, tmp_path, caplog):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    with caplog.at_level("WARNING", logger="entropy_trl"):
        make().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "saved without dynamic sampling" in caplog.text


def test_no_signal_at_all(make):
    def equal(completions, **kwargs):
        return [0.5] * len(completions)

    trainer = make(reward=equal, max_generation_rounds=3)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(NoSignalError, match=r"after 3 rounds .* only 0 of 12 prompts"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer = make(reward=equal, max_generation_rounds=3, dynamic_sampling_incomplete="train")
    trainer.train()
    assert logs(trainer, "dynamic_sampling/acceptance_rate") == [0.0, 0.0]
    assert logs(trainer, "dynamic_sampling/reward") == [0.5, 0.5]


def test_what_terminated_is_averaged_over_what_terminated():
    rounds = object.__new__(GenerationRounds)
    rounds.rewards = [torch.zeros(8), torch.zeros(4)]
    metrics = {
        "completions/clipped_ratio": [0.3, 0.5, 1.0],  # of an earlier rollout, and of two rounds
        "completions/mean_terminated_length": [7.0, 10.0, 0.0],
        "completions/min_terminated_length": [7.0, 8.0, 0.0],
        "completions/mean_length": [7.0, 9.0, 12.0],
        "other": [1.0],
    }
    rounds._merge_rounds(metrics, dict.fromkeys(metrics, 1))
    assert metrics["completions/clipped_ratio"] == [0.3, pytest.approx(2 / 3)]
    assert metrics["completions/mean_terminated_length"] == [7.0, 10.0]
    assert metrics["completions/min_terminated_length"] == [7.0, 8.0]
    assert metrics["completions/mean_length"] == [7.0, 10.0]
    assert metrics["other"] == [1.0]


def test_evaluation_with_a_model_left_in_training_mode(make, make_config):
    # As TRL's continuous batching leaves it after generating.
    trainer = make(entropy_control="clip_cov", gradient_accumulation_steps=2)
    trainer.train()
    generate = trainer._generate_single_turn

    def leave_in_training(*args, **kwargs):
        output = generate(*args, **kwargs)
        trainer.model.train()
        return output

    trainer._generate_single_turn = leave_in_training
    position, rewards = trainer._prompt_stream.position, trainer._rewards
    assert "eval_loss" in trainer.evaluate(rows(8).map(lambda row: {"prompt": "12+34="}))
    assert trainer._prompt_stream.position == position
    assert trainer._rewards is not rewards


def test_evaluation_is_trls(make, make_trainer):
    trainer = make()
    trainer.train()
    position = trainer._prompt_stream.position
    trainer.eval_dataset = rows(4).map(lambda row: {"prompt": "12+34="})
    metrics = trainer.evaluate(trainer.eval_dataset)
    assert "eval_reward" in metrics
    assert trainer._prompt_stream.position == position


def test_a_rollout_function_with_masks_and_fields(make_trainer):
    made = [0]

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(made[0])
        made[0] += 1
        ids = [
            torch.randint(2, 20, (int(n),), generator=generator).tolist() for n in torch.randint(1, 7, (len(prompts),))
        ]
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(i) for i in ids],
            "env_mask": [[j % 2 for j in i] for i in ids],  # known from the ids
            "first": [i[0] for i in ids],
            "constant": "c",
        }

    def reward(completions, completion_ids, first, constant, **kwargs):
        assert [ids[0] for ids in completion_ids] == first and set(constant) == {"c"}
        return [float(f % 5 == 0) for f in first]

    trainer = make_trainer(dynamic_sampling=True, max_steps=2, trainer_kwargs={"rollout_func": rollout})
    trainer.reward_funcs = [reward]
    (result,) = train_recorded(trainer)
    assert made[0] > 1
    mask = result["completion_mask"].bool()
    assert torch.equal(result["tool_mask"][mask], result["completion_ids"][mask] % 2)
    assert [row["first"] for row in result["rows"]] == result["completion_ids"][:, 0].tolist()


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: One of them.
        b: The other.

    Returns:
        Their sum.
    """
    return a + b


class Caller(Qwen2ForCausalLM):
    """Writes what a policy with tools might: calls in the form of Qwen3, right and wrong ones, or a guess.

    Only what is drawn is a script; TRL parses it, calls the tool, goes on and makes the masks.
    """

    def generate(self, input_ids, attention_mask, generation_config, **kwargs):
        texts = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(row[mask.bool()])
            a, b = map(int, re.search(r"\nWhat is (\d+) plus (\d+)\?", prompt).groups())
            results = re.findall(r"<tool_response>\n(.*)\n</tool_response>", prompt)
            kind = self.generator.random()
            if results:
                texts.append(results[-1] if results[-1].isdigit() else "?")
            elif a == 0 or kind < 0.4:  # never a call where a is 0: a group without a signal
                texts.append("?" * self.generator.randint(1, 9))
            elif kind < 0.7:
                texts.append(json.dumps({"name": "add", "arguments": {"a": a, "b": b}}))
            else:  # without an argument, or with a tool that is not there
                texts.append(json.dumps({"name": "ad" + "d" * (kind < 0.9), "arguments": {"a": a}}))
        self.drawn += texts
        calls = [f"<tool_call>\n{text}\n</tool_call>" if text.startswith("{") else text for text in texts]
        ids = [self.tokenizer(text + "<|im_end|>")["input_ids"] for text in calls]
        self.tokens += sum(map(len, ids))
        return torch.cat([input_ids, pad([torch.tensor(i) for i in ids], self.tokenizer.pad_token_id)], dim=1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tools(make_config, monkeypatch, accumulation):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = qwen3_chat_template
    config = build_model(seed=0).config
    config.update({"vocab_size": len(tokenizer), "max_position_embeddings": 4096})
    model = Caller(config)
    model.tokenizer, model.generator, model.drawn, model.tokens = tokenizer, random.Random(3), [], 0
    scored, pools, select = [], [], StepWindow._select

    def reward(completions, a, b, log_metric, **kwargs):
        rewards = [float(c[-1]["content"] == str(x + y)) for c, x, y in zip(completions, a, b, strict=True)]
        scored.extend(completions)
        log_metric("asked", 1.0)
        return rewards

    def record(window, pool):
        selected = select(window, pool)
        pools.append((pool, selected))
        return selected

    monkeypatch.setattr(StepWindow, "_select", record)
    questions = [(i % 3, 10 + i) for i in range(24)]
    rows = [{"prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}], "a": a, "b": b} for a, b in questions]
    trainer = CovGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=make_config(
            dynamic_sampling=True,
            entropy_control_kwargs={"fraction": 0.05, "cov_low": -1e9, "cov_high": 1e9},
            max_completion_length=256,
            max_steps=2,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=2 * accumulation,
            logging_steps=2,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=[add],
    )
    (rollout,) = train_recorded(trainer)
    (rounds,) = logs(trainer, "dynamic_sampling/rounds")
    assert rounds > 1

    # The masks: of every completion, its own tool's result is out, with the words that the template has around it.
    results = 0
    for row, ids, mask, tool_mask in zip(
        *(rollout[n] for n in ("rows", "completion_ids", "completion_mask", "tool_mask")), strict=True
    ):
        ids, tool_mask = ids[mask.bool()], tool_mask[mask.bool()].bool()
        written, returned = tokenizer.decode(ids[tool_mask]), tokenizer.decode(ids[~tool_mask])
        assert "tool_response" not in written
        if returned:
            (result,) = re.fullmatch(
                r"\n<\|im_start\|>user\n<tool_response>\n(.*)\n</tool_response><\|im_end\|>\n<\|im_start\|>assistant\n",
                returned,
            ).groups()
            assert result == str(row["a"] + row["b"]) or result.startswith("{'error': ")
            assert f'"a": {row["a"]}' in written
            assert written.endswith("</tool_call><|im_end|>" + (result if result.isdigit() else "?") + "<|im_end|>")
            results += result.isdigit()
    assert results >= 4
    advantages = rollout["advantages"].view(-1, 4)
    assert (advantages.amax(1) > advantages.amin(1)).all()
    assert {row["a"] for row in rollout["rows"]} == {1, 2}
    loss_mask = (rollout["completion_mask"] * rollout["tool_mask"]).bool()
    assert rollout["num_items_in_batch"] == loss_mask.sum() < rollout["completion_mask"].sum()

    # The control: every token of the rollout once, without the tools'.
    assert len(pools) == 2
    seen = torch.zeros_like(loss_mask)
    for pool, selected in pools:
        seen[pool.row_ids] = pool.mask.bool()
        assert selected.any() and not (selected & ~pool.mask.bool()).any()
        assert selected.sum() == int(0.05 * pool.mask.sum())
    assert torch.equal(seen, loss_mask)

    # Each metric once a rollout, over all completions and calls of all rounds.
    calls = [text for text in model.drawn if text.startswith("{")]
    failed = [text for text in calls if '"b"' not in text]
    assert sum(len(completion) == 3 for completion in scored) == len(calls) > len(failed) > 0
    assert logs(trainer, "asked") == [1.0]
    assert logs(trainer, "tools/call_frequency") == pytest.approx([len(calls) / len(scored)])
    assert logs(trainer, "tools/failure_frequency") == pytest.approx([len(failed) / len(calls)])
    assert logs(trainer, "completions/mean_length") == pytest.approx([model.tokens / len(scored)])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"max_generation_rounds": 0}, "must be at least 1"),
        ({"dynamic_sampling_incomplete": "warn"}, "Unknown `dynamic_sampling_incomplete`"),
        ({"num_generations": 16, "per_device_train_batch_size": 8, "steps_per_generation": 3}, "generation"),
    ],
)
def test_settings_that_cannot_be(make_config, overrides, words):
    with pytest.raises(ValueError, match=words):
        make_config(dynamic_sampling=True, **overrides)


def test_a_group_must_be_on_one_process(make_config, monkeypatch):
    monkeypatch.setattr("entropy_trl.CovGRPOConfig.world_size", 2)
    settings = {"per_device_train_batch_size": 6, "steps_per_generation": 1, "num_generations": 4}
    with pytest.raises(ValueError, match="6 completions, is not a multiple of `num_generations` \\(4\\)"):
        make_config(dynamic_sampling=True, **settings)


def test_images_are_refused():
    with pytest.raises(ValueError, match="images"):
        make_prompt_stream(
            type("T", (), {"environment_factories": None, "train_dataset": rows().add_column("image", [0] * 7)})()
        )


def test_reward_is_the_mean_of_what_was_generated(make):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(values := digit_reward(completions))
        return values

    trainer = make(reward=reward, max_steps=1)
    trainer.train()
    assert logs(trainer, "dynamic_sampling/reward")[0] == pytest.approx(sum(seen) / len(seen), abs=1e-6)
