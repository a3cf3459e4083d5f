"""Calls of tools that run on the host, in a rollout that is driven from there: what is asked of them, and what rows are told."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pixel_jax.dialog import template
from pixel_jax.dialog.grammar import Number, parse_turn
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollout.drawings import canvases_of
from pixel_jax.rollout.images import Images
from pixel_jax.rollout.loop import RolloutState
from pixel_jax.rollout.machine import ASKING
from pixel_jax.rollout.trajectory import Calls, CallStatus, Prompts
from pixel_jax.rollout.views import GREY
from pixel_jax.tools.host import Reply, Request
from pixel_jax.tools.looking import Gallery
from pixel_jax.tools.tool import ANSWERED, Tool

ERROR = "\nExecution error:\nExecution Error: The tool `{}` did not answer: {}\n"
WIDTH = 64  # answers are padded to a multiple, to share programs


class HostCall(NamedTuple):
    """A call that the row `row` waits for."""

    row: int
    request: Request


def host_calls(state: RolloutState) -> list[HostCall]:
    """The calls of tools of the host that rows wait for."""
    prompts, config, shape = state.prompts, state.config, state.shape
    if not any(tool.host for tool in shape.tools):
        return []
    language, words = prompts.tables.reader.language, prompts.tables.bytes
    few = ("row", "status", "tokens", "length", "turn_start", "gallery", "calls")
    at = {name: jax.tree.map(np.asarray, getattr(state.rows, name)) for name in few}
    bytes_of = jax.tree.map(np.asarray, words)
    found = []
    for row in np.flatnonzero(at["status"] == ASKING):
        ids = at["tokens"][row, at["turn_start"][row] : at["length"][row]]
        starts, ends = bytes_of.start[ids], bytes_of.start[ids] + bytes_of.length[ids]
        turn = parse_turn(b"".join(bytes_of.data[x:y].tobytes() for x, y in zip(starts, ends, strict=True)), language)
        mine = lambda tree: jax.tree.map(lambda x: x[row], tree)  # noqa: B023
        local = len(at["status"]) // shape.shards
        prompt = row // local * (len(prompts.length) // shape.shards) + at["row"][row] // config.group_size
        video = bool(np.asarray(prompts.is_video)[prompt])
        pictures = images_of(
            images_at(prompts, int(prompt)), video, mine(at["gallery"]), mine(at["calls"]), shape.tools
        )
        if config.blank:
            pictures = [np.full_like(picture, GREY) for picture in pictures]
        arguments = {
            argument.name: plain(turn.call.arguments[argument.name], getattr(argument, "options", ()))
            for argument in shape.tools[turn.call.tool].arguments
        }
        found.append(HostCall(int(row), Request(turn.call.tool, arguments, pictures)))
    return found


def images_at(prompts: Prompts, place: int) -> Images:
    """The images of the prompt at a place, fetched from the devices."""
    sizes, count = np.asarray(prompts.canvas_size)[place], int(np.asarray(prompts.num_canvases)[place])
    given = np.asarray(prompts.canvases[place])
    return Images(tuple(given[i, : sizes[i, 0], : sizes[i, 1]] for i in range(count)))


def images_of(images: Images, video: bool, gallery: Gallery, calls: Calls, tools: Sequence[Tool]) -> list[np.ndarray]:
    """The pictures that a row was shown, at full resolution, in the order the model counts them; a video is its frames."""
    made = (jax.tree.map(lambda x: x[number], calls) for number in range(len(calls.status)))  # noqa: B023
    canvases = canvases_of(images, made, tools)
    found = list(images.arrays) if video else []
    for i in range(1 if video else 0, int(gallery.count)):
        x1, y1, x2, y2 = gallery.region[i]
        found.append(canvases[int(gallery.canvas[i])][y1:y2, x1:x2])
    return found


def plain(value: Any, options: Sequence[str] = ()) -> Any:
    """An argument as a Python value."""
    if isinstance(value, Number):
        size = value.units if value.integer else value.units + value.micros / 10**6
        return -size if value.negative else size
    if isinstance(value, tuple):
        return [plain(x) for x in value]
    return options[value] if options else value


def tell(
    replies: Sequence[Reply], calls: Sequence[HostCall], state: RolloutState, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `machine.tell` reads: ids int32 [R, T], lengths, places of the outcomes, statuses int32 [R]."""
    rows, shape = state.rows.status.shape[0], state.shape
    ids = [[] for _ in range(rows)]
    outcome, status = np.full(rows, -1, np.int32), np.full(rows, CallStatus.NONE, np.int32)
    kinds = [(tool, x) for tool in shape.tools for x in tool.outcomes]
    for reply, (row, request) in zip(replies, calls, strict=True):
        tool, right = shape.tools[request.tool], reply.outcome == ANSWERED
        text = f"\n{reply.text}" if right else ERROR.format(tool.name, reply.text)
        pieces = ["\n", *template.message_pieces("user", text), *template.PROMPT]
        ids[row] = template.to_ids(template.join_texts(pieces), vocabulary, ())
        outcome[row] = kinds.index((tool, reply.outcome))
        status[row] = CallStatus.DONE if right else CallStatus.FAILED
    lengths = np.array([len(x) for x in ids], np.int32)
    padded = np.zeros((rows, WIDTH * -(-int(lengths.max()) // WIDTH)), np.int32)
    for row, x in enumerate(ids):
        padded[row, : len(x)] = x
    return padded, lengths, outcome, status
