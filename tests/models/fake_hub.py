"""A hub on the loopback for downloads: model facts, gates, files with ranges; written from what the client asks for.

Status codes and X-Error headers are those that huggingface_hub's `hf_raise_for_status` tells apart.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pth", "tokenizer.json")


@dataclass
class Account:
    """`accepted`: gated repositories it may read. `may_read_gated`: the scope of a fine-grained token."""

    accepted: tuple[str, ...] = ()
    may_read_gated: bool = True
    role: str = "read"


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False


@dataclass
class FakeHub:
    """`accounts` by token.

    Attributes:
        chunk_seconds: pause after each 64 KiB of a file.
        cut_after: file name -> bytes after which the connection is cut, once.
        damaged: files that arrive with a changed byte; `ignores_ranges`: always the whole file.
        status, page: what every request is answered with instead.
        requests: method, path, Range, Authorization of every request.
    """

    repositories: dict[str, Repository]
    accounts: dict[str, Account] = field(default_factory=dict)
    chunk_seconds: float = 0.0
    cut_after: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    status: int | None = None
    page: str | None = None
    url: str = ""
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def ranges(self, name: str) -> list[str | None]:
        return [asked for method, path, asked, _ in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def refusal(self, repo_id: str, token: str | None, *, reads_file: bool) -> tuple[int, str, str] | None:
        """Status, X-Error-Code and X-Error-Message, or None."""
        if token is not None and token not in self.accounts:
            return 401, "", "Invalid credentials in Authorization header"
        if repo_id not in self.repositories:
            return (404 if token else 401), "RepoNotFound", "Repository not found"
        if self.repositories[repo_id].gated and reads_file:
            if token is None:
                return 401, "GatedRepo", f"Access to model {repo_id} is restricted. You must be authenticated"
            account = self.accounts[token]
            if not account.may_read_gated:
                return 403, "GatedRepo", "Please enable access to public gated repositories in your fine-grained token"
            if repo_id not in account.accepted:
                return 403, "GatedRepo", f"Access to model {repo_id} is restricted"
        return None


def is_large(name: str) -> bool:
    return name.endswith(LARGE_SUFFIXES)


def tiny_repository(directory: Path, *, gated: bool = False, **more: bytes) -> Repository:
    """The embedded Gemma's own files, and what must not be downloaded beside them."""
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
    others = {
        "gemma.gguf": b"GGUF", "pytorch_model.bin": b"pickle", "consolidated.pth": b"pickle", "README.md": b"# x",
        "original/model.safetensors": b"again", "flax_model.msgpack": b"flax", ".gitattributes": b"",
    }  # fmt: skip
    return Repository({**files, **others, **more}, gated=gated)


def _facts(name: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    sha256 = hashlib.sha256(data).hexdigest()
    return {"size": len(data), "git": git, "sha256": sha256 if is_large(name) else None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.hub.requests.append((self.command, path, self.headers.get("Range"), authorization))
        if self.hub.status is not None:
            return self._send(self.hub.status, {"error": "not now"})
        if self.hub.page is not None:
            return self._send_page(self.hub.page)
        if path == "/api/whoami-v2":
            account = self.hub.accounts.get(token or "")
            if account is None:
                return self._send(401, {"error": "Invalid username or password."})
            return self._send(
                200, {"name": "alice-of-the-hub", "auth": {"accessToken": {"role": account.role, "displayName": "x"}}}
            )
        api = re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+))?", path)
        file = re.fullmatch(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)", path)
        found = api or file
        if found is None:
            return self._send(404, {"error": "no such page"})
        refusal = self.hub.refusal(found["id"], token, reads_file=file is not None)
        if refusal is not None:
            status, code, message = refusal
            return self._send(status, {"error": message}, **{"X-Error-Code": code, "X-Error-Message": message})
        if found["rev"] not in (None, "main", COMMIT):
            return self._send(404, {"error": "no"}, **{"X-Error-Code": "RevisionNotFound"})
        repository = self.hub.repositories[found["id"]]
        if file is not None:
            return self._send_file(file["name"], repository)
        facts = {name: _facts(name, data) for name, data in repository.files.items()}
        if api is not None and api["what"] == "tree":
            return self._send(200, [_tree_entry(name, fact) for name, fact in facts.items()])
        siblings = [_sibling(name, fact) for name, fact in facts.items()]
        gated = "manual" if repository.gated else False
        return self._send(200, {"id": found["id"], "sha": COMMIT, "gated": gated, "siblings": siblings})

    def _send_page(self, page: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page.encode())))
        self.end_headers()
        self.wfile.write(page.encode())

    def _send(self, status: int, value: Any, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name, header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, name: str, repository: Repository) -> None:
        if name not in repository.files:
            return self._send(404, {"error": "no"}, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = repository.files[name]
        fact = _facts(name, data)
        etag = fact["sha256"] or fact["git"]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and not self.hub.ignores_ranges else 0
        if name in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after.pop(name, None)
        for begin in range(start, len(data), 65_536):
            if cut is not None and begin - start >= cut:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            try:
                self.wfile.write(data[begin : begin + 65_536])
            except OSError:  # the client was killed
                self.close_connection = True
                return
            time.sleep(self.hub.chunk_seconds)

    def log_message(self, *arguments: object) -> None:
        pass


def _sibling(name: str, fact: dict[str, Any]) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": fact["sha256"], "size": fact["size"], "pointerSize": 134}}
    return {"rfilename": name, "size": fact["size"], "blobId": fact["git"]} | (lfs if fact["sha256"] else {})


def _tree_entry(name: str, fact: dict[str, Any]) -> dict[str, Any]:
    lfs = {"lfs": {"oid": fact["sha256"], "size": fact["size"], "pointerSize": 134}}
    return {"type": "file", "path": name, "size": fact["size"], "oid": fact["git"]} | (lfs if fact["sha256"] else {})


@contextmanager
def running_hub(hub: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
