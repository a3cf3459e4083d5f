"""What a tool call means: from the numbers the model wrote to the pixels it gets, or to the message that says why not.

Pixel Reasoner code, `experience_maker.py` (crop and select), with three faults mended: a coordinate of exactly 1 is
relative, indices below 1 are out of range, and crops are cut from the full-resolution canvas.

A box is either in shares of an image or in pixels of that image *as the model was shown it*, which is the size that
observations announce and the one in which Qwen2.5-VL was taught to point. Either way it becomes shares, is padded and
clipped, and cut from what the image shows of its canvas, at full resolution. The released code does this in Python's
floats, whose last bit decides where an edge lies halfway between two pixels (4 % of boxes in pixels); so do we, on
integers, so that every device and the host agree. A coordinate counts to the millionth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.dialog.observations import MAX_IMAGES, Arguments, Kind
from pixel_jax.ops import doubles, smart_resize
from pixel_jax.rollout.config import FACTOR, RolloutConfig
from pixel_jax.tools import CROP_IMAGE, RELEASED, SELECT_FRAMES
from pixel_jax.tools.calls import Calls as ParsedCalls
from pixel_jax.tools.calls import Numbers, arguments

MILLION = 1_000_000
MAX_RATIO = 200  # longest to shortest side that smart_resize accepts


class Gallery(NamedTuple):
    """The images a row may crop, in the order the model counts them; entry 0 of a video row is the video itself."""

    canvas: jax.Array  # int32 [R, M]
    region: jax.Array  # int32 [R, M, 4], x1 y1 x2 y2 in the canvas
    size: jax.Array  # int32 [R, M, 2], (height, width) at which the model was shown it; of a video, its frames
    count: jax.Array  # int32 [R]


class Result(NamedTuple):
    """What R calls come to. Where `count` is 0 the observation is a message; nothing else of the row is meaningful."""

    message: Arguments  # what the observation says, its kind above all
    canvas: jax.Array  # int32 [R, V]
    region: jax.Array  # int32 [R, V, 4]
    size: jax.Array  # int32 [R, V, 2], (height, width) shown to the model
    count: jax.Array  # int32 [R], images shown


def box_in_region(called: Numbers, region: jax.Array, size: jax.Array, config: RolloutConfig) -> jax.Array:
    """The called box int32 [R, 4] in canvas pixels, padding applied, clipped to the region that it is a box of.

    Args:
      region: int32 [R, 4], x1 y1 x2 y2 in the canvas; size: int32 [R, 2], (height, width) at which it was shown.
    """
    beyond = (called.units > 1) | ((called.units == 1) & (called.micros > 0))
    if config.one_is_absolute:
        beyond = called.units >= 1
    absolute = jnp.any(beyond & ~called.negative, axis=1, keepdims=True)
    with jax.enable_x64(True):
        sides = (region[:, jnp.array([2, 3, 2, 3])] - region[:, jnp.array([0, 1, 0, 1])]).astype(jnp.int64)
        shown = jnp.maximum(size, 1)[:, jnp.array([1, 0, 1, 0])].astype(jnp.int64)
        millionths = called.units.astype(jnp.int64) * MILLION + called.micros
        share = doubles.divide(doubles.double(millionths), doubles.constant(float(MILLION)))
        share = doubles.where(absolute, doubles.divide(share, doubles.double(shown)), share)
        pad, zero = doubles.constant(config.pad), doubles.constant(0.0)
        low = doubles.where(called.negative, zero, doubles.subtract(share, pad))
        high = doubles.where(called.negative, doubles.subtract(pad, share), doubles.add(share, pad))
        share = doubles.where(jnp.arange(4) < 2, low, high)
        edges = doubles.round_half_even(doubles.multiply(sides, share))
        box = jnp.minimum(jnp.where(doubles.at_least_one(share), sides, edges), sides).astype(jnp.int32)
    return box + region[:, jnp.array([0, 1, 0, 1])]


def shown_size(region: jax.Array, min_pixels: int, max_pixels: int, max_side: int) -> tuple[jax.Array, jax.Array]:
    """Size [..., 2] (height, width) at which `region` [..., 4] is shown, and whether it can be.

    Rounding up can exceed a tight budget, and a sliver has no size at all.
    """
    height, width = region[..., 3] - region[..., 1], region[..., 2] - region[..., 0]
    short, long = jnp.minimum(height, width), jnp.maximum(height, width)
    possible = (short > 0) & (long <= MAX_RATIO * short)
    height, width = jnp.where(possible, height, 28), jnp.where(possible, width, 28)
    size = jnp.stack(smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels), axis=-1)
    fits = (size[..., 0] * size[..., 1] <= max_pixels) & (jnp.max(size, axis=-1) <= max_side)
    return size, possible & fits


def overview_size(canvas_size: jax.Array, is_video: jax.Array, config: RolloutConfig) -> jax.Array:
    """Size int32 [..., 2] at which a prompt first shows a canvas of `canvas_size` [..., 2]; `is_video` bool [...]."""
    zeros = jnp.zeros_like(canvas_size)
    whole = jnp.concatenate([zeros, canvas_size[..., ::-1]], axis=-1)
    as_image, _ = shown_size(whole, config.min_pixels, config.max_pixels, config.max_side)
    as_frame, _ = shown_size(whole, config.video_min_pixels, config.video_max_pixels, config.max_side)
    return jnp.where(is_video[..., None], as_frame, as_image)


def first_gallery(
    canvas_size: jax.Array, num_canvases: jax.Array, is_video: jax.Array, config: RolloutConfig
) -> Gallery:
    """The gallery of R rows that have been shown their prompts: canvas_size int32 [R, C, 2], others [R]."""
    rows, most = canvas_size.shape[:2]
    more = config.max_images
    size = overview_size(canvas_size, jnp.broadcast_to(is_video[:, None], (rows, most)), config)
    return Gallery(
        canvas=jnp.broadcast_to(jnp.minimum(jnp.arange(most + more), most - 1), (rows, most + more)).astype(jnp.int32),
        region=jnp.pad(canvas_size[..., ::-1], ((0, 0), (0, more), (2, 0))),
        size=jnp.pad(size, ((0, 0), (0, more), (0, 0))),
        count=jnp.where(is_video, 1, num_canvases),
    )


def execute(
    call: ParsedCalls, gallery: Gallery, is_video, canvas_size, num_canvases, views: int, config: RolloutConfig
):
    """The result of each row's call.

    Args:
      call: what the automaton read, R rows.
      gallery: the images of each row so far.
      is_video: bool [R]; canvas_size: int32 [R, C, 2]; num_canvases: int32 [R].
      views: V, most images one observation can show: 1 where no row is a video.
    """
    rows = jnp.arange(call.tool.shape[0])
    crop_call, select_call = (arguments(call, RELEASED, tool) for tool in (CROP_IMAGE, SELECT_FRAMES))
    # ---- crop
    target = crop_call["target_image"].signed_units
    fresh_video = is_video & (gallery.count == 1)
    low = jnp.where(is_video & ~fresh_video, 2, 1)
    high = jnp.where(fresh_video, num_canvases, gallery.count)
    in_range = (target >= low) & (target <= high)
    index = jnp.where(in_range, target, low) - 1
    frame = jnp.minimum(index, canvas_size.shape[1] - 1)
    frame_size = canvas_size[rows, frame]
    whole = jnp.stack([jnp.zeros_like(frame), jnp.zeros_like(frame), frame_size[:, 1], frame_size[:, 0]], axis=1)
    crop_canvas = jnp.where(fresh_video, frame, gallery.canvas[rows, index])
    source = jnp.where(fresh_video[:, None], whole, gallery.region[rows, index])
    size = gallery.size[rows, jnp.where(fresh_video, 0, index)]
    box = box_in_region(crop_call["bbox_2d"], source, size, config)
    width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    crop_size, crop_fits = shown_size(box, config.crop_min_pixels, config.crop_max_pixels, config.max_side)
    crop_kind = jnp.select(
        [
            ~crop_call["target_image"].integer,
            ~in_range & ~is_video,
            ~in_range & fresh_video,
            ~in_range,
            (width < 0) | (height < 0),
            (width <= config.min_crop) | (height <= config.min_crop),
            ~crop_fits,
        ],
        [
            Kind.MALFORMED,
            Kind.BAD_IMAGE_INDEX,
            Kind.BAD_VIDEO_INDEX,
            Kind.BAD_SELECTED_INDEX,
            Kind.MALFORMED,
            Kind.CROP_TOO_SMALL,
            Kind.MALFORMED,
        ],
        Kind.CROP,
    )
    # ---- select
    frames, num_frames = select_call["target_frames"]
    listed = jnp.arange(frames.shape[1]) < num_frames[:, None]
    frames_in_range = jnp.all(~listed | ((frames >= 1) & (frames <= num_canvases[:, None])), axis=1)
    chosen = jnp.clip(frames[:, :views] - 1, 0, canvas_size.shape[1] - 1)
    chosen_size = jnp.take_along_axis(canvas_size, chosen[..., None], axis=1)
    zeros = jnp.zeros_like(chosen)
    frame_regions = jnp.stack([zeros, zeros, chosen_size[..., 1], chosen_size[..., 0]], axis=-1)
    select_size, select_fits = shown_size(
        frame_regions, config.select_min_pixels, config.select_max_pixels, config.max_side
    )
    select_fits = jnp.all(select_fits | ~listed[:, :views], axis=1)
    select_kind = jnp.select(
        [
            ~is_video,
            num_frames == 0,
            num_frames > MAX_IMAGES,
            ~frames_in_range,
            ~select_fits,
        ],
        [Kind.SELECT_ON_IMAGE, Kind.MALFORMED, Kind.TOO_MANY_FRAMES, Kind.FRAMES_OUT_OF_RANGE, Kind.MALFORMED],
        Kind.FRAMES,
    )
    # ---- either
    crop = call.tool == 0
    kind = jnp.where(call.valid, jnp.where(crop, crop_kind, select_kind), Kind.MALFORMED)
    count = jnp.select([kind == Kind.CROP, kind == Kind.FRAMES], [1, num_frames], 0)
    first = jnp.arange(views) == 0
    canvas = jnp.where(crop[:, None], crop_canvas[:, None], chosen)
    region = jnp.where(crop[:, None, None], box[:, None], frame_regions)
    size = jnp.where(crop[:, None, None], crop_size[:, None], select_size)
    present = jnp.where(crop[:, None], first, listed[:, :views]) & (count > 0)[:, None]
    shown_width, shown_height = size[:, 0, 1], size[:, 0, 0]
    zero = jnp.zeros_like(kind)
    fills = {
        Kind.CROP: (shown_width, shown_height),
        Kind.FRAMES: (shown_width, shown_height, gallery.count, gallery.count + count - 1),
        Kind.TOO_MANY_FRAMES: (num_frames,),
        Kind.FRAMES_OUT_OF_RANGE: (num_canvases,),
        Kind.BAD_IMAGE_INDEX: (gallery.count,),
        Kind.BAD_VIDEO_INDEX: (num_canvases, target),
        Kind.BAD_SELECTED_INDEX: (gallery.count, target),
        Kind.CROP_TOO_SMALL: (width, height),
    }
    integers = [jnp.stack([*fill, *[zero] * (4 - len(fill))], axis=1) for fill in fills.values()]
    size = jnp.where(present[..., None], size, 0)
    pads = size[..., 0] * size[..., 1] // FACTOR**2
    message = Arguments(
        kind=kind,
        integers=jnp.select([(kind == k)[:, None] for k in fills], integers, 0),
        items=frames,
        num_items=num_frames,
        pads=jnp.pad(pads, ((0, 0), (0, MAX_IMAGES - views))),
    )
    return Result(
        message=message,
        canvas=jnp.where(present, canvas, -1),
        region=jnp.where(present[..., None], region, 0),
        size=size,
        count=count,
    )


def add_to_gallery(gallery: Gallery, result: Result, rows: jax.Array) -> Gallery:
    """The gallery with the images of `result` appended in the rows where `rows` (bool [R]) holds."""
    views = result.canvas.shape[1]
    shown = (jnp.arange(views) < result.count[:, None]) & rows[:, None]
    slot = jnp.where(shown, gallery.count[:, None] + jnp.arange(views), gallery.canvas.shape[1])
    at = (jnp.arange(slot.shape[0])[:, None], slot)
    return Gallery(
        canvas=gallery.canvas.at[at].set(result.canvas, mode="drop"),
        region=gallery.region.at[at].set(result.region, mode="drop"),
        size=gallery.size.at[at].set(result.size, mode="drop"),
        count=gallery.count + jnp.where(rows, result.count, 0),
    )
