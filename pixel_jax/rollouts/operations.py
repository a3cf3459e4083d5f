"""Carries out calls of device tools: from parsed calls to the views that rows are shown, or to messages.

A tool is a function of one row (`pixel_jax.tools.device`), which is mapped over all rows here.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.observations import MAX_LIST, NUM_INTEGERS, Observations, ObservationValues
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.trajectory import NO_IMAGE, Calls, CallStatus, Tables, Views, no_pictures, shown_by
from pixel_jax.tools.boxes import with_shares
from pixel_jax.tools.calls import Lists, ParsedCalls, Values, read
from pixel_jax.tools.device import Answer, ImageHistory, Seen, region_size, shown_size, size_of_drawing, whole
from pixel_jax.tools.tool import Outcome, Tool


class ToolResults(NamedTuple):
    """The results of R calls."""

    message: ObservationValues  # kind and values of the observation
    source: Views  # [R, V], regions that are shown or drawn from; none where the observation is a message
    drawn: jax.Array  # int32 [R, 2], (height, width) of the image that a tool draws from the source; zeros: none
    done: jax.Array  # bool [R], the call succeeds
    num_images: jax.Array  # int32 [R], images shown
    values: Values  # [R, ...], the arguments for the record; boxes of tools that draw are in shares (`with_shares`)


def overview_size(image_sizes: AnyArray, is_video: AnyArray, config: RolloutConfig) -> jax.Array:
    """Returns the size int32 [..., 2] at which a prompt shows images of `image_sizes` [..., 2]; `is_video` bool [...]."""
    as_image, _ = shown_size(whole(image_sizes), config.sizes())
    as_frame, _ = shown_size(whole(image_sizes), config.sizes("video"))
    return jnp.where(is_video[..., None], as_frame, as_image)


def first_history(
    image_sizes: jax.Array, image_counts: jax.Array, is_video: jax.Array, config: RolloutConfig
) -> ImageHistory:
    """Returns the image history of R rows before any call; `image_sizes` is int32 [R, C, 2], other arrays are [R]."""
    rows, most = image_sizes.shape[:2]
    more = config.max_images
    size = overview_size(image_sizes, jnp.broadcast_to(is_video[:, None], (rows, most)), config)
    return ImageHistory(
        image=jnp.broadcast_to(jnp.minimum(jnp.arange(most + more), most - 1), (rows, most + more)).astype(jnp.int32),
        region=jnp.pad(image_sizes[..., ::-1], ((0, 0), (0, more), (2, 0))),
        size=jnp.pad(size, ((0, 0), (0, more), (0, 0))),
        length=jnp.where(is_video, 1, image_counts),
    )


def execute(call: ParsedCalls, seen: Seen, tables: Tables, views: int, config: RolloutConfig) -> ToolResults:
    """Computes the result of each row's call.

    Args:
      call: of R rows.
      seen: of R rows.
      tables: of the tokenizer and the tools.
      views: V, the most images of one observation.
      config: of the rollout.
    """
    tools, observations, known = tables.tools, tables.observations, tables.parser.language.format
    config = config if config.pad is not None else dataclasses.replace(config, pad=known.pad)
    kind = jnp.full(call.tool.shape, observations.malformed, jnp.int32)
    result = _message(kind, views, call.values)
    seen = seen._replace(coordinates=jnp.full(call.tool.shape, known.coordinates, jnp.int32))
    for index, tool in enumerate(tools):
        if tool.host:  # `rollouts.host` carries these calls out
            continue
        one = functools.partial(_result, tool, observations=observations, views=views, config=config)
        mine = call.valid & (call.tool == index)
        choose = lambda x, y, mine=mine: jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, y)
        result = jax.tree.map(choose, jax.vmap(one)(call.values, seen), result)
    return result


def _message(kind: jax.Array, views: int, values: Values) -> ToolResults:
    """Returns results of these kinds (int32 [R]) without images and integers."""
    zeros = lambda *tail: jnp.zeros((*kind.shape, *tail), jnp.int32)
    return ToolResults(
        message=ObservationValues(kind, zeros(NUM_INTEGERS), zeros(MAX_LIST), zeros(), zeros(views)),
        source=Views(jnp.full_like(zeros(views), NO_IMAGE), zeros(views, 4), zeros(views, 2)),
        drawn=zeros(2),
        done=zeros() > 0,
        num_images=zeros(),
        values=values,
    )


def _result(
    tool: Tool, values: Values, seen: Seen, observations: Observations, views: int, config: RolloutConfig
) -> ToolResults:
    """Computes the result of one row's call of `tool`."""
    assert tool.execute is not None  # `check_device_tool` makes sure
    answer: Answer = tool.execute(read(tool, values), seen, config)
    drawn, cases, recorded = jnp.zeros(2, jnp.int32), list(answer.outcomes), values
    if tool.draw is not None:
        size = region_size(answer.region[0])
        recorded = with_shares(tool, values, size, size if answer.shown is None else answer.shown, seen.coordinates)
        drawn = size_of_drawing(tool, read(tool, recorded), size)
        # Buffers are as large as the longest side of the prompt's images and of pictures that host tools returned.
        side = jnp.maximum(jnp.max(seen.image_sizes), jnp.max(region_size(answer.region[0])))
        cases.append((jnp.max(drawn) > side, None, ()))
    cases.append((True, *answer.last))

    def kind_of(outcome: Outcome | None) -> jax.Array:
        return jnp.int32(observations.malformed if outcome is None else observations.find(tool, outcome.name))

    conditions = [jnp.asarray(condition) for condition, *_ in cases]
    kind = jnp.select(conditions, [kind_of(outcome) for _, outcome, _ in cases])
    filled = lambda x: jnp.stack([*(jnp.asarray(i, jnp.int32) for i in x), *[jnp.int32(0)] * (NUM_INTEGERS - len(x))])
    integers = jnp.select(conditions, [filled(x) for *_, x in cases])
    done = jnp.select(conditions, [jnp.bool_(outcome is not None and outcome.done) for _, outcome, _ in cases])
    pictures = jnp.select(conditions, [jnp.int32(0 if outcome is None else outcome.images) for _, outcome, _ in cases])
    count = jnp.minimum(jnp.asarray(answer.num_images, jnp.int32), jnp.minimum(pictures, views))

    def fit(x: jax.Array, blank: int) -> jax.Array:
        """Pads to V views."""
        x = x[:views]
        rest = jnp.full((views - x.shape[0], *x.shape[1:]), blank, x.dtype)
        present = (jnp.arange(views) < count).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(present, jnp.concatenate([x, rest]), blank)

    listed = answer.listed or Lists(jnp.zeros(MAX_LIST, jnp.int32), jnp.int32(0))
    items = jnp.pad(listed.values[:MAX_LIST], (0, max(0, MAX_LIST - listed.values.shape[0])))
    source = Views(fit(answer.image, NO_IMAGE), fit(answer.region, 0), fit(answer.size, 0))
    pads = source.size[:, 0] * source.size[:, 1] // config.factor**2
    return ToolResults(
        ObservationValues(kind, integers, items, listed.length, pads),
        source,
        jnp.where(count > 0, drawn, 0),
        done | (count > 0),
        count,
        jax.tree.map(lambda x, y: jnp.where(count > 0, x, y), recorded, values),
    )


def record_calls(call: ParsedCalls, result: ToolResults, run: jax.Array, tools: Sequence[Tool]) -> Calls:
    """Returns the record of R calls of device tools, [R, ...], of which those of the rows `run` (bool [R]) are carried out."""
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
    """Appends the views of the calls [R, ...], of index `number` (int32 [R]) in their rows, to the image history."""
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
