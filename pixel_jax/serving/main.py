"""`pixel-jax serve DIR ...`: models behind OpenAI's chat completions, tools and pictures included."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from pixel_jax.cli import UserError
from pixel_jax.serving.http import bracketed, listen, serve_until
from pixel_jax.serving.speakers import define_speaker_flags, host_tools, load_speaker
from pixel_jax.signals import SIGNALS
from pixel_jax.terminal import Waiting, say

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from pixel_jax.rollouts.shapes import BatchShape
    from pixel_jax.serving.conversation import Speaker
    from pixel_jax.serving.engine import Engine

FLAGS = flags.FLAGS
EMPTY_SIDE = 64  # pixels
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def define_flags(command: str) -> None:
    """Declares the flags of the command."""
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at. One that others reach needs an API key.")
    flags.DEFINE_integer("port", 8000, "Port to listen at; 0: any that is free.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("key", "PIXEL_JAX_API_KEY", "Environment variable with the API key that requests must have.")
    flags.DEFINE_list("allowed_hosts", [], "Names, without ports, that the server is called by besides localhost.")
    flags.DEFINE_list(
        "adapter", [], "Adapters (PEFT's format) of the first model: NAME=DIR, each a model of that name."
    )
    flags.DEFINE_integer("slots", 8, "Answers of each model that are written at the same time.", lower_bound=1)
    flags.DEFINE_integer("queue", 64, "Further requests that may wait; to more the server says 429.", lower_bound=0)
    flags.DEFINE_integer("budget", 16, "Tokens between two looks at what came and what was written.", lower_bound=1)
    flags.DEFINE_integer(
        "prompt_tokens", 4096, "Longest prompt: the conversation, its images included.", lower_bound=64
    )
    flags.DEFINE_integer("images", 4, "Most images of a conversation.", lower_bound=1)
    flags.DEFINE_integer("image_side", 1536, "Longest side of an image, in pixels.", lower_bound=28)
    flags.DEFINE_integer("body_mb", 32, "Longest body of a request, in MiB.", lower_bound=1)
    flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens of this mass; 1: off. By default the model's.")
    flags.DEFINE_integer("top_k", None, "Draw from so many of the likeliest tokens; 0: off. By default the model's.")
    define_speaker_flags()


def main(command: str, arguments: list[str]) -> None:
    """Serves the models in the directories of the command line until Ctrl-C or SIGTERM."""
    if not arguments:
        raise UserError("give the directory of a model, or several as NAME=DIR: pixel-jax serve DIR")
    directories, adapters = named_directories(arguments), named_directories(FLAGS.adapter)
    if both := directories.keys() & adapters.keys():
        raise UserError(f"a model and an adapter are called {min(both)!r}: name one as NAME=DIR")
    key = os.environ.get(FLAGS.key) or None
    if key is None and FLAGS.host not in LOOPBACK:
        raise UserError(
            f"--host={FLAGS.host} is reached by others and {FLAGS.key} is not set: export {FLAGS.key}=... with a key of "
            "your choice, or leave --host out"
        )
    try:
        import uvicorn  # noqa: F401, it is needed when the models are loaded

        from pixel_jax.serving.app import make_app
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'pixel_jax[serve]'") from None
    from pixel_jax.models.peft import load_adapter, open_adapter
    from pixel_jax.serving.engine import Engine
    from pixel_jax.serving.metrics import Metrics
    from pixel_jax.serving.session import Session
    from pixel_jax.tools.host import HostToolsConfig
    from pixel_jax.tools.named import DEFAULT
    from pixel_jax.training.progress import announce_compiles, use_compilation_cache

    for adapter in adapters.values():  # before a model is read, which takes long
        open_adapter(pathlib.Path(adapter))
    listener = listen(FLAGS.host, FLAGS.port)
    announce_compiles()
    workers = HostToolsConfig(FLAGS.tool_workers, FLAGS.tool_seconds)
    with contextlib.ExitStack() as stack:
        load = lambda directory: load_speaker(directory, tools=FLAGS.tools, call_format=FLAGS.call_format)
        speakers = {name: with_sampling(load(directory)) for name, directory in directories.items()}
        base = next(iter(speakers.values()))  # its weights are shared
        speakers |= {x: dataclasses.replace(base, model=load_adapter(base.model, y)) for x, y in adapters.items()}
        use_compilation_cache(pathlib.Path.home() / ".cache" / "pixel_jax")
        sessions = {}
        for name, speaker in speakers.items():
            called = stack.enter_context(host_tools(speaker, FLAGS.tools or DEFAULT, workers))
            sessions[name] = Session(speaker, shape_of(speaker), slots=FLAGS.slots, host=called)
            with Waiting(f"preparing {name!r} to answer"):
                sessions[name].warm_up()
        limit = FLAGS.slots * len(sessions) + FLAGS.queue
        engine = Engine(sessions, limit=limit, budget=FLAGS.budget, metrics=Metrics())
        engine.start()
        hosts = [bracketed(FLAGS.host), *FLAGS.allowed_hosts]
        app = make_app(engine, speakers, hosts=hosts, key=key, body_bytes=FLAGS.body_mb << 20)
        host, port = listener.getsockname()[:2]
        names = ", ".join(map(repr, speakers))
        SIGNALS.save_first("It ends when the requests that came are answered; Ctrl-C again ends it at once.")
        say(f"{names} at http://{bracketed(host)}:{port}/v1, {'with' if key else 'without'} an API key")
        asyncio.run(serve(app, engine, listener))
        if engine.failed is not None:
            raise UserError(f"the model has failed: {engine.failed}")
        say("All requests are answered.")


def named_directories(arguments: Sequence[str]) -> Mapping[str, str]:
    """Reads NAME=DIR arguments: name -> directory; by default the folder's name. UserError: two have one name."""
    directories: dict[str, str] = {}
    for argument in arguments:
        name, sign, directory = argument.partition("=")
        if not sign:
            name, directory = pathlib.Path(argument).resolve().name, argument
        if not name or not directory:
            raise UserError(f"{argument!r} is no NAME=DIR")
        if name in directories:
            raise UserError(
                f"two models are called {name!r}, {directories[name]} and {directory}: name one as NAME=DIR"
            )
        directories[name] = directory
    return directories


def with_sampling(speaker: "Speaker") -> "Speaker":
    """The same model, sampled as --top_p and --top_k say."""
    sampling = {name: value for name in ("top_p", "top_k") if (value := getattr(FLAGS, name)) is not None}
    return dataclasses.replace(speaker, config=dataclasses.replace(speaker.config, **sampling))


def shape_of(speaker: "Speaker") -> "BatchShape":
    """The batch shape that prompts must fit, from the flags.

    Raises:
        UserError: no prompt would fit.
    """
    from pixel_jax.rollouts.shapes import prompt_shape
    from pixel_jax.serving.conversation import ChatMessage, prompt_of

    shortest = len(prompt_of([ChatMessage("user", ("?",))], speaker).ids)
    if shortest >= FLAGS.prompt_tokens:
        raise UserError(
            f"--prompt_tokens={FLAGS.prompt_tokens}: a question of one letter and no image has {shortest} tokens, with the "
            "system message and the tools; give more"
        )
    # A model that sees no images has one small empty buffer, so that all arrays have the same axes.
    images, side = (FLAGS.images, FLAGS.image_side) if speaker.config.max_images else (1, EMPTY_SIDE)
    return prompt_shape(images, side, side, FLAGS.prompt_tokens, speaker.config, video=False)


async def serve(app: "ASGIApp", engine: "Engine", listener: socket.socket) -> None:
    """Answers requests until SIGTERM or Ctrl-C. Then new requests get 503, and it returns when the others are answered."""

    async def finished() -> None:
        while not (SIGNALS.requested or engine.failed is not None):
            await asyncio.sleep(0.05)
        engine.close()
        if engine.failed is None:
            say("No more requests are taken; those that came are answered.", sys.stderr)
        while not engine.idle:
            await asyncio.sleep(0.05)

    try:
        await serve_until(finished, app, listener)
    finally:
        engine.close()
