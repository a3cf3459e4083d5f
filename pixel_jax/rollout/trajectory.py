"""The two types that meet at the rollout: what goes in (`Prompts`) and what comes out (`Trajectories`).

A synthesized trace, a sampled rollout and an example to unlearn are all `Trajectories`; they differ only in who wrote the tokens.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.automaton import Reader, TokenTable
from pixel_jax.dialog.observations import Observations
from pixel_jax.models.inputs import Visual
from pixel_jax.rollout.canvases import Canvases

Array = jax.Array | np.ndarray

# Why a row stopped, `Trajectories.stop`.
STOP_ANSWER = 0  # the turn ended without a call
STOP_TURN_LENGTH = 1  # the turn reached `max_new_tokens` without ending
STOP_CALLS = 2  # a call was asked for after `max_calls` were spent
STOP_IMAGES = 3  # the images of a call would exceed `max_images`
STOP_TOKENS = 4  # the observation would exceed `max_tokens`
STOP_REASONS = ("answer", "turn too long", "too many calls", "too many images", "too many tokens")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bytes", "stop"], meta_fields=["observations", "reader"]
)
@dataclasses.dataclass(frozen=True)
class Tables:
    """What the device has to know of the tokenizer, the same for all rows. Built by `pixel_jax.rollout.prompts.tables`."""

    bytes: TokenTable  # of every token, for the automaton
    observations: Observations  # static: the constant stretches are few
    stop: Array  # int32 [k], tokens that end a turn
    reader: Reader  # static: of the calls of these tools, as the format writes them


class Prompts(NamedTuple):
    """B prompts, each with the pixels it may zoom into. Built by `pixel_jax.rollout.prompts.build_prompts`."""

    tokens: Array  # int32 [B, Lp], left-aligned, padded with zeros
    length: Array  # int32 [B]
    # uint8 [B, C, H, W, 3], full resolution, zero beyond `canvas_size`; frames when `is_video`. On the host `Canvases`.
    canvases: Array | Canvases
    canvas_size: Array  # int32 [B, C, 2], (height, width); (0, 0) is absent
    num_canvases: Array  # int32 [B]
    is_video: Array  # bool [B], the canvases are one video
    seconds: Array  # float32 [B], seconds a temporal patch covers; 0 for images
    uid: Array  # int32 [B], what the rows' keys are derived from: a prompt's rows do not depend on its neighbours
    tables: Tables


class Calls(NamedTuple):
    """The operations of R rows, in order; N is the limit of calls plus one (a call past the limit is seen, not executed)."""

    kind: Array  # int32 [R, N]: -1 none, 0 crop_image_normalized, 1 select_frames, 2 unreadable, 3 executed by the host
    observation: (
        Array  # int32 [R, N]: kind of observation returned (`pixel_jax.dialog.observations`), -1 when not executed
    )
    canvas: Array  # int32 [R, N], what was cropped
    box: Array  # int32 [R, N, 4], x1 y1 x2 y2 in that canvas's pixels, padding included
    frames: Array  # int32 [R, N, 8], frames selected (0-based), -1 absent


class Trajectories(NamedTuple):
    """R rows of a conversation as the model saw it. Positions with `valid` false are padding and may lie anywhere."""

    tokens: Array  # int32 [R, L]
    valid: Array  # bool [R, L]
    chosen: (
        Array  # bool [R, L], the policy chose (or, in a trace, should learn) this token: the only ones that carry loss
    )
    logprobs: Array  # float32 [R, L], of the full temperature-scaled distribution, zero where not chosen
    visual: Visual
    prompt: Array  # int32 [R], index of the prompt
    calls: Calls
    num_calls: Array  # int32 [R], calls asked for, executed or not
    stop: Array  # int32 [R], see `STOP_REASONS`


def to_host(trajectories: Trajectories) -> Trajectories:
    """The same trajectories as NumPy arrays."""
    return jax.tree.map(np.asarray, trajectories)


def take_rows(trajectories: Trajectories, rows) -> Trajectories:
    """The rows `rows` (an index array or a slice) of every field."""
    return jax.tree.map(lambda x: x[rows], trajectories)


def concatenate(parts: list[Trajectories]) -> Trajectories:
    """Rows of several trajectories of equal widths, one after the other, on the host."""
    return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)


def executed_calls(trajectories: Trajectories) -> Array:
    """Operations that ran and returned pixels (n_vo of the paper, §4.2): int32 [R]."""
    xp = jnp if isinstance(trajectories.calls.kind, jax.Array) else np
    observation = trajectories.calls.observation
    return xp.sum((observation == 0) | (observation == 1), axis=1)
