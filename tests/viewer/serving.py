"""A viewer in a thread."""

import asyncio
import contextlib
import http.client
import threading

from pixel_jax.serving.http import listen, make_server
from pixel_jax.view import RunOpener, names_of
from pixel_jax.viewer.app import make_app
from pixel_jax.viewer.index import Index


def index_of(*paths):
    source = RunOpener(100)
    index = Index([source.open(path) for path in paths], names_of(paths))
    index.refresh()
    return index


@contextlib.contextmanager
def serving(index):
    """Serves an index; yields a function that asks: (status, headers, body)."""
    listener = listen("127.0.0.1", 0)
    port, server = listener.getsockname()[1], make_server(make_app(index))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()

    def ask(path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), body

    ask.port = port
    try:
        yield ask
    finally:
        server.should_exit = True
        thread.join(30)
