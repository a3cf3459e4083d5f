"""Executing calls, against a plain-Python reading of the released code with its faults mended."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.dialog.grammar import parse_turn
from pixel_jax.ops import Sizes, smart_resize
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.operations import add_to_history, execute, first_history, record_calls
from pixel_jax.tools import RELEASED
from pixel_jax.tools.calls import ParsedCalls, Values
from pixel_jax.tools.device import ImageHistory, Seen, shown_size
from tests.rollouts import scripted_model

ROWS, VIEWS, BUFFERS = 256, 8, 4
NARROW = dict(crop_min_pixels=784, crop_max_pixels=8 * 784, select_min_pixels=784, select_max_pixels=4 * 784)


def reference(call, written, video, sizes, images, config):
    """What the released code answers: (kind, its integers, regions and sizes shown).

    `sizes` are (height, width) of the buffers, `images` the (image, region, size shown) a row has; of a video's first
    entry only the last is looked at.
    """
    if call is None:
        return "malformed", [], []
    if call.tool == 1:
        if not video:
            return "select_frames: no video", [], []
        if not call.arguments["target_frames"]:
            return "malformed", [], []
        if len(call.arguments["target_frames"]) > 8:
            return "select_frames: too many frames", [len(call.arguments["target_frames"])], []
        if any(not 1 <= frame <= len(sizes) for frame in call.arguments["target_frames"]):
            return "select_frames: out of range", [len(sizes)], []
        shown = [(f - 1, (0, 0, sizes[f - 1][1], sizes[f - 1][0])) for f in call.arguments["target_frames"]]
        low, high = config.select_min_pixels, config.select_max_pixels
    else:
        if not call.arguments["target_image"].integer:
            return "malformed", [], []
        target = call.arguments["target_image"].signed_units()
        if video and len(images) == 1:
            if not 1 <= target <= len(sizes):
                return "crop_image_normalized: no such frame", [len(sizes), target], []
            image, region, seen = target - 1, (0, 0, sizes[target - 1][1], sizes[target - 1][0]), images[0][2]
        else:
            if not (2 if video else 1) <= target <= len(images):
                bad = [len(images), target] if video else [len(images)]
                return f"crop_image_normalized: no such {'selection' if video else 'image'}", bad, []
            image, region, seen = images[target - 1]
        width, height = region[2] - region[0], region[3] - region[1]
        numbers = [float(n) for n in written]  # as json reads them; from here on the released lines
        absolute = not all(n < 1 if config.one_is_absolute else n <= 1 for n in numbers)
        if absolute:  # of the picture that is shown, which there is the picture that is cut
            numbers = [n / side for n, side in zip(numbers, (seen[1], seen[0]) * 2, strict=True)]
        numbers = [n - config.pad for n in numbers[:2]] + [n + config.pad for n in numbers[2:]]
        numbers = [min(max(0, n), 1) for n in numbers]
        box = [round(n * side) for n, side in zip(numbers, (width, height) * 2, strict=True)]
        w, h = box[2] - box[0], box[3] - box[1]
        if w < 0 or h < 0:
            return "malformed", [], []
        if w <= config.min_crop or h <= config.min_crop:
            return "crop_image_normalized: too small", [w, h], []
        shown = [(image, (box[0] + region[0], box[1] + region[1], box[2] + region[0], box[3] + region[1]))]
        low, high = config.crop_min_pixels, config.crop_max_pixels
    views = []
    for image, region in shown:
        h, w = region[3] - region[1], region[2] - region[0]
        if max(h, w) > 200 * min(h, w):
            return "malformed", [], []
        size = smart_resize(h, w, min_pixels=low, max_pixels=high)
        if size[0] * size[1] > high or max(size) > config.max_side:
            return "malformed", [], []
        views.append((image, region, size))
    size = views[0][2]
    if call.tool == 1:
        return "select_frames: shown", [size[1], size[0], len(images), len(images) + len(views) - 1], views
    return "crop_image_normalized: shown", [size[1], size[0]], views


def stack_calls(turns):
    """Device arrays of parsed turns, as the automaton would give them."""
    slots = RELEASED[1].slots
    values = [np.zeros((len(turns), slots), kind) for kind in (np.int32, np.int32, bool, bool)]
    lengths = np.zeros((len(turns), 1), np.int32)
    for row, turn in enumerate(turns):
        if turn.call is None:
            continue
        frames = turn.call.arguments.get("target_frames", ())
        numbers = [*turn.call.arguments["bbox_2d"], turn.call.arguments["target_image"]] if turn.call.tool == 0 else []
        for slot, found in enumerate(numbers):
            for record, value in zip(values, found, strict=True):
                record[row, slot] = value
        for slot, frame in enumerate(frames[:slots]):
            values[0][row, slot], values[2][row, slot], values[3][row, slot] = abs(frame), frame < 0, True
        lengths[row] = len(frames)
    zeros = jnp.zeros((len(turns), 2), bool)
    return ParsedCalls(
        given=zeros,
        required=jnp.array([turn.required for turn in turns]),
        valid=jnp.array([turn.call is not None for turn in turns]),
        tool=jnp.array([turn.call.tool if turn.call else -1 for turn in turns], jnp.int32),
        **jax.tree.map(jnp.asarray, Values(*values, lengths))._asdict(),
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
    count = int(rng.integers(1, BUFFERS + 1))
    size = rng.integers(30, 2000, 2)
    sizes = [tuple(map(int, size if video else rng.integers(30, 2000, 2))) for _ in range(count)]
    shown = lambda: tuple(int(side) for side in rng.integers(28, 1200, 2))
    images = [(0, (0, 0, 1, 1), shown())] if video else [(i, (0, 0, w, h), shown()) for i, (h, w) in enumerate(sizes)]
    for _ in range(rng.integers(0, 4)):
        image = int(rng.integers(count))
        h, w = sizes[image]
        x, y = int(rng.integers(0, w // 2 + 1)), int(rng.integers(0, h // 2 + 1))
        x2, y2 = int(rng.integers(x + 29, x + 30 + w)), int(rng.integers(y + 29, y + 30 + h))
        images.append((image, (x, y, x2, y2), shown()))
    written = ()
    if rng.random() < 0.3:
        frames = ", ".join(
            str(f) for f in rng.integers(-1 if rng.random() < 0.2 else 1, count + 1, rng.integers(0, 10))
        )
        text = f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": [{frames}]}}}}</tool_call>'
    else:
        box = [number(rng, side) for side in (sizes[0][1], sizes[0][0]) * 2]
        if rng.random() < 0.6:
            a, b, digits = np.sort(rng.random(2)), np.sort(rng.random(2)), rng.integers(1, 5)
            box = [f"{x:.{digits}f}" for x in (a[0], b[0], a[1], b[1])]
        target = rng.choice(["1", "2", "3", "1", "0", "-1", "5", "1.0", "1000000"])
        written = tuple(box)
        arguments = f'{{"bbox_2d": [{", ".join(box)}], "target_image": {target}}}'
        text = f'<tool_call>{{"name": "crop_image_normalized", "arguments": {arguments}}}</tool_call>'
    return parse_turn(text), written, video, sizes, images


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
    image, region, count = np.zeros((ROWS, slots), int), np.zeros((ROWS, slots, 4), int), np.zeros(ROWS, int)
    shown = np.zeros((ROWS, slots, 2), int)
    size = np.zeros((ROWS, BUFFERS, 2), int)
    for i, (*_, sizes, images) in enumerate(cases):
        size[i, : len(sizes)], count[i] = sizes, len(images)
        for j, entry in enumerate(images):
            image[i, j], region[i, j], shown[i, j] = entry
    history = ImageHistory(*(jnp.array(x, jnp.int32) for x in (image, region, shown, count)))
    seen_by = Seen(
        history,
        jnp.array([case[2] for case in cases]),
        jnp.array(size, jnp.int32),
        jnp.array([len(case[3]) for case in cases], jnp.int32),
    )
    calls, tables = stack_calls([case[0] for case in cases]), scripted_model.token_tables()
    result = jax.jit(execute, static_argnums=(3, 4))(calls, seen_by, tables, VIEWS, config)
    kinds = [str(kind) for kind in tables.observations.kinds]
    seen = set()
    for i, (turn, written, video, sizes, images) in enumerate(cases):
        kind, integers, views = reference(turn.call, written, video, sizes, images, config)
        seen.add(kind)
        assert kinds[int(result.message.kind[i])] == kind, (turn, video, sizes, images)
        assert result.message.integers[i, : len(integers)].tolist() == integers, (turn, kind)
        assert int(result.num_images[i]) == len(views)
        assert int(np.sum(result.message.pads[i])) == sum(h * w // 784 for _, _, (h, w) in views)
        for j, (where, box, shown) in enumerate(views):
            assert int(result.source.image[i, j]) == where
            assert tuple(result.source.region[i, j].tolist()) == tuple(box), turn
            assert tuple(result.source.size[i, j].tolist()) == shown
    assert seen >= set(kinds) - {"select_frames: too many frames"}


def calls_of(*boxes, target=1):
    """Parsed calls, one a row; a box is the text between its brackets."""
    call = (
        '<tool_call>{"name": "crop_image_normalized", "arguments": {"bbox_2d": [%s], "target_image": %d}}</tool_call>'
    )
    return stack_calls([parse_turn(call % (box, target)) for box in boxes])


def run(calls, history, sizes, config):
    """Rows of one image each, of (height, width) `sizes`."""
    rows = len(sizes)
    seen = Seen(history, jnp.zeros(rows, bool), jnp.array(sizes)[:, None], jnp.ones(rows, jnp.int32))
    return jax.jit(execute, static_argnums=(3, 4))(calls, seen, scripted_model.token_tables(), 1, config)


def test_pixels_are_those_of_the_picture_that_is_shown():
    """A picture larger than its budget, then a crop of it, whose size the observation announces."""
    config, sizes = RolloutConfig(pad=0.0), [(2000, 3000)] * 2
    one = jnp.ones(2, jnp.int32)
    history = first_history(jnp.array(sizes, jnp.int32)[:, None], one, one == 0, config)
    assert history.size[0, 0].tolist() == [1008, 1512]
    calls = calls_of("756, 504, 1512, 1008", "0.5, 0.5, 1, 1")
    result = run(calls, history, sizes, config)
    assert result.source.region[:, 0].tolist() == [[1500, 1000, 3000, 2000]] * 2
    assert result.message.integers[0, :2].tolist() == [1064, 700]
    history = add_to_history(history, record_calls(calls, result, one == 1, RELEASED), jnp.zeros(2, jnp.int32))
    result = run(calls_of("532, 350, 1064, 700", "0.5, 0.5, 1, 1", target=2), history, sizes, config)
    assert result.source.region[:, 0].tolist() == [[2250, 1500, 3000, 2000]] * 2


@pytest.mark.parametrize("pad", [0.0, 0.1])
def test_edges_are_the_released_ones_to_the_pixel(pad):
    """`CropImageNormalized.call` and Pillow's crop, of pictures that are shown as they are; 256 boxes of each kind."""
    rng, rows = np.random.default_rng(1), 256
    config = RolloutConfig(pad=pad, one_is_absolute=True, min_crop=0)
    for digits in (1, 2, 3, 4, 6, None):
        sizes = rng.integers(1, 130, (rows, 2)) * 28
        corners = np.sort(rng.random((rows, 2, 2)), axis=1).reshape(rows, 4)
        boxes = corners.round(digits).tolist() if digits else (corners * sizes[:, [1, 0, 1, 0]] + 1).round().tolist()
        whole = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1)
        history = ImageHistory(np.zeros((rows, 1), np.int32), whole[:, None], sizes[:, None], np.ones(rows, np.int32))
        history = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), history)
        result = run(calls_of(*(", ".join(map(repr, box)) for box in boxes)), history, sizes.tolist(), config)
        compared = 0
        for i, (box, (height, width)) in enumerate(zip(boxes, sizes.tolist(), strict=True)):
            if result.num_images[i]:
                assert result.source.region[i, 0].tolist() == released_edges(box, width, height, pad), (
                    box,
                    width,
                    height,
                )
                compared += 1
        assert compared > rows // 2


def released_edges(box, img_x, img_y, padding):
    """The released lines, and the rounding of Pillow's `Image.crop`."""
    x1, y1, x2, y2 = box
    if not (x1 < 1 and y1 < 1 and x2 < 1 and y2 < 1):
        x1, y1, x2, y2 = x1 / img_x, y1 / img_y, x2 / img_x, y2 / img_y
    x1, y1, x2, y2 = x1 - padding, y1 - padding, x2 + padding, y2 + padding
    x1, y1, x2, y2 = (min(max(0, x), 1) for x in (x1, y1, x2, y2))
    return list(map(int, map(round, (x1 * img_x, y1 * img_y, x2 * img_x, y2 * img_y))))


def test_a_sliver_cannot_be_shown():
    regions = jnp.array([[0, 0, 6001, 30], [0, 0, 6000, 30], [5, 5, 5, 9]], jnp.int32)
    size, fits = shown_size(regions, Sizes(28, 784, 2000 * 784, 10_000))
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
