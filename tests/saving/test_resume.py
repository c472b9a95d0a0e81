"""A resumed run is the run that was not interrupted: its weights, its rollout, its reference, its arguments."""

import copy
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from entropy_trl.cli import train_main
from entropy_trl.quickstart.task import build_dataset
from entropy_trl.saving import resume
from entropy_trl.saving.options import recorded_options
from entropy_trl.saving.shards import check_shards, save_shard_sample
from entropy_trl.saving.weights import restore_weights


SAVING = {"save_strategy": "steps", "save_steps": 1}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.2}}


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moe():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=20,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


@pytest.fixture
def resumed(make_trainer, tmp_path):
    """Trains through, and again from a checkpoint of that run; returns both trainers."""

    def run(checkpoint, model=None, **overrides):
        trainers = []
        for choice in (None, str(tmp_path / "out" / f"checkpoint-{checkpoint}")):
            trainer = make_trainer(model=None if model is None else model(), **(SAVING | overrides))
            trainer.train(resume_from_checkpoint=choice)
            trainers.append(trainer)
        return trainers

    return run


def test_a_mixture_of_experts_resumes(resumed):
    through, again = resumed(2, moe, **KL_COV)
    assert same(weights(through), weights(again))


def draw_python():
    return random.random()


def draw_numpy():
    return float(np.random.rand())


def draw_torch():
    return torch.rand(1).item()


def reversing(draw):
    """A data set that reverses prompts at random as they are read."""

    def reverse(rows):
        return {"prompt": [prompt if draw() < 0.5 else prompt[::-1] for prompt in rows["prompt"]]}

    return build_dataset(16).with_transform(reverse)


@pytest.mark.parametrize(
    ("draw", "checkpoint", "options"),
    [
        (draw_torch, 1, {}),  # inside the first rollout: two batches were read at once
        (draw_python, 2, {}),
        (draw_numpy, 3, {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        (draw_torch, 4, {"entropy_control": None}),  # the start of an epoch
    ],
)
def test_data_that_draw_random_numbers_resume(make_trainer, tmp_path, caplog, draw, checkpoint, options):
    trainers = []
    for choice in (None, str(tmp_path / "out" / f"checkpoint-{checkpoint}")):
        # 16 prompts, 4 a rollout of 2 steps: an epoch has 8 steps (4 with accumulation).
        trainer = make_trainer(max_steps=6, **(SAVING | {"steps_per_generation": 2} | options))
        trainer.train_dataset = reversing(draw)
        with caplog.at_level(logging.WARNING, logger="entropy_trl"):
            trainer.train(resume_from_checkpoint=choice)
        trainers.append(trainer)
    assert same(*map(weights, trainers))
    assert not caplog.text


def test_what_makes_random_data_inexact_is_told(make_trainer, tmp_path, caplog):
    trainer = make_trainer(max_steps=2, **SAVING)
    trainer.train_dataset = reversing(draw_torch)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "data_rank0.json").unlink()  # as an earlier version saved it
    (checkpoint / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, logger="entropy_trl"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert f"draws random numbers, and {checkpoint} does not have the random state" in caplog.text
        other = make_trainer(max_steps=2, dataloader_num_workers=1, **SAVING)
        other.train_dataset = reversing(draw_torch)
        other.train(resume_from_checkpoint=str(checkpoint))
        assert "Set dataloader_num_workers to 0 for an exact resume" in caplog.text


class Worse(TrainerCallback):
    """Makes the first checkpoint the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = -state.global_step


def test_the_best_mixture_of_experts_is_loaded(make_trainer, tmp_path):
    trainer = make_trainer(
        model=moe(),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=True,
        trainer_kwargs={"eval_dataset": build_dataset(8), "callbacks": [Worse()]},
        **SAVING,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    best = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert same(weights(trainer), best.state_dict())


def test_a_continued_adapter_with_a_reference_resumes(resumed, tiny_model, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(copy.deepcopy(tiny_model), lora).save_pretrained(tmp_path / "adapter")

    def adapted():
        return PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path / "adapter", is_trainable=True)

    through, again = resumed(3, adapted, beta=0.3, **KL_COV)
    assert (tmp_path / "out" / "checkpoint-3" / "ref").is_dir()
    assert same(weights(through), weights(again))


def test_a_synchronised_reference_resumes(resumed, tiny_model, tmp_path, caplog):
    tiny_model.save_pretrained(tmp_path / "model")

    def saved():
        return type(tiny_model).from_pretrained(tmp_path / "model")

    options = {"beta": 0.3, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    through, again = resumed(2, saved, **options, **KL_COV)
    assert same(weights(through), weights(again))
    assert same(through.ref_model.state_dict(), again.ref_model.state_dict())
    assert not same(through.ref_model.state_dict(), saved().state_dict())


@pytest.mark.parametrize("checkpoint", [1, 2])
@pytest.mark.parametrize("options", [{}, {"advantage_estimator": "rloo"}, {"num_iterations": 2}], ids=str)
def test_the_control_off_resumes_inside_a_rollout(resumed, checkpoint, options):
    options = {"entropy_control": None} | options
    through, again = resumed(checkpoint, gradient_accumulation_steps=2, steps_per_generation=4, **options)
    assert same(weights(through), weights(again))


def test_the_control_off_is_stock_trl(make_trainer):
    ours = make_trainer(entropy_control=None, **SAVING)
    stock = make_trainer(GRPOTrainer, GRPOConfig, **SAVING)
    for trainer in (ours, stock):
        trainer.train_dataset = reversing(draw_torch)
        torch.manual_seed(0)
        trainer.train()
    assert same(weights(ours), weights(stock))


def test_a_named_limit_is_in_the_saved_arguments(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, save_total_limit=1, **SAVING)
    trainer.train()
    saved = torch.load(tmp_path / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 1
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_a_run_names_the_run_it_overwrites(make_trainer, tmp_path, caplog):
    for name, steps in (("other", 1), ("out", 2)):
        make_trainer(output_dir=str(tmp_path / name), max_steps=steps, **SAVING).train()
    said = "already holds another run (checkpoint-2 is its last checkpoint, run "
    with caplog.at_level(logging.WARNING, logger="entropy_trl"):
        trainer = make_trainer(max_steps=2, **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert said not in caplog.text
        trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1"))
        assert caplog.text.count(said) == 1
        trainer.train()
        assert caplog.text.count(said) == 2


def test_the_command_names_another_run_before_the_model_loads(tmp_path, caplog):
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "my_notes.txt").touch()
    config = Path(__file__).parents[2] / "configs" / "smoke" / "dapo_math.yaml"
    command = ["--config", str(config), "--output_dir", str(tmp_path), "--model_factory", "no.such"]
    assert train_main(command) == 2
    assert f"{tmp_path} already holds another run (model.safetensors, trainer_state.json): this run" in caplog.text


@pytest.fixture
def finished(make_trainer, tmp_path, caplog):
    """A run of 4 steps, 2 a rollout; resumes it with other options, and returns the trainer and what was said."""
    make_trainer(**SAVING).train()

    def resume(checkpoint, **options):
        trainer = make_trainer(**(SAVING | {"output_dir": str(tmp_path / "again")} | options))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="entropy_trl"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{checkpoint}"))
        return trainer, caplog.text

    return resume


def test_other_options_are_told_with_those_that_hold(finished):
    ours = {"lr_scheduler_type": "constant", "max_steps": 6, "seed": 1}
    trainer, said = finished(2, learning_rate=1e-4, weight_decay=0.1, save_steps=3, **ours)
    assert (
        "The new ones hold for lr_scheduler_type constant (was linear), max_steps 6 (was 4), seed 1 (was 0). The "
        "checkpoint's hold for learning_rate 0.01 (not 0.0001), weight_decay 0.0 (not 0.1), save_steps 1 (not 3). The "
        "order of the prompts is another one" in said
    )
    # They do hold.
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], trainer.state.save_steps) == (0.01, 0.0, 1)
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"run_name": "again", "save_total_limit": None}, None),
        ({"temperature": 0.5}, "temperature 0.5 (was 1.0). The saved rollout is used up"),
        ({"entropy_control": "kl_cov"}, "hold for entropy_control kl_cov (was clip_cov)"),
        ({"entropy_control": None}, "hold for entropy_control null (was clip_cov)"),
        ({"entropy_control": "entropic", "entropy_control_kwargs": {"entropy_target": 1.0}}, "'entropic' starts"),
    ],
    ids=str,
)
def test_options_inside_a_rollout(finished, options, words):
    _, said = finished(3, **options)
    assert words in said if words else not said


def test_other_data_and_rewards_are_told(make_trainer, tmp_path, caplog):
    def shortest(completions, **kwargs):
        return [-float(len(completion)) for completion in completions]

    make_trainer(max_steps=1, **SAVING).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    trainer = make_trainer(max_steps=2, reward_funcs=[shortest], **SAVING)
    trainer.train_dataset = build_dataset(32)
    with caplog.at_level(logging.WARNING, logger="entropy_trl"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert (
        f"{checkpoint} was saved by a run with other data or rewards. The new ones hold: train_rows 32 (was 64), "
        'reward_funcs ["shortest"] (was ["digit_reward"]). Prompts may come twice' in caplog.text
    )


@pytest.mark.parametrize("max_steps", [2, 4])
def test_a_finished_run_makes_no_further_step(finished, max_steps, tmp_path):
    trainer, said = finished(4, max_steps=max_steps)
    assert f"Nothing is left to train: {tmp_path / 'out'}/checkpoint-4 is at step 4" in said
    assert trainer.state.global_step == 4
    assert same(trainer.model.state_dict(), load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors"))


def test_a_run_of_epochs_that_is_finished_makes_no_further_step(finished):
    trainer, said = finished(4, max_steps=-1, num_train_epochs=0.1)
    assert "Nothing is left to train" in said and trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": "sgd"}, "has the state of another optimizer than sgd .it has no dampening, momentum"),
        ({"beta": 0.1}, "inside a rollout that was made with beta 0"),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "has the state of 'linear'"),
    ],
    ids=str,
)
def test_options_that_cannot_go_on_are_refused(finished, tiny_model, tmp_path, options, words):
    tiny_model.save_pretrained(tmp_path / "model")
    model = type(tiny_model).from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=words):
        finished(3, model=model, trainer_kwargs={"eval_dataset": build_dataset(8)}, **options)


def test_options_are_kept_without_secrets(make_config):
    options = recorded_options(make_config(model_init_kwargs={"token": "hf_abcdefghijklmnop", "dtype": torch.bfloat16}))
    assert options["model_init_kwargs"] == {"token": "*** (masked)", "dtype": "bfloat16"}
    assert "output_dir" not in options and "hub_token" not in options


def test_the_optimizer_of_several_processes_on_cpus_loads(tmp_path):
    torch.save({"exp_avg": torch.ones(3)}, tmp_path / "optimizer.pt")
    resume._let_torch_load_to_numbered_cpus()
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu:0"), weights_only=True)
    assert torch.equal(loaded["exp_avg"], torch.ones(3))


def test_tied_weights_fit(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    restore_weights(model, tmp_path)


TEXT = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def gpt_neox():
    config = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    return GPTNeoXForCausalLM(GPTNeoXConfig(num_attention_heads=2, **config))


def qwen2_5_vl():
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=TEXT | {"rope_scaling": rope}, vision_config=vision)
    )


def gemma3():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=TEXT, vision_config=vision | {"image_size": 16, "patch_size": 8})
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gpt_neox, qwen2_5_vl, gemma3])
def test_models_whose_files_have_other_names_are_restored(tmp_path, make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - before.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    restore_weights(model, tmp_path)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("zip_format", [True, False])
def test_bin_files_are_compared(tiny_model, tmp_path, zip_format):
    file = tmp_path / "pytorch_model.bin"
    torch.save(tiny_model.state_dict(), file, _use_new_zipfile_serialization=zip_format)
    restore_weights(tiny_model, tmp_path)
    torch.save(other_values(tiny_model.state_dict()), file, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=r"do not fit the model \(model.norm.weight\)"):
        restore_weights(tiny_model, tmp_path)


def test_an_adapter_in_a_bin_file_is_restored(tiny_model, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(tiny_model), lora)
    before = copy.deepcopy(model.state_dict())
    torch.save(get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    restore_weights(model, tmp_path)
    assert same(model.state_dict(), before)


def test_a_checkpoint_without_the_adapter_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"do not fit the model .it has no adapter 'default'"):
        restore_weights(model, tmp_path)


def test_restored_shards_are_compared(tiny_model, tmp_path, caplog):
    """The comparison alone; test_launch.py resumes runs with shards of ZeRO and FSDP."""
    model = copy.deepcopy(tiny_model)
    save_shard_sample(model, tmp_path, 0, 2)
    check_shards(model, tmp_path, 0, 2)
    assert not caplog.records
    check_shards(model, tmp_path, 0, 4)
    assert "it has no sample of the shards of 4 processes" in caplog.text
    with torch.no_grad():
        model.model.norm.weight[-1] += 1
    with pytest.raises(ValueError, match=r"are not those that were saved \(model.norm.weight\)"):
        check_shards(model, tmp_path, 0, 2)


def other_names(tensors):
    return {f"other.{name}": tensor for name, tensor in tensors.items()}


def other_values(tensors):
    return tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}


@pytest.mark.parametrize("change", [other_names, other_values])
def test_weights_that_do_not_fit_are_refused(tiny_model, tmp_path, change):
    tiny_model.save_pretrained(tmp_path)
    file = Path(tmp_path) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit the model"):
        restore_weights(copy.deepcopy(tiny_model), tmp_path)
