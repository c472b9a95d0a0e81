"""A Hub in one process: the part of its HTTP protocol that `huggingface_hub` pushes a model with, on a loopback port.

Repositories and files are kept in memory. Large files go the way of Git LFS, as for a client with
`HF_HUB_DISABLE_XET=1`: the Xet protocol is not spoken. What is not understood is answered with 404 and noted in
`unknown`, so that a client that speaks otherwise than this server does not pass a test unnoticed.

    with HubServer() as hub:
        hub.fail("commit", 503)       # from now on; `hub.heal()` ends it
        ...                           # a client with HF_ENDPOINT=hub.url and HF_TOKEN=hub.token
        hub.repositories["tester/model"].files["README.md"]
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


#: What the Hub's default `.gitattributes` sends through LFS, of the files that a training run writes.
LARGE = re.compile(r"\.(safetensors|bin|pt|pth|parquet|png)$|tfevents")
#: Requests that have nothing to do with a push, and whose answers the client does without.
_BESIDE_THE_POINT = ("/api/agent-harnesses", "/api/telemetry/")
#: The Hub's rule for `base_model`: an id, not a path.
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    #: Of each commit its message and the paths that it wrote.
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()

    @property
    def metadata(self) -> dict[str, Any]:
        """The YAML at the head of the card."""
        return yaml.safe_load(self.card.split("---\n")[1])


class HubServer:
    """The server, its contents, and the failures that it is told to have."""

    def __init__(self):
        self.token, self.read_token = "hf_write", "hf_read"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[str] = []  # "POST /api/repos/create", ...
        self.unknown: list[str] = []
        self._failures: list[tuple[re.Pattern[str], int | str]] = []
        self.released = threading.Event()  # ends the wait of the requests that are told to "hold"
        self._closed = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, request: str, how: int | str) -> None:
        """Let requests whose line matches the pattern fail.

        Args:
            request: a regular expression, searched for in "METHOD /path".
            how: a status code; "drop" closes the connection without an answer; "hang" never answers; "slow" answers
                after half a second.
        """
        self._failures.append((re.compile(request), how))

    def heal(self) -> None:
        self._failures.clear()

    def failure_of(self, line: str) -> int | str | None:
        return next((how for pattern, how in self._failures if pattern.search(line)), None)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        body = self._read_body()
        if path.startswith(_BESIDE_THE_POINT):
            self._answer(404)
            return
        hub.requests.append(line)
        failure = hub.failure_of(line)
        if failure == "hang":
            hub._closed.wait()
        if failure in ("hang", "drop"):
            self.close_connection = True
            return
        if failure == "hold":
            hub.released.wait(20)
        if failure == "slow":
            time.sleep(0.5)
        if isinstance(failure, int):
            self._answer(failure, {"error": f"this server was told to answer {failure}"})
            return
        for method, pattern, needs_token, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                if needs_token and not self._may(write=needs_token == "write"):
                    return
                answer(self, body, *match.groups())
                return
        hub.unknown.append(line)
        self._answer(404, {"error": f"unknown request {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may(self, write: bool) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == self.hub.token or (token == self.hub.read_token and not write):
            return True
        if token == self.hub.read_token:
            self._answer(403, {"error": "you don't have the rights to write here"})
        else:
            self._answer(401, {"error": "Invalid username or password."})
        return False

    def _repository(self, repo_id: str | None) -> Repository | None:
        repository = self.hub.repositories.get(repo_id or "")
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repository

    def whoami(self, body: bytes) -> None:
        self._answer(200, {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        known = repo_id in self.hub.repositories
        if not known:
            self.hub.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        url = {"url": f"{self.hub.url}/{repo_id}"}
        self._answer(409, {"error": "You already created this model repo"} | url) if known else self._answer(200, url)

    def info(self, body: bytes, repo_id: str | None, revision: str | None = None) -> None:
        if repository := self._repository(repo_id):
            files = [{"rfilename": name} for name in repository.files]
            facts = {"_id": "0", "id": repo_id, "sha": repository.sha, "private": repository.private}
            self._answer(200, facts | {"siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def may_write(self, body: bytes, repo_id: str) -> None:
        if self._repository(repo_id):
            self._answer(200, {})

    def validate(self, body: bytes) -> None:
        content, errors = json.loads(body)["content"], []
        try:
            metadata = yaml.safe_load(content.split("---\n")[1])
        except (yaml.YAMLError, IndexError) as error:
            errors.append(str(error))
        else:
            if not MODEL_ID.fullmatch(metadata.get("base_model") or "none"):
                errors.append('"base_model" must be a model id')
            if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
                errors.append('"tags" must be strings')
        self._answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if not (repository := self._repository(repo_id)):
            return
        answers = []
        for file in json.loads(body)["files"]:
            known = repository.files.get(file["path"])
            large = bool(LARGE.search(file["path"]))
            oid = None
            if known is not None:
                oid = hashlib.sha256(known).hexdigest() if large else _git_blob(known)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        if not self._repository(repo_id):
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid = wanted["oid"]
            upload = {} if oid in self.hub.objects else {"upload": {"href": f"{self.hub.url}/storage/{oid}"}}
            objects.append({"oid": oid, "size": wanted["size"]} | ({"actions": upload} if upload else {}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "the content does not have this hash"})
            return
        self.hub.objects[oid] = body
        self._answer(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if not (repository := self._repository(repo_id)):
            return
        message, written = "", {}
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                written[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self._answer(400, {"error": f"cannot {operation['key']} {value['path']}"})
                return
        repository.files |= written
        repository.commits.append((message, sorted(written)))
        oid = repository.sha
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
#: Method, path, the token that it takes, and what answers.
_ROUTES: list[tuple[str, str, str | None, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", "read", _Handler.whoami),
    ("POST", r"/api/repos/create", "write", _Handler.create),
    ("POST", r"/api/validate-yaml", None, _Handler.validate),
    ("GET", rf"/api/models/(?:{_ID}|[\w.-]+)", "read", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/([\w./-]+)", "read", _Handler.info),
    ("GET", rf"/api/models/{_ID}/auth-check/write", "write", _Handler.may_write),
    ("POST", rf"/api/models/{_ID}/preupload/([\w./-]+)", "write", _Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "write", _Handler.lfs_batch),
    ("PUT", r"/storage/(\w+)", None, _Handler.store),  # its address is its permission, as with a signed URL
    ("POST", rf"/api/models/{_ID}/commit/([\w./-]+)", "write", _Handler.commit),
]
