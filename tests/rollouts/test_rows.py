"""Work on some of the rows only, and on the rows that wait while others write."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax.rollouts import decode_loop
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.rows import for_chunks, fullest
from pixel_jax.rollouts.shapes import BatchShape, RolloutShape

LOCAL, ROWS = 5, 10


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3, 99]))
def test_each_busy_row_is_worked_on_once(busy, shards, size):
    busy = np.array(busy)
    x, shared = jnp.arange(1.0, ROWS + 1)[:, None], jnp.arange(2.0)  # five neighbouring rows share an entry

    def body(chunk, carry):
        done, turns = carry
        mine = chunk.take(x) + 100 * chunk.take(shared)[:, None]
        wanted = chunk.take(jnp.array(busy))[:, None]  # what fills up the last chunk is not
        return chunk.put(done, chunk.take(done) + wanted * mine), turns + 1

    done, turns = for_chunks(jnp.array(busy), shards, size, body, (jnp.zeros((ROWS, 1)), 0))
    expected = np.where(busy, np.arange(1, ROWS + 1) + 100 * (np.arange(ROWS) // LOCAL), 0)
    np.testing.assert_array_equal(done[:, 0], expected)
    most = max(part.sum() for part in np.split(busy, shards))
    assert int(fullest(jnp.array(busy), shards)) == most
    assert int(turns) == -(-most // min(size, ROWS // shards))


@pytest.mark.parametrize(
    "waiting, free, writes",
    [(0, 0, True), (3, 0, True), (2, 1, True), (4, 0, False), (2, 2, False), (0, 4, False), (16, 0, False)],
)
def test_rows_are_answered_while_others_write(waiting, free, writes):
    """Of 16 rows of a shard, four that wait for pixels or leave room for another row are enough."""
    place = jnp.arange(16)
    status = jnp.where(place < waiting, decode_loop.WAITING, decode_loop.WRITING)
    takes = (place >= waiting) & (place < waiting + free)
    status = jnp.where(takes, decode_loop.DONE, status)
    state = decode_loop.RowState(**{name: None for name in decode_loop.RowState._fields})._replace(
        status=jnp.tile(status, 2)
    )
    config, shape = RolloutConfig(observe_chunk=2), RolloutShape(BatchShape(8, 1, 1, 4), (), 2)
    assert bool(decode_loop.writes_on(state, jnp.tile(takes, 2), config, shape)) == writes


@pytest.mark.parametrize("writing, writes", [([16, 16], True), ([2, 3], True), ([2, 2], False), ([0, 1], False)])
def test_all_end_their_turns_where_a_tail_costs_little(writing, writes):
    """Of two shards of 16 rows, those of the one that has more writing are decoded together until they are a tail of two."""
    status = jnp.concatenate([jnp.where(jnp.arange(16) < n, decode_loop.WRITING, decode_loop.WAITING) for n in writing])
    state = decode_loop.RowState(**{name: None for name in decode_loop.RowState._fields})._replace(status=status)
    config, shape = RolloutConfig(observe_chunk=2, tail_rows=2), RolloutShape(BatchShape(8, 1, 1, 4), (), 2)
    assert bool(decode_loop.writes_on(state, jnp.zeros(32, bool), config, shape)) == writes
