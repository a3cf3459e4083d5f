"""A chat-completions endpoint on the loopback interface, over real HTTP, that misbehaves as it is told to."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the server sends: `body` as it is (bytes), or as JSON, or a text as a chat completion."""

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = {}
    delay: float = 0.0  # seconds before anything is sent
    finish: str = "stop"
    raw: Callable[[Callable[[bytes], None]], None] | None = None  # sends it all itself, byte by byte, and may never end


def dripping(content: bytes, first: bytes = b"", wait: float = 0.05) -> Reply:
    """`first` at once, and then `content` a byte at a time."""

    def raw(send):
        send(first)
        for i in range(len(content)):
            send(content[i : i + 1])
            time.sleep(wait)

    return Reply(raw=raw)


def endless(first: bytes, again: bytes, wait: float = 0.0) -> Reply:
    """`first`, and then `again` for ever."""

    def raw(send):
        send(first)
        while True:
            send(again)
            time.sleep(wait)

    return Reply(raw=raw)


class Received(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float  # on the monotonic clock


class ChatServer:
    """`answer(number, request)` makes the reply to the request of that number (from 0); a text will do."""

    def __init__(self, answer: Callable[[int, dict], Reply | str]):
        self.answer, self.received, self.lock, self.over = answer, [], threading.Lock(), False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    number = len(outer.received)
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    outer.received.append(Received(self.path, headers, body, time.monotonic()))
                reply = outer.answer(number, body)
                reply = Reply(reply) if isinstance(reply, str) else reply
                time.sleep(reply.delay)
                if reply.raw is not None:
                    self.close_connection = True
                    with contextlib.suppress(OSError):  # the client has gone, or the test is over
                        reply.raw(self.send)
                    return
                content = reply.body
                if isinstance(content, str):
                    message = {"role": "assistant", "content": content}
                    content = {
                        "object": "chat.completion",
                        "choices": [{"message": message, "finish_reason": reply.finish}],
                    }
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                with contextlib.suppress(ConnectionError):  # a client that waits no longer
                    self.send_response(reply.status)
                    for name, value in {**reply.headers, "content-length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            def send(self, data: bytes) -> None:
                if outer.over:
                    raise ConnectionAbortedError
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, *_):
                pass

        return Handler


@contextlib.contextmanager
def chat_server(answer: Callable[[int, dict], Reply | str]) -> Iterator[ChatServer]:
    """A server that runs while the context does."""
    made = ChatServer(answer)
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.over = True
        made.server.shutdown()
        thread.join()
        made.server.server_close()
