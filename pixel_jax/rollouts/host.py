"""Calls of host tools in a rollout: requests from the state of rows, and observations from the replies."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pixel_jax.dialog import template
from pixel_jax.dialog.grammar import DecimalNumber, parse_turn
from pixel_jax.dialog.layout import Place
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.decode_loop import ASKING, HostAnswers
from pixel_jax.rollouts.drawings import row_images
from pixel_jax.rollouts.images import Images
from pixel_jax.rollouts.loop import RolloutState
from pixel_jax.rollouts.trajectory import Calls, CallStatus
from pixel_jax.rollouts.views import GREY
from pixel_jax.tools.device import MAX_RATIO, ImageHistory
from pixel_jax.tools.host import ToolReply, ToolRequest
from pixel_jax.tools.tool import ANSWERED, FAILED, Tool

ERROR = "\nExecution error:\nExecution Error: The tool `{}` did not answer: {}\n"
WIDTH = 64  # answers are padded to a multiple of it, to share programs


class HostCall(NamedTuple):
    """A call that a row waits for."""

    row: int  # index of its slot
    prompt: int  # index of its prompt
    request: ToolRequest


def host_calls(state: RolloutState, images: np.ndarray) -> list[HostCall]:
    """Returns the calls of host tools that rows wait for; `images` are the prompts' `Images` [B]."""
    prompts, config, shape = state.prompts, state.config, state.shape
    if not any(tool.host for tool in shape.tools):
        return []
    language = prompts.tables.parser.language
    few = ("row", "status", "tokens", "length", "turn_start", "history", "calls")
    at = {name: jax.tree.map(np.asarray, getattr(state.rows, name)) for name in few}
    bytes_of, is_video = jax.tree.map(np.asarray, (prompts.tables.bytes, prompts.is_video))
    calls = []
    for row in np.flatnonzero(at["status"] == ASKING):
        ids = at["tokens"][row, at["turn_start"][row] : at["length"][row]]
        starts, ends = bytes_of.start[ids], bytes_of.start[ids] + bytes_of.length[ids]
        turn = parse_turn(b"".join(bytes_of.data[x:y].tobytes() for x, y in zip(starts, ends, strict=True)), language)
        assert turn.call is not None  # a row only asks after a valid call
        mine = lambda tree: jax.tree.map(lambda x: x[row], tree)  # noqa: B023
        local = len(at["status"]) // shape.shards
        prompt = row // local * (len(prompts.length) // shape.shards) + at["row"][row] // config.group_size
        pictures = images_of(
            images[int(prompt)], bool(is_video[prompt]), mine(at["history"]), mine(at["calls"]), shape.tools
        )
        if config.blank:
            pictures = [np.full_like(picture, GREY) for picture in pictures]
        arguments = {
            argument.name: _python_value(turn.call.arguments[argument.name], getattr(argument, "options", ()))
            for argument in shape.tools[turn.call.tool].arguments
        }
        calls.append(HostCall(int(row), int(prompt), ToolRequest(turn.call.tool, arguments, pictures)))
    return calls


def images_of(
    images: Images, video: bool, history: ImageHistory, calls: Calls, tools: Sequence[Tool]
) -> list[np.ndarray]:
    """Returns the images that a row was shown, at full resolution, in the order in which the model counts them.

    For a video they begin with its frames.
    """
    numbers = range(np.shape(calls.status)[0])
    buffers = row_images(images, (jax.tree.map(lambda x: x[number], calls) for number in numbers), tools)  # noqa: B023
    shown = list(images.arrays) if video else []
    for i in range(1 if video else 0, int(history.length)):
        x1, y1, x2, y2 = history.region[i]
        shown.append(buffers[int(history.image[i])][y1:y2, x1:x2])
    return shown


def _python_value(value: Any, options: Sequence[str] = ()) -> Any:
    """Converts an argument to a Python value."""
    if isinstance(value, DecimalNumber):
        size = value.units if value.integer else value.units + value.micros / 10**6
        return -size if value.negative else size
    if isinstance(value, tuple):
        return [_python_value(x) for x in value]
    return options[value] if options else value


def encode_replies(
    replies: Sequence[ToolReply],
    calls: Sequence[HostCall],
    images: np.ndarray,
    state: RolloutState,
    vocabulary: Vocabulary,
) -> HostAnswers:
    """Encodes the replies of host tools as observations of the call format, for `decode_loop.answer_host_calls`.

    Args:
      replies: of host tools.
      calls: that they answer.
      images: `Images` [B] of the prompts, in which returned pictures are stored.
      state: of the rollout.
      vocabulary: of the tokenizer.
    """
    rows, config, shape = state.rows.status.shape[0], state.config, state.shape
    call_format = state.prompts.tables.parser.language.format
    ids: list[list[int]] = [[] for _ in range(rows)]
    outcome, status = np.full(rows, -1, np.int32), np.full(rows, CallStatus.NONE, np.int32)
    drawn, sizes = np.zeros((rows, 2), np.int32), np.zeros((rows, 2), np.int32)
    digests = np.zeros((rows, 8), np.uint32)
    kinds = [(tool.name, outcome.name) for tool in shape.tools for outcome in tool.outcomes]
    for reply, (row, prompt, request) in zip(replies, calls, strict=True):
        tool, pads = shape.tools[request.tool], ()
        if reply.picture is not None:
            size = size_shown(reply.picture, tool, config)
            if size is None:
                height, width, _ = reply.picture.shape
                reply = ToolReply(FAILED, f"its picture of {width}x{height} pixels cannot be shown")
            else:
                drawn[row], sizes[row] = reply.picture.shape[:2], size
                digests[row] = images[prompt].keep(reply.picture)
                pads = (size[0] * size[1] // config.factor**2,)
        answered = reply.outcome == ANSWERED
        text = f"\n{reply.text}" if answered else ERROR.format(tool.name, reply.text)
        before, behind = call_format.answer(tool, reply.outcome, text)
        parts = [text_part(before), *({"type": "image"} for _ in pads), text_part(behind)]
        ids[row] = template.to_ids(vocabulary.layout.observation(parts), vocabulary, pads, Place.SPECIAL)
        outcome[row] = kinds.index((tool.name, reply.outcome.name))
        status[row] = CallStatus.DONE if answered else CallStatus.FAILED
    lengths = np.array([len(x) for x in ids], np.int32)
    padded = np.zeros((rows, WIDTH * -(-int(lengths.max()) // WIDTH)), np.int32)
    for row, x in enumerate(ids):
        padded[row, : len(x)] = x
    picture = digests if any(tool.picture for tool in shape.tools) else None
    return HostAnswers(padded, lengths, outcome, status, drawn, sizes, picture)


def text_part(text: str) -> dict[str, str]:
    """Returns a text as a part of a message."""
    return {"type": "text", "text": text}


def size_shown(picture: np.ndarray, tool: Tool, config: RolloutConfig) -> tuple[int, int] | None:
    """Returns the (height, width) at which a picture is shown; None if no size is within the budgets of `tool`."""
    sizes = config.sizes(tool.budget)
    if max(picture.shape[:2]) > MAX_RATIO * min(picture.shape[:2]):
        return None
    height, width = sizes.of(*picture.shape[:2])
    return (height, width) if height * width <= sizes.max_pixels and max(height, width) <= sizes.max_side else None
