"""A run's uploads to the Hub: how long they wait, what becomes of those that fail, and how to make up for them."""

import json
import logging
import shlex
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import _http
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.hub import hf_api


logger = logging.getLogger(__name__)

#: Seconds. The Hub itself gives up on a request after one minute; `huggingface_hub` alone would wait for ever.
TIME_LIMIT = httpx.Timeout(120.0, connect=10.0)

#: What a request to the Hub raises: no connection, an error status, or an answer that is not the Hub's (a proxy's).
REQUEST_ERRORS = (httpx.HTTPError, OSError, json.JSONDecodeError)

#: Of the status codes for a mistake, those that say: try again.
_TRY_AGAIN = (408, 425, 429)


class PushMistake(ValueError):
    """Pushing cannot work, now or later, unless the user changes something."""


def make_repository(args: TrainingArguments, token: str | None = None) -> str:
    """Makes the repository that a run is pushed to, unless it is there, and returns its id.

    Raises:
        PushMistake: Only the user can put it right: no token or a wrong one, no right to write, an impossible name,
            offline mode.
        httpx.HTTPError, OSError, json.JSONDecodeError: The Hub cannot be reached, or does not do its work now.
    """
    limit_waiting()
    api = hf_api()
    if token is None and api.token is None and get_token() is None:
        raise PushMistake(
            "Pushing to the Hub needs a token, and there is none. Set HF_TOKEN, log in with `hf auth login`, or leave "
            "push_to_hub out."
        )
    name = intended_name(args)
    try:
        url = api.create_repo(name, token=token, private=args.hub_private_repo, exist_ok=True)
        repo_id = str(url.repo_id)
        # A token that may only read gets this far if the repository is there.
        _check_write(repo_id, token)
    except HFValidationError as error:
        raise PushMistake(f"hub_model_id: {error} The name was {name!r}.") from error
    except OfflineModeIsEnabled as error:
        raise PushMistake(
            "Pushing to the Hub is not possible with HF_HUB_OFFLINE set. Unset it, or leave push_to_hub out and upload "
            "the model later with `hf upload`."
        ) from error
    except HfHubHTTPError as error:
        if not 400 <= error.response.status_code < 500 or error.response.status_code in _TRY_AGAIN:
            raise
        raise PushMistake(
            f"The Hub does not let this token write to {name!r} ({describe(error)}). Check HF_TOKEN (or `hf auth "
            "whoami`), its right to write, and hub_model_id; or leave push_to_hub out."
        ) from error
    return repo_id


def intended_name(args: TrainingArguments) -> str:
    """The repository as the user names it: without a namespace it is in the one of the token."""
    return str(args.hub_model_id or Path(str(args.output_dir)).absolute().name)


def _check_write(repo_id: str, token: str | None) -> None:
    try:
        hf_api().auth_check(repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
        # A mirror, or a Hub on premises, may not know the question.


def limit_waiting() -> None:
    """Lets every request of this process to the Hub end, by a time limit unless the client already has one."""
    make_client = _http._GLOBAL_CLIENT_FACTORY
    if not isinstance(make_client, _TimeLimit):
        set_client_factory(_TimeLimit(make_client))


@dataclass(frozen=True)
class _TimeLimit:
    """Makes clients as another factory does (the user's own, behind a proxy), and gives them a time limit."""

    make_client: Any

    def __call__(self) -> httpx.Client:
        client: httpx.Client = self.make_client()
        if client.timeout == httpx.Timeout(None):
            client.timeout = TIME_LIMIT
        return client


def describe(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}: {error.server_message or error.response.reason_phrase}"
    message = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading 'model.safetensors'"
        return f"{message} {describe(error.__cause__)}"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@dataclass(frozen=True)
class _Upload:
    repo_id: str
    path_in_repo: str
    folder: Path
    job: "Future[Any]"


class Uploads:
    """The uploads of a run, and which of them failed.

    Uploads run in a thread of `huggingface_hub`. One that fails is told at once, by one warning with the command that
    uploads the same later.
    """

    def __init__(self, args: TrainingArguments) -> None:
        #: False while the trainer is made: only then may a mistake of the user's end the run.
        self.started = False
        self._args = args
        self._latest: dict[str, _Upload] = {}  # by path in the repository
        self._told: set[Future[Any]] = set()
        self._telling = threading.Lock()

    def watch(self, repo_id: str, path_in_repo: str, folder: Path, job: "Future[Any]") -> None:
        """Follow an upload. A later one to the same path takes its place."""
        upload = self._latest[path_in_repo] = _Upload(repo_id, path_in_repo, folder, job)
        job.add_done_callback(lambda _: self._tell(upload))

    def failed(self, folder: Path, error: BaseException) -> None:
        """Note that the upload of a run's folder could not even begin."""
        job: Future[Any] = Future()
        job.set_exception(error)
        self.watch(intended_name(self._args), "", folder, job)

    @property
    def failures(self) -> list[str]:
        """Of each upload that failed and was not made up for, what happened and how to make up for it."""
        found = []
        for upload in self._latest.values():
            if upload.job.done():
                self._tell(upload)  # the thread may be about to
                error = upload.job.exception()
                if error is not None:
                    found.append(self._sentence(upload, error))
        return found

    def _tell(self, upload: _Upload) -> None:
        error = upload.job.exception()
        with self._telling:
            if error is not None and upload.job not in self._told:
                self._told.add(upload.job)
                logger.warning(self._sentence(upload, error))

    def _sentence(self, upload: _Upload, error: BaseException) -> str:
        what = f"{upload.folder} was not uploaded to {upload.repo_id} ({describe(error)})."
        if not upload.folder.exists():
            return f"{what} It has been deleted since (save_total_limit)."
        return f"{what} Nothing is lost: it is complete on disk. To upload it later: {self._command(upload)}"

    def _command(self, upload: _Upload) -> str:
        command = ["hf", "upload", upload.repo_id, str(upload.folder), upload.path_in_repo or "."]
        if not upload.path_in_repo:
            command += ["--exclude", "_*", "--exclude", f"{PREFIX_CHECKPOINT_DIR}-*"]
        if self._args.hub_private_repo:
            command += ["--private"]
        if self._args.hub_revision:
            command += ["--revision", str(self._args.hub_revision)]
        return shlex.join(command)
