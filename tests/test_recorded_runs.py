"""Short runs against their recorded logs, so that a change of structure that changes training is seen.

A change that is meant to alter training records them anew: `python tests/test_recorded_runs.py`.
"""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import digit_reward

from entropy_trl import CovGRPOConfig, CovGRPOTrainer
from entropy_trl.quickstart.task import build_dataset, build_model, build_tokenizer


RECORDED = Path(__file__).with_name("recorded_runs.json")

CLIP_COV = {"entropy_control": "clip_cov", "entropy_control_kwargs": {"cov_low": 0.01, "fraction": 0.2}}
KL_COV = {"entropy_control": "kl_cov", "entropy_control_kwargs": {"coef": 0.7, "fraction": 0.2}}
TWO_MICRO_BATCHES = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
}
RUNS = {
    "clip_cov over two micro-batches": CLIP_COV | TWO_MICRO_BATCHES,
    "kl_cov, eight updates a rollout": KL_COV | {"steps_per_generation": 8, "max_steps": 8},
    "kl_cov, scored by the current policy": KL_COV | TWO_MICRO_BATCHES | {"entropy_control_scores": "current"},
    "dynamic sampling and RLOO": CLIP_COV | {"dynamic_sampling": True, "advantage_estimator": "rloo"},
    "records, regions and law": KL_COV
    | {"token_records": {"every": 2, "entropy_change": True}, "entropy_regions": True, "entropy_law": True},
    "a chain with a state": {
        "entropy_control": "kl_cov+targeted_clip_higher",
        "entropy_control_kwargs": {
            "kl_cov": {"coef": 0.7, "fraction": 0.2},
            "targeted_clip_higher": {"epsilon": 0.1, "delta": 0.05, "k_max": 0.2, "entropy_target": 2.8},
        },
    },
}


def log_of(overrides, folder):
    """Loss and entropy of every step, and all that the last step logged."""
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "steps_per_generation": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = CovGRPOTrainer(
        model=build_model(seed=0),
        reward_funcs=digit_reward,
        args=CovGRPOConfig(**(values | overrides)),
        train_dataset=build_dataset(64),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    last = {name: value for name, value in steps[-1].items() if "time" not in name and "seconds" not in name}
    return {"loss": [log["loss"] for log in steps], "entropy": [log["entropy"] for log in steps], "last": last}


@pytest.mark.parametrize("name", RUNS)
def test_training_is_what_it_was(tmp_path, name):
    log, recorded = log_of(RUNS[name], tmp_path), json.loads(RECORDED.read_text())[name]
    # Far above what two types of CPU differ by after these few steps.
    near = {"rel": 1e-3, "abs": 1e-4, "nan_ok": True}
    assert log["loss"] == pytest.approx(recorded["loss"], **near)
    assert log["entropy"] == pytest.approx(recorded["entropy"], **near)
    assert log["last"] == pytest.approx(recorded["last"], **near)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: log_of(run, Path(folder, str(i))) for i, (name, run) in enumerate(RUNS.items())}
    RECORDED.write_text(json.dumps(logs, indent=1) + "\n")
