"""What a GPU computes is what the CPU computes, and the trainer runs there in bf16. Run by `make gpu-check`."""

import math

import pytest
import torch

from entropy_trl import CONTROLS, ClipCov, KLCov, TokenBatch


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rows", [16, 2000])
@pytest.mark.parametrize(
    "control", [KLCov(), KLCov(selection="random"), ClipCov(), ClipCov(selection="random")], ids=str
)
def test_the_same_tokens_as_on_a_cpu(control, rows):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "logps": -torch.rand(rows, 1024, generator=generator) * 8,
        "advantages": torch.randn(rows, 1, generator=generator),
        "mask": torch.rand(rows, 1024, generator=generator) < 0.7,
        "row_ids": torch.arange(rows),
    }
    selections = []
    for device in ("cpu", "cuda"):
        moved = {k: v.to(device) for k, v in tensors.items()}
        selections.append(control.select(TokenBatch(old_logps=moved["logps"], **moved)))
    assert selections[1].selected.device.type == "cuda"
    assert torch.equal(selections[0].selected, selections[1].selected.cpu())
    torch.testing.assert_close(selections[0].covariance, selections[1].covariance.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("pool", ["step", "micro_batch"])
@pytest.mark.parametrize("name", CONTROLS)
def test_training_on_a_gpu(make_trainer, name, pool, bf16):
    trainer = make_trainer(
        entropy_control=name,
        entropy_control_kwargs={"clip_cov": {"fraction": 0.1, "cov_low": 0.02}, "kl_cov": {"fraction": 0.1}}.get(name),
        entropy_control_pool=pool,
        use_cpu=False,
        bf16=bf16,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
    )
    trainer.train()
    assert next(trainer.model.parameters()).device.type == "cuda"
    steps = [log for log in trainer.state.log_history if "loss" in log]
    if name in ("clip_cov", "kl_cov"):
        assert all(0 < log["entropy_control/selected_fraction"] <= 0.3 for log in steps)
    assert all(math.isfinite(log["loss"]) for log in steps)
