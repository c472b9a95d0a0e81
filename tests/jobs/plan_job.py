"""Trains one rollout in several processes and dumps what travelled between them and what each of them holds.

Run by tests/plan/test_plan.py: `accelerate launch ... plan_job.py OUT JSON`.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist


CALLS: Counter = Counter()


def count(name):
    """Let `torch.distributed.<name>` record who calls it, and the bytes of the whole tensor it makes or sums."""
    function = getattr(dist, name)

    def counting(*args, **kwargs):
        whole = max((x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), default=0)
        frame, caller = sys._getframe(1), "other"
        while frame is not None and caller == "other":
            parts = Path(frame.f_code.co_filename).parts
            caller = next(
                (p for p in ("entropy_trl", "trl", "deepspeed", "_fully_shard", "transformers") if p in parts), "other"
            )
            frame = frame.f_back
        CALLS[caller, name, whole] += 1
        return function(*args, **kwargs)

    setattr(dist, name, counting)


NAMES = "all_reduce all_gather all_gather_into_tensor all_gather_single reduce_scatter_tensor reduce_scatter_single"
for name in [*NAMES.split(), "all_gather_object"]:
    if hasattr(dist, name):  # the `_single` ones are of newer versions of torch
        count(name)

import fsdp_on_cpu  # noqa: E402
import transformers.training_args  # noqa: E402
from conftest import digit_reward  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from entropy_trl import CovGRPOConfig, CovGRPOTrainer  # noqa: E402
from entropy_trl.quickstart.task import build_dataset, build_tokenizer  # noqa: E402


class CountingDDP(DistributedDataParallel):
    """DDP sends its buckets from C++, past the functions above."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, self.count)

    @staticmethod
    def count(group, bucket):
        views = any(p.grad is not None and shares(p.grad, bucket.buffer()) for p in bucket.parameters())
        CALLS["ddp", "views" if views else "copies", bucket.buffer().nbytes] += 1
        return allreduce_hook(group, bucket)


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def size(tensors):
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in local if t.ndim)


def held(trainer):
    """Bytes of this process's part of the model states, by kind."""
    parameters = list(trainer.model.parameters())
    if trainer.accelerator.state.deepspeed_plugin is None:
        states = [x for state in trainer.optimizer.optimizer.state.values() for x in state.values()]
        return {"parameters": size(parameters), "optimizer": size(states)}
    zero = trainer.model_wrapped.optimizer
    states = {"optimizer": size(x for state in zero.optimizer.state.values() for x in state.values())}
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        states |= {
            "master": size(zero.fp32_partitioned_groups_flat),
            "gradients": size([zero.grad_partitions_flat_buffer]),
        }
        return states | {"parameters": size(p.ds_tensor for p in parameters)}
    return states | {"master": size(zero.single_partition_of_fp32_groups), "parameters": size(parameters)}


def unsharded_gradients(model):
    """What FSDP2 keeps whole between the micro-batches of a step."""
    groups = {
        state._fsdp_param_group for m in model.modules() if (state := getattr(m, "_get_fsdp_state", lambda: None)())
    }
    parameters = {p for group in groups - {None} for p in group.fsdp_params if hasattr(p, "_unsharded_param")}
    return [p._unsharded_param.grad for p in parameters]


def main(out: Path, job: dict) -> None:
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp:
        fsdp_on_cpu.enable()
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it is asked of "GPUs" that are CPUs
    torch.nn.parallel.DistributedDataParallel = CountingDDP
    shape = job.pop("model")
    config = CovGRPOConfig(
        output_dir=str(out / "run"),
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=not fsdp,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **job,
    )

    unreduced = [0]

    class Trainer(CovGRPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if fsdp:
                unreduced[0] = max(unreduced[0], size(unsharded_gradients(self.model_wrapped)))
            return loss

        def train(self, *args, **kwargs):
            CALLS.clear()
            return super().train(*args, **kwargs)

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    trainer = Trainer(
        model=Qwen2ForCausalLM(Qwen2Config(**shape, pad_token_id=tokenizer.pad_token_id)),
        reward_funcs=digit_reward,
        args=config,
        train_dataset=build_dataset(64),
        processing_class=tokenizer,
    )
    trainer.train()
    calls = [[*key, number] for key, number in CALLS.items()]
    (out / f"rank{config.process_index}.json").write_text(
        json.dumps({"calls": calls, "held": held(trainer), "unreduced": unreduced[0]})
    )
    trainer.accelerator.end_training()
    os._exit(0)  # see distributed_job.py


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
