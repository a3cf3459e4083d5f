"""Packed rows are the same traces: nothing changes for any token of them."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.models.inputs import Visual
from pixel_jax.training.batch import PackingConfig, first_fit, pack, pack_rows
from pixel_jax.training.losses import PolicyLossConfig, policy_loss, sft_loss, turn_temperature
from pixel_jax.training.steps import ForwardConfig, trajectory_logprobs

CONFIG = ForwardConfig(remat=False)


@pytest.fixture
def traces(batch):
    """Rows of one, two and three slices: an image, two images, a video of two slices that share a frame."""
    rows, random = len(batch.tokens), np.random.default_rng(1)
    tokens = batch.tokens.copy()
    slices = np.full((rows, 3, 2), -1, np.int32)
    grids = np.zeros((rows, 3, 3), np.int32)
    seconds = np.zeros((rows, 3), np.float32)
    for row in range(rows):
        slices[row, 0], grids[row, 0] = 0, (1, 4, 4)
        if row % 3 == 1:  # a second image, in the second turn's observation
            tokens[row, 14:16] = 60
            tokens[row, 2:4] = 50  # the first one is smaller
            grids[row, 0] = (1, 2, 4)
            slices[row, 1], grids[row, 1] = 1, (1, 2, 4)
        if row % 3 == 2:
            tokens[row, 2:6] = 61
            slices[row, :2], grids[row, 0], seconds[row, 0] = [(0, 1), (1, 1)], (2, 2, 4), 0.5
    patches = random.integers(0, 256, (rows, 2, 16, 588)).astype(np.uint8)
    visual = Visual(patches, slices, grids, seconds)
    return batch._replace(tokens=tokens, visual=visual)


@pytest.fixture(scope="module")
def scored():
    return jax.jit(lambda model, batch: trajectory_logprobs(model, batch, CONFIG))


def test_tokens_have_the_log_probabilities_that_they_have_alone(model, traces, scored):
    packed = pack(traces, length=64, slices=5)
    assert len(packed.tokens) < len(traces.tokens) / 2
    alone, together = scored(model, traces), scored(model, packed)
    values = []
    for (logprobs, entropy), rows in ((alone, traces), (together, packed)):
        chosen = [(np.asarray(x)[rows.loss_mask], rows.tokens[rows.loss_mask]) for x in (logprobs, entropy)]
        order = np.lexsort((chosen[0][0], chosen[0][1]))
        values.append([x[0][order] for x in chosen])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5, atol=1e-5)
    shuffled = scored(model, packed._replace(segments=np.zeros_like(packed.segments)))
    assert (
        np.abs(np.asarray(shuffled[0] - together[0])[packed.loss_mask]).max() > 0.1
    )  # the mask is what keeps them apart


@pytest.mark.parametrize("normalizer", ["row", "token"])
def test_the_loss_is_that_of_the_rows(model, traces, scored, normalizer):
    losses = []
    for rows in (traces, pack(traces, length=64, slices=5)):
        loss = sft_loss(
            *scored(model, rows), rows.loss_mask, rows.weight, normalizer=normalizer, segments=rows.segments
        )
        losses.append((loss.total / loss.denominator, loss.denominator, loss.sums["nll"], loss.sums["tokens"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("normalizer", ["constant", "token"])
def test_the_policy_loss_is_that_of_the_rows(model, traces, scored, normalizer):
    """Every trace with its own advantage; rows of padding add nothing."""
    losses = []
    for rows in (traces, pack_rows(traces, PackingConfig(length=64, slices=5, rows=4))):
        logprobs, entropy = scored(model, rows)
        loss = policy_loss(
            logprobs,
            entropy,
            rows.old_logprobs,
            rows.logprobs,
            rows.advantage,
            rows.loss_mask,
            rows.weight,
            PolicyLossConfig(normalizer=normalizer),
            segments=rows.segments,
        )
        losses.append((loss.total, loss.denominator, *loss.sums.values()))
    assert (rows.weight == 0).any() and len(rows.tokens) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_turns_are_counted_in_each_trace(batch):
    alone = turn_temperature(batch.loss_mask, 1.5, 2.5)
    assert {float(alone[batch.loss_mask].min()), float(alone[batch.loss_mask].max())} == {1.5, 2.5}
    # rows of one length keep their order when packed
    packed = pack(batch._replace(valid=np.ones_like(batch.valid)), length=3 * batch.tokens.shape[1])
    together = turn_temperature(packed.loss_mask, 1.5, 2.5, packed.segments)
    at = [(i, segment) for i in range(len(packed.tokens)) for segment in range(packed.segments[i].max() + 1)]
    for row, (i, segment) in enumerate(at):
        own = packed.segments[i] == segment
        chosen = packed.loss_mask[i] & own
        np.testing.assert_array_equal(np.asarray(together)[i][chosen], np.asarray(alone)[row][batch.loss_mask[row]])


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 4)), min_size=1, max_size=40))
def test_every_item_lies_in_one_bin_that_has_room(sizes):
    sizes, room = np.array(sizes), np.array([20, 4])
    bins = first_fit(sizes, room)
    assert sorted(item for rows in bins for item in rows) == list(range(len(sizes)))
    loads = np.array([sizes[rows].sum(axis=0) for rows in bins])
    assert (loads <= room).all()
    # first fit: no bin could have been spared by putting its first item into an earlier one
    for i in range(1, len(bins)):
        assert (loads[:i] + sizes[bins[i]].max(axis=0) > room).any()


def test_what_cannot_be_packed_is_named(batch, traces):
    with pytest.raises(ValueError, match="rows of weight 0.5"):
        pack(batch._replace(weight=np.full(len(batch.weight), 0.5, np.float32)))
    with pytest.raises(ValueError, match=r"row \d has \d+ tokens and \d slices, the capacity is 10 and"):
        pack(traces, length=10)
