"""The embedded task: entropy collapse and its cure on a CPU in minutes. `entropy-trl quickstart` runs it.

The task, its verifier and the tiny policy serve tests and notebooks too:

```python
from entropy_trl.quickstart import build_dataset, countdown_reward, warm_start_policy

model, tokenizer = warm_start_policy()
trainer = CovGRPOTrainer(
    model=model, processing_class=tokenizer, reward_funcs=countdown_reward, train_dataset=build_dataset(), args=...
)
```
"""

from entropy_trl.quickstart.evaluate import evaluate_policy
from entropy_trl.quickstart.recipe import METHODS, RECIPES, Recipe, training_arguments
from entropy_trl.quickstart.task import (
    build_dataset,
    build_model,
    build_tokenizer,
    countdown_reward,
    held_out_prompts,
    train_prompts,
)
from entropy_trl.quickstart.warm_start import WarmStartConfig, load_or_warm_up, warm_start_policy, warm_up


__all__ = [
    "METHODS",
    "RECIPES",
    "Recipe",
    "WarmStartConfig",
    "build_dataset",
    "build_model",
    "build_tokenizer",
    "countdown_reward",
    "evaluate_policy",
    "held_out_prompts",
    "load_or_warm_up",
    "train_prompts",
    "training_arguments",
    "warm_start_policy",
    "warm_up",
]
