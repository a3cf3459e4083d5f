"""What comes in which batch follows from the order alone: for any restart and any number of processes."""

import json
import threading
import time

import pytest

from pixel_jax.data.batches import Batches
from pixel_jax.data.buckets import shuffled


def make(count=10, size=4, seed=0, load=int, **options):
    return Batches(
        shuffled([range(count)], size, seed),
        load,
        lambda rows, own: list(rows),
        size,
        same={"seed": seed},
        **options,
    )


def first(batches, count):
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_order_is_drawn_from_seed_and_epoch():
    batches = first(make(), 5)
    assert batches == first(make(), 5) and batches != first(make(seed=1), 5)
    flat = sum(batches, [])
    # 20 rows are two epochs: the first has 8, the second begins with what is left.
    assert sorted(flat) == sorted(2 * list(range(10))) and len(set(flat[:8])) == 8 and flat[:8] != list(range(8))


def test_all_of_a_batch_are_of_one_bucket():
    order = shuffled([[0, 2, 4, 6, 8], [1, 3, 5]], 2, 0)
    batches = [(order[2 * i], order[2 * i + 1]) for i in range(16)]
    assert all(a % 2 == b % 2 for a, b in batches)
    seen = sum(batches, ())
    assert {seen.count(i) for i in range(0, 9, 2)} == {seen.count(i) for i in (1, 3, 5)} == {4}


@pytest.mark.parametrize("ahead", [1, 7])
def test_a_restart_sees_the_batches_that_were_left(ahead):
    expected, data = first(make(7, 3), 6), make(7, 3, ahead=ahead)
    for done in range(6):
        again = make(7, 3, ahead=ahead)
        again.set_state(json.loads(json.dumps(data.get_state())))
        assert first(again, 6 - done) == expected[done:]
        next(data)
    data.set_state(data.get_state() | {"position": 2})  # also one that has begun
    assert first(data, 4) == expected[2:]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_see_what_one_would(count):
    whole = first(make(10, 8), 5)
    parts = [first(make(10, 8, process_index=i, process_count=count), 5) for i in range(count)]
    assert [sum(batch, []) for batch in zip(*parts, strict=True)] == whole
    # and a run may go on with another number of them
    one = make(10, 8)
    first(one, 2)
    for i in range(count):
        part = make(10, 8, process_index=i, process_count=count)
        part.set_state(one.get_state())
        assert first(part, 3) == parts[i][2:]


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="a batch of 8 rows cannot be split over 3 processes"):
        make(10, 8, process_count=3)


@pytest.mark.parametrize(("other", "message"), [({"seed": 1}, "0 for seed, now it is 1"), ({"size": 5}, "4 for size")])
def test_a_restart_with_another_order_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        make(**other).set_state(make().get_state())


@pytest.mark.parametrize("position", [-5, 1.5, None, True, 1 << 48])
def test_a_position_that_is_none_is_refused(position):
    with pytest.raises(ValueError, match=f"position in the data is {position}, not a whole number from 0"):
        make().set_state(make().get_state() | {"position": position})


def test_an_error_of_a_thread_comes_out_where_its_row_would():
    order = sum(first(make(), 2), [])

    def load(i):
        if i == order[6]:
            raise OSError(f"row {i} is broken")
        return i

    batches = make(load=load, ahead=8)
    assert next(batches) == order[:4]
    with pytest.raises(OSError, match=f"row {order[6]} is broken"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("ahead", [1, 6])
def test_no_more_is_read_than_was_asked_for(ahead):
    """However long nobody asks for a batch."""
    lock, loaded = threading.Lock(), []

    def load(i):
        with lock:
            loaded.append(i)
        return i

    batches = make(load=load, ahead=ahead, threads=3)
    for done in (1, 2):
        next(batches)
        before = -1
        while before != len(loaded):
            before = len(loaded)
            time.sleep(0.1)
        assert 4 * done <= len(loaded) <= 4 * done + ahead
    batches.close()
