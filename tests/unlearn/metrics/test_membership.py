"""Membership attacks by hand, the area under the curve against scikit-learn, PrivLeak against published numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from unlearn_jax.metrics import membership

LOGPROB = np.log(np.array([[0.5, 0.25, 0.9, 0.1, 0.8, 1.0], [0.3, 0.3, 1.0, 1.0, 1.0, 1.0]]))
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("k", "lowest"), [(0.4, [[0.1, 0.25], [0.3]]), (0.2, [[0.1], [0.3]]), (1, [[0.5, 0.25, 0.9, 0.1, 0.8], [0.3, 0.3]])]
)
def test_lowest_tokens(k, lowest):
    np.testing.assert_allclose(membership.min_k(LOGPROB, MASK, k=k), [-np.log(row).mean() for row in lowest])


def test_rows_without_tokens_and_shares_out_of_range():
    with pytest.raises(ValueError, match="row 1"):
        membership.min_k(LOGPROB, MASK * [[1], [0]])
    with pytest.raises(ValueError, match="1.5"):
        membership.min_k(LOGPROB, MASK, k=1.5)
    with pytest.raises(ValueError, match="0 forgotten and 1 holdout"):
        membership.auc([], [1.0])
    with pytest.raises(ValueError, match=r"\[1\]"):
        membership.auc([0.0, np.nan], [1.0])


scores = st.lists(st.integers(-4, 4), min_size=1, max_size=12)  # few values: many ties


@settings(deadline=None)
@given(scores, scores)
def test_area_is_that_of_scikit_learn(forget, holdout):
    expected = roc_auc_score([0] * len(forget) + [1] * len(holdout), forget + holdout)
    found = membership.auc(forget, holdout)
    assert found == pytest.approx(expected, abs=1e-12)
    assert membership.auc(holdout, forget) == pytest.approx(1 - found, abs=1e-12)
    assert membership.auc(np.exp(forget), np.exp(holdout)) == pytest.approx(found, abs=1e-12)


def test_orientation():
    """Members have the lower loss: what still looks like a member gives one."""
    assert membership.auc(forget=[0.1, 0.2], holdout=[1.0, 2.0]) == 1


def test_privleak():
    assert membership.privleak(0.5) == 0
    assert membership.privleak(1.0) == pytest.approx(-100)
    assert membership.privleak(0.0) == pytest.approx(100)
    # MUSE News: the target model scores -99.8 with retrain's 1 - AUC = .4772, so its own 1 - AUC is about .001.
    assert membership.privleak(1 - 0.000954, 1 - 0.4772) == pytest.approx(-99.8, abs=0.01)
    assert membership.privleak(1 - 0.4772, 1 - 0.4772) == 0


def test_a_loss_by_the_length_of_the_compressed_text():
    import zlib

    texts = ["a" * 100, "Alna Hartberg was born in Paris."]
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    np.testing.assert_allclose(membership.zlib_ratio([1.0, 2.0], texts), [1 / sizes[0], 2 / sizes[1]])
    assert sizes[0] < sizes[1]
