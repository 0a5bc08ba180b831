"""A chat-completions server on this machine, for tests of what asks one."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def endpoint(reply_to: Any, *, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A chat-completions server on this machine, and the questions that it was asked.

    reply_to: gives the content to a question, or (content, finish reason), which is "stop" unless given.
    """
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(question["messages"][0]["content"])
            said = reply_to(asked[-1])
            content, reason = said if isinstance(said, tuple) else (said, "stop")
            body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": reason}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()
