"""Examples with ids."""

import grain
import numpy as np
import pytest

from unlearn_jax import Dataset, Remove, apply

DATA = {"x": np.arange(12.0).reshape(6, 2), "nested": {"y": np.arange(6)}}
NAMES = np.array(["a", "b", "c", "d", "e", "f"])


def examples():
    return [{"x": DATA["x"][i], "nested": {"y": DATA["nested"]["y"][i]}} for i in range(6)]


class Source:
    """The protocol of Grain's random access sources."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return examples()[i]


@pytest.mark.parametrize("data", [DATA, examples(), Source(), grain.MapDataset.source(Source())])
def test_every_kind_of_source_gives_the_same_examples(data):
    dataset = Dataset.of(data)
    assert len(dataset) == 6 and dataset.ids.tolist() == list(range(6)) and dataset.weights.tolist() == [1] * 6
    batch = dataset.take([4, 0])
    np.testing.assert_array_equal(batch["x"], DATA["x"][[4, 0]])
    np.testing.assert_array_equal(batch["nested"]["y"], [4, 0])
    np.testing.assert_array_equal(dataset.take()["x"], DATA["x"])
    assert dataset.take([])["x"].shape == (0, 2)
    assert dataset.example(3)["nested"]["y"] == 3
    part = apply(dataset, [Remove([0, 2])]).select([1, 2])
    assert part.ids.tolist() == [3, 4] and part.take()["nested"]["y"].tolist() == [3, 4]


@pytest.mark.parametrize(
    "data", [{**DATA, "id": NAMES}, [{**e, "id": n} for e, n in zip(examples(), NAMES, strict=True)]]
)
def test_named_examples(data):
    dataset = Dataset.of(data)
    assert dataset.positions(["f", np.str_("b")]).tolist() == [5, 1]
    assert set(dataset.take([1])) == {"x", "nested"}  # the loss does not see the ids
    with pytest.raises(ValueError, match="no example has the id 'z'; the 6 ids are 'a', 'b', 'c', ..."):
        dataset.positions(["z"])
    with pytest.raises(ValueError, match="no example has the id 'b'; the 5 ids"):
        apply(dataset, [Remove(["b"])]).positions(["b"])


def test_a_dataset_is_a_dataset():
    dataset = Dataset.of(DATA, weights=np.arange(6))
    assert Dataset.of(dataset) is dataset
    with pytest.raises(ValueError, match="has weights already"):
        Dataset.of(dataset, weights=np.ones(6))


@pytest.mark.parametrize(
    ("data", "weights", "message"),
    [
        ({"x": np.ones((2, 1)), "y": np.ones(3)}, None, r"\['y'\] has 3 examples, the field \['x'\] has 2"),
        ({"x": np.float32(1)}, None, r"\['x'\] has no leading axis"),
        ({"id": np.arange(3)}, None, "at least one array besides the ids"),
        ({"x": np.ones(2), "id": np.array(["a", "a"])}, None, "two examples have the id 'a'"),
        ({"x": np.ones(2), "id": np.ones((2, 2))}, None, r"'id' has shape \(2, 2\) for 2 examples"),
        ({"x": np.ones(2)}, np.ones(3), r"weights of shape \(3,\) for 2 examples"),
        ({"x": np.ones(2)}, np.array([1.0, -1.0]), "weights must be finite, not negative"),
        (iter([1]), None, "like a Grain source; list_iterator has not"),
        ({"x": np.ones(2), "text": np.array(["a", "b"])}, None, "'text' of the dataset holds <U1, not numbers"),
        (
            {"x": np.ones(2), "n": {"t": np.array([{}, {}])}},
            None,
            "'t' of 'n' of the dataset holds object, not numbers",
        ),
        ({"x": [[1, 2], [3, 4]]}, None, "'x' of the dataset is a list: make it an array"),
        ([{"x": [1, 2]}, {"x": [3, 4]}], None, "'x' of example 0 is a list: make it an array .*with_format"),
        ([{"x": np.ones(2), "text": "a"}], None, "'text' of example 0 holds str, not numbers"),
        (grain.MapDataset.source(Source()).repeat(), None, "it repeats without an end"),
    ],
)
def test_malformed(data, weights, message):
    with pytest.raises(ValueError, match=message):
        Dataset.of(data, weights)


def test_ragged_examples_are_refused():
    ragged = Dataset.of([{"x": np.ones(2)}, {"x": np.ones(3)}])
    with pytest.raises(ValueError, match=r"example 1 has the fields .*\(3,\).*, example 0 has .*\(2,\).*: pad them"):
        ragged.take()


def test_a_repetition_that_ends_is_a_dataset():
    assert len(Dataset.of(grain.MapDataset.source(Source()).repeat(2))) == 12


def test_a_source_that_augments_at_each_read_is_refused():
    class Noisy(Source):
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def __getitem__(self, i):
            return {**super().__getitem__(i), "x": self.rng.normal(size=2)}

    with pytest.raises(ValueError, match="example 0 is another one at every read"):
        Dataset.of(Noisy())


def test_not_a_number_is_the_same_at_every_read():
    assert len(Dataset.of([{"x": np.array([np.nan, 1.0])}])) == 1


def test_a_dictionary_is_edited_as_a_dataset_is():
    """As a second request is made: its data are what the first has left."""
    left = apply(DATA, [Remove([3])])
    assert left.ids.tolist() == [0, 1, 2, 4, 5] and apply(left, [Remove([5])]).ids.tolist() == [0, 1, 2, 4]
