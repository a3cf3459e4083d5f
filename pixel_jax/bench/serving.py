"""Requests a second: `pixel-jax serve` beside a loop of transformers' `generate` on the same weights.

    python -m pixel_jax.bench.serving --out=runs/bench-serving.json

Both answer the same questions, each about an image of its own, greedily and with the same number of tokens at most. The server is
asked over HTTP by many clients at a time; the loop takes one question after the other, as a server around `generate` does. No
tool is called, which `generate` could not answer. Answers of both are compared before anything is said about speed. The loop
is spared HTTP and the decoding of PNGs, has all cores, and is not batched; a server that batches `generate` would lie between
the two.
"""

import base64
import io
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from pixel_jax.bench import network
from pixel_jax.bench.machine import count_cores
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.files import write_file
from pixel_jax.models import Model
from pixel_jax.models.processor import Processor
from pixel_jax.parallel.mesh import use_cores
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import prompt_shape
from pixel_jax.serving.conversation import ChatMessage, Speaker, prompt_of
from pixel_jax.serving.engine import Engine
from pixel_jax.serving.metrics import Metrics
from pixel_jax.serving.session import Session
from pixel_jax.terminal import say

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "A tiny model and few requests: whether it works, not how fast.")
flags.DEFINE_integer("requests", 48, "Questions that are asked.", lower_bound=1)
flags.DEFINE_integer("clients", 32, "Requests that are under way at a time.", lower_bound=1)
flags.DEFINE_integer("slots", 16, "Rows that the server writes at a time.", lower_bound=1)
flags.DEFINE_integer("tokens", 48, "Most tokens of an answer.", lower_bound=1)
flags.DEFINE_string("out", "runs/bench-serving.json", "Where the figures are written.")

NAME = "model"
QUESTION = "Which digit is on card {}?"


class TimedAnswers(NamedTuple):
    """The answers of one side to all questions, and the time that they took."""

    texts: list[str]
    seconds: float


def main(arguments: Sequence[str]) -> None:
    """Measures both and writes the figures."""
    if not network.HAS_TORCH:
        raise SystemExit("torch is missing, which transformers' models need: pip install torch")
    use_cores(count_cores())
    quick = FLAGS.quick
    requests, tokens, side = (8, 8, 112) if quick else (FLAGS.requests, FLAGS.tokens, 336)
    images = network.images(requests, side, side)  # shown as they are: no resize can differ
    config = RolloutConfig(
        group_size=1, temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=tokens + 1, max_response=64, max_calls=0,
        max_pixels=side**2, crop_max_pixels=side**2, max_side=side,
    )  # fmt: skip
    words, model = network.vocabulary(), network.random_model(quick)
    speaker = Speaker(model, words, tables(words), config)
    ours = served(speaker, images, tokens, side)
    theirs = generated(speaker, model, words, images, tokens)
    same = np.mean([a == b for a, b in zip(ours.texts, theirs.texts, strict=True)])
    if same < 0.9:  # now and then two logits are closer to each other than the rounding of either
        raise SystemExit(f"only {100 * same:.0f} % of the answers are the same: {ours.texts[0]!r}, {theirs.texts[0]!r}")
    figures = {
        "shapes": f"{requests} questions, an image of {side} x {side} pixels and {tokens} tokens of answer each",
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "device": jax.devices()[0].device_kind,
        "cores": count_cores(),
        "clients": FLAGS.clients,
        "slots": FLAGS.slots,
        "same_answers": float(same),
        "server_requests_per_second": requests / ours.seconds,
        "generate_requests_per_second": requests / theirs.seconds,
        "ratio": theirs.seconds / ours.seconds,
    }
    pathlib.Path(FLAGS.out).parent.mkdir(parents=True, exist_ok=True)
    write_file(FLAGS.out, json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        say(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")


def served(speaker: Speaker, images: np.ndarray, tokens: int, side: int) -> TimedAnswers:
    """The server's answers, by clients that each wait for one before they ask for the next."""
    import uvicorn

    from pixel_jax.serving.app import make_app

    session = Session(speaker, prompt_shape(1, side, side, 768, speaker.config, video=False), slots=FLAGS.slots)
    session.warm_up()
    engine = Engine({NAME: session}, limit=FLAGS.clients, budget=16, metrics=Metrics())
    web = make_app(engine, {NAME: speaker}, hosts=(), key=None, body_bytes=1 << 23)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(web, log_level="warning", access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    engine.start()
    thread.start()

    def ask(number: int) -> str:
        connection = HTTPConnection(*listener.getsockname(), timeout=600)
        body = json.dumps(
            {
                "model": NAME,
                "messages": [_message(number, images[number])],
                "temperature": 0,
                "max_tokens": tokens,
            }
        )
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        document = json.loads(connection.getresponse().read())
        connection.close()
        return document["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(FLAGS.clients) as pool:
        ask(0)
        started = time.perf_counter()
        texts = list(pool.map(ask, range(len(images))))
        seconds = time.perf_counter() - started
    server.should_exit = True
    thread.join()
    engine.close()
    return TimedAnswers(texts, seconds)


def _message(number: int, image: np.ndarray) -> dict[str, Any]:
    """A question as requests have it, its image as a PNG: exact."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    text = {"type": "text", "text": QUESTION.format(number)}
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}


def generated(speaker: Speaker, model: Model, words: Vocabulary, images: np.ndarray, tokens: int) -> TimedAnswers:
    """The answers of transformers, one after the other."""
    import torch

    torch.set_num_threads(count_cores())
    twin = network.transformers_model(model)
    processor = Processor(words.tokenizer, min_pixels=28**2, max_pixels=speaker.config.max_pixels)

    def ask(number: int) -> str:
        message = ChatMessage("user", (images[number], QUESTION.format(number)))
        ids = torch.tensor([prompt_of([message], speaker).ids])
        pixels, grid = processor.patches([images[number]])
        with torch.inference_mode():
            written = twin.generate(  # pyright: ignore[reportAttributeAccessIssue]: the stubs miss what the class mixes in
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == words.image_pad).int(),
                pixel_values=torch.from_numpy(np.asarray(pixels, np.float32)),
                image_grid_thw=torch.tensor([grid]),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=1,
                eos_token_id=[words.im_end, words.end_of_text],
                pad_token_id=words.end_of_text,
                suppress_tokens=[words.image_pad, words.video_pad],
            )
        answer = [x for x in written[0, ids.shape[1] :].tolist() if x not in (words.im_end, words.end_of_text)]
        return words.to_bytes(answer).decode("utf-8", "replace")

    ask(0)
    started = time.perf_counter()
    texts = [ask(number) for number in range(len(images))]
    return TimedAnswers(texts, time.perf_counter() - started)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app.run(main)
