"""What the quickstart is asked to do, checked before anything is computed."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_trl.quickstart import task
from entropy_trl.quickstart.recipe import METHODS, RECIPES, Recipe
from entropy_trl.quickstart.warm_start import WarmStartConfig


MOST_SEEDS = 2**32
"""NumPy's generator takes none above."""
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Options:
    """What to run; see `run_quickstart`."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: str
    warm_start_seed: int
    output_dir: Path
    plot: bool
    rollouts: int | None
    eval_prompts: int
    warm_start_steps: int

    def __post_init__(self) -> None:
        _check_list("methods", self.methods)
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
        _check_list("seeds", self.seeds)
        if not all(0 <= seed < MOST_SEEDS for seed in (*self.seeds, self.warm_start_seed)):
            raise ValueError(f"a seed is negative or above {MOST_SEEDS - 1:,}; seeds are integers from 0")
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}; choose from {', '.join(RECIPES)}")
        if self.rollouts is not None and self.rollouts < 1:
            raise ValueError(f"rollouts={self.rollouts} must be at least 1")
        for name in ("rollouts", "warm_start_steps"):
            if (getattr(self, name) or 0) > MOST_STEPS:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {MOST_STEPS:,}")
        if self.eval_prompts < 1:
            raise ValueError(f"eval_prompts={self.eval_prompts} must be at least 1")
        task.held_out_prompts(self.eval_prompts)  # refuses more than there are
        self.warm_start()  # refuses a warm-up without steps
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"output_dir {self.output_dir} is a file; give a folder")
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the picture needs matplotlib: pip install 'entropy-trl[plot]', or give --no-plot")
        for folder in (self.run_folder(method, seed) for method in self.methods for seed in self.seeds):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, and a run goes to a folder of that name; move it away")
        for name in ("summary.json", "quickstart.png", "report.html", "report.json"):
            if (self.output_dir / name).is_dir():
                raise ValueError(
                    f"{self.output_dir / name} is a folder, and a file of that name is written; move it away"
                )

    def run_folder(self, method: str, seed: int) -> Path:
        """Where a run's results and checkpoints go."""
        return self.output_dir / self.recipe / f"{method}-seed{seed}"

    def resolved_recipe(self) -> Recipe:
        recipe = RECIPES[self.recipe]
        return recipe if self.rollouts is None else Recipe(self.rollouts, recipe.learning_rate)

    def warm_start(self) -> WarmStartConfig:
        noisy_steps = min(WarmStartConfig.noisy_steps, self.warm_start_steps)
        return WarmStartConfig(self.warm_start_seed, self.warm_start_steps, noisy_steps)


def _check_list(name: str, values: Sequence[object]) -> None:
    if not values:
        raise ValueError(f"no {name} given; give at least one")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} {' '.join(map(str, values))} name one of them twice")
