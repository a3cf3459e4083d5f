"""What an example costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from unlearn_jax import CrossEntropy, Dataset, Loss, SquaredError
from unlearn_jax.loss import require_parts, sum_and_weight
from unlearn_jax.metrics.tokens import score
from unlearn_jax.objective import element_counts

LOGITS = np.array([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0], [4.0, -2.0, 0.0]], np.float32)


def test_cross_entropy():
    example = {"labels": np.array([1, 2, 0])}
    expected = -np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True))[np.arange(3), example["labels"]]
    np.testing.assert_allclose(CrossEntropy()(LOGITS, example), expected, atol=1e-6)
    assert CrossEntropy()(jnp.asarray(LOGITS, "bfloat16"), example).dtype == jnp.float32
    np.testing.assert_allclose(
        CrossEntropy("y")(LOGITS[0], {"y": np.array(1)}), expected[0], rtol=1e-6
    )  # one answer, no axis


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (np.float32(3), np.float32(1), 2.0),
        (np.array([3.0, 1.0]), np.array([1.0, 1.0]), [2.0, 0.0]),
        (np.array([[3.0, 1.0]]), np.array([[1.0, 2.0]]), [2.5]),
    ],
)
def test_squared_error_is_half_the_square_summed_over_the_last_axis(outputs, targets, expected):
    np.testing.assert_allclose(SquaredError()(outputs, {"targets": targets}), expected)


def test_mask_weights_the_elements():
    loss = Loss(lambda params, example: params * example["z"], CrossEntropy())
    example = {"z": LOGITS, "labels": np.array([1, 2, 0]), "loss_mask": np.array([1.0, 0.0, 0.5])}
    each = loss.element_losses(1.0, example)
    total, weight = loss(1.0, example)
    np.testing.assert_allclose(total, each[0] + 0.5 * each[2], rtol=1e-6)
    assert weight == 1.5
    unmasked = Loss(loss.outputs, loss.criterion, mask=None)
    np.testing.assert_allclose(unmasked(1.0, example), (each.sum(), 3), rtol=1e-6)
    del example["loss_mask"]  # without the default field every element counts
    np.testing.assert_allclose(loss(1.0, example), (each.sum(), 3), rtol=1e-6)


def test_masked_labels_may_be_negative():
    loss = Loss(lambda params, example: params * example["z"], CrossEntropy())
    example = {"z": LOGITS, "labels": np.array([1, -100, 0]), "loss_mask": np.array([True, False, True])}
    kept = {"z": LOGITS[[0, 2]], "labels": example["labels"][[0, 2]]}
    value, gradient = jax.value_and_grad(lambda p: loss(p, example)[0])(1.0)
    expected, slope = jax.value_and_grad(lambda p: loss(p, kept)[0])(1.0)
    np.testing.assert_allclose((value, gradient), (expected, slope), rtol=1e-6)


def test_mask_errors():
    loss = Loss(lambda params, example: example["z"], CrossEntropy(), mask="weights")
    example = {"z": LOGITS, "labels": np.array([1, 2, 0])}
    with pytest.raises(ValueError, match="masked by the field 'weights'; the example has only labels, z"):
        loss(None, example)
    with pytest.raises(ValueError, match=r"'weights' has shape \(2,\), the element losses have \(3,\)"):
        loss(None, {**example, "weights": np.ones(2)})


def test_plain_callables():
    assert sum_and_weight(lambda params, example: jnp.float32(2), None, None) == (2, 1)
    assert sum_and_weight(lambda params, example: (jnp.float32(2), 3), None, None) == (2, 3)
    with pytest.raises(ValueError, match=r"scalar or \(sum, weight\); it returned shapes \(2,\)"):
        sum_and_weight(lambda params, example: jnp.ones(2), None, None)
    with pytest.raises(ValueError, match="Gauss-Newton.* needs the outputs and the criterion apart.*Loss"):
        require_parts(lambda params, example: 0.0, "Gauss-Newton")


def test_samples_follow_the_model():
    example = {"labels": np.zeros(3, np.int16)}
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: CrossEntropy().sample(key, LOGITS, example)["labels"])(keys)
    assert drawn.dtype == jnp.int16
    share = np.stack([(np.asarray(drawn) == c).mean(0) for c in range(3)], -1)
    np.testing.assert_allclose(share, jax.nn.softmax(LOGITS), atol=0.03)
    outputs = jnp.array([1.0, -2.0])
    drawn = jax.vmap(lambda key: SquaredError().sample(key, outputs, {"targets": outputs})["targets"])(keys)
    np.testing.assert_allclose(drawn.mean(0), outputs, atol=0.06)
    np.testing.assert_allclose(drawn.var(0), 1, atol=0.08)


def test_a_loss_is_a_pytree_that_carries_the_base_model_as_an_argument():
    traces = []

    def outputs(base, params, example):
        traces.append(1)
        return example["x"] @ (base + params)

    @jax.jit
    def total(loss, params, example):
        return loss(params, example)[0]

    example = {"x": np.ones((2, 3), np.float32), "labels": np.zeros(2, int)}
    for base in (np.zeros((3, 4), np.float32), np.eye(3, 4, dtype=np.float32)):
        loss = Loss(Partial(outputs, base), CrossEntropy())
        leaves, tree = jax.tree.flatten(loss)
        assert any(leaf is base for leaf in leaves) and tree.unflatten(leaves).mask == "loss_mask"
        assert np.isfinite(total(Loss(Partial(outputs, base), CrossEntropy()), base, example))
    assert len(traces) == 1


@pytest.mark.parametrize("mask", ["loss_mask", None])
def test_labels_that_do_not_count_must_be_masked(mask):
    """Hugging Face's -100 is no class; what says so is a mask."""
    loss = Loss(lambda params, example: params * example["x"], CrossEntropy(), mask)
    batch = {"x": np.ones((2, 3, 4)), "labels": np.array([[-100, 1, 2], [-100, 0, 1]])}
    with pytest.raises(ValueError, match="the label -100 in 'labels' counts as a class: mask it out"):
        element_counts(loss, np.float32(1), Dataset.of(batch))
    with pytest.raises(ValueError, match="the label -100 in 'labels' counts as a class"):
        score(loss, np.float32(1), batch)
    masked = Loss(loss.outputs, CrossEntropy(), "loss_mask")
    assert element_counts(masked, np.float32(1), Dataset.of({**batch, "loss_mask": batch["labels"] >= 0})).tolist() == [
        2,
        2,
    ]
    with pytest.raises(ValueError, match="counts as a class"):
        element_counts(masked, np.float32(1), Dataset.of({**batch, "loss_mask": np.ones((2, 3))}))
