"""Trains on fixed rollouts in one or several processes and dumps what each process selected, logged and ended with.

Run by tests/test_distributed.py: `accelerate launch --config_file FILE distributed_job.py OUT JSON`. A completion is a
function of its global row and of the rollout alone. The rows of a rollout are dealt to the steps as `spread` processes
would see them, so that a run of one process has the same steps as a run of several.
"""

import json
import os
import sys
import zlib
from pathlib import Path

import fsdp_on_cpu
import torch
import trl.trainer.grpo_trainer as grpo
from conftest import digit_reward
from peft import LoraConfig

from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.loss.batch import TokenBatches
from entropy_trl.loss.window import StepWindow
from entropy_trl.quickstart.task import build_dataset, build_model, build_tokenizer


def held(parameter):
    """Elements of a parameter that this process holds: of ZeRO-3 `ds_tensor`, of FSDP2 the local part of a DTensor."""
    parameter = getattr(parameter, "ds_tensor", parameter)
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def inner_optimizer(trainer):
    """The optimizer that makes the step; DeepSpeed gives it this process's partition of the parameters."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def main(out: Path, job: dict) -> None:
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp:
        fsdp_on_cpu.enable()
    world, rows, selections, shapes = job.pop("spread"), job.pop("rows", 32), [], []
    empty_rank, generate, resume = job.pop("empty_rank", None), job.pop("generate", False), job.pop("resume", None)
    prompts, from_prompt = job.pop("prompts", 64), job.pop("from_prompt", False)
    peft_config = LoraConfig(**lora) if (lora := job.pop("lora", None)) else None
    config = CovGRPOConfig(
        output_dir=str(out / "run"),
        num_generations=4,
        max_completion_length=6,
        logging_steps=1,
        report_to="none",
        save_strategy=job.pop("save_strategy", "steps"),
        save_steps=1,
        bf16=False,
        use_cpu=not fsdp,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        # SGD: Adam divides by the size of a gradient, and so turns the rounding of a tiny one into a step.
        **({"optim": "sgd", "learning_rate": 0.3, "gradient_checkpointing": False, "max_steps": 3} | job),
    )
    rank, processes = config.process_index, config.world_size
    steps = rows // processes // config.per_device_train_batch_size // config.gradient_accumulation_steps

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        completions = []
        number = trainer.state.global_step * config.gradient_accumulation_steps // config.steps_per_generation
        for i in range(len(prompts)):
            row = rank * len(prompts) + i
            generator = torch.Generator().manual_seed(1000 * number + row)
            if from_prompt:  # and of the place in its group; every third prompt has equal completions
                key = zlib.crc32(prompts[i].encode())
                generator.manual_seed(key + (i % 4 if key % 3 else 0))
            length = int(torch.randint(1, 7, (), generator=generator))
            completions.append(torch.randint(2, 20, (length,), generator=generator).tolist())
        prompt_ids = tokenizer(prompts)["input_ids"]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": [[0.0] * len(c) for c in completions],
        }

    def deal(batch):
        """In place of TRL's shuffle, which each process has its own of: the rows as `world` processes have them."""
        if processes == world:
            return batch
        order = torch.arange(rows).view(world, steps, -1).transpose(0, 1).reshape(-1)
        return {k: v[order] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}

    grpo.shuffle_sequence_dict = deal
    select = StepWindow._select

    def record(window, pool):
        selected = select(window, pool)
        in_rows = zip(pool.row_ids.tolist(), selected, strict=True)
        selections.append(
            [window.trainer.state.global_step, {row: s.nonzero().flatten().tolist() for row, s in in_rows}]
        )
        shapes.append([list(pool.mask.shape), int(pool.mask.sum())])
        return selected

    StepWindow._select = record
    score = TokenBatches.score

    def count(batches, *args, **kwargs):
        batches.trainer.scored += 1
        return score(batches, *args, **kwargs)

    TokenBatches.score = count

    class Trainer(CovGRPOTrainer):
        scored = 0
        prompts = []

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.prompts.append([row["prompt"] for row in inputs])
            if rank == empty_rank:
                batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
            return batch

    torch.manual_seed(0)  # of LoRA's matrices
    trainer = Trainer(
        model=build_model(seed=0),
        reward_funcs=(lambda completions, **_: [1.0] * len(completions)) if job.get("seed") == 99 else digit_reward,
        args=config,
        train_dataset=build_dataset(prompts),
        processing_class=build_tokenizer(),
        rollout_func=None if generate else rollout,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    # A collective that gathers the shards of the parameters, on the first process if they are sharded.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    torch.save(
        {
            "selections": selections,
            "shapes": shapes,
            "scored": trainer.scored,
            "prompts": trainer.prompts,
            "position": trainer._prompt_stream and trainer._prompt_stream.position,
            "processes": trainer.accelerator.num_processes,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "wrapped": type(trainer.model_wrapped).__name__,
            "logs": [log for log in trainer.state.log_history if "loss" in log],
            "weights": {name: weight.clone() for name, weight in (weights or {}).items()},
            "held": sum(held(parameter) for parameter in trainer.model.parameters()),
            "optimized": sum(held(p) for group in inner_optimizer(trainer).param_groups for p in group["params"]),
        },
        out / f"rank{rank}.pt",
    )
    trainer.accelerator.end_training()
    # torch 2.13 sometimes deadlocks when the interpreter exits: the last reference to the process group is dropped with
    # the GIL held, and a thread of gloo waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
