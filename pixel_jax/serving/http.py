"""What every local server here has in common: the socket, the names that it answers to, and how it ends."""

import asyncio
import contextlib
import errno
import re
import socket
from collections.abc import Callable, Collection, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from pixel_jax.cli import UserError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Scope

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # as a Host or an Origin names it
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")


def foreign_name(scope: "Scope", hosts: Collection[str]) -> tuple[str, str] | None:
    """Finds the Host or Origin of a request that is none of the server's names.

    A page in a browser can send requests to any address, also by a foreign name that resolves to it (DNS rebinding). Such a
    request has a foreign Host or Origin.

    Args:
        scope: of the request (ASGI).
        hosts: names of the server, without ports, in lower case; an IPv6 address in brackets.

    Returns:
        The header and its value, at most 100 characters; None: both are the server's own.
    """
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, []).append(value)
    named = headers.get(b"host", [])
    if len(named) != 1 or not _known(named[0], hosts):
        return "Host", b", ".join(named).decode("latin-1")[:100]
    for origin in headers.get(b"origin", []):
        scheme, _, authority = origin.partition(b"://")
        if scheme not in (b"http", b"https") or not _known(authority, hosts):
            return "Origin", origin.decode("latin-1")[:100]
    return None


def _known(authority: bytes, hosts: Collection[str]) -> bool:
    matched = AUTHORITY.fullmatch(authority.decode("latin-1").lower())
    return matched is not None and matched[1] in hosts


def bracketed(host: str) -> str:
    """Writes an address as URLs do: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket that listens. UserError: the address cannot be bound."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # a client that connects before requests are answered waits, and is not refused
    except OSError as error:
        why = f"--host={host} --port={port} cannot be listened at: {error.strerror or error}"
        raise UserError(why + "; --port=0 takes one that is free" * (error.errno == errno.EADDRINUSE)) from None
    return listener


def make_server(app: "ASGIApp") -> "uvicorn.Server":
    """Makes a server that leaves signals to `pixel_jax.signals.SIGNALS`, as all commands do."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=False, timeout_keep_alive=30,
        h11_max_incomplete_event_size=1 << 16, http="h11", lifespan="off", ws="none",
    )  # fmt: skip
    return Server(config)


async def serve_until(end: Callable[[], Coroutine[Any, Any, None]], app: "ASGIApp", listener: socket.socket) -> None:
    """Answers requests until `end`, which runs meanwhile, returns."""
    server = make_server(app)

    async def watch() -> None:
        await end()
        server.should_exit = True

    watching = asyncio.ensure_future(watch())
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
