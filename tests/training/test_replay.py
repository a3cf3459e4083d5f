"""Selective sample replay: who is in, with what probability, and what a checkpoint keeps."""

import jax
import numpy as np
import pytest
from tiny_model import make_batch

from pixel_jax.rollouts.images import ragged
from pixel_jax.rollouts.materialize import PatchSource, VisualRecord
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import Views
from pixel_jax.training.batch import Rows, from_trajectories, pad_rows, take
from pixel_jax.training.replay import Replay, ReplayConfig, pack, stacked, unpack

SHAPE = BatchShape(24, 1, 1, 16, 64, 64)


def marked(rows, seed=0, advantage=None):
    """Rows whose first token says which they are; two neighbours are of one prompt."""
    batch = make_batch(rows, seed)
    random = np.random.default_rng(seed)
    pixels = [random.integers(0, 256, (28 + row, 40, 3)).astype(np.uint8) for row in range(0, rows, 2)]
    images = np.repeat(ragged([x] * (1 + i % 2) for i, x in enumerate(pixels)), 2)[:rows]
    views = Views(
        np.zeros((rows, 1), np.int32), random.integers(0, 28, (rows, 1, 4)), np.full((rows, 1, 2), 28, np.int32)
    )
    batch = batch._replace(visual=VisualRecord(PatchSource(views, None), *batch.visual[1:]))
    batch.tokens[:, 0] = 1000 * seed + np.arange(rows)
    if advantage is not None:
        batch = batch._replace(advantage=np.array(advantage, np.float32))
    return Rows(batch, images)


def draw(replay, rows, informative, shape=SHAPE):
    """What an update would train on."""
    entries = replay.select(rows, informative, shape)
    return None if entries is None else replay.batch(entries)


def assert_equal(a, b):
    """Rows, to the pixels of their images."""
    a, b = (jax.tree.map(lambda x: pixels(x) if np.asarray(x).dtype == object else x, rows) for rows in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def pixels(images):
    return [x.arrays for x in np.atleast_1d(images)]


def names(rows):
    return sorted(rows.batch.tokens[:, 0].tolist())


def test_informative_rows_are_all_in_and_the_rest_is_drawn():
    replay = Replay(ReplayConfig(), 0)
    rows = marked(8, advantage=[1, -1, 0.5, -0.5, 0, 0, 0, 0])
    chosen = draw(replay, rows, np.arange(8) < 4)
    assert len(chosen.images) == 8
    assert set(names(chosen)) == {0, 1, 2, 3}  # all of them, and replayed ones only from among them
    for name, row in zip(chosen.batch.tokens[:, 0], range(8), strict=True):
        assert_equal(take(chosen, row), take(rows, int(name)))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_probabilities_follow_the_advantage(exponent):
    replay = Replay(ReplayConfig(exponent=exponent, life="run"), 0)
    sizes = np.array([0.1, -0.2, 0.3, -0.4])
    draw(replay, marked(4, advantage=sizes), np.ones(4, bool))
    expected = np.abs(sizes) ** exponent / np.sum(np.abs(sizes) ** exponent)
    np.testing.assert_allclose(replay.probabilities(SHAPE), expected, rtol=1e-6)
    drawn = np.zeros(4)
    for _ in range(50):
        chosen = draw(replay, marked(100, seed=1), np.zeros(100, bool))
        drawn += np.bincount(chosen.batch.tokens[:, 0], minlength=4)
    np.testing.assert_allclose(drawn / drawn.sum(), expected, atol=0.03)  # s.e. .007


def test_a_full_batch_is_not_diluted():
    replay = Replay(ReplayConfig(), 0)
    draw(replay, marked(4, seed=1), np.ones(4, bool))
    assert names(draw(replay, marked(4, seed=2), np.ones(4, bool))) == [2000, 2001, 2002, 2003]


def test_an_episode_ends_and_a_run_does_not():
    for life, replayed in (("episode", False), ("run", True)):
        replay = Replay(ReplayConfig(life=life, episode=2), 0)
        draw(replay, marked(4, seed=1), np.ones(4, bool))
        assert names(draw(replay, marked(4, seed=2), np.zeros(4, bool)))[0] >= 1000
        assert bool(replay.rows) == replayed
        third = draw(replay, marked(4, seed=3), np.zeros(4, bool))
        assert (third is not None) == replayed


def test_the_oldest_leave_first():
    replay = Replay(ReplayConfig(capacity=3), 0)
    draw(replay, marked(5), np.ones(5, bool))
    assert [int(entry.row.batch.tokens[0]) for entry in replay.rows] == [2, 3, 4]


def test_repeat_and_none():
    rows, some = marked(7), np.array([1, 0, 0, 1, 0, 1, 0], bool)
    repeated = names(draw(Replay(ReplayConfig(kind="repeat"), 0), rows, some))
    assert set(repeated) == {0, 3, 5} and max(map(repeated.count, {0, 3, 5})) == 3
    assert draw(Replay(ReplayConfig(kind="repeat"), 0), rows, np.zeros(7, bool)) is None
    assert names(draw(Replay(ReplayConfig(kind="none"), 0), rows, some)) == list(range(7))
    assert draw(Replay(ReplayConfig(), 0), rows, np.zeros(7, bool)) is None


def test_a_restored_buffer_draws_the_same():
    replay = Replay(ReplayConfig(life="run"), 5)
    draw(replay, marked(6, seed=1), np.arange(6) < 3)
    copy = Replay(ReplayConfig(life="run"), 99)
    copy.set_state(replay.get_state())
    for _ in range(3):
        a, b = (draw(r, marked(6, seed=2), np.arange(6) < 2) for r in (replay, copy))
        assert_equal(a, b)
    empty = Replay(ReplayConfig(), 0)
    empty.set_state(Replay(ReplayConfig(), 3).get_state())
    assert not empty.rows


@pytest.mark.parametrize("kind", ["ssr", "dynamic"])
def test_an_update_is_of_rows_of_one_room(kind):
    """Rollouts about images and about videos differ in shape: what is replayed, and restored, is of the shape of the rest."""
    replay = Replay(ReplayConfig(kind=kind, life="run"), 0)
    stills, clips, clip = marked(4, seed=1), marked(4, seed=2), SHAPE._replace(video=True)
    first = draw(replay, stills, np.arange(4) < 2)
    copy = Replay(ReplayConfig(kind=kind, life="run"), 1)
    copy.set_state(replay.get_state())
    second, again = (draw(x, clips, np.arange(4) < 1, clip) for x in (replay, copy))
    if kind == "dynamic":  # which waits for four of a kind
        assert first is second is again is None
        assert {x // 1000 for x in names(draw(replay, clips, np.arange(4) < 3, clip))} == {2} and not replay.rows
        return
    assert {x // 1000 for x in names(first)} == {1} and set(names(second)) == {2000}
    third, restored = (draw(x, stills, np.zeros(4, bool)) for x in (replay, copy))
    assert {x // 1000 for x in names(third)} == {1}
    assert_equal((second, third), (again, restored))


def test_images_are_kept_and_sent_once_however_many_rows_have_them():
    replay, rows = Replay(ReplayConfig(), 0), marked(4)
    draw(replay, rows, np.ones(4, bool))
    kept = [entry.row for entry in replay.rows]
    images = [row.images for row in kept]
    assert images[0] is images[1] and images[2] is images[3] and images[0] is rows.images[0]
    assert not any(
        np.shares_memory(kept[0].batch.tokens, x) for x in (rows.batch.tokens, kept[1].batch.tokens)
    )  # the batch can go
    assert stacked(kept)["pixels"].size == 28 * 40 * 3 + 2 * 30 * 40 * 3
    sent = unpack(pack(dict(zip("abcd", kept, strict=True))))
    assert_equal([sent[name] for name in "abcd"], kept)
    assert sent["a"].images is sent["b"].images
    assert pack({}) == b"" and unpack(b"") == {}


def test_padding_weighs_nothing():
    batch = pad_rows(make_batch(3), 5)
    assert batch.tokens.shape[0] == 5 and batch.weight.tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="6 rows to 5"):
        pad_rows(make_batch(6), 5)


def test_a_batch_from_trajectories_takes_the_samplers_log_probabilities():
    rows = make_batch(3)
    batch = from_trajectories(rows)  # has the fields a trajectory has
    assert batch.old_logprobs is rows.logprobs and batch.weight.tolist() == [1, 1, 1]
    assert (batch.advantage == 0).all()
