"""Executing calls, against a plain-Python reading of the released code with its faults mended."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax.dialog.automaton import Calls
from pixel_jax.dialog.grammar import parse_turn
from pixel_jax.dialog.observations import Kind
from pixel_jax.ops import smart_resize
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.operations import Gallery, execute, round_half_even, scale, shown_size

ROWS, VIEWS, CANVASES = 256, 8, 4
NARROW = dict(crop_min_pixels=784, crop_max_pixels=8 * 784, select_min_pixels=784, select_max_pixels=4 * 784)


def reference(call, video, sizes, images, config):
    """What the released code answers: (kind, its integers, regions and sizes shown).

    `sizes` are (height, width) of the canvases, `images` the (canvas, region) a row has, a video's first entry being None.
    """
    if call is None:
        return Kind.MALFORMED, [], []
    if call.tool == 1:
        if not video:
            return Kind.SELECT_ON_IMAGE, [], []
        if not call.frames:
            return Kind.MALFORMED, [], []
        if len(call.frames) > 8:
            return Kind.TOO_MANY_FRAMES, [len(call.frames)], []
        if any(not 1 <= frame <= len(sizes) for frame in call.frames):
            return Kind.FRAMES_OUT_OF_RANGE, [len(sizes)], []
        shown = [(f - 1, (0, 0, sizes[f - 1][1], sizes[f - 1][0])) for f in call.frames]
        low, high = config.select_min_pixels, config.select_max_pixels
    else:
        if not call.target_image.integer:
            return Kind.MALFORMED, [], []
        target = call.target_image.signed_units()
        if video and len(images) == 1:
            if not 1 <= target <= len(sizes):
                return Kind.BAD_VIDEO_INDEX, [len(sizes), target], []
            canvas, region = target - 1, (0, 0, sizes[target - 1][1], sizes[target - 1][0])
        else:
            if not (2 if video else 1) <= target <= len(images):
                bad = [len(images), target] if video else [len(images)]
                return (Kind.BAD_SELECTED_INDEX if video else Kind.BAD_IMAGE_INDEX), bad, []
            canvas, region = images[target - 1]
        width, height = region[2] - region[0], region[3] - region[1]
        numbers = [Fraction(n.units * 10**6 + n.micros, 10**6) * (-1 if n.negative else 1) for n in call.box]
        relative = all(n < 1 for n in numbers) if config.one_is_absolute else all(n <= 1 for n in numbers)
        sides = (width, height, width, height)
        if not relative:
            numbers = [n / side for n, side in zip(numbers, sides, strict=True)]
        pad = Fraction(round(config.pad * 10**6), 10**6)
        numbers = [n + sign * pad for n, sign in zip(numbers, (-1, -1, 1, 1), strict=True)]
        box = [round(min(max(n, Fraction(0)), Fraction(1)) * side) for n, side in zip(numbers, sides, strict=True)]
        w, h = box[2] - box[0], box[3] - box[1]
        if w < 0 or h < 0:
            return Kind.MALFORMED, [], []
        if w <= config.min_crop or h <= config.min_crop:
            return Kind.CROP_TOO_SMALL, [w, h], []
        shown = [(canvas, (box[0] + region[0], box[1] + region[1], box[2] + region[0], box[3] + region[1]))]
        low, high = config.crop_min_pixels, config.crop_max_pixels
    views = []
    for canvas, region in shown:
        h, w = region[3] - region[1], region[2] - region[0]
        if max(h, w) > 200 * min(h, w):
            return Kind.MALFORMED, [], []
        size = smart_resize(h, w, min_pixels=low, max_pixels=high)
        if size[0] * size[1] > high or max(size) > config.max_side:
            return Kind.MALFORMED, [], []
        views.append((canvas, region, size))
    size = views[0][2]
    if call.tool == 1:
        return Kind.FRAMES, [size[1], size[0], len(images), len(images) + len(views) - 1], views
    return Kind.CROP, [size[1], size[0]], views


def stack_calls(turns):
    """Device arrays of parsed turns, as the automaton would give them."""
    calls = [turn.call for turn in turns]
    box = [
        [(n.units, n.micros, n.negative) for n in call.box] if call and call.box else [(0, 0, False)] * 4
        for call in calls
    ]
    target = [call.target_image if call else None for call in calls]
    frames = [list(call.frames[:16]) + [0] * (16 - len(call.frames[:16])) if call else [0] * 16 for call in calls]
    return Calls(
        required=jnp.array([turn.required for turn in turns]),
        valid=jnp.array([call is not None for call in calls]),
        tool=jnp.array([call.tool if call else -1 for call in calls], jnp.int32),
        box_units=jnp.array([[n[0] for n in row] for row in box], jnp.int32),
        box_micros=jnp.array([[n[1] for n in row] for row in box], jnp.int32),
        box_negative=jnp.array([[n[2] for n in row] for row in box]),
        target_image=jnp.array([t.signed_units() if t else 0 for t in target], jnp.int32),
        target_micros=jnp.array([t.micros if t else 0 for t in target], jnp.int32),
        target_integer=jnp.array([bool(t and t.integer) for t in target]),
        frames=jnp.array(frames, jnp.int32),
        num_frames=jnp.array([len(call.frames) if call else 0 for call in calls], jnp.int32),
    )


def number(rng, side):
    kind = rng.integers(8)
    if kind < 5:
        return f"{rng.random():.{rng.integers(1, 7)}f}"
    if kind == 5:
        return str(rng.integers(-3, 2 * side))
    if kind == 6:
        return rng.choice(["0", "1", "1.0", "-0.05", "-2.5", "0.999999", "999999999999", "1.000001", "-0"])
    return f"{rng.random() * side * 1.2:.2f}"


def random_case(rng):
    video = bool(rng.integers(2))
    count = int(rng.integers(1, CANVASES + 1))
    size = rng.integers(30, 2000, 2)
    sizes = [tuple(map(int, size if video else rng.integers(30, 2000, 2))) for _ in range(count)]
    images = [None] if video else [(i, (0, 0, w, h)) for i, (h, w) in enumerate(sizes)]
    for _ in range(rng.integers(0, 4)):
        canvas = int(rng.integers(count))
        h, w = sizes[canvas]
        x, y = int(rng.integers(0, w // 2 + 1)), int(rng.integers(0, h // 2 + 1))
        images.append((canvas, (x, y, int(rng.integers(x + 29, x + 30 + w)), int(rng.integers(y + 29, y + 30 + h)))))
    if rng.random() < 0.3:
        frames = ", ".join(
            str(f) for f in rng.integers(-1 if rng.random() < 0.2 else 1, count + 1, rng.integers(0, 10))
        )
        text = f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": [{frames}]}}}}</tool_call>'
    else:
        box = ", ".join(number(rng, side) for side in (sizes[0][1], sizes[0][0]) * 2)
        if rng.random() < 0.6:
            a, b = np.sort(rng.random(2)), np.sort(rng.random(2))
            box = f"{a[0]:.3f}, {b[0]:.3f}, {a[1]:.3f}, {b[1]:.3f}"
        target = rng.choice(["1", "2", "3", "1", "0", "-1", "5", "1.0", "1000000"])
        arguments = f'{{"bbox_2d": [{box}], "target_image": {target}}}'
        text = f'<tool_call>{{"name": "crop_image_normalized", "arguments": {arguments}}}</tool_call>'
    return parse_turn(text), video, sizes, images


CONFIGS = [
    RolloutConfig(pad=0.0, **NARROW),
    RolloutConfig(pad=0.1, **NARROW),
    RolloutConfig(pad=0.1, one_is_absolute=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["no padding", "padding", "released budgets and box rule"])
def test_execute_agrees_with_the_reference(config):
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(ROWS)]
    slots = 16
    canvas, region, count = np.zeros((ROWS, slots), int), np.zeros((ROWS, slots, 4), int), np.zeros(ROWS, int)
    size = np.zeros((ROWS, CANVASES, 2), int)
    for i, (_, _, sizes, images) in enumerate(cases):
        size[i, : len(sizes)], count[i] = sizes, len(images)
        for j, entry in enumerate(images):
            if entry is not None:
                canvas[i, j], region[i, j] = entry
    gallery = Gallery(*(jnp.array(x, jnp.int32) for x in (canvas, region, count)))
    result = jax.jit(execute, static_argnums=(5, 6))(
        stack_calls([case[0] for case in cases]),
        gallery,
        jnp.array([case[1] for case in cases]),
        jnp.array(size, jnp.int32),
        jnp.array([len(case[2]) for case in cases], jnp.int32),
        VIEWS,
        config,
    )
    seen = set()
    for i, (turn, video, sizes, images) in enumerate(cases):
        kind, integers, views = reference(turn.call, video, sizes, images, config)
        seen.add(kind)
        assert Kind(int(result.message.kind[i])) == kind, (turn, video, sizes, images)
        assert result.message.integers[i, : len(integers)].tolist() == integers, (turn, kind)
        assert int(result.count[i]) == len(views)
        assert int(np.sum(result.message.pads[i])) == sum(h * w // 784 for _, _, (h, w) in views)
        for j, (where, box, shown) in enumerate(views):
            assert int(result.canvas[i, j]) == where
            assert tuple(result.region[i, j].tolist()) == tuple(box), turn
            assert tuple(result.size[i, j].tolist()) == shown
    assert seen >= set(Kind) - {Kind.TOO_MANY_FRAMES}


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 2**21 - 1))
def test_scaling_is_exact(millionths, side):
    whole, part = scale(jnp.int32(millionths), jnp.int32(side))
    assert int(whole) * 10**6 + int(part) == millionths * side
    assert int(round_half_even(whole, part)) == round(Fraction(millionths * side, 10**6))


def test_a_sliver_cannot_be_shown():
    regions = jnp.array([[0, 0, 6001, 30], [0, 0, 6000, 30], [5, 5, 5, 9]], jnp.int32)
    size, fits = shown_size(regions, 784, 2000 * 784, 10_000)
    assert fits.tolist() == [False, True, False]
    assert tuple(size[1].tolist()) == smart_resize(30, 6000, min_pixels=784, max_pixels=2000 * 784)
    assert math.prod(size[1].tolist()) <= 2000 * 784


@pytest.mark.parametrize(
    "fields, value",
    [
        ({"pad": -0.1}, "-0.1"),
        ({"top_p": 0.0}, "0.0"),
        ({"crop_min_pixels": 10**9}, "1000000000"),
        ({"top_k": -1}, "-1"),
    ],
)
def test_config_names_what_is_wrong(fields, value):
    with pytest.raises(ValueError, match=value):
        RolloutConfig(**fields)
