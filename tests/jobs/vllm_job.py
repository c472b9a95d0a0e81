"""Trains with vLLM's real engine in one or several processes; each dumps what it selected, logged and ended with.

Run by tests/test_vllm.py: `python vllm_job.py OUT JSON`, or under torchrun for several processes.
"""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu
import torch
import vllm_on_cpu
from conftest import digit_reward
from transformers import Qwen2ForCausalLM, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.loss.batch import TokenBatches
from entropy_trl.loss.window import StepWindow
from entropy_trl.quickstart.task import build_dataset, build_tokenizer


def seven_reward(completions, **kwargs):
    """1 for few of a random model's completions, so that many groups have no signal."""
    return [float("7" in completion) for completion in completions]


class Recorder(CovGRPOTrainer):
    """Keeps what a test looks at: rollouts, selections, scoring passes, and the loss with all that goes into it."""

    record_losses = False

    def __init__(self, *args, **kwargs):
        self.record = {"selections": [], "rollouts": [], "scoring_passes": [], "losses": []}
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows = zip(output["completion_ids"].tolist(), output["completion_mask"].tolist(), strict=True)
        completions = [[i for i, valid in zip(ids, mask, strict=True) if valid] for ids, mask in rows]
        self.record["rollouts"].append([self.state.global_step, completions])
        return output

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_call is not None:
            self.logps = output[0]
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.record_losses:
            (gradient,) = torch.autograd.grad(loss, self.logps, retain_graph=True)
            tensors = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            result = {"loss": loss.detach(), "logps": self.logps.detach(), "gradient": gradient}
            self.record["losses"].append({"inputs": tensors, **result})
        return loss


class Switch(TrainerCallback):
    """Sets attributes of the trainer before a given step."""

    def __init__(self, changes):
        self.changes = {int(step): values for step, values in changes.items()}

    def on_step_begin(self, args, state, control, **kwargs):
        for name, value in self.changes.get(state.global_step, {}).items():
            setattr(self.trainer, name, value)


def main(out: Path, job: dict) -> None:
    mode = job.pop("vllm_mode", "colocate")
    resume, lora, switch = job.pop("resume", None), job.pop("lora", False), job.pop("switch", {})
    times, sparse = job.pop("times", 1), job.pop("sparse", False)
    synced, engine_dtype = job.pop("synced", True), job.pop("engine_dtype", "float32")
    Recorder.record_losses = job.pop("record_losses", False)
    # Before the configuration, from which on DeepSpeed would shard what is loaded, but has no processes yet on a CPU.
    model = Qwen2ForCausalLM.from_pretrained(job.pop("model"), dtype=torch.float32)
    if mode == "server":
        vllm_on_cpu.server(out)
    else:
        vllm_on_cpu.colocate(engine_dtype)
    if job.pop("fsdp", False):
        fsdp_on_cpu.enable()
    config = CovGRPOConfig(
        output_dir=str(out / "run"),
        use_vllm=True,
        vllm_mode=mode,
        vllm_max_model_length=64,
        num_generations=4,
        max_completion_length=6,
        learning_rate=job.pop("learning_rate", 1e-2),
        logging_steps=1,
        report_to="none",
        save_strategy=job.pop("save_strategy", "no"),
        save_steps=1,
        bf16=False,
        use_cpu=job.pop("use_cpu", True),
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **job,
    )
    if not synced:
        VLLMGeneration.sync_weights = lambda self: None

    select = StepWindow._select

    def record(window, pool):
        selected = select(window, pool)
        rows = {row: s.nonzero().flatten().tolist() for row, s in zip(pool.row_ids.tolist(), selected, strict=True)}
        window.trainer.record["selections"].append([window.trainer.state.global_step, rows, int(pool.mask.sum())])
        return selected

    StepWindow._select = record
    score = TokenBatches.score

    def count(batches, *args, **kwargs):
        batches.trainer.record["scoring_passes"].append(batches.trainer.state.global_step)
        return score(batches, *args, **kwargs)

    TokenBatches.score = count

    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    changes = Switch(switch)
    trainer = Recorder(
        model=model,
        reward_funcs=seven_reward if sparse else digit_reward,
        args=config,
        train_dataset=build_dataset(64),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
        callbacks=[changes],
    )
    changes.trainer = trainer
    logs = []
    for _ in range(times):
        trainer.train(resume_from_checkpoint=resume)
        logs += [log for log in trainer.state.log_history if "loss" in log]

    accelerator = trainer.accelerator
    weights = accelerator.get_state_dict(trainer.model_wrapped)  # a collective, under ZeRO-3 and FSDP2
    parameters = list(trainer.model.parameters())
    torch.save(
        trainer.record
        | {
            "processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "engine": str(trainer.vllm_generation.llm.llm_engine.model_config.dtype) if mode == "colocate" else None,
            "logs": logs,
            "weights": {name: weight.clone() for name, weight in (weights or {}).items()},
            # ZeRO-3 keeps this process's shard of a parameter in `ds_tensor`, FSDP2 in a DTensor.
            "held": sum(
                getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters
            ),
            "size": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        },
        out / f"rank{accelerator.process_index}.pt",
    )
    accelerator.end_training()
    # As in distributed_job.py: torch 2.13 sometimes deadlocks when the interpreter of a process group exits.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
