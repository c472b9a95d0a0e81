"""CovarianceRecorder: what it writes is what the step was, and the training does not notice."""

import copy

import numpy as np
import pytest
import torch
from conftest import digit_reward
from test_trainer import CLIP_COV, KL_COV, logs, same_weights
from trl import GRPOConfig

from entropy_trl import CovarianceRecorder, CovGRPOTrainer
from entropy_trl.analysis.covariance.records import read_records
from entropy_trl.quickstart.task import build_dataset, build_tokenizer


CONTROLS = {"off": {"entropy_control": None}, "clip_cov": CLIP_COV, "kl_cov": KL_COV}


def same(a, b):
    """Whether two tables hold the same, whatever the order of their dictionaries of tokens."""
    return a.astype({"token": str}).equals(b.astype({"token": str}))


def record(make_trainer, tmp_path, name="run", **overrides):
    """Trains with a recorder; returns the trainer and what was recorded."""
    options = {"token_records": {"every": 1}, "output_dir": str(tmp_path / name)} | overrides
    trainer = make_trainer(**options)
    trainer.train()
    return trainer, read_records(tmp_path / name)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_columns_are_those_of_the_step(make_trainer, tmp_path, control):
    trainer, records = record(make_trainer, tmp_path, **CONTROLS[control], token_records={"every": 1})
    assert [step.step for step in records] == [1, 2, 3, 4]
    tokenizer = build_tokenizer()
    for step, logged in zip(records, trainer.state.log_history, strict=False):
        table = step.table()
        assert step.tokens == step.tokens_recorded == len(table) > 20
        assert step.control == CONTROLS[control]["entropy_control"]
        assert step.learning_rate == pytest.approx(logged["learning_rate"])
        # Eq. 10 by hand, in float64.
        logp, advantage = table["logp"].astype(float), table["advantage"].astype(float)
        expected = (logp - logp.mean()) * (advantage - advantage.mean())
        np.testing.assert_allclose(table["covariance"], expected, atol=2e-6)
        assert step.mean_covariance == pytest.approx(expected.mean(), abs=1e-6)
        assert step.mean_entropy == pytest.approx(table["entropy"].mean(), abs=1e-6)
        assert step.mean_entropy == pytest.approx(logged["entropy"], abs=1e-4)
        assert table["selected"].mean() == pytest.approx(logged.get("entropy_control/selected_fraction", 0))
        assert table["entropy_after"].isna().all() and step.mean_entropy_after is None
        assert [tokenizer.decode([i]) for i in table["token_id"]] == list(table["token"])
        for _, row in table.groupby("row_id"):
            assert row["position"].tolist() == list(range(len(row)))
            assert row["advantage"].nunique() == row["reward"].nunique() == 1
        rows = table.drop_duplicates("row_id")
        assert (rows["group"] == rows["row_id"] // 4).all()
        assert set(step.prompts) == set(rows["group"])
    # A rollout's two steps share its rows; groups have one accuracy, the mean reward of their completions.
    rollout = [pair.table().drop_duplicates("row_id") for pair in records[:2]]
    assert sorted([*rollout[0]["row_id"], *rollout[1]["row_id"]]) == list(range(16))
    for group in range(4):
        members = [row for rows in rollout for row in rows[rows["group"] == group].itertuples()]
        mean = np.mean([row.reward for row in members])
        assert [row.group_accuracy for row in members] == pytest.approx([mean] * 4)


@pytest.mark.parametrize("control", CONTROLS)
def test_training_is_the_same_with_it(make_trainer, tmp_path, control):
    options = {**CONTROLS[control], "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    without = make_trainer(**options, per_device_train_batch_size=4)
    without.train()
    recorded, records = record(
        make_trainer,
        tmp_path,
        **options,
        per_device_train_batch_size=4,
        token_records={"every": 1, "entropy_change": True, "max_tokens": 10},
    )
    assert len(records) == 4
    assert same_weights(without, recorded) and logs(without) == logs(recorded)


def test_the_entropy_after_the_update_is_that_of_the_next_one_on_the_same_states(make_trainer, tmp_path):
    # Two iterations over a rollout of one step: the second meets the first's tokens again, after the update.
    _, records = record(
        make_trainer,
        tmp_path,
        entropy_control="clip_cov",
        steps_per_generation=1,
        num_iterations=2,
        token_records={"steps": [1, 2], "entropy_change": True},
    )
    first, second = (step.table().sort_values(["row_id", "position"], ignore_index=True) for step in records)
    assert first["token_id"].equals(second["token_id"])
    np.testing.assert_allclose(first["entropy_after"], second["entropy"], atol=1e-6)
    assert np.abs(first["entropy_after"] - first["entropy"]).max() > 1e-3
    assert records[0].mean_entropy_after == pytest.approx(first["entropy_after"].mean(), abs=1e-6)


@pytest.mark.parametrize("batch", [4, 8])
def test_the_cut_of_a_step_does_not_matter(make_trainer, tmp_path, batch):
    def of(batch):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 16 // batch}
        _, (step,) = record(
            make_trainer,
            tmp_path,
            f"cut{batch}",
            **options,
            steps_per_generation=16 // batch,
            max_steps=1,
            entropy_control="clip_cov",
            shuffle_dataset=False,
        )
        return step.table().sort_values(["row_id", "position"], ignore_index=True)

    whole, parts = of(16), of(batch)
    assert whole["token_id"].equals(parts["token_id"]) and whole["selected"].equals(parts["selected"])
    np.testing.assert_allclose(whole["covariance"], parts["covariance"], atol=1e-5)


def test_size_is_bounded(make_trainer, tmp_path, caplog):
    _, records = record(
        make_trainer, tmp_path, entropy_control=None, token_records={"every": 1, "max_tokens": 20, "max_steps": 3}
    )
    assert [step.step for step in records] == [1, 2, 3]
    assert "the last one that is recorded" in caplog.text
    whole = record(make_trainer, tmp_path, "whole", entropy_control=None)[1]
    for drawn, step in zip(records, whole, strict=False):
        assert drawn.tokens == step.tokens and drawn.mean_covariance == step.mean_covariance
        assert 0 < drawn.tokens_recorded == len(drawn.table()) <= 20
        table, tokens = drawn.table(), step.table()
        rows = tokens[tokens["row_id"].isin(set(table["row_id"]))]  # completions are never cut
        assert same(rows.reset_index(drop=True), table)
        assert set(drawn.prompts) == set(drawn.table()["group"])


def test_a_resumed_run_goes_on_recording(make_trainer, tmp_path):
    options = {"token_records": {"every": 2, "max_steps": 2}, "save_strategy": "steps", "save_steps": 1, **CLIP_COV}
    options["lr_scheduler_type"] = "constant"
    record(make_trainer, tmp_path, **options, max_steps=2)
    trainer = make_trainer(**options, output_dir=str(tmp_path / "run"), max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    straight = record(make_trainer, tmp_path, "straight", **options, max_steps=6)[1]
    resumed = read_records(tmp_path / "run")
    assert [step.step for step in resumed] == [step.step for step in straight] == [1, 3]
    for a, b in zip(resumed, straight, strict=True):
        assert same(a.table(), b.table())


def test_it_can_be_given_as_a_callback(tiny_model, make_config, tmp_path):
    trainer = CovGRPOTrainer(
        model=copy.deepcopy(tiny_model),
        reward_funcs=digit_reward,
        args=make_config(max_steps=2, output_dir=str(tmp_path / "run")),
        train_dataset=build_dataset(64),
        processing_class=build_tokenizer(),
        callbacks=[CovarianceRecorder(steps=[2])],
    )
    trainer.train()
    (step,) = read_records(tmp_path / "run")
    assert step.step == 2


def test_per_token_advantages(make_trainer, tmp_path):
    """An estimator or a subclass may give one advantage a token."""
    trainer = make_trainer(
        entropy_control="clip_cov", max_steps=1, token_records={"every": 1}, output_dir=str(tmp_path / "run")
    )
    score = trainer._generate_and_score_completions

    def per_token(inputs):
        output = score(inputs)
        positions = torch.arange(output["completion_ids"].size(1))
        output["advantages"] = output["advantages"][:, None] * (1 + positions)
        return output

    trainer._generate_and_score_completions = per_token
    trainer.train()
    (step,) = read_records(tmp_path / "run")
    table = step.table()
    first = table[table["position"] == 0].set_index("row_id")["advantage"]
    expected = table["row_id"].map(first) * (1 + table["position"])
    np.testing.assert_allclose(table["advantage"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `every` or `steps`"),
        ({"every": 1, "steps": [1]}, "either `every` or `steps`"),
        ({"every": 0}, "`every` must be an integer from 1, got 0"),
        ({"every": 2.5}, "`every` must be an integer from 1, got 2.5"),
        ({"steps": [0, 1]}, "`steps` are counted from 1"),
        ({"steps": []}, "`steps` are counted from 1"),
        ({"every": 1, "max_tokens": 0}, "`max_tokens` must be an integer from 1"),
        ({"evry": 1}, "Unknown `token_records` key 'evry'"),
        (["every"], "must be a mapping"),
    ],
)
def test_bad_options_are_refused(make_trainer, options, message):
    # The model is not there: the mistake must be told before a model loads.
    with pytest.raises(ValueError, match=message):
        make_trainer(model="no/such/model", token_records=options)


def test_records_of_a_run_with_a_plain_configuration(make_trainer, tmp_path):
    with pytest.warns(UserWarning, match="entropy control is off"):
        trainer = make_trainer(
            config_class=GRPOConfig, trainer_kwargs={"callbacks": [CovarianceRecorder(every=2)]}, max_steps=3
        )
    trainer.train()
    steps = read_records(tmp_path / "out")
    assert [step.step for step in steps] == [1, 3]
    assert steps[0].table()["group_accuracy"].between(0, 1).all()


@pytest.mark.parametrize(
    ("options", "shown"),
    [({"entropy_regions": True}, set()), ({"token_records": {"every": 1}}, {"rewards", "group_accuracy"})],
)
def test_a_rollout_carries_what_is_recorded_of_it_and_no_more(make_trainer, options, shown):
    trainer = make_trainer(**KL_COV, **options, max_steps=1)
    trainer.train()
    assert {"rewards", "group_accuracy"} & trainer._buffered_inputs[0].keys() == shown


def test_measuring_the_change_of_entropy_leaves_dropout_as_it_is(make_trainer, tiny_model):
    weights = []
    for records in (None, {"every": 1, "entropy_change": True}):
        model = copy.deepcopy(tiny_model)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        trainer = make_trainer(model=model, token_records=records, max_steps=3)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
