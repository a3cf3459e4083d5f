"""A rollout in steps: with its state in between, prompts that are admitted on the way, and the same bits in the end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.parallel import make_mesh, shard
from pixel_jax.rollouts import decode_loop
from pixel_jax.rollouts.prompts import build_prompts, tables
from pixel_jax.rollouts.queue import NOT_WAITING
from pixel_jax.rollouts.rollout import _advance, admit, advance, begin, finish, finished, rollout
from pixel_jax.rollouts.trajectory import NO_IMAGE, CallStatus, take_prompts, take_rows, to_host
from pixel_jax.tools import CROP_IMAGE
from tests.rollouts import scripted_model

KEY = jax.random.key(7)
SMALL = dataclasses.replace(scripted_model.CONFIG, group_size=2, max_response=256, max_calls=2, observe_chunk=1)
QUEUED = dataclasses.replace(SMALL, in_flight=2)
TAIL = dataclasses.replace(SMALL, tail_rows=3)
BUDGETS = (1, 3, 7, 1000)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def prompts(*which):
    """Of the six that there are, images and videos in turn, under their own uids."""
    return take_prompts(scripted_model.prompts(6, config=SMALL, video=True), list(which))


@functools.cache
def whole(config, *which):
    """What the single program makes of these prompts."""
    return to_host(rollout(scripted_model.model(), prompts(*which), KEY, config))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def through_the_host(state):
    """The state as NumPy arrays and back."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [np.array(x) for x in leaves])


def run(state, budget, between=lambda state: state):
    """The state when all rows are done, and after how many calls of `advance` that is."""
    for calls in range(1, 1000):
        state = advance(scripted_model.model(), state, budget)
        if finished(state).all():
            return state, calls
        state = between(state)
    raise AssertionError("the rollout does not end")


@pytest.mark.parametrize("config", [QUEUED, slow(SMALL), slow(TAIL)], ids=["queue", "all", "tail"])
def test_pieces_come_to_the_whole(config):
    expected = whole(config, 0, 1, 2, 3)
    assert (expected.calls.status == CallStatus.DONE).sum() >= 3 and len(set(expected.num_calls.tolist())) >= 3
    began = begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, config)
    before, counts = jax.tree.map(np.array, began), []
    for budget in BUDGETS:
        state, count = run(began, budget, through_the_host if budget == 3 else lambda state: state)
        same(to_host(finish(state)), expected)
        counts.append(count)
    assert counts == sorted(counts, reverse=True) and counts[0] > 2 * counts[1] > 6 and counts[-1] == 1
    same(began, before)  # the state that all of it began with is still there


@pytest.mark.slow
@pytest.mark.parametrize("config", [QUEUED, SMALL, TAIL], ids=["queue", "all", "tail"])
def test_what_was_cut_short_goes_on_without_a_budget(config):
    began = begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, config)
    for budget in (0, 1, 5, 20):
        some = advance(scripted_model.model(), began, budget)
        if budget == 20:  # in memory that is given away
            state = advance(scripted_model.model(), some, donate=True)
            assert all(x.is_deleted() for x in some.rows.cache.k) and not some.prompts.buffers.is_deleted()
        else:
            state = advance(scripted_model.model(), some)
        same(to_host(finish(state)), whole(config, 0, 1, 2, 3))


def test_a_budget_counts_tokens():
    state = begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, QUEUED)
    same(advance(scripted_model.model(), state, 0), state)
    written = [
        np.asarray(advance(scripted_model.model(), state, budget).rows.loss_mask).sum(axis=1) for budget in (1, 4)
    ]
    assert (written[0] == 1).all() and written[1].max() == 4 and written[1].min() >= 1
    some = advance(scripted_model.model(), state, 4)
    same(advance(scripted_model.model(), some, 0), some)
    done, _ = run(state, 1000)
    same(advance(scripted_model.model(), done, 7), done)
    with pytest.raises(ValueError, match="budget -1 is negative"):
        advance(scripted_model.model(), state, -1)


@pytest.mark.parametrize("config", [QUEUED, slow(SMALL)], ids=["queue", "all"])
def test_rows_can_be_read_while_they_write(config):
    """What `finish` says on the way is a beginning of what it says in the end."""
    state, seen, expected = (
        begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, config),
        0,
        whole(config, 0, 1, 2, 3),
    )
    width = state.prompts.tokens.shape[1]
    for _ in range(4):
        state = advance(scripted_model.model(), state, 7)
        now = to_host(finish(state))
        there = now.valid[:, width:]
        assert there.sum() > seen
        seen = there.sum()
        same(now.tokens[:, width:][there], expected.tokens[:, width:][there])
        done = now.stop >= 0
        same(take_rows(now, done), take_rows(expected, done))
        same(finished(state), done.reshape(4, -1).all(axis=1))
    assert 0 < done.sum()


def test_one_program_for_all_budgets():
    state = begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, QUEUED)
    before = _advance._cache_size()
    for budget in (1, np.int32(2), jnp.int32(3)):
        state = advance(scripted_model.model(), state, budget)
    assert _advance._cache_size() - before <= 1


def test_steps_are_traced():
    """`advance`, `admit`'s program and `finish` inside one of the caller's."""
    state = begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, QUEUED)
    both = jax.jit(lambda model, state, budget: finish(advance(model, state, budget)))
    made = jax.eval_shape(both, scripted_model.model(), state, 3)
    assert made.tokens.shape == (8, state.prompts.tokens.shape[1] + QUEUED.max_response)


@pytest.mark.parametrize(
    "in_flight, capacity, mesh", [(2, 4, None), slow(None, 4, None), slow(None, 4, MESH), slow(4, 8, MESH)]
)
def test_prompts_are_admitted_on_the_way(in_flight, capacity, mesh):
    """Six prompts go through fewer places, some empty at first; a row is the same whenever and wherever its prompt came."""
    config = dataclasses.replace(QUEUED, in_flight=in_flight)
    model = shard(scripted_model.model(), make_mesh(mesh)) if mesh else scripted_model.model()
    state = begin(model, prompts(5, 1, 0), KEY, config, capacity=capacity)
    at, waits, collected = {0: 5, 1: 1, 2: 0}, [2, 4, 3], {}
    while at:
        state = advance(model, state, 5)
        now, done = to_host(finish(state)), np.flatnonzero(finished(state)).tolist()
        for place in done:
            if place in at:
                collected[at.pop(place)] = take_rows(now, now.prompt == place)
        free = [place for place in reversed(range(capacity)) if place not in at]
        if waits and free:
            came, places = waits[:2][: len(free)], free[:2][: len(waits)]
            state = admit(state, places, prompts(*came))
            at |= dict(zip(places, came, strict=True))
            waits = waits[len(came) :]
            assert not finished(state)[places].any()
            now = to_host(finish(state))
            assert (now.stop[np.isin(now.prompt, places)] == -1).all()
            state = through_the_host(state)
    assert sorted(collected) == [0, 1, 2, 3, 4, 5]
    for which in ((0, 1, 2, 3), (2, 3, 4, 5)):
        expected = whole(QUEUED, *which)
        for i, prompt in enumerate(which):
            mine, rows = take_rows(expected, expected.prompt == i), collected[prompt]
            same(rows._replace(prompt=mine.prompt, logprobs=None), mine._replace(logprobs=None))
            np.testing.assert_allclose(rows.logprobs, mine.logprobs, atol=2e-5)


def test_who_came_first_is_read_first():
    """The order of places says nothing."""
    state = begin(scripted_model.model(), prompts(0, 1), KEY, QUEUED, capacity=4)
    for place, prompt in ((3, 2), (2, 3)):
        state = admit(state, [place], prompts(prompt))
    waiting = []
    while not finished(state).all():
        state = advance(scripted_model.model(), state, 1)
        now = np.flatnonzero(np.asarray(state.queue.order) != NOT_WAITING).tolist()
        waiting += [now] * (now not in waiting)
    assert waiting in ([[2, 3], [2], []], [[2, 3], []])


def test_an_empty_place_has_rows_that_say_nothing():
    state = begin(scripted_model.model(), prompts(0, 1), KEY, QUEUED, capacity=4)
    state = advance(scripted_model.model(), state, 1000)
    assert finished(state).tolist() == [True, True, False, False]
    made, expected = to_host(finish(state)), whole(QUEUED, 0, 1, 2, 3)
    same(take_rows(made, slice(0, 4)), take_rows(expected, slice(0, 4)))
    nothing = take_rows(made, slice(4, None))
    assert not nothing.valid.any() and (nothing.stop == -1).all() and (nothing.calls.status == CallStatus.NONE).all()
    visual = nothing.visual
    assert (visual.source.views.image == NO_IMAGE).all() and not visual.source.views.size.any()
    assert not visual.grids.any() and (visual.slices == -1).all()


def test_misuse_is_named():
    words, known = scripted_model.vocabulary(), scripted_model.token_tables()
    state, one = begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, QUEUED), prompts(4)
    same(admit(state, [], prompts()), state)
    with pytest.raises(ValueError, match=r"prompts \[2\] are not done: `advance` until `finished`; free are \[\]"):
        admit(state, [2], one)
    with pytest.raises(ValueError, match=r"indices \[4\] do not exist: the state has 0 to 3"):
        admit(state, [4], one)
    with pytest.raises(ValueError, match=r"indices \[1, 1\] for 2 prompts"):
        admit(state, [1, 1], prompts(4, 5))
    with pytest.raises(
        ValueError, match=r"prompts of 96 tokens and 2 pictures of 192 x 192 .* in a rollout of 96 tokens and 3"
    ):
        admit(state, [0], scripted_model.prompts(1, config=SMALL))
    with pytest.raises(ValueError, match=r"for the tools \['crop_image_normalized'\] in a rollout with"):
        admit(state, [0], one._replace(tables=tables(words, (CROP_IMAGE,))))
    with pytest.raises(ValueError, match=r"prompts \[0\] have no tokens"):
        admit(state, [0], one._replace(length=np.zeros(1, np.int32)))
    with pytest.raises(ValueError, match="capacity 3 is less than the 4 prompts"):
        begin(scripted_model.model(), prompts(0, 1, 2, 3), KEY, QUEUED, capacity=3)
    stills = build_prompts(scripted_model.queries(2), words, known, SMALL, shape=one.shape._replace(video=False))
    with pytest.raises(ValueError, match="videos in a rollout that began without any: have one among the prompts"):
        admit(begin(scripted_model.model(), stills, KEY, SMALL), [0], prompts(1))


def test_without_a_budget_nothing_is_counted():
    """In the single program the rows' own state, and nothing else, is carried from token to token."""
    nothing = decode_loop.RowState(**dict.fromkeys(decode_loop.RowState._fields))
    state = nothing._replace(status=jnp.array([decode_loop.WRITING, decode_loop.DONE]))

    def loop(left):
        writing = lambda state: jnp.any(state.status == decode_loop.WRITING)
        ends = lambda state: state._replace(status=jnp.full_like(state.status, decode_loop.DONE))
        made = jax.make_jaxpr(lambda state, left: decode_loop.decode_while(writing, state, ends, left))(state, left)
        return next(x for x in made.eqns if x.primitive.name == "while")

    plain, counted = loop(None), loop(3)
    assert len(plain.outvars) == 1 and len(counted.outvars) == 2
    assert [x.primitive.name for x in plain.params["cond_jaxpr"].eqns] == ["eq", "reduce_or"]
    assert [x.primitive.name for x in plain.params["body_jaxpr"].eqns] == ["broadcast_in_dim"]
