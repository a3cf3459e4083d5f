"""The HTTP side of the server: authorisation, limits, and how answers are sent."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixel_jax.evaluation.transcript import as_document, make_transcript
from pixel_jax.rollouts.materialize import VisualRecord, materialize_on_host
from pixel_jax.rollouts.trajectory import Trajectories
from pixel_jax.serving.conversation import Speaker
from pixel_jax.serving.engine import BusyError, ClosedError, Ended, Engine, Event, Job
from pixel_jax.serving.http import LOOPBACK, foreign_name
from pixel_jax.serving.metrics import CONTENT_TYPE, Metrics
from pixel_jax.serving.protocol import ChatAnswer, ChatRequest, RequestError, read_request
from pixel_jax.serving.session import Saw, Wrote

BODY_SECONDS = 30.0  # the time within which the body of a request must arrive


class Gate:
    """Accepts requests from a known Host and Origin (`foreign_name`), with the key if one is set.

    Args:
      hosts: names of the server, without ports, in lower case.
      key: the key that requests must have, as `Authorization: Bearer KEY`. None: none.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], key: str | None, metrics: Metrics):
        self.app, self.hosts, self.key, self.metrics = app, frozenset(hosts), key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself, with 4xx, or passes it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, path = time.monotonic(), scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.add(path=path, status=str(message["status"]))
            await send(message)

        try:
            self.check(scope)
        except RequestError as error:
            await refusal(error)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)
        if path == CHAT:
            self.metrics.durations.observe(time.monotonic() - started)

    def check(self, scope: Scope) -> None:
        """Checks a request. RequestError: it is refused."""
        if (foreign := foreign_name(scope, self.hosts)) is not None:
            header, value = foreign
            known = ", ".join(sorted(self.hosts))
            raise RequestError(
                f"the {header} {value!r} is none of this server's names ({known}): start it with --allowed_hosts to add one",
                status=403,
                code="foreign_host",
            )
        if self.key is not None and scope["path"] != "/health":
            authorization = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(authorization, b"Bearer " + self.key.encode()):
                raise RequestError(
                    "send the server's API key as `Authorization: Bearer KEY`", status=401, code="invalid_api_key"
                )


class Completions:
    """`POST /v1/chat/completions`, an ASGI application.

    Args:
      engine: writes the answers.
      speakers: the models, by name.
      body_bytes: the longest body.
    """

    def __init__(self, engine: Engine, speakers: Mapping[str, Speaker], body_bytes: int):
        self.engine, self.speakers, self.body_bytes = engine, speakers, body_bytes
        self.shapes = {name: session.shape for name, session in engine.sessions.items()}
        # Images are decoded in these threads; more of them would only take more memory.
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="requests")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["method"] != "POST":
            await refusal(RequestError("send a POST", status=405))(scope, receive, send)
            return
        try:
            with self._entered():
                await self._answer(scope, receive, send)
        except RequestError as error:
            await refusal(error)(scope, receive, send)
        except ConnectionResetError:  # the client has gone
            pass

    @contextlib.contextmanager
    def _entered(self):
        try:
            self.engine.enter()
        except BusyError as error:
            raise RequestError(f"{error}: ask again in a while", status=429, code="busy") from None
        except ClosedError as error:
            raise RequestError(f"the server takes no requests: {error}", status=503, code="unavailable") from None
        try:
            yield
        finally:
            self.engine.leave()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        body = await read_body(scope, receive, self.body_bytes)
        request = await loop.run_in_executor(self.threads, read_request, body, self.speakers, self.shapes)
        speaker = self.speakers[request.model]
        reader = request.reader(speaker)
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(
            model=request.model,
            prompts=request.prompt.placed(speaker, self.shapes[request.model], request.seed),
            temperature=request.temperature,
            reader=reader,
            deliver=deliver,
            record=request.pictures,
        )
        answer = ChatAnswer(request, reader)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            try:
                self.engine.submit(job)
            except ClosedError as error:
                raise RequestError(f"the server takes no requests: {error}", status=503, code="unavailable") from None
            pieces = _until(events, gone)
            if request.stream:
                await self._stream(answer, speaker, pieces, job.prompts.images, send)
            else:
                await self._whole(answer, speaker, pieces, job.prompts.images, scope, receive, send)
        finally:
            gone.cancel()
            self.engine.cancel(job)

    async def _whole(
        self,
        answer: ChatAnswer,
        speaker: Speaker,
        events: AsyncIterator[Event],
        images: np.ndarray,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        async for event in events:
            if isinstance(event, Ended):
                if event.error is not None:
                    raise RequestError(f"the model has failed: {event.error}"[:500], status=500, code="failed")
                transcript = await self._transcript(answer.request, speaker, event.row, images)
                await JSONResponse(answer.completion(transcript))(scope, receive, send)
            else:
                answer.add(event)

    async def _stream(
        self, answer: ChatAnswer, speaker: Speaker, events: AsyncIterator[Event], images: np.ndarray, send: Send
    ) -> None:
        """Sends server-sent events: a chunk for each piece of text and each turn of a tool."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(document: Any, more: bool = True) -> None:
            data = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        await write(answer.chunk({"role": "assistant", "content": ""}))
        async for event in events:
            match event:
                case Wrote(text):
                    answer.add(event)
                    await write(answer.chunk({"content": text}))
                case Saw():
                    answer.add(event)
                    await write(answer.chunk({}, pixel_jax={"turn": answer.shown(event)}))
                case Ended(error=None):
                    transcript = await self._transcript(answer.request, speaker, event.row, images)
                    await write(answer.chunk({}, answer.reader.ended, pixel_jax=answer.extension(transcript)))
                    if answer.request.usage:
                        await write(answer.usage_chunk())
                    await write("[DONE]", more=False)
                case Ended(error=error):
                    failure = RequestError(f"the model has failed: {error}"[:500], status=500, code="failed")
                    await write(failure.body(), more=False)

    async def _transcript(
        self, request: ChatRequest, speaker: Speaker, row: Trajectories[VisualRecord] | None, images: np.ndarray
    ) -> dict[str, Any] | None:
        """Makes the transcript of an answer's row, as a document of `pixel_jax.evaluation.transcript.Transcript`.

        `images` are the `Images` [1] of its prompt and, beside them, the pictures that tools on the host have drawn.
        """
        if row is None:
            return None
        query = request.prompt.query

        def drawn() -> dict[str, Any]:
            materialized = materialize_on_host(row, images, speaker.tables.tools, speaker.config)
            return as_document(make_transcript(materialized, 0, query, speaker.vocabulary, tools=speaker.tables.tools))

        return await asyncio.get_running_loop().run_in_executor(self.threads, drawn)


async def _disconnected(receive: Receive) -> None:
    """Waits until the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until(events: asyncio.Queue[Event], gone: asyncio.Future[None]) -> AsyncIterator[Event]:
    """Iterates over events up to the last. ConnectionResetError: the client has disconnected."""
    while True:
        event = asyncio.ensure_future(events.get())
        await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            event.cancel()
            raise ConnectionResetError
        yield event.result()
        if isinstance(event.result(), Ended):
            return


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads the body of a request. RequestError: it is no JSON, too long, or does not arrive in time."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the content type is {kind[:100]!r}: send application/json", status=415)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RequestError("the body is compressed: send it as it is", status=415)
    too_long = RequestError(
        f"the body has more than {limit:,} bytes: send smaller images, or start the server with a larger --body_mb",
        status=413,
    )
    announced = headers.get(b"content-length", b"0")
    if not announced.isdigit() or len(announced) > 18 or int(announced) > 2 * limit:
        raise too_long
    body, length = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError
                piece, more = message.get("body", b""), message.get("more_body", False)
                length += len(piece)
                if length <= limit:
                    body += piece
                # A body that is a little too long is read to its end: a client that is still sending misses the response.
                if length > 2 * limit or (length > limit and not more):
                    raise too_long
                if not more:
                    return bytes(body)
    except TimeoutError:
        raise RequestError(f"the body did not come within {BODY_SECONDS:g} s: send it faster", status=408) from None


def refusal(error: RequestError) -> Response:
    """The response that says why a request is refused."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    # The rest of the body is not read, so the connection cannot be used again.
    headers |= {"Connection": "close"} if error.status in (408, 413, 415) else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/models", "/health", "/metrics")


def make_app(
    engine: Engine,
    speakers: Mapping[str, Speaker],
    *,
    hosts: Sequence[str],
    key: str | None,
    body_bytes: int,
    created: Callable[[], float] = time.time,
) -> ASGIApp:
    """Makes the application that answers requests.

    Args:
      engine: writes the answers.
      speakers: the models, by the names of the engine's sessions.
      hosts: names of the server besides those of the loopback interface.
      key: the key that requests must have; None: none.
      body_bytes: the longest body of a request.
      created: returns the time, in seconds since 1970, that responses state as the creation of models.
    """
    since = int(created())

    async def models(request: Request) -> Response:
        listed = [{"id": name, "object": "model", "created": since, "owned_by": "pixel_jax"} for name in speakers]
        return JSONResponse({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in speakers:
            return refusal(RequestError(f"there is no model {name[:100]!r}", status=404, code="model_not_found"))
        return JSONResponse({"id": name, "object": "model", "created": since, "owned_by": "pixel_jax"})

    async def health(request: Request) -> Response:
        state = "failed" if engine.failed is not None else "closing" if engine.closing else "ok"
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(engine.metrics.text(engine.counts()), headers={"Content-Type": CONTENT_TYPE})

    async def nowhere(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return refusal(
            RequestError(f"nothing is at {request.url.path[:100]!r}: there are {', '.join(PATHS)}", status=status)
        )

    routes = [
        Route(CHAT, Completions(engine, speakers, body_bytes)),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    app = Starlette(routes=routes, exception_handlers={404: nowhere, 405: nowhere})
    return Gate(app, [*LOOPBACK, *(host.lower() for host in hosts)], key, engine.metrics)
