"""Scenes and clips: named by their seed, made of photographs and digits of one split, and what is drawn is what they say."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pixel_jax.quickstart import miniature
from pixel_jax.quickstart.miniature import CARD, FRAME_SIDE, NUM_FRAMES, SIDE, SPLITS, SceneConfig

CONFIG = SceneConfig(small_share=0.5)


def scenes(count, split="test", config=CONFIG, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [miniature.draw_scene(rng, split, config, **options) for _ in range(count)]


def is_card(image):
    return (image == CARD).all(axis=-1)


def read(written, split):
    """The digit whose ink, as the data set has it, is nearest to the written pixels uint8 [n, n, 3]."""
    ink, labels = miniature.digits(split)
    assert (written == written[..., :1]).all()  # grey
    seen = 255.0 - np.asarray(Image.fromarray(written).resize((8, 8), Image.BOX))[..., 0]
    # Bicubic there and box back leaves some blur, which all digits share.
    distance = np.square(ink.reshape(-1, 64).astype(float) - seen.reshape(64)).sum(axis=1)
    return labels[np.argmin(distance)]


def occurs_in(view, photo):
    """Whether the pixels uint8 [h, w, 3] are somewhere in the photograph."""
    height, width = view.shape[:2]
    last_y, last_x = photo.shape[0] - height, photo.shape[1] - width
    found = np.argwhere((photo[: last_y + 1, : last_x + 1] == view[0, 0]).all(axis=-1))
    for dy, dx in np.random.default_rng(0).integers(0, (height, width), (60, 2)):
        found = found[(photo[found[:, 0] + dy, found[:, 1] + dx] == view[dy, dx]).all(axis=-1)]
    return any((photo[y : y + height, x : x + width] == view).all() for y, x in found)


def test_a_scene_is_named_by_its_seed():
    first, again, other = (scenes(4, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert a[1:] == b[1:]
    assert all((a.image != b.image).any() for a, b in zip(first, other, strict=True))
    clips = [miniature.draw_clip(np.random.default_rng(5), "test", CONFIG) for _ in range(2)]
    np.testing.assert_array_equal(clips[0].frames, clips[1].frames)
    # A scene is the caller's to change: the photograph behind it stays as it is.
    before = miniature.photographs("test")[0].copy()
    for scene in first:
        scene.image[:] = 0
    np.testing.assert_array_equal(miniature.photographs("test")[0], before)


def test_digits_are_split_and_none_is_lost():
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = miniature.digits("train"), miniature.digits("test")
    assert len(train) == miniature.TRAIN_DIGITS and len(train) + len(test) == len(load_digits().target)
    together = np.concatenate([train, test]).reshape(-1, 64)
    ink = np.round(load_digits().images.reshape(-1, 64) * (255 / 16)).astype(np.uint8)
    # As many copies of each digit as the data set has: so none is in both parts.
    np.testing.assert_array_equal(together[np.lexsort(together.T)], ink[np.lexsort(ink.T)])
    assert set(train_labels) == set(test_labels) == set(range(10))


def test_photographs_are_split():
    assert not set(SPLITS["train"]) & set(SPLITS["test"])
    test, train = miniature.photographs("test"), miniature.photographs("train")
    assert len(test) == len(SPLITS["test"]) and len(train) == len(SPLITS["train"]) * miniature.TINTS
    for photo in (*test, *train):
        assert photo.dtype == np.uint8 and photo.ndim == 3 and 480 <= min(photo.shape[:2]) <= 640
    for split, mine, others in (("test", test, train), ("train", train, test)):
        for scene in scenes(3, split, small=True):
            # The quarter of the scene that lies farthest from the card's middle has nothing of it.
            x, y = ((scene.card[i] + scene.card[i + 2]) // 2 for i in (0, 1))
            top, left = (0 if y > SIDE / 2 else SIDE - 120), (0 if x > SIDE / 2 else SIDE - 120)
            corner = scene.image[top : top + 120, left : left + 120]
            assert any(occurs_in(corner, photo) for photo in mine)
            assert not any(occurs_in(corner, photo) for photo in others)
    with pytest.raises(ValueError, match="'validation'.*'test', 'train'"):
        miniature.draw_scene(np.random.default_rng(0), "validation", CONFIG)


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_boxes_and_label_agree(split):
    for scene in scenes(30, split):
        assert scene.image.shape == (SIDE, SIDE, 3) and scene.image.dtype == np.uint8
        (x1, y1, x2, y2), (a1, b1, a2, b2) = scene.card, scene.digit
        assert 0 <= x1 < a1 < a2 < x2 <= SIDE and 0 <= y1 < b1 < b2 < y2 <= SIDE
        assert abs((a1 - x1) - (x2 - a2)) <= 1 and abs((b1 - y1) - (y2 - b2)) <= 1  # in the middle
        inside = is_card(scene.image[y1:y2, x1:x2])
        inside[b1 - y1 : b2 - y1, a1 - x1 : a2 - x1] = True
        assert inside.all()
        assert not is_card(scene.image[b1:b2, a1:a2]).any()
        assert read(scene.image[b1:b2, a1:a2], split) == scene.label


def test_sizes_are_those_of_the_configuration():
    config = SceneConfig(small_card=(70, 72), small_digit=(30, 31), large_card=(300, 302), large_margin=0.1)
    for small, sides, inner in ((True, {70, 71, 72}, {30, 31}), (False, {300, 301, 302}, {240, 241, 242})):
        drawn = scenes(60, config=config, small=small)
        assert all(scene.small == small for scene in drawn)
        for i in (0, 1):  # both ends of an interval are drawn, and nothing beyond them
            assert {scene.card[i + 2] - scene.card[i] for scene in drawn} == sides
            assert {scene.digit[i + 2] - scene.digit[i] for scene in drawn} == inner


def test_shares_and_frequencies():
    drawn = scenes(400, config=dataclasses.replace(CONFIG, small_share=0.2, frequencies=(0, 3, 0, 0, 0, 9, 0, 0, 0, 0)))
    assert abs(np.mean([scene.small for scene in drawn]) - 0.2) < 0.08  # four standard errors
    labels = np.array([scene.label for scene in drawn])
    assert set(labels) == {1, 5} and abs(np.mean(labels == 5) - 0.75) < 0.09
    shares = np.bincount([scene.label for scene in scenes(400)], minlength=10) / 400
    assert (np.abs(shares - 0.1) < 0.06).all()  # the data set has about as many of each


def test_a_clip_shows_the_card_once():
    targets = set()
    for seed in range(24):
        clip = miniature.draw_clip(np.random.default_rng(seed), "test", CONFIG)
        assert clip.frames.shape == (NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3) and clip.frames.dtype == np.uint8
        cards = is_card(clip.frames).sum(axis=(1, 2))
        assert (np.flatnonzero(cards > 1000) == clip.target).all() and (cards > 1000).sum() == 1
        targets.add(clip.target)
        frame = clip.frames[clip.target]
        rows, columns = np.flatnonzero(is_card(frame).any(axis=1)), np.flatnonzero(is_card(frame).any(axis=0))
        side = rows[-1] + 1 - rows[0]
        inner = round(side * (1 - 2 * CONFIG.large_margin))
        top, left = rows[0] + (side - inner) // 2, columns[0] + (side - inner) // 2
        assert read(frame[top : top + inner, left : left + inner], "test") == clip.label
    assert targets == set(range(NUM_FRAMES))
