"""A Hugging Face Hub on this machine, for model repositories, with faults on demand.

    python -m tests.hub.loopback        # prints the variables that point other programs at it

It speaks what huggingface_hub needs to make, push to and read repositories; paths of requests are those of the Hub.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub.metadata import metadata_errors

_MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "You don't have the rights to do this",
    409: "Another commit is being made",
    412: "A commit has happened since. Please refresh and try again.",
}
_JSON = "application/json"


@dataclasses.dataclass(frozen=True)
class User:
    """Who a token belongs to, and what it may do: "write", "read" or "fineGrained"."""

    name: str
    role: str

    def may_write(self, namespace: str) -> bool:
        """Whether it may write into a namespace."""
        own = {self.name} if self.role == "fineGrained" else {self.name, "lab"}
        return self.role != "read" and namespace in own

    def described(self) -> dict[str, Any]:
        """As `whoami` answers."""
        token: dict[str, Any] = {"displayName": "token", "role": self.role}
        if self.role == "fineGrained":
            entity = {"type": "user", "name": self.name}
            token["fineGrained"] = {"scoped": [{"entity": entity, "permissions": ["repo.write"]}]}
        orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@dataclasses.dataclass(frozen=True)
class Call:
    """A request with its answer; the status is 0 where the connection was closed."""

    method: str
    path: str
    status: int


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """The identifier that the Hub gives it: of git, or of LFS."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        """As in a listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclasses.dataclass(frozen=True)
class Commit:
    """A commit with all files that the repository holds then."""

    sha: str
    title: str
    revision: str
    contents: dict[str, File]


class Repository:
    """A model repository: its commits, and branches and tags that name them."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.repo_id, self.private = repo_id, private
        self.commits: list[Commit] = []
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def commit(self, revision: str, title: str, contents: dict[str, File]) -> Commit:
        """Add a commit to a branch."""
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, revision, contents))
        self.branches[revision] = sha
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or an identifier names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The contents of all files."""
        commit = self.at(revision)
        return {} if commit is None else {path: file.content for path, file in commit.contents.items()}

    def described(self, commit: Commit) -> dict[str, Any]:
        """As `model_info` answers."""
        siblings = [{"rfilename": path} for path in sorted(commit.contents)]
        names = {"id": self.repo_id, "modelId": self.repo_id, "sha": commit.sha, "siblings": siblings}
        return {**names, "private": self.private, "tags": [], "downloads": 0, "likes": 0, "gated": False}


@dataclasses.dataclass
class _Fault:
    """What happens to the next requests that fit a pattern, before or in the place of an answer."""

    pattern: str
    times: int | None
    act: Callable[[_Handler], bool]


class LoopbackHub:
    """A Hub that listens on this machine while the context lasts.

    Tokens are `hf_write`, `hf_read` and `hf_fine`, all of `user`, who may write into the organisation `lab` and read in
    `readers`. A pattern of a fault is matched with "METHOD /path".

    Attributes:
        endpoint: its address.
        repositories: by their names.
        calls: all requests so far.
    """

    def __init__(self, port: int = 0) -> None:
        roles = {"hf_write": "write", "hf_read": "read", "hf_fine": "fineGrained"}
        self.users = {f"Bearer {token}": User("user", role) for token, role in roles.items()}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.lock = threading.RLock()
        self._faults: list[_Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = "hf_write") -> dict[str, str]:
        """Variables that point a process at this Hub, which huggingface_hub reads when it is imported."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def fail(self, pattern: str, *, status: int, times: int | None = 1) -> None:
        """Answer the next `times` requests (None: all) with an error status."""

        def act(handler: _Handler) -> bool:
            handler.refuse(status, _MESSAGES.get(status, "The Hub is not well"))
            return True

        self._faults.append(_Fault(pattern, times, act))

    def drop(self, pattern: str, *, times: int | None = 1) -> None:
        """Close the connection of the next requests without an answer."""

        def act(handler: _Handler) -> bool:
            self.calls.append(Call(handler.command, urlsplit(handler.path).path, 0))
            handler.close_connection = True
            return True

        self._faults.append(_Fault(pattern, times, act))

    def delay(self, pattern: str, *, seconds: float, times: int | None = 1) -> None:
        """Wait before the next requests are answered."""

        def act(handler: _Handler) -> bool:
            time.sleep(seconds)
            return False

        self._faults.append(_Fault(pattern, times, act))

    def clear(self) -> None:
        """Remove all faults."""
        self._faults.clear()

    def fault_for(self, request: str) -> _Fault | None:
        """The first fault that a request runs into, which is used up by it."""
        with self.lock:
            for fault in self._faults:
                if fault.times != 0 and fnmatch.fnmatch(request, fault.pattern):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send bytes, or anything else as JSON."""
        self.hub.calls.append(Call(self.command, urlsplit(self.path).path, status))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else _JSON
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        """Send an error as the Hub does; huggingface_hub knows some by their code."""
        headers = {"X-Error-Message": message} | ({} if code is None else {"X-Error-Code": code})
        self.answer({"error": message}, status, headers)

    def respond(self) -> None:
        """Answer a request, or run into a fault."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.fault_for(f"{self.command} {path}")
        if fault is not None and fault.act(self):
            return
        for method, pattern, route in _ROUTES:
            matched = re.fullmatch(pattern, path)
            if matched is not None and self.command in method.split():
                with self.hub.lock:
                    route(self, body, *matched.groups())
                return
        self.refuse(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    @property
    def user(self) -> User | None:
        """Whose token the request carries."""
        return self.hub.users.get(self.headers.get("Authorization") or "")

    def readable(self, repo_id: str) -> Repository | None:
        """A repository that the user may see; without one the request is answered."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.user is None):
            self.refuse(404 if self.user else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def commit_at(self, repository: Repository | None, revision: str) -> Commit | None:
        """A commit of a repository; without one the request is answered."""
        commit = None if repository is None else repository.at(revision)
        if repository is not None and commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def may_write(self, repo_id: str) -> bool:
        """Whether the user may write into a repository; where not, the request is answered."""
        if self.user is None:
            self.refuse(401, _MESSAGES[401])
        elif not self.user.may_write(repo_id.partition("/")[0]):
            self.refuse(403, f"You don't have the rights to write into {repo_id}")
        else:
            return True
        return False

    def writable(self, repo_id: str) -> Repository | None:
        """A repository that the user may write into; without one the request is answered."""
        return self.readable(repo_id) if self.may_write(repo_id) else None


def _whoami(request: _Handler, body: bytes) -> None:
    if request.user is None:
        request.refuse(401, "Invalid user token.")
    else:
        request.answer(request.user.described())


def _validate(request: _Handler, body: bytes) -> None:
    errors = metadata_errors(json.loads(body)["content"])
    request.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)


def _create(request: _Handler, body: bytes) -> None:
    asked = json.loads(body)
    namespace = asked.get("organization") or (request.user.name if request.user else "")
    repo_id = f"{namespace}/{asked['name']}"
    if not request.may_write(repo_id):
        return
    url = {"url": f"{request.hub.endpoint}/{repo_id}"}
    if repo_id in request.hub.repositories:
        request.answer({"error": "You already created this model repo", **url}, 409)
        return
    private = asked.get("visibility") == "private" or asked.get("private") is True
    request.hub.repositories[repo_id] = Repository(repo_id, private)
    request.answer(url)


def _info(request: _Handler, body: bytes, repo_id: str, revision: str | None = None) -> None:
    repository = request.readable(repo_id)
    commit = request.commit_at(repository, revision or "main")
    if repository is not None and commit is not None:
        request.answer(repository.described(commit))


def _auth_check(request: _Handler, body: bytes, repo_id: str, write: str | None) -> None:
    if (request.writable if write else request.readable)(repo_id) is not None:
        request.answer({})


def _preupload(request: _Handler, body: bytes, repo_id: str, revision: str) -> None:
    commit = request.commit_at(request.writable(repo_id), revision)
    if commit is None:
        return
    answers = []
    for file in json.loads(body)["files"]:
        present = commit.contents.get(file["path"])
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        oid = None if present is None else present.oid
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.answer({"files": answers})


def _lfs_batch(request: _Handler, body: bytes, repo_id: str) -> None:
    if request.writable(repo_id) is None:
        return
    objects = []
    for asked in json.loads(body)["objects"]:
        missing = asked["oid"] not in request.hub.objects
        upload = {"upload": {"href": f"{request.hub.endpoint}/_lfs/{asked['oid']}"}} if missing else {}
        objects.append({"oid": asked["oid"], "size": asked["size"], "actions": upload} if missing else asked)
    request.answer({"transfer": "basic", "objects": objects})


def _lfs_put(request: _Handler, body: bytes, oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        request.refuse(400, "the content is not what was announced")
    else:
        request.hub.objects[oid] = body
        request.answer(b"")


def _commit(request: _Handler, body: bytes, repo_id: str, revision: str) -> None:
    repository = request.writable(repo_id)
    if repository is None:
        return
    parent = repository.at(revision)
    contents = {} if parent is None else dict(parent.contents)
    title = ""
    for operation in map(json.loads, body.splitlines()):
        value = operation["value"]
        if operation["key"] == "header":
            title = value["summary"]
        elif operation["key"] == "file":
            contents[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif operation["key"] == "deletedFile":
            del contents[value["path"]]
        elif operation["key"] != "lfsFile":
            request.refuse(400, f"{operation['key']} is not spoken here")
            return
        elif value["oid"] not in request.hub.objects:
            request.refuse(400, f"{value['path']} was not uploaded")
            return
        else:
            contents[value["path"]] = File(request.hub.objects[value["oid"]], is_lfs=True)
    commit = repository.commit(revision, title, contents)
    address = f"{request.hub.endpoint}/{repo_id}/commit/{commit.sha}"
    request.answer({"success": True, "commitOid": commit.sha, "commitUrl": address, "hookOutput": ""})


def _branch(request: _Handler, body: bytes, repo_id: str, branch: str) -> None:
    repository = request.writable(repo_id)
    if repository is None:
        return
    if branch in repository.branches:
        request.refuse(409, f"Reference already exists: {branch}")
    else:
        repository.branches[branch] = repository.branches["main"]
        request.answer({})


def _tree(request: _Handler, body: bytes, repo_id: str, revision: str, folder: str | None) -> None:
    commit = request.commit_at(request.readable(repo_id), revision)
    if commit is None:
        return
    prefix = f"{folder}/" if folder else ""
    found = {path: file for path, file in sorted(commit.contents.items()) if path.startswith(prefix)}
    request.answer([file.described(path) for path, file in found.items()])


def _resolve(request: _Handler, body: bytes, repo_id: str, revision: str, path: str) -> None:
    commit = request.commit_at(request.readable(repo_id), revision)
    if commit is None:
        return
    headers = {"X-Repo-Commit": commit.sha}
    file = commit.contents.get(path)
    if file is None:
        missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        request.answer({"error": "Entry not found"}, 404, headers | missing)
        return
    headers |= {"ETag": f'"{file.oid}"'}
    if file.is_lfs:
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
    request.answer(file.content, headers=headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_MODEL = rf"/api/models/{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", "/api/repos/create", _create),
    ("GET", rf"{_MODEL}/auth-check(/write)?", _auth_check),
    ("POST", rf"{_MODEL}/preupload/(.+)", _preupload),
    ("POST", rf"{_MODEL}/commit/(.+)", _commit),
    ("POST", rf"{_MODEL}/branch/(.+)", _branch),
    ("GET", rf"{_MODEL}/tree/([^/]+)(?:/(.+))?", _tree),
    ("GET", rf"{_MODEL}/revision/(.+)", _info),
    ("GET", _MODEL, _info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", r"/_lfs/([0-9a-f]{64})", _lfs_put),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
]


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine.")
    parser.add_argument("--port", type=int, default=8765)
    with LoopbackHub(parser.parse_args().port) as hub, contextlib.suppress(KeyboardInterrupt):
        for name, value in hub.environment(Path("hub-home")).items():
            print(f"export {name}={value}", flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
