"""The worker process, `python -m pixel_jax.tools.worker NAME ...`, which carries out calls of host tools (`tools.host`)."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.pictures import rgb
from pixel_jax.tools import Tool
from pixel_jax.tools.host import MOST_TEXT, receive, send
from pixel_jax.tools.named import find_tools


def main(names: list[str]) -> None:
    """Answers requests from standard input until it is closed."""
    # Answers get a descriptor of their own, because what a tool prints must not mix with them.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tools = find_tools(names)
    send(answers, "ready")
    while True:
        try:
            request, pixels = receive(_read)
        except EOFError:
            return
        send(answers, *answer(tools[request["tool"]], request, pixels))


def _read(count: int) -> bytes:
    data = sys.stdin.buffer.read(count)
    if len(data) < count:
        raise EOFError
    return data


def answer(tool: Tool, request: Mapping[str, Any], pixels: bytes) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
    """Carries out a request: returns a document, with the tool's text or the error, and the picture if there is one."""
    images, at = [], 0
    for shape in request["shapes"]:
        count = int(np.prod(shape))
        images.append(np.frombuffer(pixels, np.uint8, count, at).reshape(shape))
        at += count
    assert tool.execute is not None  # every host tool has one
    try:
        text, picture = returned(tool, tool.execute(images, **request["arguments"]))
        small = None if picture is None else fitted(picture, request["side"])
    except Exception as error:  # errors of any type: the model reads the message, and the run goes on
        print(f"tool {tool.name!r}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {"error": f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace").decode()}, ()
    if picture is None or small is None:
        return {"text": text, "shape": None, "shrunk": False}, ()
    return {"text": text, "shape": small.shape, "shrunk": small.shape != picture.shape}, (small,)


def returned(tool: Tool, value: Any) -> tuple[str, np.ndarray | None]:
    """Returns the text and the picture, uint8 [h, w, 3], of what a tool returned; "" and None where there is none.

    Raises:
      TypeError: the value is neither text nor picture.
      ValueError: the text is too long, or not Unicode.
    """
    text, picture = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if picture is None and not isinstance(text, str):
        text, picture = "", text
    if not isinstance(text, str):
        raise TypeError(f"a host tool returns a text, not {type(text).__name__}")
    text.encode()  # raises for half a surrogate pair
    if len(text) > MOST_TEXT:
        raise ValueError(f"the answer has {len(text)} characters, at most {MOST_TEXT} are read")
    if picture is None:
        return text, None
    if isinstance(picture, Image.Image):
        picture = rgb(picture, "the picture")
    if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3):
        kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise TypeError(f"a host tool returns a text, or a picture as uint8 [h, w, 3], not {kind}")
    if picture.shape[2] != 3 or 0 in picture.shape:
        raise TypeError(f"a picture is uint8 [h, w, 3], not {picture.shape}: Pillow's convert('RGB') makes one")
    if not tool.picture:
        raise TypeError(f"the tool {tool.name!r} returns a picture: it needs Tool(..., picture=True)")
    return text, picture


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """Returns the picture, made smaller if its longest side exceeds `side` pixels."""
    if max(picture.shape) <= side:
        return picture
    smaller = Image.fromarray(picture)
    smaller.thumbnail((side, side), reducing_gap=None)
    return np.asarray(smaller)


if __name__ == "__main__":
    main(sys.argv[1:])
