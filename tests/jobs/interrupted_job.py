"""`train.py` that kills itself (SIGKILL) at a given place: python interrupted_job.py PLACE STEP RANK ARGUMENTS...

PLACE is `step` (inside an optimizer step, after its first micro-batch's backward), `save` (in a checkpoint, after the
model), `rollout` (with half of the rollout's file written), `manifest` (with everything written but the manifest),
`rotation` (after the manifest), `launcher` (as `step`, and SIGTERM for the launcher of the process), or `never`.
"""

import os
import signal
import sys
import time

import entropy_trl.saving.resume
from entropy_trl import CovGRPOTrainer
from entropy_trl.cli import train_main


def die_in(owner, name, when):
    method = getattr(owner, name)

    def dying(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, dying)


def main(place, step, rank, argv):
    step, rank, saved = int(step), int(rank), f"checkpoint-{step}"

    def at(trainer, *args):
        return trainer.state.global_step == step and trainer.args.process_index == rank

    if place == "step":
        die_in(CovGRPOTrainer, "_compute_loss", lambda *args: at(*args) and args[0]._step % 2 == 1)
    elif place == "launcher":

        def ended(*args):
            if at(*args):
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(20)  # until the launcher has told this process

        die_in(CovGRPOTrainer, "_compute_loss", ended)
    elif place == "save":
        die_in(CovGRPOTrainer, "_save_optimizer_and_scheduler", at)
    elif place == "rollout":

        def torn(path, *args):
            if path.parent.name == saved and path.name == f"rollout_rank{rank}.safetensors":
                path.write_bytes(bytes(100))
                return True

        die_in(entropy_trl.saving.resume, "save_rollout", torn)
    elif place in ("manifest", "rotation"):
        name = {"manifest": "write_manifest", "rotation": "rotate"}[place]
        steps = []
        die_in(CovGRPOTrainer, "_save_checkpoint", lambda trainer, *args: steps.append(trainer.state.global_step))
        die_in(entropy_trl.saving.resume, name, lambda *args: steps[-1] == step)
    return train_main(argv)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], sys.argv[4:]))
