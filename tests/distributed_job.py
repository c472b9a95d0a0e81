"""Trains on fixed rollouts in one or several processes and dumps what each process selected, logged and ended with.

Run by tests/test_distributed.py: `torchrun --nproc_per_node N distributed_job.py OUT JSON`. A completion is a function
of its global row and of the rollout alone. The rows of a rollout are dealt to the steps as `spread` processes would see
them, so that a run of one process has the same steps as a run of several.
"""

import json
import os
import sys
from pathlib import Path

import torch
import trl.trainer.grpo_trainer as grpo
from conftest import digit_reward

import entropy_trl.trainer
from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.quickstart.task import build_dataset, build_model, build_tokenizer


ROWS = 32


def main(out: Path, job: dict) -> None:
    world, rollouts, selections, shapes = job.pop("spread"), [0], [], []
    empty_rank, generate, resume = job.pop("empty_rank", None), job.pop("generate", False), job.pop("resume", None)
    config = CovGRPOConfig(
        output_dir=str(out / "run"),
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        optim="sgd",  # Adam divides by the size of a gradient, and so turns the rounding of a tiny one into a step
        learning_rate=0.3,
        logging_steps=1,
        report_to="none",
        save_strategy=job.pop("save_strategy", "steps"),
        save_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **job,
    )
    rank, processes = config.process_index, config.world_size
    steps = ROWS // processes // config.per_device_train_batch_size // config.gradient_accumulation_steps

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        completions = []
        for i in range(len(prompts)):
            row = rank * len(prompts) + i
            generator = torch.Generator().manual_seed(1000 * rollouts[0] + row)
            length = int(torch.randint(1, 7, (), generator=generator))
            completions.append(torch.randint(2, 20, (length,), generator=generator).tolist())
        rollouts[0] += 1
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
        rows = torch.arange(ROWS).view(world, steps, -1).transpose(0, 1).reshape(-1)
        return {k: v[rows] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}

    grpo.shuffle_sequence_dict = deal
    select = entropy_trl.trainer._StepWindow._select

    def record(window, pool):
        selected = select(window, pool)
        rows = zip(pool.row_ids.tolist(), selected, strict=True)
        selections.append([window.trainer.state.global_step, {row: s.nonzero().flatten().tolist() for row, s in rows}])
        shapes.append([list(pool.mask.shape), int(pool.mask.sum())])
        return selected

    entropy_trl.trainer._StepWindow._select = record

    class Trainer(CovGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            if rank == empty_rank:
                batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
            return batch

    trainer = Trainer(
        model=build_model(seed=0),
        reward_funcs=(lambda completions, **_: [1.0] * len(completions)) if job.get("seed") == 99 else digit_reward,
        args=config,
        train_dataset=build_dataset(64),
        processing_class=build_tokenizer(),
        rollout_func=None if generate else rollout,
    )
    trainer.train(resume_from_checkpoint=resume)
    # A collective, under ZeRO-3: it gathers the shards of the parameters.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    torch.save(
        {
            "selections": selections,
            "shapes": shapes,
            "processes": trainer.accelerator.num_processes,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "logs": [log for log in trainer.state.log_history if "loss" in log],
            "weights": {name: weight.clone() for name, weight in (weights or {}).items()},
            # ZeRO-3 keeps this process's shard of a parameter in `ds_tensor`.
            "held": sum(getattr(p, "ds_tensor", p).numel() for p in trainer.model.parameters()),
        },
        out / f"rank{rank}.pt",
    )
    trainer.accelerator.end_training()
    # torch 2.13 sometimes deadlocks when the interpreter exits: the last reference to the process group is dropped with
    # the GIL held, and a thread of gloo waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
