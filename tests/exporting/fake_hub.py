"""A hub on the loopback: the endpoints that huggingface_hub's client needs to make a repository and to commit to it.

Written from the requests of the client and from the Git LFS batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md). It keeps what it was given, so that tests compare
bytes, and every request with its headers, so that tests look for what must not have been sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """`tokens`: token -> the owners it may write to. `fail`: (method, part of the path) -> status of the answer."""

    tokens: dict[str, tuple[str, ...]]
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    fail: dict[tuple[str, str], int] = field(default_factory=dict)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[branch]

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        for (failing, part), status in self.fail.items():
            if failing == method and part in path:
                return status, {"error": "not now"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/objects/"):  # presigned: no token
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token not in self.tokens:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        found = re.match(r"(?:/api/models)?/(?P<id>[^/]+/[^/]+?)(?P<git>\.git)?(?:/(?P<rest>.*))?$", path)
        if found is None or found["id"] not in self.repositories:
            return 404, {"error": "Repository not found"}
        if method == "POST" and found["id"].split("/")[0] not in self.tokens[token]:
            return 403, {"error": "You do not have write access"}
        repository = self.repositories[found["id"]]
        action, _, revision = (found["rest"] or "info").partition("/")
        handlers: dict[str, Callable[[], tuple[int, Any]]] = {
            "info": lambda: (200, {"id": found["id"], "private": repository.private, "sha": "0" * 40}),
            "tree": lambda: (200, _tree(repository.branches[revision])),
            "branch": lambda: self._branch(repository, revision),
            "preupload": lambda: (200, {"files": [_upload_mode(file) for file in json.loads(body)["files"]]}),
            "commit": lambda: self._commit(found["id"], repository, revision, body),
        }
        if found["git"]:
            return 200, {"objects": [self._lfs_action(each) for each in json.loads(body)["objects"]]}
        return handlers[action]()

    def _create(self, wanted: dict[str, Any], token: str) -> tuple[int, Any]:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.tokens[token]:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        answer = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repositories:
            return 409, answer | {"error": "You already created this model repo"}
        self.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        return 200, answer

    def _branch(self, repository: Repository, name: str) -> tuple[int, Any]:
        if name in repository.branches:
            return 409, {"error": "Reference already exists"}
        repository.branches[name] = dict(repository.branches["main"])
        return 200, {}

    def _lfs_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/objects/{wanted['oid']}"
        known = wanted["oid"] in self.objects
        return wanted if known else wanted | {"actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repo_id: str, repository: Repository, revision: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.branches[revision][value["path"]] = base64.b64decode(value["content"])
            else:
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                repository.branches[revision][value["path"]] = content
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    is_large = file["path"].endswith((".safetensors", ".gguf"))
    return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]


@contextmanager
def running_hub(tokens: dict[str, tuple[str, ...]]) -> Iterator[FakeHub]:
    hub = FakeHub(tokens)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, str(self.headers).encode() + body))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            status, answer = hub.answer(self.command, path, body, token)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
