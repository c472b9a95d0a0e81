"""[`PushingTrainer`]: TRL's GRPOTrainer whose uploads may fail without harm to the model or the run.

What goes wrong at the Hub is a warning. Only what the user alone can put right is an error, and only before training.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api
from trl import GRPOTrainer

from entropy_trl.saving.hub import (
    REQUEST_ERRORS,
    PushMistake,
    Uploads,
    describe,
    intended_name,
    limit_waiting,
    make_repository,
)
from entropy_trl.saving.manifest import MANIFEST
from entropy_trl.saving.model_card import write_card
from entropy_trl.trl_compat import adapt_trl


logger = logging.getLogger(__name__)

adapt_trl()


#: In a run's folder, what TensorBoard and TRL (`log_completions`) add to while an upload reads it.
GROWING = ("runs/*", "completions/*")


@contextmanager
def _without_growing_files() -> Iterator[None]:
    """Let transformers begin uploads without the logs that grow. It has no option for what an upload leaves out."""
    api = hf_api()
    upload_folder = api.upload_folder

    def upload_less(*, ignore_patterns: Sequence[str] = (), **options: Any) -> Any:
        return upload_folder(ignore_patterns=[*ignore_patterns, *GROWING], **options)

    vars(api)["upload_folder"] = upload_less  # of this object, in front of the method of its class
    try:
        yield
    finally:
        del vars(api)["upload_folder"]


class PushingTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with uploads that are followed, and a model card with what the run did."""

    hub_model_id: str | None
    push_in_progress: PushInProgress | None = None
    _unwritten_card: tuple[Any, ...] | None = None

    def __init__(self, model, reward_funcs, args, *trainer_args, **trainer_kwargs):
        self._uploads = Uploads(args)
        # Every checkpoint's `training_args.bin`, which may be shared, would have it in plain text.
        if args.hub_token is not None:
            hf_api().token, args.hub_token = args.hub_token, None
        super().__init__(model, reward_funcs, args, *trainer_args, **trainer_kwargs)
        self._uploads.started = True

    def init_hf_repo(self, token=None):
        self.push_in_progress = None
        mistake = None
        if self.is_world_process_zero():
            try:
                self.hub_model_id = make_repository(self.args, token)
            except (PushMistake, *REQUEST_ERRORS) as error:
                if self._uploads.started:
                    self._uploads.failed(Path(self.args.output_dir), error)
                elif isinstance(error, PushMistake):
                    mistake = str(error)
                else:
                    logger.warning(
                        f"The Hub cannot be used now ({describe(error)}). Training goes on, and pushing is tried again "
                        "later: nothing is lost."
                    )
        if not self._uploads.started and self.accelerator.num_processes > 1:
            (mistake,) = broadcast_object_list([mistake])
        if mistake is not None:
            raise PushMistake(mistake)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Saves the model and its card, and uploads them, as [`~transformers.Trainer.push_to_hub`] does.

        Everything is complete in `args.output_dir` before the upload begins. An upload that fails does not raise: it
        warns, with the command that uploads the same later, and is listed in `hub_failures`.

        Returns:
            `CommitInfo`, `Future` or `None`: The commit, or its future if not `blocking`. `None` if the upload failed,
            and on all processes but the first.
        """
        if self.is_world_process_zero():
            limit_waiting()
            self._finish_current_push()  # it reads the files that are now written anew
            if self.hub_model_id is None:
                self.init_hf_repo(token)
            if self.hub_model_id is None:  # and it has been told why
                self.save_model(_internal_call=True)
                self.create_model_card(**{"model_name": intended_name(self.args).split("/")[-1]} | kwargs)
                return None
        job = super().push_to_hub(commit_message, False, token, revision, **kwargs)
        if job is None:
            return None
        self.push_in_progress = PushInProgress([job])
        self._uploads.watch(str(self.hub_model_id), "", Path(self.args.output_dir), job)
        if not blocking:
            return job
        return None if job.exception() is not None else job.result()

    def _push_from_checkpoint(self, checkpoint_folder):
        # Transformers calls this before the rollout and the manifest are there, `_save_checkpoint` when they are.
        folder = Path(checkpoint_folder)
        if not self.is_world_process_zero() or not (folder / MANIFEST).exists():
            return
        if self.hub_model_id is None and self.args.hub_strategy != HubStrategy.END:
            self.init_hf_repo()
        if self.hub_model_id is None:
            return
        if self.args.hub_always_push:  # transformers would write over the files that the last upload still reads
            self._finish_current_push()
        self._write_card()
        known = set() if self.push_in_progress is None else set(self.push_in_progress.jobs)
        with _without_growing_files():
            super()._push_from_checkpoint(checkpoint_folder)
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        in_repo = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
        sources = (("", Path(self.args.output_dir)), (in_repo, folder))
        for (path_in_repo, source), job in zip(sources, [job for job in jobs if job not in known], strict=False):
            self._uploads.watch(self.hub_model_id, path_in_repo, source, job)

    @property
    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    @property
    def hub_failures(self) -> list[str]:
        """What was to be uploaded to the Hub and was not: of each a sentence with the command that does it later."""
        return self._uploads.failures

    # An upload hashes a file, and reads it again later to send it: no file of the folder may change in between. A save
    # in training does not wait for that. It leaves the card for the end of the upload.
    def _finish_current_push(self):
        super()._finish_current_push()
        self._write_card()

    def save_model(self, output_dir=None, _internal_call=False):
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            self._finish_current_push()
        super().save_model(output_dir, _internal_call)

    def save_state(self):
        self._finish_current_push()
        super().save_state()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_in_train:
            self._finish_current_push()
        self._unwritten_card = (model_name, dataset_name, tags)
        self._write_card()

    def _write_card(self):
        if self._unwritten_card is None or self._is_pushing or not self.is_world_process_zero():
            return
        card, self._unwritten_card = self._unwritten_card, None
        base = partial(super().create_model_card, *card)
        write_card(self.args, base, self.state, self.hub_model_id, self.model)
