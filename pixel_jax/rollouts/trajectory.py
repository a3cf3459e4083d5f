"""The types of a rollout's input (`HostPrompts`, on the devices `Prompts`) and output (`Trajectories`).

A synthesized trace, a sampled rollout and an example to unlearn are all `Trajectories`; they only differ in who wrote the tokens.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Generic, NamedTuple, TypeAlias, TypeVar

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
    """Tables of the tokenizer and the tools, which all rows share; made by `pixel_jax.rollouts.prompts.tables`."""

    bytes: TokenTable  # of every token, for the parser
    observations: Observations  # static
    stop: AnyArray  # int32 [k], tokens that end a turn
    parser: CallParser  # static

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The tools that calls can name."""
        return self.parser.language.tools


RowIndex: TypeAlias = slice | Sequence[int] | AnyArray  # indices, or bool [R]


class HostPrompts(NamedTuple):
    """B prompts on the host, with their images; made by `pixel_jax.rollouts.prompts.build_prompts`."""

    tokens: np.ndarray  # int32 [B, Lp], left-aligned, padded with zeros
    length: np.ndarray  # int32 [B]
    images: np.ndarray  # `Images` [B], full resolution; the frames of a video where `is_video`
    image_sizes: np.ndarray  # int32 [B, C, 2], (height, width) of each image; (0, 0) is absent
    image_counts: np.ndarray  # int32 [B], images of each
    is_video: np.ndarray  # bool [B], the images are one video
    seconds: np.ndarray  # float32 [B], seconds a temporal patch covers; 0 for images
    # int32 [B], or [B, k], k numbers each: the random keys of rows are derived from them, and do not depend on other prompts.
    uid: np.ndarray
    tables: Tables
    shape: BatchShape  # on the devices


def take_prompts(prompts: HostPrompts, rows: RowIndex) -> HostPrompts:
    """Takes the prompts `rows`."""
    return jax.tree.map(lambda x: x[rows], prompts._replace(tables=()))._replace(tables=prompts.tables)


class Prompts(NamedTuple):
    """`HostPrompts` on the devices, as compiled programs read them."""

    tokens: jax.Array
    length: jax.Array
    buffers: jax.Array  # uint8 [B, C, H, W, 3], the images, zero beyond `image_sizes`
    image_sizes: jax.Array
    image_counts: jax.Array
    is_video: jax.Array
    seconds: jax.Array
    uid: jax.Array
    tables: Tables


class CallStatus(enum.IntEnum):
    """The status of a call, `Calls.status`."""

    NONE = -1  # there was none
    SPENT = 0  # past the limits of its row: counted, not carried out
    FAILED = 1  # answered with an error
    DONE = 2  # carried out


UNREADABLE = -1  # `Calls.tool` where no tool could be read
NO_IMAGE = -1  # `Views.image` where there is no picture


CallNumber = TypeVar("CallNumber", int, jax.Array, np.ndarray, AnyArray)


class Views(NamedTuple):
    """K regions of images that are shown to rows, [..., K]."""

    # int32 [..., K], index among the prompt's images; `made_by(n)`: the image of call n; NO_IMAGE: none.
    image: AnyArray
    region: AnyArray  # int32 [..., K, 4], x1 y1 x2 y2 in the image
    size: AnyArray  # int32 [..., K, 2], (height, width) at which it is shown; zeros: none


def made_by(call: CallNumber) -> CallNumber:
    """Returns the index (`Views.image`) of the image that call number `call` of a row made; it is less than NO_IMAGE."""
    return NO_IMAGE - 1 - call


class Calls(NamedTuple):
    """The calls of R rows, in order; N is the limit of calls plus one, because a call past the limit is recorded, too.

    Everything that a row was shown follows from this and from the images of its prompt (`pixel_jax.rollouts.materialize`).
    """

    status: AnyArray  # int32 [R, N], a `CallStatus`
    tool: AnyArray  # int32 [R, N], index into the tools
    outcome: AnyArray  # int32 [R, N], index of the kind of observation (`Observations.kinds`), -1: none
    values: Values  # [R, N, ...], the arguments
    source: Views  # [R, N, V], regions that were shown, or that a tool drew from
    drawn: AnyArray  # int32 [R, N, 2], (height, width) of the image that a tool drew from the source; zeros: none
    # uint32 [R, N, 8], SHA-256 of the picture that a host tool returned (`Images.keep`); it counts as drawn, and its source is
    # the whole picture. Zeros: none. None: no host tool returns any.
    picture: AnyArray | None = None


def no_pictures(lead: tuple[int, ...], tools: Sequence[Tool], xp: ModuleType = np) -> AnyArray | None:
    """Returns `Calls.picture` of calls [*lead] without pictures; `xp` is NumPy or `jax.numpy`."""
    return xp.zeros((*lead, 8), np.uint32) if any(tool.picture for tool in tools) else None


def no_calls(rows: int, numbers: int, views: int, tools: Sequence[Tool], xp: ModuleType = np) -> Calls:
    """Returns the record of rows without calls, [rows, numbers, ...]; `xp` is NumPy or `jax.numpy`."""
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
    """Returns the views that calls [...] showed, [..., V]: their source, or the image that they drew from it.

    Args:
      calls: [...].
      number: int32 [...], the index of each call in its row.
    """
    xp = jnp if isinstance(calls.drawn, jax.Array) else np
    drawn = (calls.drawn[..., :1] > 0) & (calls.source.image != NO_IMAGE)
    whole = xp.concatenate([xp.zeros_like(calls.drawn), calls.drawn[..., ::-1]], axis=-1)
    return calls.source._replace(
        image=xp.where(drawn, made_by(number)[..., None], calls.source.image),
        region=xp.where(drawn[..., None], whole[..., None, :], calls.source.region),
    )


# `Visual`: pixels; or `VisualRecord` (`pixel_jax.rollouts.materialize`): the regions that they were cut from.
Shown = TypeVar("Shown")
Other = TypeVar("Other")


class Trajectories(NamedTuple, Generic[Shown]):
    """R conversations as the model read them. Positions with `valid` false are padding, and may be anywhere in a row.

    A rollout returns `Trajectories[VisualRecord]`, of which `materialize` makes `Trajectories[Visual]`.
    """

    tokens: AnyArray  # int32 [R, L]
    valid: AnyArray  # bool [R, L]
    loss_mask: AnyArray  # bool [R, L], tokens that carry loss: the policy chose them, or should learn them from a trace
    logprobs: AnyArray  # float32 [R, L], of the full temperature-scaled distribution, zero outside the loss mask
    visual: Shown  # the images that rows were shown
    prompt: AnyArray  # int32 [R], index of the prompt
    calls: Calls
    num_calls: AnyArray  # int32 [R], calls, carried out or not
    stop: AnyArray  # int32 [R], see `STOP_REASONS`
    # int32 [R, L], for each token the number of iterations that the policy which chose it was trained for, -1 outside the loss
    # mask. None: the policy that is trained next has chosen all.
    policy: AnyArray | None = None

    def with_visual(self, visual: Other) -> "Trajectories[Other]":
        """Returns the same trajectories with other images: `materialize` makes them from a record."""
        return Trajectories(**{**self._asdict(), "visual": visual})


def to_host(trajectories: Trajectories[Shown]) -> Trajectories[Shown]:
    """Copies trajectories to the host, as NumPy arrays."""
    return jax.tree.map(np.asarray, trajectories)


def take_rows(trajectories: Trajectories[Shown], rows: RowIndex) -> Trajectories[Shown]:
    """Takes the rows `rows` of every field."""
    return jax.tree.map(lambda x: x[rows], trajectories)


def concatenate(parts: Sequence[Trajectories[Shown]]) -> Trajectories[Shown]:
    """Concatenates the rows of trajectories of equal widths, on the host."""
    return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)


def executed_calls(trajectories: Trajectories) -> AnyArray:
    """Counts calls that were carried out (n_vo of the paper, §4.2): int32 [R]."""
    return (trajectories.calls.status == CallStatus.DONE).sum(axis=1)


def answered_calls(trajectories: Trajectories) -> AnyArray:
    """Counts calls that were answered, with a result or an error: int32 [R]."""
    return (trajectories.calls.status >= CallStatus.FAILED).sum(axis=1)


def failed_calls(trajectories: Trajectories) -> AnyArray:
    """Counts calls that were answered with an error: int32 [R]."""
    return (trajectories.calls.status == CallStatus.FAILED).sum(axis=1)
