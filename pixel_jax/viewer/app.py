"""The HTTP side of the viewer: it only reads, answers to loopback names only, and tells the browser to trust nothing.

Texts of traces leave as JSON and become text nodes; a picture is found by its number, never by a path; a page that is shown can
ask nothing but this server (content security policy), and no script can make markup of a text (trusted types).
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixel_jax.serving.http import LOOPBACK, foreign_name
from pixel_jax.state_files import to_json
from pixel_jax.viewer.index import Filter, FilterError, Index
from pixel_jax.viewer.runs import GoneError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
FILES = {
    "/": ("viewer.html", "text/html"),
    "/viewer.js": ("viewer.js", "text/javascript"),
    "/viewer.css": ("viewer.css", "text/css"),
    "/viewer.svg": ("viewer.svg", "image/svg+xml"),
}
MOST_PATH, MOST_QUERY = 200, 4000  # characters of an address in front of its question mark and behind it
MOST_ROWS = 50  # of a page of the list, unless it asks otherwise


class Guard:
    """Refuses requests by foreign names, and gives every response the headers above."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself, with 4xx, or passes it on."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        if (foreign := foreign_name(scope, LOOPBACK)) is not None:
            why = (
                f"the {foreign[0]} {foreign[1]!r} is not this computer: open the address that `pixel-jax view` printed"
            )
            await _refusal(why, 403)(scope, receive, guarded)
        elif len(scope["path"]) > MOST_PATH or len(scope["query_string"]) > MOST_QUERY:
            await _refusal("this address is too long", 414)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)


def _refusal(why: str, status: int) -> Response:
    return Response(to_json({"error": why}), status, media_type="application/json")


def _json(value: Any) -> Response:
    return Response(to_json(value), media_type="application/json")


def make_app(index: Index) -> ASGIApp:
    """Makes the application that shows the traces of an index."""

    def answer(make: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def handle(request: Request) -> Response:
            index.refresh()
            try:
                return make(request)
            except GoneError as error:
                return _refusal(str(error), 404)
            except FilterError as error:
                return _refusal(str(error), 400)

        return handle

    def state(request: Request) -> Response:
        if request.query_params.get("since") == str(index.version):
            return Response(status_code=204)
        return _json(index.state())

    def listed(request: Request) -> Response:
        start, count = (_whole(request, name, usual) for name, usual in (("start", 0), ("count", MOST_ROWS)))
        return _json(index.page(read_filter(request.query_params), start, count))

    def trace(request: Request) -> Response:
        return _json(index.trace(request.path_params["number"], read_filter(request.query_params)))

    def tokens(request: Request) -> Response:
        return _json(index.tokens(**request.path_params))

    def picture(request: Request) -> Response:
        kind, data = index.picture(**request.path_params)
        return Response(data, media_type=kind)

    def page(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        return Response(resources.files("pixel_jax.viewer").joinpath(name).read_bytes(), media_type=kind)

    async def nowhere(request: Request, error: Exception) -> Response:
        return _refusal("nothing is here", getattr(error, "status_code", 404))

    routes = [
        *(Route(path, page) for path in FILES),
        Route("/state", answer(state)),
        Route("/traces", answer(listed)),
        Route("/traces/{number:int}", answer(trace)),
        Route("/traces/{number:int}/tokens/{conversation:int}/{turn:int}", answer(tokens)),
        Route("/traces/{number:int}/pictures/{picture:int}", answer(picture)),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={404: nowhere, 405: nowhere}))


def _whole(request: Request, name: str, usual: int) -> int:
    text = request.query_params.get(name, str(usual))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise FilterError(f"{name} is no number: {text[:20]!r}")
    return int(text)


def read_filter(values: Mapping[str, str]) -> Filter:
    """Reads a filter from the fields of an address.

    Raises:
        FilterError: a field has a value that it cannot have.
    """
    hints = typing.get_type_hints(Filter)
    known: dict[str, Any] = {
        field.name: values[field.name] for field in dataclasses.fields(Filter) if field.name in values
    }
    for name, value in known.items():
        if choices := typing.get_args(hints[name]):
            if value not in choices:
                raise FilterError(f"{name} is one of {', '.join(map(repr, choices))}, not {value[:20]!r}")
    return Filter(**known)
