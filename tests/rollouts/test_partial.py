"""Rollouts that end by a budget and are gone on with: what their rows write in the end, and what is refused before."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from pixel_jax.parallel import make_mesh, shard
from pixel_jax.rollouts import rollout as rollout_module
from pixel_jax.rollouts.config import RolloutBudget
from pixel_jax.rollouts.decode_loop import WRITING, turn_numbers
from pixel_jax.rollouts.partial import no_records, partial_rollout
from pixel_jax.rollouts.rollout import begin, rollout
from pixel_jax.rollouts.trajectory import CallStatus, take_prompts, to_host
from tests.rollouts import scripted_model

KEY = jax.random.key(7)
SMALL = dataclasses.replace(scripted_model.CONFIG, group_size=2, max_response=256, max_calls=2, observe_chunk=1)
QUEUED = dataclasses.replace(SMALL, in_flight=2)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def prompts(uid=None):
    """Images and videos in turn."""
    four = take_prompts(scripted_model.prompts(6, config=SMALL, video=True), [0, 1, 2, 3])
    return four if uid is None else four._replace(uid=uid)


@functools.cache
def whole():
    """What the single program makes of them, by the key of iteration 5."""
    return to_host(rollout(scripted_model.model(), prompts(), jax.random.fold_in(KEY, 5), QUEUED))


def run(model, config, budget):
    """The rows when all are done, and the records after each call. Keys are the same: 5 is folded in by the prompts."""
    asked = prompts(np.array([[5, i] for i in range(4)], np.int32))
    records, seen = no_records(asked, config), []
    while not seen or (seen[-1].stop < 0).any():
        assert len(seen) < 100
        rows, records = partial_rollout(model, asked, records, KEY, config, budget)
        records = jax.tree.map(np.asarray, records)
        seen.append(records)
    return to_host(rows), seen


def assert_the_same(rows, expected):
    for name in ("tokens", "valid", "loss_mask", "visual", "calls", "num_calls", "stop", "prompt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(rows, name), getattr(expected, name))
    np.testing.assert_allclose(rows.logprobs, expected.logprobs, atol=2e-4)


@pytest.mark.parametrize(
    "config, budget, mesh",
    [
        (QUEUED, RolloutBudget(tokens=7), None),
        slow(SMALL, RolloutBudget(tokens=5), None),
        slow(QUEUED, RolloutBudget(tokens=1), None),
        slow(dataclasses.replace(SMALL, tail_rows=3), RolloutBudget(tokens=7), None),
        slow(dataclasses.replace(QUEUED, in_flight=4, observe_chunk=3), RolloutBudget(tokens=7), MESH),
    ],
    ids=["queue", "all", "token by token", "tail", "mesh"],
)
def test_rows_that_carry_over_write_the_same(config, budget, mesh):
    model = shard(scripted_model.model(), make_mesh(mesh)) if mesh else scripted_model.model()
    rows, seen = run(model, config, budget)
    assert_the_same(rows, whole())
    # Rows carried over in the middle of a turn, some of which had been shown what they asked for.
    carried = [(x.stop < 0) & (x.length > 0) for x in seen[:-1]]
    shown = [(x.calls.status == CallStatus.DONE).any(axis=1) & on for x, on in zip(seen, carried, strict=False)]
    writing = [(x.status == WRITING) & (x.length > x.turn_start) & on for x, on in zip(seen, carried, strict=False)]
    assert len(seen) > 3 and np.any(shown) and np.any(writing)


@pytest.mark.slow
def test_a_share_of_the_rows_ends_a_call():
    """The share is of the rows that a call begins with; it is counted now and then, so that more may end."""
    rows, seen = run(scripted_model.model(), QUEUED, RolloutBudget(share=0.3))
    assert_the_same(rows, whole())
    left = [8, *(int((x.stop < 0).sum()) for x in seen)]
    assert all(before - after >= math.ceil(0.3 * before) for before, after in zip(left, left[1:], strict=False))


@pytest.mark.slow
def test_what_was_written_keeps_its_log_probabilities():
    """Under other weights the rest is written by these, and the beginning is still what the first have written."""
    first, other = scripted_model.model(), jax.tree.map(lambda x: x * np.float32(1.01), scripted_model.model())
    asked = prompts(np.array([[5, i] for i in range(4)], np.int32))
    budget = RolloutBudget(tokens=9)
    _, begun = partial_rollout(first, asked, no_records(asked, QUEUED), KEY, QUEUED, budget)
    _, mixed = partial_rollout(other, asked, begun, KEY, QUEUED, budget)
    _, same = partial_rollout(first, asked, begun, KEY, QUEUED, budget)
    begun, mixed, same = (jax.tree.map(np.asarray, x) for x in (begun, mixed, same))
    before = begun.loss_mask & mixed.loss_mask & same.loss_mask
    assert before.sum() > 20
    for x in (mixed, same):
        np.testing.assert_array_equal(x.logprobs[before], begun.logprobs[before])
        np.testing.assert_array_equal(x.tokens[before], begun.tokens[before])
    new = mixed.loss_mask & same.loss_mask & ~begun.loss_mask
    assert np.abs(mixed.logprobs - same.logprobs)[new].max() > 1e-3


def test_tokens_are_numbered_by_turns():
    mask = np.array([[0, 0, 1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 10], bool)
    expected = [[0, 0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 10]
    assert np.asarray(turn_numbers(mask)).tolist() == expected


@pytest.mark.parametrize("tokens", [0, -3, 1.5, True, float("nan")])
def test_budgets_of_tokens_that_cannot_be_are_refused(tokens):
    with pytest.raises(ValueError, match=f"budget of {tokens!r} tokens: give a whole number of at least 1"):
        RolloutBudget(tokens=tokens)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), float("inf"), True])
def test_budgets_of_a_share_that_cannot_be_are_refused(share):
    with pytest.raises(ValueError, match=f"share {share!r} of the rows: give a number in"):
        RolloutBudget(share=share)


def test_records_of_other_rows_are_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(rollout_module, "_start", None)
    asked, model = prompts(), scripted_model.model()
    longer = dataclasses.replace(SMALL, max_response=128)
    with pytest.raises(ValueError, match=r"\('int32', \(8, 128\)\) for tokens, this rollout needs .*\(8, 256\)"):
        begin(model, asked, KEY, SMALL, records=no_records(asked, longer))
    with pytest.raises(ValueError, match=r"\(16, 256\)\) for tokens, this rollout needs .*another `group_size`"):
        begin(model, asked, KEY, SMALL, records=no_records(asked, dataclasses.replace(SMALL, group_size=4)))
    with pytest.raises(ValueError, match="capacity 8 with records of the rows of 4 prompts"):
        begin(model, asked, KEY, SMALL, capacity=8, records=no_records(asked, SMALL))
