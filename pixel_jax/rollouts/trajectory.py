"""The types that meet at the rollout: what goes in (`HostPrompts`, on the devices `Prompts`) and what comes out (`Trajectories`).

A synthesized trace, a sampled rollout and an example to unlearn are all `Trajectories`; they differ only in who wrote the tokens.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.call_parser import CallParser, TokenTable
from pixel_jax.dialog.observations import Observations
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.tools.calls import Values, no_values
from pixel_jax.tools.tool import Tool

# Why a row stopped, `Trajectories.stop`.
STOP_ANSWER = 0  # the turn ended without a call
STOP_TURN_LENGTH = 1  # the turn reached `max_new_tokens` without ending
STOP_CALLS = 2  # a call was asked for after `max_calls` were spent
STOP_IMAGES = 3  # the images of a call would exceed `max_images`
STOP_TOKENS = 4  # the observation would exceed `max_tokens`
STOP_REASONS = ("answer", "turn too long", "too many calls", "too many images", "too many tokens")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bytes", "stop"], meta_fields=["observations", "parser"]
)
@dataclasses.dataclass(frozen=True)
class Tables:
    """What the device has to know of the tokenizer and the tools, the same for all rows. Built by
    `pixel_jax.rollouts.prompts.tables`.
    """

    bytes: TokenTable  # of every token, for the automaton
    observations: Observations  # static: the constant stretches are few
    stop: AnyArray  # int32 [k], tokens that end a turn
    parser: CallParser  # static: of the calls of the tools, as the format writes them

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self.parser.language.tools


class HostPrompts(NamedTuple):
    """B prompts on the host, each with the images it may zoom into. Built by `pixel_jax.rollouts.prompts.build_prompts`."""

    tokens: np.ndarray  # int32 [B, Lp], left-aligned, padded with zeros
    length: np.ndarray  # int32 [B]
    images: np.ndarray  # `Images` [B], full resolution; the frames of a video where `is_video`
    image_sizes: np.ndarray  # int32 [B, C, 2], (height, width) of each image; (0, 0) is absent
    image_counts: np.ndarray  # int32 [B], images of each
    is_video: np.ndarray  # bool [B], the images are one video
    seconds: np.ndarray  # float32 [B], seconds a temporal patch covers; 0 for images
    uid: np.ndarray  # int32 [B], what the rows' keys are derived from: a prompt's rows do not depend on its neighbours
    tables: Tables
    shape: BatchShape  # room that they have on the devices


def take_prompts(prompts: HostPrompts, rows) -> HostPrompts:
    """The prompts `rows` (an index array or a slice)."""
    return jax.tree.map(lambda x: x[rows], prompts._replace(tables=()))._replace(tables=prompts.tables)


class Prompts(NamedTuple):
    """`HostPrompts` as compiled programs read them."""

    tokens: AnyArray
    length: AnyArray
    buffers: AnyArray  # uint8 [B, C, H, W, 3], the images, zero beyond `image_sizes`
    image_sizes: AnyArray
    image_counts: AnyArray
    is_video: AnyArray
    seconds: AnyArray
    uid: AnyArray
    tables: Tables


class CallStatus(enum.IntEnum):
    """What became of a call, `Calls.status`."""

    NONE = -1  # there was none
    SPENT = 0  # past the limits of its row: counted, not carried out
    FAILED = 1  # answered with an error
    DONE = 2  # carried out: the row was shown what it asked for


UNREADABLE = -1  # `Calls.tool` where no tool could be read
NO_IMAGE = -1  # `Views.image` where there is no picture


class Views(NamedTuple):
    """Pictures that rows look at, [..., K]."""

    image: AnyArray  # int32 [..., K], of the row's prompt; `made_by(n)`: what call n made; NO_IMAGE: none
    region: AnyArray  # int32 [..., K, 4], x1 y1 x2 y2 in it
    size: AnyArray  # int32 [..., K, 2], (height, width) at which it is shown; zeros: none


def made_by(call):
    """The image that call number `call` of a row made. Below every image of a prompt, however many those are."""
    return NO_IMAGE - 1 - call


class Calls(NamedTuple):
    """The operations of R rows, in order; N is the limit of calls plus one (a call past the limit is seen, not executed).

    All that a row saw follows from this and from the images of its prompt (`pixel_jax.rollouts.materialize`).
    """

    status: AnyArray  # int32 [R, N], a `CallStatus`
    tool: AnyArray  # int32 [R, N], index into the tools
    outcome: AnyArray  # int32 [R, N], kind of observation returned (`Observations.kinds`), -1 where none was
    values: Values  # [R, N, ...], the arguments
    source: Views  # [R, N, V], what was looked at: before a tool made something of it
    drawn: (
        AnyArray  # int32 [R, N, 2], (height, width) of the picture that a tool made of the source; zeros: it made none
    )
    # uint32 [R, N, 8], SHA-256 of the picture that a tool of the host returned (`Images.keep`), which is drawn, and its own
    # source; zeros: none. None: no tool of the host returns any.
    picture: AnyArray | None = None


def no_pictures(lead: tuple[int, ...], tools: Sequence[Tool], xp=np) -> AnyArray | None:
    """`Calls.picture` of calls [*lead] that have none."""
    return xp.zeros((*lead, 8), np.uint32) if any(tool.picture for tool in tools) else None


def no_calls(rows: int, numbers: int, views: int, tools: Sequence[Tool], xp=np) -> Calls:
    """The record of rows that have called nothing."""
    zeros = lambda *tail: xp.zeros((rows, numbers, *tail), np.int32)
    none = lambda value: xp.full((rows, numbers), value, np.int32)
    return Calls(
        status=none(CallStatus.NONE),
        tool=none(UNREADABLE),
        outcome=none(-1),
        values=no_values((rows, numbers), tools, xp),
        source=Views(xp.full((rows, numbers, views), NO_IMAGE, np.int32), zeros(views, 4), zeros(views, 2)),
        drawn=zeros(2),
        picture=no_pictures((rows, numbers), tools, xp),
    )


def shown_by(calls: Calls, number: AnyArray) -> Views:
    """What calls [...] showed, [..., V]: their source, or what they made of it. `number` int32 [...]: places in their rows."""
    xp = jnp if isinstance(calls.drawn, jax.Array) else np
    made = (calls.drawn[..., :1] > 0) & (calls.source.image != NO_IMAGE)
    whole = xp.concatenate([xp.zeros_like(calls.drawn), calls.drawn[..., ::-1]], axis=-1)
    return calls.source._replace(
        image=xp.where(made, made_by(number)[..., None], calls.source.image),
        region=xp.where(made[..., None], whole[..., None, :], calls.source.region),
    )


Shown = TypeVar(
    "Shown"
)  # `Visual`: pixels; or `VisualRecord` (`pixel_jax.rollouts.materialize`): where they were cut from


class Trajectories(NamedTuple, Generic[Shown]):
    """R rows of a conversation as the model saw it. Positions with `valid` false are padding and may lie anywhere.

    A rollout returns `Trajectories[VisualRecord]`, of which `materialize` makes `Trajectories[Visual]`.
    """

    tokens: AnyArray  # int32 [R, L]
    valid: AnyArray  # bool [R, L]
    loss_mask: AnyArray  # bool [R, L], the policy chose (or, in a trace, should learn) this token: the only ones that carry loss
    logprobs: AnyArray  # float32 [R, L], of the full temperature-scaled distribution, zero where not chosen
    visual: Shown  # what the rows saw
    prompt: AnyArray  # int32 [R], index of the prompt
    calls: Calls
    num_calls: AnyArray  # int32 [R], calls asked for, executed or not
    stop: AnyArray  # int32 [R], see `STOP_REASONS`


def to_host(trajectories: Trajectories) -> Trajectories:
    """The same trajectories as NumPy arrays."""
    return jax.tree.map(np.asarray, trajectories)


def take_rows(trajectories: Trajectories, rows) -> Trajectories:
    """The rows `rows` (an index array or a slice) of every field."""
    return jax.tree.map(lambda x: x[rows], trajectories)


def concatenate(parts: list[Trajectories]) -> Trajectories:
    """Rows of several trajectories of equal widths, one after the other, on the host."""
    return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)


def executed_calls(trajectories: Trajectories) -> AnyArray:
    """Operations that were carried out (n_vo of the paper, §4.2): int32 [R]."""
    return (trajectories.calls.status == CallStatus.DONE).sum(axis=1)


def answered_calls(trajectories: Trajectories) -> AnyArray:
    """Calls that were answered, with what they asked for or an error: int32 [R]."""
    return (trajectories.calls.status >= CallStatus.FAILED).sum(axis=1)


def failed_calls(trajectories: Trajectories) -> AnyArray:
    """Calls that were answered with an error: int32 [R]."""
    return (trajectories.calls.status == CallStatus.FAILED).sum(axis=1)
