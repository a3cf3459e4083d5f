"""Packed rows: every trace once an epoch, the same tokens and pixels as alone, in batches that follow from the order alone."""

import collections
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.data.example import ReadReport
from pixel_jax.data.packed import PackedOrder, Packing
from pixel_jax.data.read import read_examples
from pixel_jax.data.shapes import AutoShapes, bucket_shapes, training_work
from pixel_jax.data.traces import TraceError, to_trajectories
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.training.batch import from_trajectories
from tests.data import released_files as files
from tests.rollouts import scripted_model
from tests.training.tiny_model import tiny_config

LARGEST = BatchShape(tokens=1024, images=6, slices=6, patches=16)


def test_buckets():
    assert bucket_shapes((), LARGEST) == (LARGEST,)
    small = bucket_shapes((1, 512), LARGEST)
    assert [x.tokens for x in small] == [1, 512, 1024] and [x.patches for x in small] == [8, 16, 16]
    for lengths in ((512, 256), (512, 512), (0,), (1024,)):
        with pytest.raises(ValueError, match="must rise and stay under the tokens of a trace, 1024"):
            bucket_shapes(lengths, LARGEST)


SIZES = st.lists(
    st.builds(BatchShape, *map(st.integers, (1, 1, 1, 1), (40, 4, 4, 9)), *map(st.just, (0, 0, False))),
    min_size=1,
    max_size=30,
)
BUCKETS = (BatchShape(10, 4, 4, 5), BatchShape(20, 4, 4, 9), BatchShape(40, 4, 4, 9))


@given(SIZES, st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_has_every_trace_once(sizes, size, seed):
    order = PackedOrder(sizes, BUCKETS, size, seed)
    seen, batches = collections.Counter(), 0
    while min((seen[i] for i in range(len(sizes))), default=0) < 2:
        rows = [order[batches * size + i] for i in range(size)]
        assert len({row.bucket for row in rows}) == 1
        for row in rows:
            load = np.sum([sizes[i][:3] for i in row.traces], axis=0)
            assert (load <= BUCKETS[row.bucket][:3]).all()
            assert all(sizes[i].patches <= BUCKETS[row.bucket].patches for i in row.traces)
            # a trace lies in the smallest bucket that has room for it
            assert all((np.array(sizes[i]) > BUCKETS[b]).any() for i in row.traces for b in range(row.bucket))
            seen.update(row.traces)
        batches += 1
    # Rows wait for a batch of their bucket, at most `size - 1` of each: nothing else is between the most and the fewest.
    rows_waiting = len(BUCKETS) * (size - 1)
    epochs = len(order.starts) - 1
    missing = sum(epochs - seen[i] for i in range(len(sizes)))
    assert 0 <= missing - sum(len(r.traces) for b in order.left[epochs] for r in b) <= len(sizes) * epochs
    assert sum(len(b) for b in order.left[epochs]) <= rows_waiting


def test_the_same_row_whoever_asks_and_whenever():
    random = np.random.default_rng(0)
    sizes = [BatchShape(int(x), 1, 1, 1) for x in random.integers(1, 41, 50)]
    make = lambda seed=0: PackedOrder(sizes, BUCKETS, 4, seed)
    straight = make()
    rows = [straight[i] for i in range(400)]
    assert len(straight.starts) > 5
    jumping = make()
    assert all(jumping[int(i)] == rows[i] for i in random.permutation(400)[:60])
    assert rows != [make(1)[i] for i in range(400)]
    with pytest.raises(
        ValueError, match="trace 1 takes 41 tokens and 1 picture, 1 patches each; there is room for 10 tokens"
    ):
        PackedOrder([sizes[0], BatchShape(41, 1, 1, 1)], BUCKETS, 4, 0)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Released traces over and over, under names of their own."""
    folder = tmp_path_factory.mktemp("released")
    found, _ = read_examples(files.write_traces(folder, [x for _ in range(3) for x in files.traces()]), turns=True)
    return [x._replace(id=f"{x.id}-{i}") for i, x in enumerate(found)]


def packing(examples, lengths=(384,), size=2, drop=False, largest=LARGEST):
    report = ReadReport("here", drop)
    buckets = bucket_shapes(lengths, largest)
    words = scripted_model.vocabulary()
    made = Packing(
        examples, words, scripted_model.token_tables(), scripted_model.CONFIG, buckets, size=size, seed=0, report=report
    )
    return made, report


@pytest.fixture(scope="module")
def packed(examples):
    """In two buckets, the lower half of the traces in the shorter one."""
    lengths = [len(row.ids) for row in packing(examples, ())[0].rows]
    return packing(examples, (int(np.median(lengths)),))[0]


def chosen_and_seen(batch):
    """Every trace of a batch as (tokens, which are learned, the patches it shows, grids): sorted, so comparable."""
    found = []
    segments = np.zeros_like(batch.tokens) if batch.segments is None else batch.segments
    for r in range(len(batch.tokens)):
        for segment in np.unique(segments[r][batch.valid[r]]):
            mine = batch.valid[r] & (segments[r] == segment)
            found.append((batch.tokens[r][mine].tolist(), batch.loss_mask[r][mine].tolist()))
    patches = sorted(x.tobytes() for x in batch.visual.patches.reshape(-1, batch.visual.patches.shape[-1]) if x.any())
    return sorted(found), patches


def test_packed_rows_are_the_traces(packed, examples):
    """An epoch of packed rows against the same traces made into one row each, by the functions of the quickstart."""
    rows = [place for bucket in packed.order.rows(0) for place in bucket]
    assert sorted(i for place in rows for i in place.traces) == list(range(len(examples)))
    assert len(rows) < len(examples) and len({place.bucket for place in rows}) == 2
    alone = to_trajectories(
        [x.trace(x.query()) for x in packed.examples],
        scripted_model.vocabulary(),
        scripted_model.token_tables(),
        scripted_model.CONFIG,
        LARGEST._replace(tokens=2048),
    )
    for place in rows:
        batch = packed.collate(iter([packed.load(place)]), 1)
        expected = from_trajectories(jax.tree.map(lambda x: x[list(place.traces)], alone))  # noqa: B023
        for ours, theirs in zip(chosen_and_seen(batch), chosen_and_seen(expected), strict=True):
            assert ours == theirs
        bucket = packed.buckets[place.bucket]
        assert batch.tokens.shape == (1, bucket.tokens) and batch.visual.slices.shape == (1, bucket.slices, 2)
        assert batch.visual.patches.shape[:3] == (1, bucket.images, bucket.patches)


def first(packed, count, index=0, processes=1, state=None):
    data = packed.batches(index, processes, threads=4, ahead=4)
    if state is not None:
        data.set_state(json.loads(json.dumps(state)))
    found, states = [], [data.get_state()]
    for _ in range(count):
        found.append(next(data))
        states.append(data.get_state())
    data.close()
    return found, states


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_batches_resume_anywhere_and_are_shared_by_processes(packed):
    whole, states = first(packed, 6)
    assert len({batch.tokens.shape for batch in whole}) == 2
    for done in range(1, 6, 2):
        same(first(packed, 6 - done, state=states[done])[0], whole[done:])
    parts = [first(packed, 6, index, 2)[0] for index in range(2)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        same(jax.tree.map(lambda *x: np.concatenate(x), *pieces), batch)


def test_padding_is_reported(packed):
    tokens = sum(len(row.ids) for row in packed.rows)
    capacity = sum(packed.buckets[place.bucket].tokens for rows in packed.order.rows(0) for place in rows)
    share = packed.padding()
    alone = share["tokens without packing"]
    assert share["tokens"] == pytest.approx(1 - tokens / capacity)
    assert alone == pytest.approx(1 - tokens / len(packed.rows) / 1024)
    seen = sum(t * h * w for row in packed.rows for t, h, w in row.grids)
    capacity = sum(packed.buckets[place.bucket][2] * 16 for rows in packed.order.rows(0) for place in rows)
    assert share["patches"] == pytest.approx(1 - seen / capacity)
    said = (
        f"{share['tokens']:.1%} of the tokens, {share['patches']:.1%} of the patches, {alone:.1%} of the tokens without"
    )
    assert share["tokens"] < alone and said in str(packed)
    assert "12 traces" in str(packing(packed.examples, ())[0])


def test_what_fits_no_shape_is_an_error_or_dropped_and_counted(examples):
    longest = max(len(row.ids) for row in packing(examples)[0].rows)
    tight = LARGEST._replace(tokens=longest - 1)
    with pytest.raises(TraceError, match=rf"SA1B-1-1 takes {longest} tokens .*there is room for .*config.trace_tokens"):
        packing(examples, (), largest=tight)
    made, report = packing(examples, (), drop=True, largest=tight)
    assert len(made.examples) == 9 and len(report.dropped) == 3
    # one that cannot be written out: the calls of a wave are answered together, and only it is at fault
    wordless = examples[0]._replace(id="wordless", turns=(examples[0].turns[-1], examples[0].turns[-1]))
    with pytest.raises(TraceError, match=r"wordless: turn 1 of a trace about 'What\?' is no call"):
        packing([*examples, wordless])
    made, report = packing([*examples[:3], wordless, *examples[3:]], drop=True)
    assert [x.id for x in made.examples] == [x.id for x in examples] and "wordless" in report.dropped[0]
    with pytest.raises(TraceError, match="no trace is left. .*1 rows dropped"):
        packing([wordless], drop=True)


def test_images_that_changed_are_noticed(packed):
    from pixel_jax.data.traces import render

    row = packed.rows[0]
    with pytest.raises(TraceError, match=r"has images \[\(9, 9, 3\)\], it was planned for \[\(120, 150, 3\)\]"):
        render(row, [np.zeros((9, 9, 3), np.uint8)])


def test_rows_of_shapes_that_are_worked_out(examples):
    """Every trace has a row, and what alone would fill the memory is named or left out."""
    work = training_work(tiny_config())
    takes = lambda shape: shape.tokens
    report = ReadReport("here", drop=True)
    given = scripted_model.vocabulary(), scripted_model.token_tables(), scripted_model.CONFIG
    longest = max(row.shape.tokens for row in packing(examples, ())[0].rows)
    made = Packing(examples, *given, AutoShapes(work, 2, longest, takes), size=2, seed=0, report=report)
    assert len(made.rows) == len(examples) and not report.dropped
    assert all(any(shape.holds(row.shape) for shape in made.buckets) for row in made.rows)
    for place in (place for bucket in made.order.rows(0) for place in bucket):
        shape, batch = made.load(place)
        assert batch.tokens.shape == (1, shape.tokens) and shape == made.buckets[place.bucket]
    by = AutoShapes(work, 2, longest - 1, takes)
    made = Packing(examples, *given, by, size=2, seed=0, report=report)
    assert len(made.rows) + len(report.dropped) == len(examples) and "config.rollout.max_pixels" in report.dropped[0]
    with pytest.raises(TraceError, match=r"takes \d+ tokens and .*; to tune on it would take 0.00 GiB of a device"):
        Packing(examples, *given, by, size=2, seed=0, report=ReadReport("here"))
