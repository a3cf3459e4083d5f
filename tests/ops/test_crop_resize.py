"""crop_resize and its host twin against Pillow, bit for bit, in every formulation and under every transform."""

import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from PIL import Image

from pixel_jax.ops import crop_resize, host_crop_resize
from pixel_jax.parallel import make_mesh

IMAGE = np.random.default_rng(0).integers(0, 256, (75, 90, 3), dtype=np.uint8)
# Stripes overshoot most, so that both ends of the clipping are used.
STRIPES = np.where(np.indices((75, 90)).sum(0)[..., None] // 3 % 2, 255, 0).repeat(3, -1).astype(np.uint8)
CANVAS = (60, 83)
FORMS = ("banded", "matmul")
ORDERS = ("horizontal_first", "pillow13")


def pillow(image, box, size, canvas, order="horizontal_first"):
    """Pillow's result on the canvas. Pillow 13's order in two resizes, each of which has one pass only."""
    crop = Image.fromarray(image).crop(tuple(box))
    (width, height), (out_height, out_width) = crop.size, size
    if order == "pillow13" and height > out_height and height - out_height > 2 * (width - out_width):
        crop = crop.resize((width, out_height), Image.BICUBIC)
    elif order != "native":
        crop = crop.resize((out_width, height), Image.BICUBIC)
    out = np.zeros((*canvas, 3), np.uint8)
    out[:out_height, :out_width] = np.asarray(crop.resize((out_width, out_height), Image.BICUBIC))
    return out


def native(image, box, size, canvas):
    """One call of Pillow's resize, as users write it."""
    return pillow(image, box, size, canvas, "native")


@st.composite
def crops(draw, height=75, width=90, canvas=CANVAS):
    """A box and a size; ends are drawn often, because that is where taps are cut off."""

    def span(length):
        low = draw(st.integers(0, length - 1))
        return low, draw(st.one_of(st.integers(low + 1, length), st.sampled_from([low + 1, length])))

    (x1, x2), (y1, y2) = span(width), span(height)
    size = [draw(st.one_of(st.integers(1, side), st.sampled_from([1, side]))) for side in canvas]
    return (x1, y1, x2, y2), tuple(size)


def random_crops(random, count, height, width, canvas):
    corners = np.sort(random.integers(0, (width, height), (count, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], axis=1)
    sizes = np.stack([random.integers(1, side + 1, count) for side in canvas], axis=1)
    return boxes.astype(np.int32), sizes.astype(np.int32)


def test_pillow_is_one_whose_order_we_know():
    """The oracle in two steps equals one call of the installed Pillow, whatever its release."""
    order = "horizontal_first" if int(Image.__version__.split(".")[0]) < 13 else "pillow13"
    boxes, sizes = random_crops(np.random.default_rng(1), 50, 75, 90, CANVAS)
    for box, size in zip(boxes, sizes, strict=True):
        np.testing.assert_array_equal(native(IMAGE, box, size, CANVAS), pillow(IMAGE, box, size, CANVAS, order))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=120, deadline=None)
@given(crop=crops(), stripes=st.booleans())
def test_equals_pillow(form, crop, stripes):
    box, size = crop
    image = STRIPES if stripes else IMAGE
    out = crop_resize(image, box, size, CANVAS, implementation=form)
    np.testing.assert_array_equal(out, pillow(image, box, size, CANVAS))


@settings(max_examples=300, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    data=st.data(),
    seed=st.integers(0, 9),
    extreme=st.booleans(),
)
def test_the_host_equals_pillow(sides, data, seed, extreme):
    """Images of any shape; whatever release of Pillow is installed, in the order of Pillow 12."""
    image = np.random.default_rng(seed).integers(0, 256, (*sides, 3), dtype=np.uint8)
    image = np.where(image < 128, 0, 255).astype(np.uint8) if extreme else image
    canvas = data.draw(st.tuples(st.integers(1, 200), st.integers(1, 200)))
    box, size = data.draw(crops(*sides, canvas))
    np.testing.assert_array_equal(host_crop_resize(image, box, size), pillow(image, box, size, size))


@pytest.mark.parametrize("box, size", [((0, 0, 800, 2400), (952, 308)), ((40, 30, 680, 1730), (868, 336))])
def test_the_host_equals_the_device_where_releases_of_pillow_differ(box, size):
    """Crops more than twice as tall as wide that shrink: Pillow 13 shows a fifth of their values another way."""
    image = np.random.default_rng(13).integers(0, 256, (2400, 800, 3), dtype=np.uint8)
    found = host_crop_resize(image, box, size)
    np.testing.assert_array_equal(found, crop_resize(image, box, size, size))
    assert (found != pillow(image, box, size, size, "pillow13")).mean() > 0.1


def test_the_host_takes_views_and_one_channel():
    flipped, grey = IMAGE[::-1, ::-2], IMAGE[..., :1]
    found = host_crop_resize(flipped, (3, 4, 40, 70), (30, 33))
    np.testing.assert_array_equal(found, pillow(np.ascontiguousarray(flipped), (3, 4, 40, 70), (30, 33), (30, 33)))
    found = host_crop_resize(grey, (3, 4, 40, 70), (30, 33))
    np.testing.assert_array_equal(found, host_crop_resize(IMAGE, (3, 4, 40, 70), (30, 33))[..., :1])


@pytest.mark.parametrize(
    "image, box, size, message",
    [
        (IMAGE.astype(np.float32), (0, 0, 9, 9), (4, 4), "image must be uint8"),
        (IMAGE[0], (0, 0, 9, 9), (4, 4), "image must be uint8"),
        (IMAGE, (0, 0, 91, 9), (4, 4), r"box \(0, 0, 91, 9\) is empty or outside the image of width 90, height 75"),
        (IMAGE, (5, 5, 5, 9), (4, 4), "is empty or outside"),
        (IMAGE, (0, 0, 9, 9), (0, 4), r"size \(height, width\) \(0, 4\) is empty"),
    ],
)
def test_what_the_host_refuses(image, box, size, message):
    with pytest.raises(ValueError, match=message):
        host_crop_resize(image, box, size)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=120, deadline=None)
@given(crop=crops(canvas=(75, 60)))
def test_equals_pillow_13(form, crop):
    box, size = crop
    out = crop_resize(IMAGE, box, size, (75, 60), order="pillow13", implementation=form)
    np.testing.assert_array_equal(out, pillow(IMAGE, box, size, (75, 60), "pillow13"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=25, deadline=None)
@given(crop=crops(), data=st.data())
def test_a_part_of_the_result(form, order, crop, data):
    """From an origin on the canvas has the same pixels, zeros behind the last ones."""
    box, size = crop
    row, column = (data.draw(st.integers(0, side)) for side in size)
    whole = np.pad(pillow(IMAGE, box, size, CANVAS, order), ((0, 20), (0, 30), (0, 0)))
    out = crop_resize(IMAGE, box, size, (20, 30), origin=(row, column), order=order, implementation=form)
    np.testing.assert_array_equal(out, whole[row : row + 20, column : column + 30])


def test_an_origin_that_is_refused():
    with pytest.raises(ValueError, match=r"origin \(row, column\) \(-1, 0\) is negative"):
        crop_resize(IMAGE, (0, 0, 9, 9), (9, 9), (5, 5), origin=(-1, 0))
    with pytest.raises(ValueError, match=r"\(0, 9\) is empty$"):
        crop_resize(IMAGE, (0, 0, 9, 9), (0, 9), (5, 5), origin=(0, 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=120, deadline=None)
@given(crop=crops(), stripes=st.booleans())
@example(crop=((0, 0, 90, 2), (21, 81)), stripes=True)  # two equal rows, both near ties after the first pass
def test_within_one_level(form, order, crop, stripes):
    box, size = crop
    image = STRIPES if stripes else IMAGE
    out = crop_resize(image, box, size, CANVAS, order=order, exact=False, implementation=form)
    expected = pillow(image, box, size, CANVAS, order)
    assert np.abs(np.asarray(out, int) - expected).max() <= 1


def test_within_one_level_at_extreme_sizes_and_in_batches():
    """Shrunk 6000 times, enlarged 300 times; and side by side, where the float32 sums round once in a while."""
    long = np.random.default_rng(4).integers(0, 256, (2, 6000, 3), dtype=np.uint8)
    for image, box, size in [(long, (1, 0, 6000, 2), (1, 1)), (IMAGE, (40, 40, 42, 41), (300, 600))]:
        out = crop_resize(image, box, size, size, exact=False, implementation="banded")
        assert np.abs(np.asarray(out, int) - pillow(image, box, size, size)).max() <= 1
    image = np.random.default_rng(5).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    boxes, _ = random_crops(np.random.default_rng(6), 16, 400, 500, CANVAS)
    crop = lambda box: crop_resize(
        jnp.asarray(image), box, (224, 224), (224, 224), exact=False, implementation="banded"
    )
    out = np.asarray(jax.jit(jax.vmap(crop))(boxes), int)
    apart = np.abs(out - [pillow(image, box, (224, 224), (224, 224)) for box in boxes])
    assert apart.max() == 1 and apart.mean() < 1e-4  # the faster sums are in use, and all but always right


def test_the_two_orders_differ():
    box, size = (0, 0, 90, 75), (10, 80)
    assert (pillow(IMAGE, box, size, CANVAS) != pillow(IMAGE, box, size, CANVAS, "pillow13")).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "height, width, canvas",
    [(1, 1, (1, 1)), (1, 50, (9, 9)), (50, 1, (9, 9)), (3, 5, (40, 40)), (64, 64, (8, 8)), (65, 130, (7, 130))],
)
def test_small_and_odd_images(form, height, width, canvas):
    image = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes, sizes = random_crops(np.random.default_rng(3), 20, height, width, canvas)
    boxes[0], sizes[0] = (0, 0, width, height), canvas
    for box, size in zip(boxes, sizes, strict=True):
        out = crop_resize(image, box, size, canvas, implementation=form)
        np.testing.assert_array_equal(out, pillow(image, box, size, canvas))


@pytest.mark.parametrize("form", FORMS)
def test_the_greatest_reduction_is_exact(form):
    """128 times with every tap at its largest: where float32 sums of digits would leave the integers first."""
    image = np.full((4, 1280, 3), 255, np.uint8)
    image[:, ::2, 1] = 0
    image[:, 640:, 2] = 0
    out = crop_resize(image, (0, 0, 1280, 4), (2, 10), (2, 10), implementation=form)
    np.testing.assert_array_equal(out, pillow(image, (0, 0, 1280, 4), (2, 10), (2, 10)))


def test_banded_has_no_limit():
    image = np.random.default_rng(4).integers(0, 256, (2, 6000, 3), dtype=np.uint8)
    out = crop_resize(image, (1, 0, 6000, 2), (1, 1), (1, 1), implementation="banded")
    np.testing.assert_array_equal(out, pillow(image, (1, 0, 6000, 2), (1, 1), (1, 1)))


def test_padding_around_the_image_has_no_influence():
    padded = np.pad(IMAGE, ((0, 30), (0, 20), (0, 0)), constant_values=77)
    box, size = (60, 40, 90, 75), (45, 70)
    for form in FORMS:
        out = crop_resize(padded, box, size, CANVAS, implementation=form)
        np.testing.assert_array_equal(out, pillow(IMAGE, box, size, CANVAS))


@pytest.mark.parametrize("form", (None, *FORMS))
def test_batches(form):
    """Boxes of one image, boxes of several, two batch axes, each in one call."""
    images = np.random.default_rng(5).integers(0, 256, (6, 75, 90, 3), dtype=np.uint8)
    boxes, sizes = random_crops(np.random.default_rng(6), 6, 75, 90, CANVAS)

    def crop(image, box, size):
        return crop_resize(image, box, size, CANVAS, implementation=form)

    one = jax.jit(jax.vmap(crop, in_axes=(None, 0, 0)))(images[0], boxes, sizes)
    several = jax.jit(jax.vmap(crop))(images, boxes, sizes)
    nested = jax.vmap(jax.vmap(crop, in_axes=(None, 0, 0)))(images[:2], boxes.reshape(2, 3, 4), sizes.reshape(2, 3, 2))
    same_box = jax.vmap(crop, in_axes=(0, None, None))(images, boxes[0], sizes[0])
    for row in range(6):
        np.testing.assert_array_equal(one[row], pillow(images[0], boxes[row], sizes[row], CANVAS))
        np.testing.assert_array_equal(several[row], pillow(images[row], boxes[row], sizes[row], CANVAS))
        np.testing.assert_array_equal(
            nested[row // 3, row % 3], pillow(images[row // 3], boxes[row], sizes[row], CANVAS)
        )
        np.testing.assert_array_equal(same_box[row], pillow(images[row], boxes[0], sizes[0], CANVAS))


@pytest.mark.parametrize("form", FORMS)
def test_pillow_13_in_a_batch(form):
    boxes, sizes = random_crops(np.random.default_rng(7), 12, 75, 90, CANVAS)
    crop = lambda box, size: crop_resize(jnp.asarray(IMAGE), box, size, CANVAS, order="pillow13", implementation=form)
    out = jax.jit(jax.vmap(crop))(boxes, sizes)
    for row, (box, size) in enumerate(zip(boxes, sizes, strict=True)):
        np.testing.assert_array_equal(out[row], pillow(IMAGE, box, size, CANVAS, "pillow13"))


@pytest.mark.parametrize("form", FORMS)
def test_sharded_batches(form):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    images = np.random.default_rng(8).integers(0, 256, (8, 75, 90, 3), dtype=np.uint8)
    boxes, sizes = random_crops(np.random.default_rng(9), 8, 75, 90, CANVAS)
    crop = jax.jit(
        jax.vmap(lambda image, box, size: crop_resize(image, box, size, CANVAS, implementation=form)),
        out_shardings=rows,
    )
    out = crop(*jax.device_put((images, boxes, sizes), rows))
    assert out.sharding.is_equivalent_to(rows, 4)
    for row in range(8):
        np.testing.assert_array_equal(out[row], pillow(images[row], boxes[row], sizes[row], CANVAS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "split, order", [*((split, ORDERS[0]) for split in ("image and box", "box", "image")), ("box", "pillow13")]
)
def test_inside_shard_map(form, split, order):
    """Whatever differs from device to device, with JAX's own check of what does."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    images, boxes = np.stack([IMAGE, STRIPES]), np.array([[3, 4, 60, 70], [10, 1, 90, 33]], np.int32)
    size = jnp.array([20, 30])
    crop = lambda image, box: crop_resize(image, box, size, CANVAS, order=order, implementation=form)
    given = (images if "image" in split else IMAGE, boxes if "box" in split else boxes[0])
    axes = tuple(0 if name in split else None for name in ("image", "box"))
    specs = tuple(whole if axis is None else rows for axis in axes)
    mapped = jax.vmap(crop, axes)
    found = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=rows))(*given)
    np.testing.assert_array_equal(found, jax.jit(mapped)(*given))


@pytest.mark.parametrize("form", (None, *FORMS))
@pytest.mark.parametrize("order, shared", [("horizontal_first", False), ("pillow13", True)])
def test_explicit_axes(form, order, shared):
    """On the mesh that `jax.make_mesh` makes; the rows of the result lie where the boxes did."""
    mesh = jax.make_mesh((8,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    rows, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    images = np.random.default_rng(8).integers(0, 256, (8, 75, 90, 3), dtype=np.uint8)
    boxes, sizes = random_crops(np.random.default_rng(9), 8, 75, 90, CANVAS)
    crop = lambda image, box, size: crop_resize(image, box, size, CANVAS, order=order, implementation=form)
    given = jax.device_put(images[0], whole) if shared else jax.device_put(images, rows)
    out = jax.jit(jax.vmap(crop, (None if shared else 0, 0, 0)))(given, *jax.device_put((boxes, sizes), rows))
    assert out.sharding.is_equivalent_to(rows, 4)
    out = np.asarray(out)
    for row in range(8):
        image = images[0 if shared else row]
        np.testing.assert_array_equal(out[row], pillow(image, boxes[row], sizes[row], CANVAS, order))


def test_gradients_are_zero():
    """What the docstring says: nothing in JAX tells this function that somebody differentiates what it is given."""
    total = lambda x: crop_resize((x * 255).astype(jnp.uint8), (0, 0, 9, 9), (4, 4), (4, 4)).astype(jnp.float32).sum()
    assert not jax.grad(total)(jnp.full((9, 9, 3), 0.5)).any()
    with pytest.raises(ValueError, match="image must be uint8"):
        jax.grad(lambda x: crop_resize(x, (0, 0, 9, 9), (4, 4), (4, 4)).sum())(jnp.zeros((9, 9, 3)))


@pytest.mark.parametrize("form", (None, *FORMS))
def test_inside_loops_and_branches(form):
    """As a rollout uses it: vmapped, in a cond, in a while loop, in a jit."""
    boxes, sizes = random_crops(np.random.default_rng(10), 3, 75, 90, CANVAS)
    batch = jax.vmap(lambda box, size: crop_resize(jnp.asarray(IMAGE), box, size, CANVAS, implementation=form))

    @jax.jit
    def run(boxes, sizes, turns):
        def turn(carry):
            count, out = carry
            crop = lambda: batch(jnp.roll(boxes, count, axis=0), jnp.roll(sizes, count, axis=0))
            return count + 1, jax.lax.cond(count % 2 == 0, crop, lambda: out)

        return jax.lax.while_loop(lambda carry: carry[0] < turns, turn, (0, jnp.zeros((3, *CANVAS, 3), jnp.uint8)))

    count, out = run(boxes, sizes, 4)
    assert count.dtype == jnp.int32  # nothing of the double precision inside leaks out
    for row, (box, size) in enumerate(zip(np.roll(boxes, 2, 0), np.roll(sizes, 2, 0), strict=True)):
        np.testing.assert_array_equal(out[row], pillow(IMAGE, box, size, CANVAS))


@pytest.mark.parametrize("form", (None, *FORMS))
def test_constants_and_wide_integers(form):
    """Boxes known to the compiler are folded by other code than traced ones; 64-bit processes have other defaults."""
    box, size = (3, 5, 71, 68), (41, 29)
    expected = pillow(IMAGE, box, size, CANVAS)
    crop = lambda image: crop_resize(image, box, size, CANVAS, implementation=form)
    np.testing.assert_array_equal(jax.jit(crop)(IMAGE), expected)
    with jax.enable_x64(True):
        traced = jax.jit(lambda *args: crop_resize(*args, CANVAS, implementation=form, order="pillow13"))
        out = traced(IMAGE, np.array(box, np.int64), np.array(size, np.int64))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("form", FORMS)
def test_one_compilation_serves_all_boxes_and_sizes(form):
    traces = []

    @jax.jit
    def crop(box, size):
        traces.append(1)
        return crop_resize(jnp.asarray(IMAGE), box, size, CANVAS, implementation=form)

    for box, size in zip(*random_crops(np.random.default_rng(11), 20, 75, 90, CANVAS), strict=True):
        np.testing.assert_array_equal(crop(box, size), pillow(IMAGE, box, size, CANVAS))
    assert len(traces) == crop._cache_size() == 1


def test_lowering_chooses_by_platform():
    """The CPU gets its loops and the TPU its bfloat16 products, from one traced function."""
    crop = jax.jit(lambda image, box, size: crop_resize(image, box, size, CANVAS))
    traced = crop.trace(
        *(jax.ShapeDtypeStruct(s, d) for s, d in [((75, 90, 3), "uint8"), ((4,), "int32"), ((2,), "int32")])
    )
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert "bf16" not in texts["cpu"] and "stablehlo.while" in texts["cpu"]
    for platform in ("tpu", "cuda"):
        assert "bf16" in texts[platform] and "stablehlo.while" not in texts[platform]


BAD_BOXES = [(5, 5, 5, 9), (5, 9, 9, 9), (9, 5, 5, 9), (-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 91, 5), (0, 0, 5, 76)]
HUGE = 2**31 - 1


@pytest.mark.parametrize("box", [*BAD_BOXES, (-HUGE, 0, HUGE, 5), (HUGE, HUGE, -HUGE, -HUGE)])
def test_bad_boxes(box):
    with pytest.raises(ValueError, match=r"box \(.*\) is empty or outside the image of width 90, height 75"):
        crop_resize(IMAGE, box, (4, 4), CANVAS)
    for form in FORMS:
        crop = jax.jit(lambda box, form=form: crop_resize(IMAGE, box, (4, 4), CANVAS, implementation=form))
        assert not crop(jnp.array(box)).any()


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-4, 4), (61, 4), (4, 84), (HUGE, HUGE)])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=r"size \(height, width\) \(.*\) is empty or exceeds the canvas \(60, 83\)"):
        crop_resize(IMAGE, (0, 0, 9, 9), size, CANVAS)
    for form in FORMS:
        crop = jax.jit(lambda size, form=form: crop_resize(IMAGE, (0, 0, 9, 9), size, CANVAS, implementation=form))
        assert not crop(jnp.array(size)).any()


def test_bad_rows_leave_the_others_of_a_batch_alone():
    boxes = np.array([(3, 4, 50, 60), (9, 9, 9, 9), (0, 0, 90, 75), (80, 0, 95, 9)], np.int32)
    for form in FORMS:
        crop = jax.jit(jax.vmap(lambda box, form=form: crop_resize(IMAGE, box, (20, 30), CANVAS, implementation=form)))
        out = crop(boxes)
        for row in (0, 2):
            np.testing.assert_array_equal(out[row], pillow(IMAGE, boxes[row], (20, 30), CANVAS))
        assert not out[1].any() and not out[3].any()


def test_matmul_refuses_more_than_its_limit():
    image = np.full((1, 300, 3), 9, np.uint8)
    with pytest.raises(ValueError, match="shrinks at most 128 times"):
        crop_resize(image, (0, 0, 257, 1), (1, 2), (1, 2), implementation="matmul")
    crop = jax.jit(lambda box: crop_resize(image, box, (1, 2), (1, 2), implementation="matmul"))
    assert not crop(jnp.array((0, 0, 257, 1))).any()
    assert (crop(jnp.array((0, 0, 256, 1))) == 9).all()


def test_bad_arguments():
    box, size = (0, 0, 9, 9), (4, 4)
    for arguments, options, message in [
        ((IMAGE.astype(np.float32), box, size, CANVAS), {}, "image must be uint8"),
        ((IMAGE[0], box, size, CANVAS), {}, "image must be uint8"),
        ((IMAGE, (0, 0, 9), size, CANVAS), {}, "box must be 4 integers"),
        ((IMAGE, (0.0, 0.0, 9.0, 9.0), size, CANVAS), {}, "box must be 4 integers"),
        ((IMAGE, box, (4,), CANVAS), {}, "size must be 2 integers"),
        ((IMAGE, box, size, (0, 5)), {}, "canvas must be"),
        ((IMAGE, box, size, CANVAS), {"order": "vertical"}, "order must be one of"),
        ((IMAGE, box, size, CANVAS), {"implementation": "cuda"}, "implementation must be None or one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            crop_resize(*arguments, **options)


def test_bits_with_the_compiler_as_users_have_it():
    """The tests compile with fewer optimisations; a fused multiply-add would show here only."""
    script = (
        "import sys, jax, numpy as np; from pixel_jax.ops import crop_resize; given = np.load(sys.argv[1]); "
        "crop = lambda form: jax.jit(jax.vmap(lambda box, size: crop_resize("
        "given['image'], box, size, tuple(given['canvas'].tolist()), implementation=form))); "
        "np.savez(sys.argv[2], **{form: crop(form)(given['boxes'], given['sizes']) for form in ('banded', 'matmul')})"
    )
    boxes, sizes = random_crops(np.random.default_rng(5), 64, 75, 90, CANVAS)
    sizes = np.maximum(sizes, 8)  # within the limit of the dense form
    with tempfile.TemporaryDirectory() as place:
        given, made = f"{place}/given.npz", f"{place}/made.npz"
        np.savez(given, image=STRIPES, boxes=boxes, sizes=sizes, canvas=CANVAS)
        subprocess.run([sys.executable, "-c", script, given, made], env=os.environ | {"XLA_FLAGS": ""}, check=True)
        expected = [pillow(STRIPES, box, size, CANVAS) for box, size in zip(boxes, sizes, strict=True)]
        with np.load(made) as out:
            for form in FORMS:
                np.testing.assert_array_equal(out[form], expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "height, width, canvas", [(448, 448, (56, 56)), (600, 1000, (336, 336)), (200, 300, (512, 640))]
)
def test_millions_of_pixels(form, height, width, canvas):
    random = np.random.default_rng(12)
    images = random.integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    images[4:] = np.where(images[4:] < 128, 0, 255)
    crop = jax.jit(jax.vmap(lambda image, box, size: crop_resize(image, box, size, canvas, implementation=form)))
    compared = 0
    while compared < 4_000_000:
        boxes, sizes = random_crops(random, 8, height, width, canvas)
        sizes = np.maximum(sizes, 8)  # within the limit of the dense form
        sizes[::2] = canvas
        out = np.asarray(crop(images, boxes, sizes))
        for row in range(8):
            np.testing.assert_array_equal(out[row], pillow(images[row], boxes[row], sizes[row], canvas))
        compared += 3 * int(sizes.prod(axis=1).sum())
