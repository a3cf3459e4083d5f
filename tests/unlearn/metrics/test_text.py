"""ROUGE-L against the package `rouge_score`, which TOFU's and MUSE's released evaluations call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn_jax.metrics.text import rouge_l

words = st.lists(st.sampled_from("a born borne in Paris, paris the running runs 1950 é -".split()), max_size=12).map(
    " ".join
)


@pytest.mark.parametrize("stemmed", [False, True])
@given(one=words | st.text(max_size=30), two=words | st.text(max_size=30))
def test_it_is_the_package(stemmed, one, two):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=stemmed)
    stem = pytest.importorskip("nltk.stem.porter").PorterStemmer().stem if stemmed else None
    expected = scorer.score(two, one)["rougeL"]  # (target, prediction)
    assert rouge_l(one, two, stem=stem) == pytest.approx((expected.precision, expected.recall, expected.fmeasure))


def test_by_hand():
    found = rouge_l("Alna was born in Oslo", "Alna Hartberg was born in Paris.")
    assert found == pytest.approx((4 / 5, 4 / 6, 8 / 11))
    assert rouge_l("", "anything") == rouge_l("anything", "") == (0, 0, 0)
