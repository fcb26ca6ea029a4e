"""A judge behind an OpenAI-compatible endpoint on this machine, whose replies are scripted."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# From the prompt to the reply, or to a status, headers and a body.
Script = Callable[[str], "str | tuple[int, dict[str, str], str]"]
_ANSWERS = re.compile(r"(\[\[\w+]]) ANSWER A\n(.*?)\n\1 ANSWER B\n(.*?)\n\1 END", re.DOTALL)


@dataclass
class Endpoint:
    """A running endpoint: its address, and what was asked of it."""

    url: str
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextlib.contextmanager
def serve_judge(script: Script) -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.paths.append(self.path)
            endpoint.headers.append(dict(self.headers))
            endpoint.bodies.append(body)
            said = script(body["messages"][0]["content"])
            if isinstance(said, str):
                said = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}))
            status, headers, text = said
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown_answers(prompt: str) -> tuple[str, str]:
    """The two answers of a judge prompt, in the order in which they are shown."""
    found = _ANSWERS.search(prompt)
    assert found is not None
    return found[2], found[3]
