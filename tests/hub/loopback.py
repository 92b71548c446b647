"""A Hugging Face Hub on this machine, for model repositories, with faults on demand.

    python -m tests.hub.loopback        # prints the variables that point other programs at it

It speaks what huggingface_hub needs to make, push to and read repositories; paths of requests are those of the Hub.
"""

import argparse
import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml


class Call(NamedTuple):
    """A request with its answer; the status is 0 where the connection was closed."""

    method: str
    path: str
    status: int


class Commit(NamedTuple):
    """A commit with all files that the repository holds then."""

    sha: str
    title: str
    contents: dict[str, bytes]


class Repository:
    """A model repository: its commits, and branches that name them."""

    def __init__(self, repo_id, private):
        self.repo_id, self.private = repo_id, private
        self.commits = []
        self.branches = {}
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, revision, title, contents):
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, contents))
        self.branches[revision] = sha
        return self.commits[-1]

    def at(self, revision):
        """The commit that a branch or an identifier names."""
        sha = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def files(self, revision="main"):
        commit = self.at(revision)
        return {} if commit is None else dict(commit.contents)


class LoopbackHub:
    """A Hub that listens on this machine while the context lasts.

    Tokens are `hf_write`, `hf_read` and `hf_fine`, all of `user`, who may write into the organisation `lab` and read in
    `readers`. A pattern of a fault is matched with "METHOD /path"; `times` is None for all requests to come.
    """

    def __init__(self, port=0):
        self.roles = {"Bearer hf_write": "write", "Bearer hf_read": "read", "Bearer hf_fine": "fineGrained"}
        self.repositories = {}
        self.objects = {}
        self.calls = []
        self.lock = threading.RLock()
        self._faults = []
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home, token="hf_write"):
        """Variables that point a process at this Hub, which huggingface_hub reads when it is imported."""
        settings = {"ENDPOINT": self.endpoint, "HOME": str(home), "HUB_DISABLE_PROGRESS_BARS": "1"}
        settings |= {"HUB_DISABLE_TELEMETRY": "1", "HUB_DISABLE_XET": "1", "HUB_OFFLINE": "0"}
        settings |= {} if token is None else {"TOKEN": token}
        proxies = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        return {f"HF_{name}": value for name, value in settings.items()} | proxies

    def fail(self, pattern, *, status, times=1):
        """Answer the next requests with an error status."""
        self._faults.append([pattern, times, lambda handler: handler.refuse(status, "The Hub is not well") or True])

    def drop(self, pattern, *, times=1):
        """Close the connection of the next requests without an answer."""

        def act(handler):
            self.calls.append(Call(handler.command, urlsplit(handler.path).path, 0))
            handler.close_connection = True
            return True

        self._faults.append([pattern, times, act])

    def delay(self, pattern, *, seconds, times=1):
        """Wait before the next requests are answered."""
        self._faults.append([pattern, times, lambda handler: bool(time.sleep(seconds))])

    def clear(self):
        self._faults.clear()

    def fault_for(self, request):
        """What happens to a request before it is answered; True where that is in the place of an answer."""
        with self.lock:
            for fault in self._faults:
                pattern, times, act = fault
                if times != 0 and fnmatch.fnmatch(request, pattern):
                    fault[1] = None if times is None else times - 1
                    return act
        return lambda handler: False


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def respond(self):
        """Answer a request, or run into a fault."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.fault_for(f"{self.command} {path}")(self):
            return
        for method, pattern, route in _ROUTES:
            matched = re.fullmatch(pattern, path)
            if matched is not None and self.command in method.split():
                with self.hub.lock:
                    route(self, body, *matched.groups())
                return
        self.refuse(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    def answer(self, content, status=200, headers=None):
        """Send bytes, or anything else as JSON."""
        self.hub.calls.append(Call(self.command, urlsplit(self.path).path, status))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, message, code="", headers=None):
        """Send an error as the Hub does; huggingface_hub knows some by their code."""
        self.answer({"error": message}, status, {"X-Error-Message": message, "X-Error-Code": code, **(headers or {})})

    @property
    def role(self):
        """What the token of the request may do; None without a valid one."""
        return self.hub.roles.get(self.headers.get("Authorization") or "")

    def readable(self, repo_id):
        """A repository that the user may see; without one the request is answered."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.role is None):
            self.refuse(404 if self.role else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def may_write(self, repo_id):
        """Whether the user may write into a repository; where not, the request is answered."""
        namespaces = {"write": ("user", "lab"), "fineGrained": ("user",)}.get(self.role or "", ())
        may = repo_id.partition("/")[0] in namespaces
        if not may and self.role is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        elif not may:
            self.refuse(403, f"You don't have the rights to write into {repo_id}")
        return may

    def writable(self, repo_id):
        """A repository that the user may write into; without one the request is answered."""
        return self.readable(repo_id) if self.may_write(repo_id) else None

    def commit_at(self, repository, revision):
        """A commit of a repository; without one the request is answered."""
        commit = None if repository is None else repository.at(revision)
        if repository is not None and commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def _whoami(request, body):
    if request.role is None:
        request.refuse(401, "Invalid user token.")
        return
    orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    auth = {"type": "access_token", "accessToken": {"displayName": "token", "role": request.role}}
    request.answer({"type": "user", "name": "user", "orgs": orgs, "auth": auth})


def _validate(request, body):
    errors = [{"message": error} for error in metadata_errors(json.loads(body)["content"])]
    request.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def metadata_errors(card):
    """What is wrong with the metadata of a card, as the documentation of the Hub says."""
    front = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    data = yaml.safe_load(front[1]) if front is not None else {}
    # Of the licences of the Hub, those that the tests use.
    licences = ("apache-2.0", "mit", "other", "unknown")
    errors = [] if data.get("license", "mit") in licences else [f'"license" must not be {data["license"]!r}']
    for key in ("tags", "datasets", "metrics", "language", "base_model"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        name = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?" if key in ("datasets", "base_model") else r".+"
        if not isinstance(values, list) or not all(isinstance(v, str) and re.fullmatch(name, v) for v in values):
            errors.append(f'"{key}" must not be {values}')
    for model in data.get("model-index", []):
        for result in model["results"]:
            texts = [model["name"], result["task"]["type"], result["dataset"]["name"], result["dataset"]["type"]]
            texts += [metric["type"] for metric in result["metrics"]]
            numbers = [metric["value"] for metric in result["metrics"]]
            if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
                errors.append(f'"model-index" must not be {model}')
    return errors


def _create(request, body):
    asked = json.loads(body)
    repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
    if request.may_write(repo_id):
        url = {"url": f"{request.hub.endpoint}/{repo_id}"}
        if repo_id in request.hub.repositories:
            request.answer({"error": "You already created this model repo", **url}, 409)
        else:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            request.hub.repositories[repo_id] = Repository(repo_id, private)
            request.answer(url)


def _info(request, body, repo_id, revision=None):
    repository = request.readable(repo_id)
    commit = request.commit_at(repository, revision or "main")
    if repository is not None and commit is not None:
        known = {"id": repo_id, "modelId": repo_id, "sha": commit.sha, "private": repository.private, "gated": False}
        siblings = [{"rfilename": path} for path in sorted(commit.contents)]
        request.answer({**known, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})


def _auth_check(request, body, repo_id, write):
    if (request.writable if write else request.readable)(repo_id) is not None:
        request.answer({})


def _is_lfs(path):
    return path.endswith(".safetensors")


def _oid(path, content):
    """The identifier that the Hub gives a file: of git, or of LFS."""
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _preupload(request, body, repo_id, revision):
    commit = request.commit_at(request.writable(repo_id), revision)
    if commit is not None:
        answers = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            oid = _oid(path, commit.contents[path]) if path in commit.contents else None
            mode = "lfs" if _is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        request.answer({"files": answers})


def _lfs_batch(request, body, repo_id):
    if request.writable(repo_id) is not None:
        objects = json.loads(body)["objects"]
        for asked in objects:
            if asked["oid"] not in request.hub.objects:
                asked["actions"] = {"upload": {"href": f"{request.hub.endpoint}/_lfs/{asked['oid']}"}}
        request.answer({"transfer": "basic", "objects": objects})


def _lfs_put(request, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        request.refuse(400, "the content is not what was announced")
    else:
        request.hub.objects[oid] = body
        request.answer(b"")


def _commit(request, body, repo_id, revision):
    repository = request.writable(repo_id)
    if repository is None:
        return
    contents, title = repository.files(revision), ""
    for operation in map(json.loads, body.splitlines()):
        value = operation["value"]
        if operation["key"] == "header":
            title = value["summary"]
        elif operation["key"] == "file":
            contents[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "deletedFile":
            del contents[value["path"]]
        else:
            # A file that was not uploaded is a KeyError, which closes the connection.
            contents[value["path"]] = request.hub.objects[value["oid"]]
    commit = repository.commit(revision, title, contents)
    address = f"{request.hub.endpoint}/{repo_id}/commit/{commit.sha}"
    request.answer({"success": True, "commitOid": commit.sha, "commitUrl": address, "hookOutput": ""})


def _branch(request, body, repo_id, branch):
    repository = request.writable(repo_id)
    if repository is not None and branch in repository.branches:
        request.refuse(409, f"Reference already exists: {branch}")
    elif repository is not None:
        repository.branches[branch] = repository.branches["main"]
        request.answer({})


def _tree(request, body, repo_id, revision, folder):
    commit = request.commit_at(request.readable(repo_id), revision)
    if commit is not None:
        chosen = {path: file for path, file in commit.contents.items() if path.startswith(f"{folder or ''}")}
        request.answer([{"type": "file", "path": p, "size": len(f), "oid": _oid(p, f)} for p, f in chosen.items()])


def _resolve(request, body, repo_id, revision, path):
    commit = request.commit_at(request.readable(repo_id), revision)
    if commit is None:
        return
    headers = {"X-Repo-Commit": commit.sha}
    if path not in commit.contents:
        request.refuse(404, "Entry not found", "EntryNotFound", headers)
        return
    file = commit.contents[path]
    headers["ETag"] = f'"{_oid(path, file)}"'
    if _is_lfs(path):
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file))}
    request.answer(file, headers=headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_MODEL = rf"/api/models/{_REPO}"
_ROUTES = [
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine.")
    parser.add_argument("--port", type=int, default=8765)
    with LoopbackHub(parser.parse_args().port) as hub, contextlib.suppress(KeyboardInterrupt):
        for name, value in hub.environment(Path("hub-home")).items():
            print(f"export {name}={value}", flush=True)  # noqa: T201
        threading.Event().wait()
