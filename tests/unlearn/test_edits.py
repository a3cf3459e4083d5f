"""What shall have been different: edited datasets, their objectives, and everything that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unlearn_jax import CorrectResponse, Dataset, MaskTokens, ModifyQuery, Remove, SquaredError, apply
from unlearn_jax.edits import affected
from unlearn_jax.loss import Loss
from unlearn_jax.objective import dataset_objective


@pytest.fixture
def data(rng):
    return toys.sequences(rng)


def first_counted(data, i):
    """A mask that marks the first element that counts, and one more where there is one."""
    mask = np.zeros(toys.LENGTH, bool)
    mask[np.flatnonzero(data["loss_mask"][i])[:2]] = True
    return mask


def test_edited_examples(data):
    new_x, new_y = data["x"][:2] + 1, (data["labels"][4:5] + 1) % toys.CLASSES
    edits = [Remove([0]), ModifyQuery([1, 3], {"x": new_x}), CorrectResponse(np.array([4]), [{"labels": new_y[0]}])]
    dataset = Dataset.of(data)
    after = apply(dataset, edits, toys.LOSS)
    assert after.ids.tolist() == [1, 2, 3, 4, 5, 6] and len(dataset) == 7
    batch = after.take()
    np.testing.assert_array_equal(batch["x"], [*new_x[:1], data["x"][2], *new_x[1:], *data["x"][4:]])
    np.testing.assert_array_equal(batch["labels"], [*data["labels"][1:4], *new_y, *data["labels"][5:]])
    np.testing.assert_array_equal(dataset.take()["x"], data["x"])
    old, new, others = affected(dataset, after)
    assert (old.tolist(), new.tolist(), others.tolist()) == ([0, 1, 3, 4], [0, 2, 3], [2, 5, 6])
    again = apply(after, [Remove([4]), ModifyQuery([1], {"x": data["x"][1:2]})], toys.LOSS)
    np.testing.assert_array_equal(again.take()["x"], [data["x"][1], data["x"][2], new_x[1], *data["x"][5:]])


def test_what_changes_nothing_is_no_edit(data):
    dataset = Dataset.of(data)
    same = [ModifyQuery([1], {"x": data["x"][1:2]}), CorrectResponse([2], [toys.row(data, 2)]), Remove([])]
    for edits in ([], same, [ModifyQuery([], {}), MaskTokens([], [])]):
        old, new, others = affected(dataset, apply(dataset, edits, toys.LOSS))
        assert not len(old) and not len(new) and others.tolist() == list(range(7))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("reduction", ["per_example", "per_token"])
def test_masked_elements_in_closed_form(rng, data, x64, reduction, renormalize):
    """The gradient after the edit, from gradients of single elements, with both normalisers."""
    params, edited = toys.params(rng), [i for i in range(toys.N) if data["loss_mask"][i].sum() > 2][:2]
    masks = [first_counted(data, i) for i in edited]
    edit = MaskTokens(edited, masks, renormalize=renormalize)
    after = apply(Dataset.of(data), [edit], toys.LOSS)
    element = jax.jacobian(lambda params: jax.vmap(lambda e: toys.LOSS.element_losses(params, e))(data))(params)
    left = data["loss_mask"].copy()
    for i, mask in zip(edited, masks, strict=True):
        left[i] &= ~mask
    counts = (left if renormalize else data["loss_mask"]).sum(1)
    share = 1 / counts / toys.N if reduction == "per_example" else np.full(toys.N, 1 / counts.sum())
    expected = jax.tree.map(lambda g: jnp.einsum("n,nt,nt...->...", share, left, g), element)
    got = dataset_objective(toys.LOSS, params, after, reduction=reduction).gradient(params)
    np.testing.assert_allclose(toys.flatten(got), toys.flatten(expected), rtol=1e-10, atol=1e-15)

    # A later edit of the same example: the fixed normaliser stays with further masks and ends with a new answer.
    again = apply(after, [CorrectResponse(edited[:1], {"labels": data["labels"][edited[:1]] * 0})], toys.LOSS)
    counts[edited[0]] = left[edited[0]].sum()
    share = 1 / counts / toys.N if reduction == "per_example" else np.full(toys.N, 1 / counts.sum())
    got = dataset_objective(toys.LOSS, params, again, reduction=reduction)
    np.testing.assert_allclose(np.asarray(got.coefficients)[0], share, rtol=1e-12)


def test_a_question_may_move_the_labels_but_not_change_them(data):
    """A longer question shifts the answer to the right."""
    data["loss_mask"][:] = [False, True, True, False]
    moved = {name: np.roll(x[2:3], 1, axis=1) for name, x in data.items()}
    dataset = Dataset.of(data)
    after = apply(dataset, [ModifyQuery([2], moved)], toys.LOSS)
    np.testing.assert_array_equal(after.example(2)["loss_mask"], [False, False, True, True])
    changed = {"labels": (data["labels"][2:3] + 1) % toys.CLASSES}
    with pytest.raises(ValueError, match=r"ModifyQuery of example 2 changes the labels .* CorrectResponse does that"):
        apply(dataset, [ModifyQuery([2], changed)], toys.LOSS)
    assert not np.array_equal(
        apply(dataset, [CorrectResponse([2], changed)], toys.LOSS).example(2)["labels"], data["labels"][2]
    )


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Remove([9])], "no example has the id 9; the 7 ids are 0, 1, 2, ..."),
        ([Remove([1, 1])], "example 1 is edited twice, by Remove and by Remove"),
        (
            [Remove([1]), CorrectResponse([2, 1], {"labels": np.zeros((2, 4), int)})],
            "1 is edited twice, by Remove and by Corr",
        ),
        ([Remove(range(7))], "the edits remove all 7 examples"),
        ([ModifyQuery([1, 2], {"x": np.ones((1, 4, 3))})], "ModifyQuery has 2 ids and 1 examples"),
        (
            [ModifyQuery([1], {"y": np.ones((1, 4, 3))})],
            "example 1: there is no field 'y'; the fields are labels, loss_mask, x",
        ),
        (
            [ModifyQuery([1], {"x": np.ones((1, 5, 3))})],
            r"\['x'\] is float64 \(4, 3\), its replacement float64 \(5, 3\)",
        ),
        ([CorrectResponse([1], {"labels": np.ones((1, 4))})], r"\['labels'\] is int64 \(4,\), its replacement float64"),
        (
            [CorrectResponse([1], {"labels": np.zeros((1, 4), int), "id": [2]})],
            r"is about \[1\]; its examples are \[2\]",
        ),
        ([CorrectResponse([1], [{"labels": np.zeros(4, int), "id": 2}])], r"is about \[1\]; its examples are \[2\]"),
        ([MaskTokens([1], [[True] * 4, [True] * 4])], "MaskTokens has 1 ids and 2 masks"),
        ([MaskTokens([1], [[True] * 3])], r"a mask is true or false, \(4,\) like 'loss_mask'; it is bool \(3,\)"),
        ([MaskTokens([1], [[2, 0, 0, 0]])], r"a mask is true or false, .* it is int64 \(4,\), 0 to 2"),
        ([MaskTokens([1], [[True] * 4])], "example 1 leaves no element that carries loss; Remove"),
        ([MaskTokens([1], [[False] * 4])], "example 1 marks no element that carries loss"),
    ],
)
def test_malformed_requests(data, edits, message):
    with pytest.raises(ValueError, match=message):
        apply(Dataset.of(data), edits, toys.LOSS)


@pytest.mark.parametrize("mask", [np.arange(7) == 2, [False, True], np.ones(7, bool)])
def test_a_mask_is_no_list_of_ids(mask):
    with pytest.raises(ValueError, match=f"takes ids, not a mask of {len(mask)} true and false: np.flatnonzero"):
        Remove(mask)


def test_what_is_no_edit(data):
    with pytest.raises(TypeError, match=r"edits are a list: \[Remove\(...\)\]"):
        apply(Dataset.of(data), Remove([1]))
    with pytest.raises(TypeError, match="an edit is Remove, ModifyQuery, CorrectResponse or MaskTokens, not 3"):
        apply(Dataset.of(data), [3])
    for ids in (3, "a", {1, 2}):
        with pytest.raises(ValueError, match="Remove takes a sequence of ids"):
            Remove(ids)


def test_masks_need_a_field_to_be_in(data):
    edit = MaskTokens([1], [[True, False, False, False]])
    for loss in (None, lambda params, example: 0.0, Loss(toys.network, SquaredError(), mask=None)):
        with pytest.raises(ValueError, match="MaskTokens needs to know which field weights the elements"):
            apply(Dataset.of(data), [edit], loss)
    del data["loss_mask"]
    with pytest.raises(ValueError, match="example 1: the example has no field 'loss_mask' to be masked in"):
        apply(Dataset.of(data), [edit], toys.LOSS)


def test_examples_that_are_no_dictionaries():
    dataset = Dataset.of((np.arange(8.0).reshape(4, 2), np.arange(4)))
    after = apply(dataset, [CorrectResponse([2], (np.ones((1, 2)), np.array([7])))])
    assert after.take()[1].tolist() == [0, 1, 7, 3]
    with pytest.raises(ValueError, match="has the structure"):
        apply(dataset, [CorrectResponse([2], (np.ones((1, 2)),))])
