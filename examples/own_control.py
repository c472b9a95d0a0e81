"""A control of one's own: the class below is all of it.

    accelerate launch train.py --config configs/quickstart/grpo.yaml --entropy_control examples.own_control.SpareTheSure
    accelerate launch train.py --config configs/quickstart/grpo.yaml \
        --entropy_control clip_cov+examples.own_control.SpareTheSure \
        --entropy_control_kwargs '{"clip_cov": {"fraction": 0.01}, "examples.own_control.SpareTheSure": {"probability": 0.8}}'
    python examples/own_control.py                  # the same in Python, with an instance

It must be a frozen dataclass at the top of a module that can be imported: from an installed package, or from the folder
that the command runs in (here `examples/own_control.py`). Its fields are the keyword arguments. A control may also look
at all tokens of the step (`select`), keep numbers from step to step (`next_state`) and add a penalty to the loss:
`entropy_trl/controls/base.py` has the interface, and each control beside it is an example.
"""  # noqa: E501

import argparse
import math
from dataclasses import dataclass

from entropy_trl import CovGRPOConfig, CovGRPOTrainer, EntropyControl, TokenEdit
from entropy_trl.quickstart import build_dataset, countdown_reward, warm_start_policy


@dataclass(frozen=True)
class SpareTheSure(EntropyControl):
    """Leave right tokens alone that the rollout's policy was sure of: they can only lower the entropy further."""

    probability: float = 0.95

    drops_tokens = True  # so that losses in which single tokens cannot be taken out are refused

    def __post_init__(self):
        if not 0 < self.probability < 1:
            raise ValueError(f"`probability` must lie between 0 and 1, got {self.probability}.")

    def edit(self, batch, selected):
        sure = (batch.old_logps > math.log(self.probability)) & (batch.advantages > 0) & batch.mask
        return TokenEdit(
            advantages=batch.advantages.masked_fill(sure, 0.0),  # neither loss nor gradient
            metrics={"spared": (sure.sum(), batch.mask.sum())},  # logged as entropy_control/spared: sum / count
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a control of one's own on the embedded task.")
    parser.add_argument("--rollouts", type=int, default=120)
    rollouts = parser.parse_args().rollouts

    model, tokenizer = warm_start_policy()
    trainer = CovGRPOTrainer(
        model=model,
        reward_funcs=countdown_reward,
        args=CovGRPOConfig(
            output_dir="runs/examples/own_control",
            entropy_control=SpareTheSure(probability=0.9),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=7,
            steps_per_generation=8,
            max_steps=8 * rollouts,
            learning_rate=6e-4,
            loss_type="dapo",
            logging_steps=8 * max(1, rollouts // 20),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=build_dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    last = [log for log in trainer.state.log_history if "entropy_control/spared" in log][-1]
    print(f"entropy {last['entropy']:.3f} nats, {last['entropy_control/spared']:.0%} of the tokens spared")


if __name__ == "__main__":
    main()
