"""What tool calls come to: from the numbers that a model wrote to the pictures it is shown, or to the message that says why not.

Each tool decides for one row (`pixel_jax.tools.device`); here it is asked about all of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.dialog.observations import MAX_LIST, NUM_INTEGERS, Observations, ObservationValues
from pixel_jax.rollouts.config import FACTOR, RolloutConfig
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, CallStatus, Tables, Views, no_pictures, shown_by
from pixel_jax.tools.boxes import with_shares
from pixel_jax.tools.calls import Lists, ParsedCalls, Values, read
from pixel_jax.tools.device import Answer, ImageHistory, Seen, region_size, shown_size, size_of_drawing, whole
from pixel_jax.tools.tool import Tool


class Result(NamedTuple):
    """What R calls come to."""

    message: ObservationValues  # what the observation says, its kind above all
    source: Views  # [R, V], what is looked at; nothing where the observation is a message
    drawn: jax.Array  # int32 [R, 2], (height, width) of what a tool makes of it; zeros: nothing
    done: jax.Array  # bool [R], it is what was asked for
    num_images: jax.Array  # int32 [R], images shown
    values: Values  # [R, ...], the arguments as they go on record: as written, but for boxes of tools that draw (`with_shares`)


def overview_size(image_sizes: jax.Array, is_video: jax.Array, config: RolloutConfig) -> jax.Array:
    """Size int32 [..., 2] at which a prompt first shows an image of `image_sizes` [..., 2]; `is_video` bool [...]."""
    as_image, _ = shown_size(whole(image_sizes), config.min_pixels, config.max_pixels, config.max_side)
    as_frame, _ = shown_size(whole(image_sizes), config.video_min_pixels, config.video_max_pixels, config.max_side)
    return jnp.where(is_video[..., None], as_frame, as_image)


def first_history(
    image_sizes: jax.Array, image_counts: jax.Array, is_video: jax.Array, config: RolloutConfig
) -> ImageHistory:
    """The image history of R rows that have been shown their prompts: image_sizes int32 [R, C, 2], others [R]."""
    rows, most = image_sizes.shape[:2]
    more = config.max_images
    size = overview_size(image_sizes, jnp.broadcast_to(is_video[:, None], (rows, most)), config)
    return ImageHistory(
        image=jnp.broadcast_to(jnp.minimum(jnp.arange(most + more), most - 1), (rows, most + more)).astype(jnp.int32),
        region=jnp.pad(image_sizes[..., ::-1], ((0, 0), (0, more), (2, 0))),
        size=jnp.pad(size, ((0, 0), (0, more), (0, 0))),
        length=jnp.where(is_video, 1, image_counts),
    )


def execute(call: ParsedCalls, seen: Seen, tables: Tables, views: int, config: RolloutConfig) -> Result:
    """The result of each row's call.

    Args:
      call: what the automaton read, R rows; seen: of R rows.
      views: V, most images one observation can show.
    """
    tools, observations, known = tables.tools, tables.observations, tables.parser.language.format
    config = config if config.pad is not None else dataclasses.replace(config, pad=known.pad)
    kind = jnp.full(call.tool.shape, observations.malformed, jnp.int32)
    result = _message(kind, views, call.values)
    seen = seen._replace(coordinates=jnp.full(call.tool.shape, known.coordinates, jnp.int32))
    for place, tool in enumerate(tools):
        if tool.host:  # `rollout.host` answers before anybody asks here
            continue
        one = lambda values, seen, tool=tool: _result(tool, values, seen, observations, views, config)
        mine = call.valid & (call.tool == place)
        choose = lambda x, y, mine=mine: jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, y)
        result = jax.tree.map(choose, jax.vmap(one)(call.values, seen), result)
    return result


def _message(kind: jax.Array, views: int, values: Values) -> Result:
    """Observations of these kinds [R] that show and say nothing besides."""
    zeros = lambda *tail: jnp.zeros((*kind.shape, *tail), jnp.int32)
    return Result(
        message=ObservationValues(kind, zeros(NUM_INTEGERS), zeros(MAX_LIST), zeros(), zeros(views)),
        source=Views(jnp.full_like(zeros(views), NO_IMAGE), zeros(views, 4), zeros(views, 2)),
        drawn=zeros(2),
        done=zeros() > 0,
        num_images=zeros(),
        values=values,
    )


def _result(
    tool: Tool, values: Values, seen: Seen, observations: Observations, views: int, config: RolloutConfig
) -> Result:
    """What one row's call of `tool` comes to."""
    arguments = read(tool, values)
    answer: Answer = tool.execute(arguments, seen, config)
    drawn, cases, given = jnp.zeros(2, jnp.int32), list(answer.outcomes), values
    if tool.draw is not None:
        size = region_size(answer.region[0])
        given = with_shares(tool, values, size, size if answer.shown is None else answer.shown, seen.coordinates)
        drawn = size_of_drawing(tool, read(tool, given), size)
        # There is room for pictures as long as the longest of the prompt's, or what a tool of the host returned.
        room = jnp.maximum(jnp.max(seen.image_sizes), jnp.max(region_size(answer.region[0])))
        cases.append((jnp.max(drawn) > room, None, ()))
    cases.append((True, *answer.last))
    name = lambda outcome: observations.malformed if outcome is None else observations.find(tool, outcome.name)
    conditions = [jnp.asarray(condition) for condition, *_ in cases]
    kind = jnp.select(conditions, [jnp.int32(name(outcome)) for _, outcome, _ in cases])
    filled = lambda x: jnp.stack([*(jnp.asarray(i, jnp.int32) for i in x), *[jnp.int32(0)] * (NUM_INTEGERS - len(x))])
    integers = jnp.select(conditions, [filled(x) for *_, x in cases])
    done = jnp.select(conditions, [jnp.bool_(outcome is not None and outcome.done) for _, outcome, _ in cases])
    pictures = jnp.select(conditions, [jnp.int32(0 if outcome is None else outcome.images) for _, outcome, _ in cases])
    count = jnp.minimum(jnp.asarray(answer.num_images, jnp.int32), jnp.minimum(pictures, views))

    def fit(x: jax.Array, blank: int) -> jax.Array:
        x = x[:views]
        room = jnp.full((views - x.shape[0], *x.shape[1:]), blank, x.dtype)
        present = (jnp.arange(views) < count).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(present, jnp.concatenate([x, room]), blank)

    listed = answer.listed or Lists(jnp.zeros(MAX_LIST, jnp.int32), jnp.int32(0))
    items = jnp.pad(listed.values[:MAX_LIST], (0, max(0, MAX_LIST - listed.values.shape[0])))
    source = Views(fit(answer.image, NO_IMAGE), fit(answer.region, 0), fit(answer.size, 0))
    pads = source.size[:, 0] * source.size[:, 1] // FACTOR**2
    return Result(
        ObservationValues(kind, integers, items, listed.length, pads),
        source,
        jnp.where(count > 0, drawn, 0),
        done | (count > 0),
        count,
        jax.tree.map(lambda x, y: jnp.where(count > 0, x, y), given, values),
    )


def record_calls(call: ParsedCalls, result: Result, run: jax.Array, tools: Sequence[Tool]) -> Calls:
    """The record of R calls of `tools` of the device, [R, ...], of which those of the rows `run` (bool [R]) are carried out."""
    showing = run & (result.num_images > 0)
    status = jnp.where(run, jnp.where(result.done, CallStatus.DONE, CallStatus.FAILED), CallStatus.SPENT)
    where = lambda x, blank: jnp.where(showing.reshape(-1, *[1] * (x.ndim - 1)), x, blank)
    return Calls(
        status=status.astype(jnp.int32),
        tool=call.tool,
        outcome=jnp.where(run, result.message.kind, -1),
        values=result.values,
        source=Views(*map(where, result.source, (NO_IMAGE, 0, 0))),
        drawn=where(result.drawn, 0),
        picture=no_pictures(run.shape, tools, jnp),
    )


def add_to_history(history: ImageHistory, call: Calls, number: jax.Array) -> ImageHistory:
    """The image history with what the calls [R, ...], each of its row's `number` (int32 [R]), showed appended."""
    shown = shown_by(call, number)
    views, present = shown.image.shape[1], shown.image != NO_IMAGE
    slot = jnp.where(present, history.length[:, None] + jnp.arange(views), history.image.shape[1])
    at = (jnp.arange(slot.shape[0])[:, None], slot)
    return ImageHistory(
        image=history.image.at[at].set(shown.image, mode="drop"),
        region=history.region.at[at].set(shown.region, mode="drop"),
        size=history.size.at[at].set(shown.size, mode="drop"),
        length=history.length + jnp.sum(present, axis=1),
    )
