"""What is held out: of the size that was asked for, whole groups, and the same whatever else is in the data."""

from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.data.digests import Digests
from pixel_jax.data.example import Example
from pixel_jax.data.held_out import FILE, choose, keys_of, settled
from pixel_jax.training.watch import WatchConfig
from pixel_jax.watching import hold_out
from tests.rollouts import scripted_model

KEYS = st.lists(st.sampled_from([f"k{i}" for i in range(12)]), max_size=40)


@given(KEYS, st.integers(0, 20), st.integers(0, 3))
def test_as_many_as_fit_and_no_group_is_split(keys, count, seed):
    held = choose(keys, count, seed)
    size = sum(key in held for key in keys)
    assert size <= count and held <= set(keys)
    assert all(keys.count(key) > count - size for key in set(keys) - held)  # no other group would fit, too
    assert choose(list(reversed(keys)), count, seed) == held


@given(st.sets(st.integers(0, 1000), min_size=30, max_size=60), st.integers(1, 10))
def test_rows_that_are_added_move_few(numbers, count):
    """A new row is held out in the place of another, or it is trained on: nothing else changes."""
    keys = [f"k{i}" for i in numbers]
    before, after = choose(keys, count, 0), choose([*keys, "new"], count, 0)
    assert len(before - after) == len(after - before) <= 1 and after - before <= {"new"}


def test_seeds_hold_out_different_ones():
    keys = [f"k{i}" for i in range(100)]
    assert len({frozenset(choose(keys, 5, seed)) for seed in range(5)}) == 5


def test_examples_about_the_same_pictures_go_together(tmp_path):
    from PIL import Image

    for name, seed in (("a", 0), ("b", 1), ("copy of a", 0)):
        Image.fromarray(scripted_model.image(seed, 30, 40)).save(tmp_path / f"{name}.png")
    example = lambda question, *names: Example("i", question, tuple(tmp_path / f"{x}.png" for x in names), ("7",))
    rows = [example("one?", "a"), example("two?", "b"), example("three?", "copy of a"), example("four?", "a", "b")]
    with Digests(tmp_path / "digests.json") as digests:
        keys = keys_of(rows, digests)
    assert keys[0] == keys[2] and len(set(keys)) == 3


def test_what_a_run_noted_it_holds_out_again(tmp_path):
    keys = [f"k{i}" for i in range(20)]
    place = tmp_path / "sft"
    first = settled(place, keys, 3, 0, begun=False)
    assert len(first) == 3
    more = [*keys, *(f"new{i}" for i in range(200))]
    assert settled(place, more, 30, 0, begun=True) == first
    other = settled(place, more, 30, 0, begun=False)  # nothing was trained on yet: it begins anew
    assert len(other) == 30 and settled(place, keys, 3, 0, begun=True) == other
    (place / FILE).write_text('{"keys": [1]}')
    assert settled(place, keys, 3, 0, begun=True) == set()  # the run's own settings then say that others are trained on


def test_a_file_to_judge_by_has_the_names_of_the_data(tmp_path):
    """`columns` are of both files: the format of `data_eval` is that of `data`."""
    from PIL import Image

    Image.fromarray(scripted_model.image(0, 30, 40)).save(tmp_path / "a.png")
    path = tmp_path / "judging.jsonl"
    path.write_text('{"prompt": "Which digit?", "images": ["a.png"], "answer": "7"}\n')
    given = {"seed": 0, "turns": False, "columns": {"question": "prompt"}}
    held = hold_out([], str(path), WatchConfig(), tmp_path, None, **given)
    assert [x.question for x in held.judging] == ["Which digit?"] and not held.rows
