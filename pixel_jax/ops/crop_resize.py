"""Crop and resize on the device, with the bits of Pillow's `Image.crop(box).resize((width, height), BICUBIC)`.

Box and size are traced, so one executable serves every crop that a model asks for; only the canvas that the result is
written to is static. Two formulations give the same bits:

* `matmul`, for matrix units: both passes are dense products over the whole image. Pixels, and the digits of the
  fixed-point weights, are integers that bfloat16 holds exactly, and float32 holds their sums exactly.
* `banded`, for CPUs: only the blocks of the image that a block of outputs touches are multiplied, one crop at a time,
  so that time follows the size of the box.

`exact=False` trades the last bit for speed: the second pass of `banded` then sums the products of the same weights in float32,
one product instead of two, and may round a near-tie to the wrong level. The first pass stays exact, because in an image of equal
columns all pixels under an output could be near-ties, and the output would be two levels off. `matmul`, and the order of
Pillow 13, in which either pass may be the first, ignore the option and are exact.

Pillow (`src/libImaging/Resample.c`) computes each weight in double precision, rounds it to 22-bit fixed point, and
rounds the image to 8 bits between its two passes. So does this module, in doubles whatever the precision of the caller. Compilers
may round a double's last bit differently; that moves a weight by one unit only if it lies within about 1e-9 units of a
rounding boundary (none of 21 million did), and such a unit changes one of 16,000 pixels.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pixel_jax.arrays import AnyArray
from pixel_jax.ops.arguments import check_pixels, integers, is_concrete
from pixel_jax.ops.automatic import on_automatic_axes
from pixel_jax.ops.bicubic import FRACTION_BITS, Window, bicubic, fixed_point, window

ORDERS = ("horizontal_first", "pillow13")
IMPLEMENTATIONS = ("banded", "matmul")

# `matmul` splits a weight into three signed 8-bit digits: 514 products of magnitude 128 * 255 stay below 2 ** 24. A
# weight has at most 4 * scale + 1 taps.
DIGIT_BITS = 8
MAX_SCALE = 128

# `banded` multiplies blocks of OUT_BLOCK outputs, TAP_BLOCK taps and ROW_BLOCK image rows, whose sizes were the fastest of those
# measured on a CPU. A weight is two digits, the lower of LOW_BITS: sums of TAP_BLOCK products of either and a pixel stay below
# 2 ** 24, because the magnitudes of an output's weights add up to less than 1.3 * 2 ** 22.
OUT_BLOCK = 8
TAP_BLOCK = 24
ROW_BLOCK = 64
LOW_BITS = 10


def crop_resize(
    image: AnyArray,
    box: AnyArray | Sequence[int],
    size: AnyArray | Sequence[int],
    canvas: Sequence[int],
    *,
    origin: AnyArray | Sequence[int] | None = None,
    order: str = "horizontal_first",
    exact: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """Cuts `box` out of `image` and resizes it to `size` by bicubic interpolation, as Pillow does on the host.

    Works under `jit` and `vmap`, with boxes of one image or of several.

    Args:
      image: uint8 [h, w, channels]; may be padded: pixels outside the box have no influence.
      box: int32 [4]: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; traced or concrete.
      size: int32 [2]: height and width of the result; traced or concrete.
      canvas: static (H, W), at least `size` where there is no `origin`.
      origin: int32 [2]: row and column of the result at which the canvas begins, traced or concrete, so that only a part of the
        result is computed. None: the canvas holds all of it.
      order: "horizontal_first" as Pillow up to 12, under which the released models were trained and with whose bits
        transformers was tested; or "pillow13", which goes vertically first where that saves work (crops that shrink and are
        much taller than wide). It matters because the image is rounded to 8 bits in between: up to a fifth of the
        values of such a crop differ, by a few levels. The whole package uses the first, whatever Pillow is installed.
      exact: True for the bits of Pillow; False for values that differ by at most one level, faster on CPUs in the default
        order. In noise 4 values of 100,000 differ, in photographs 1 to 2.
      implementation: "banded", "matmul", or None for the one that suits the platform the function is lowered for.

    Returns:
      uint8 [H, W, channels], zero beyond `size`. All are zero where a traced box is empty or reaches outside the image, a traced
      size is empty or, without an origin, exceeds the canvas, a traced origin is negative, or "matmul" would shrink the image
      more than 128 times.

    Raises:
      ValueError: a concrete box or size is such a one, or the image is no uint8 [h, w, channels].

    There is no gradient, because pixels are integers. A float image raises ValueError; but where the caller converts floats
    to uint8, JAX takes the conversion to be constant, and gradients are silently zero.
    """
    check_pixels("image", image)
    if image.ndim != 3 or image.dtype != jnp.uint8:
        raise ValueError(f"image must be uint8 [h, w, channels], got {image.dtype} {image.shape}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    sides = tuple(int(side) for side in canvas)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"canvas must be a height and a width of at least one pixel, got {sides}")
    box, size = integers("box", box, 4), integers("size", size, 2)
    options = {"canvas": sides, "order": order, "exact": exact, "implementation": implementation}
    cut = functools.partial(_crop_resize, **options)
    if origin is None:
        _check_concrete(image.shape, box, size, sides, implementation)
        return on_automatic_axes(cut, image, box, size)
    origin = integers("origin", origin, 2)
    if is_concrete(origin) and min(np.asarray(origin).tolist()) < 0:
        raise ValueError(f"origin (row, column) {tuple(np.asarray(origin).tolist())} is negative")
    _check_concrete(image.shape, box, size, None, implementation)
    return on_automatic_axes(cut, image, box, size, origin)


def _check_concrete(
    shape: Sequence[int], box: AnyArray, size: AnyArray, canvas: tuple[int, int] | None, implementation: str | None
) -> None:
    height, width = shape[:2]
    corners = np.asarray(box).tolist() if is_concrete(box) else None
    if corners is not None:
        x1, y1, x2, y2 = corners
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(f"box {(x1, y1, x2, y2)} is empty or outside the image of width {width}, height {height}")
    if is_concrete(size):
        out_height, out_width = np.asarray(size).tolist()
        most = canvas or (out_height, out_width)
        if not (1 <= out_height <= most[0] and 1 <= out_width <= most[1]):
            exceeds = f" or exceeds the canvas {canvas}" if canvas else ""
            raise ValueError(f"size (height, width) {(out_height, out_width)} is empty{exceeds}")
        if implementation == "matmul" and corners is not None:
            x1, y1, x2, y2 = corners
            if y2 - y1 > MAX_SCALE * out_height or x2 - x1 > MAX_SCALE * out_width:
                raise ValueError(
                    f"'matmul' shrinks at most {MAX_SCALE} times; box {(x1, y1, x2, y2)} to size {(out_height, out_width)}"
                )


class _Crop(NamedTuple):
    """A checked crop, int32 scalars. Sizes are 0 where it is not allowed, so that no output has a weight."""

    x: jax.Array
    y: jax.Array
    width: jax.Array
    height: jax.Array
    out_width: jax.Array
    out_height: jax.Array
    vertical_first: jax.Array
    row: jax.Array | None  # of the result at which the canvas begins; None: the first
    column: jax.Array | None


@jax.jit(static_argnames=("canvas", "order", "exact", "implementation"))
def _crop_resize(image, box, size, origin=None, *, canvas, order, exact, implementation):
    # Box and size may be of any integer type; what does not fit int32 is outside every image.
    big = jnp.iinfo(jnp.int32).max
    x1, y1, x2, y2 = (jnp.clip(value, -1, big).astype(jnp.int32) for value in box)
    out_height, out_width = (jnp.clip(value, -1, big).astype(jnp.int32) for value in size)
    height, width = image.shape[:2]
    allowed = (0 <= x1) & (x1 < x2) & (x2 <= width) & (0 <= y1) & (y1 < y2) & (y2 <= height)
    row = column = None
    if origin is None:
        allowed &= (1 <= out_height) & (out_height <= canvas[0]) & (1 <= out_width) & (out_width <= canvas[1])
    else:
        row, column = (jnp.clip(value, -1, big).astype(jnp.int32) for value in origin)
        allowed &= (1 <= out_height) & (1 <= out_width) & (row >= 0) & (column >= 0)
        # A canvas behind the last row or column is zero; larger numbers would only overflow.
        row, column = jnp.clip(row, 0, out_height), jnp.clip(column, 0, out_width)
    x1, y1, x2, y2, out_height, out_width = (
        jnp.where(allowed, value, 0) for value in (x1, y1, x2, y2, out_height, out_width)
    )
    crop_width, crop_height = x2 - x1, y2 - y1
    # Pillow 13's rule, found by probing it.
    shrinks = crop_height > out_height
    vertical_first = shrinks & (crop_height - out_height > 2 * (crop_width - out_width))
    vertical_first &= order == "pillow13"
    crop = _Crop(x1, y1, crop_width, crop_height, out_width, out_height, vertical_first, row, column)

    def banded(image, crop):
        return _banded(image, crop, canvas, order, exact)

    def matmul(image, crop):
        return _matmul(image, crop, canvas, order)

    if implementation is None:
        return lax.platform_dependent(image, crop, cpu=banded, default=matmul)
    return {"banded": banded, "matmul": matmul}[implementation](image, crop)


def _to_pixels(sums):
    """Rounds sums of fixed-point weights times pixels to uint8."""
    if sums.dtype == jnp.float32:
        return jnp.clip(sums * 2.0**-FRACTION_BITS + 0.5, 0, 255).astype(jnp.uint8)
    return jnp.clip((sums + (1 << (FRACTION_BITS - 1))) >> FRACTION_BITS, 0, 255).astype(jnp.uint8)


def _outputs(count, origin):
    """The numbers of the outputs along an axis of the canvas: int32 [count]."""
    numbers = jnp.arange(count, dtype=jnp.int32)
    return numbers if origin is None else numbers + origin


# For matrix units.


def _dense_digits(start, length, out_length, in_size, out_size, origin):
    """Digits of the weights of every output (rows) for every pixel of the image (columns): three of bfloat16 [out, in]."""
    with jax.enable_x64(True):
        outputs = _outputs(out_size, origin)[:, None]
        pixels = jnp.arange(in_size, dtype=jnp.int32) - start
        weights = bicubic(pixels, window(outputs, length, out_length))
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        allowed = (outputs < out_length) & (length <= MAX_SCALE * out_length)
        weights = fixed_point(jnp.where(allowed, weights, 0.0))
        low = _signed_digit(weights)
        weights = (weights - low) >> DIGIT_BITS
        middle = _signed_digit(weights)
        high = (weights - middle) >> DIGIT_BITS
        return tuple(digit.astype(jnp.bfloat16) for digit in (low, middle, high))


def _signed_digit(values):
    half = 1 << (DIGIT_BITS - 1)
    return ((values + half) & (2 * half - 1)) - half


def _dense_product(equation, digits, image):
    """Multiplies digit by digit: the sums of all at once, in float32 and int32, would be six arrays of the result's size."""
    pixels = image.astype(jnp.bfloat16)
    low, middle, high = (
        jnp.einsum(equation, digit, pixels, preferred_element_type=jnp.float32).astype(jnp.int32) for digit in digits
    )
    return _to_pixels(low + (middle << DIGIT_BITS) + (high << 2 * DIGIT_BITS))


def _matmul(image, crop: _Crop, canvas, order):
    across = _dense_digits(crop.x, crop.width, crop.out_width, image.shape[1], canvas[1], crop.column)
    down = _dense_digits(crop.y, crop.height, crop.out_height, image.shape[0], canvas[0], crop.row)

    def horizontal(image):
        return _dense_product("ow,hwc->hoc", across, image)

    def vertical(image):
        return _dense_product("oh,hwc->owc", down, image)

    out = vertical(horizontal(image))
    # Both orders are computed: in a batch `cond` would compute both, too, and it fails in a batch in `shard_map`.
    return out if order == "horizontal_first" else jnp.where(crop.vertical_first, horizontal(vertical(image)), out)


# For CPUs.


class _Band(NamedTuple):
    """The non-zero part of an axis' weight matrix, as tiles of OUT_BLOCK outputs by TAP_BLOCK pixels, in order.

    used: int32 [], number of tiles in use; block: int32 [tiles], of outputs; fresh: bool [tiles], first tile of its block;
    pixel: int32 [tiles], the first pixel in the crop; weights: float32 [tiles, 2 * OUT_BLOCK, TAP_BLOCK], low and
    high digits; or [tiles, OUT_BLOCK, TAP_BLOCK], the fixed-point numbers themselves.
    """

    used: jax.Array
    block: jax.Array
    fresh: jax.Array
    pixel: jax.Array
    weights: jax.Array


def tiles(in_size: int, out_size: int) -> int:
    """Returns how many tiles an axis needs at most."""
    blocks = -(-out_size // OUT_BLOCK)
    # The windows of a block's outputs span less than (OUT_BLOCK - 1) * scale + 4 * max(scale, 1) + 1 pixels, and scale
    # * outputs is at most in_size.
    return blocks + (in_size + 3 * in_size // OUT_BLOCK + 5 * blocks) // TAP_BLOCK + 1


def _band(length, out_length, in_size, out_size, origin, exact) -> _Band:
    blocks = -(-out_size // OUT_BLOCK)
    with jax.enable_x64(True):
        outputs = _outputs(blocks * OUT_BLOCK, origin).reshape(blocks, OUT_BLOCK)
        seen = window(jnp.minimum(outputs, out_length - 1), length, out_length)
        first, last = seen.first[:, 0], seen.last[:, -1]
        needed = jnp.where(outputs[:, 0] < out_length, (last - first + TAP_BLOCK - 1) // TAP_BLOCK, 0)
        ends = jnp.cumsum(needed, dtype=jnp.int32)
        count = ends[-1]
        tile = jnp.arange(tiles(in_size, out_size), dtype=jnp.int32)
        block = jnp.minimum(jnp.sum(tile[:, None] >= ends, axis=1, dtype=jnp.int32), blocks - 1)
        offset = tile - (ends - needed)[block]  # of the tile in its block
        pixel = first[block] + offset * TAP_BLOCK
        seen = Window(*(value[block][..., None] if value.ndim else value for value in seen))
        pixels = (pixel[:, None] + jnp.arange(TAP_BLOCK, dtype=jnp.int32))[:, None, :]
        weights = jnp.where((tile < count)[:, None, None], bicubic(pixels, seen), 0.0)
        totals = jax.ops.segment_sum(jnp.sum(weights, axis=-1), block, num_segments=blocks)[block]
        used = (tile < count)[:, None] & (outputs[block] < out_length)
        weights = fixed_point(jnp.where(used[..., None], weights / totals[..., None], 0.0))
        if exact:
            weights = jnp.concatenate([weights & ((1 << LOW_BITS) - 1), weights >> LOW_BITS], axis=1)
        return _Band(count, block, offset == 0, pixel, weights.astype(jnp.float32))


def _banded(image, crop: _Crop, canvas, order, exact):
    across = _band(crop.width, crop.out_width, image.shape[1], canvas[1], crop.column, exact=True)
    down = _band(crop.height, crop.out_height, image.shape[0], canvas[0], crop.row, exact=exact or order == "pillow13")

    # Weights of a batch are computed together. The passes run one crop after another under vmap: together, all loops would run
    # as long as the longest, and slices at different positions would become gathers.
    @jax.custom_batching.sequential_vmap
    def passes(image, crop, across, down):
        def horizontal_first():
            rows = _resize_columns(image, crop.y, crop.height, crop.x, crop.width, across, canvas[1])
            return _resize_rows(rows, crop.y, down, canvas[0])

        def vertical_first():
            padded = jnp.pad(image, ((0, TAP_BLOCK), (0, 0), (0, 0)))
            rows = _resize_rows(padded, crop.y, down, canvas[0])
            height = crop.out_height
            if crop.row is not None:
                height = jnp.minimum(height - crop.row, canvas[0])
            rows = _resize_columns(rows, jnp.int32(0), height, crop.x, crop.width, across, canvas[1])
            return rows[: canvas[0]]

        if order == "horizontal_first":
            return horizontal_first()
        return lax.cond(crop.vertical_first, vertical_first, horizontal_first)

    return passes(image, crop, across, down)


def _zeros(shape, dtype, image: jax.Array, *scalars: jax.Array) -> jax.Array:
    """Returns zeros for a loop over `image` to begin with.

    Inside `jax.shard_map` they must vary over the mesh axes over which the arguments do. So they are computed from the
    arguments; XLA makes a constant of that.
    """
    zero = 0 * functools.reduce(operator.add, scalars, image.reshape(-1)[0].astype(jnp.int32))
    return jnp.full(shape, zero.astype(dtype))


def _resize_rows(image, start, band: _Band, out_size):
    """Vertical pass over [h + TAP_BLOCK, w, channels], the crop starting at row `start`; [out_size, w, channels]."""
    rows, width, channels = image.shape
    image = image.reshape(rows, width * channels)
    blocks = -(-out_size // OUT_BLOCK)
    zero = jnp.int32(0)
    exact = band.weights.shape[1] > OUT_BLOCK  # two digits a weight

    def add_tile(tile, carry):
        sums, out = carry
        rows = lax.dynamic_slice(image, (start + band.pixel[tile], zero), (TAP_BLOCK, image.shape[1]))
        product = jnp.dot(band.weights[tile], rows.astype(jnp.float32))
        if exact:
            product = product.astype(jnp.int32)
            product = product[:OUT_BLOCK] + (product[OUT_BLOCK:] << LOW_BITS)
        sums = jnp.where(band.fresh[tile], 0, sums) + product
        # The output is written after each tile: the last tile of a block writes the full sum.
        return sums, lax.dynamic_update_slice(out, _to_pixels(sums), (band.block[tile] * OUT_BLOCK, zero))

    sums = _zeros((OUT_BLOCK, image.shape[1]), jnp.int32 if exact else jnp.float32, image, start, band.used)
    out = _zeros((blocks * OUT_BLOCK, image.shape[1]), jnp.uint8, image, start, band.used)
    with jax.named_scope("tiles"):
        _, out = lax.fori_loop(zero, band.used, add_tile, (sums, out))
    return out[:out_size].reshape(out_size, width, channels)


def _resize_columns(image, top, height, start, width, band: _Band, out_size):
    """Horizontal pass over the crop's rows of [h, w, channels]; [h + TAP_BLOCK, out_size, channels], rows at their own index.

    It works on transposed strips of ROW_BLOCK rows, in which columns of pixels are rows.
    """
    rows, columns, channels = image.shape
    strip_rows, strip_columns = min(ROW_BLOCK, rows), min(ROW_BLOCK, columns)
    zero = jnp.int32(0)

    def resize_strip(index, carry):
        out, strip = carry
        row = jnp.minimum(top + index * strip_rows, rows - strip_rows)

        def transpose(index, strip):
            column = jnp.minimum(start + index * strip_columns, columns - strip_columns)
            part = lax.dynamic_slice(image, (row, column, zero), (strip_rows, strip_columns, channels))
            return lax.dynamic_update_slice(strip, part.transpose(1, 0, 2), (column, zero, zero))

        with jax.named_scope("columns"):
            strip = lax.fori_loop(zero, (width + strip_columns - 1) // strip_columns, transpose, strip)
        resized = _resize_rows(strip, start, band, out_size).transpose(1, 0, 2)
        return lax.dynamic_update_slice(out, resized, (row, zero, zero)), strip

    out = _zeros((rows + TAP_BLOCK, out_size, channels), jnp.uint8, image, start, band.used)
    strip = _zeros((columns + TAP_BLOCK, strip_rows, channels), jnp.uint8, image, start, band.used)
    with jax.named_scope("strips"):
        out, _ = lax.fori_loop(zero, (height + strip_rows - 1) // strip_rows, resize_strip, (out, strip))
    return out
