"""The model in two parts is the whole model; greedy answers are those of repeated forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_study import model, tokenizer

import pixel_jax
from pixel_jax.cli import UserError
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, merge_lora, split
from unlearn_jax.recommendation import generation
from unlearn_jax.recommendation.generation import ReadQuestions
from unlearn_jax.recommendation.recommender import Recommender, examples

TARGETS = r".*\.(q_proj|v_proj|down_proj)"
PAIRS = [("Film 12, Film 3", "Film 7\n"), ("Film 5", "No."), ("Film 1, Film 30, Film 2", "Yes.")]
LENGTH = 24


def make(layers, **options):
    return Recommender.of(
        model(), tokenizer(), layers=layers, rank=2, alpha=4.0, targets=TARGETS, key=jax.random.key(1), **options
    )


def moved(recommender, seed=0):
    """An adapter that changes a lot."""
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=x.shape), jnp.float32) for name, x in recommender.shape.items()}


def whole(recommender, adapter, layers):
    """The uncut model with the adapter merged into its top layers."""
    full = add_lora(model(), jax.random.key(0), rank=2, alpha=4.0, targets=TARGETS)
    weights, rest = split(full, LoRAWeight)
    padded = {name: x.at[-layers:].set(adapter[name]).at[:-layers].set(0) for name, x in weights.items()}
    return merge_lora(combine(padded, rest))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_parts_are_the_whole(layers):
    recommender = make(layers)
    adapter = moved(recommender)
    encoded = recommender.encode(PAIRS, LENGTH, 8)
    rows = examples(encoded, recommender.hidden(encoded.tokens))
    found = jax.vmap(lambda example: recommender.loss.z(adapter, example))(rows)
    expected = pixel_jax.forward(whole(recommender, adapter, layers), input_ids=encoded.tokens)
    expected = np.take_along_axis(np.asarray(expected), encoded.places[..., None], axis=1)
    counted = encoded.mask > 0
    np.testing.assert_allclose(np.asarray(found)[counted], expected[counted], rtol=2e-4, atol=2e-4)
    for i, (question, said) in enumerate(PAIRS):  # the labels are the answers, at the places behind the questions
        assert tokenizer().decode(encoded.labels[i][counted[i]].tolist()) == said
        assert tokenizer().decode(encoded.tokens[i, : encoded.lengths[i]].tolist()) == question
        assert encoded.places[i, 0] == encoded.lengths[i] - 1


def test_a_fresh_adapter_changes_nothing_and_has_a_seed():
    recommender = make(2)
    encoded = recommender.encode(PAIRS, LENGTH, 8)
    rows = examples(encoded, recommender.hidden(encoded.tokens))
    found = jax.vmap(lambda example: recommender.loss.z(recommender.fresh(3), example))(rows)
    expected = np.asarray(pixel_jax.forward(model(), input_ids=encoded.tokens))
    expected = np.take_along_axis(expected, encoded.places[..., None], axis=1)
    np.testing.assert_allclose(np.asarray(found)[encoded.mask > 0], expected[encoded.mask > 0], rtol=2e-4, atol=2e-4)
    same, other = recommender.fresh(3), recommender.fresh(4)
    for name, x in recommender.fresh(3).items():
        np.testing.assert_array_equal(x, same[name])
        assert name.endswith("lora_b") or not np.array_equal(x, other[name])


@pytest.mark.parametrize("count", [1, 2])
def test_greedy_answers_are_those_of_repeated_passes(count, monkeypatch):
    """Also of the mean of two adapters' probabilities, and in blocks of different widths."""
    monkeypatch.setattr(generation, "BLOCK", 2)
    monkeypatch.setattr(generation, "WIDTH", 4)
    recommender = make(2)
    adapters = [moved(recommender, seed) for seed in range(count)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    encoded = recommender.encode(PAIRS, LENGTH, 8)
    read = ReadQuestions(recommender, encoded.tokens, encoded.lengths, recommender.hidden(encoded.tokens))
    assert sorted(i for block in read.blocks for i in block.positions) == [0, 1, 2]
    assert len({block.hidden.shape[1] for block in read.blocks}) == 2
    models = [whole(recommender, adapter, 2) for adapter in adapters]

    def next_logits(ids):
        padded = np.zeros((1, LENGTH + 8), np.int32)
        padded[0, : len(ids)] = ids
        chances = [jax.nn.softmax(pixel_jax.forward(x, input_ids=padded)[0, len(ids) - 1]) for x in models]
        return np.log(np.mean(chances, axis=0))

    expected = []
    for i, _ in enumerate(PAIRS):
        ids = encoded.tokens[i, : encoded.lengths[i]].tolist()
        if i < 2:
            first = next_logits(ids)
            np.testing.assert_allclose(read.first_logits(stacked)[i], first, rtol=2e-4, atol=2e-4)
        for _ in range(6):
            ids.append(int(next_logits(ids).argmax()))
        expected.append(ids[encoded.lengths[i] :])
    nowhere = [len(tokenizer()) + 1]  # a stop that is never written
    assert read.answers(stacked, 6, nowhere) == [tokenizer().decode(ids) for ids in expected]
    stop = expected[0][2]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
    assert read.answers(stacked, 6, [stop]) == [tokenizer().decode(ids) for ids in cut]


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match=r"config\.adapter\.layers is 4; the model has 3"):
        make(4)
    with pytest.raises(ValueError, match="over 24 or 8: raise config.data.length"):
        make(1).encode([("Film 1, " * 30, "Yes.")], LENGTH, 8)
    # A title that is spelled like a special token is text.
    assert tokenizer().convert_tokens_to_ids("<|im_end|>") not in make(1).ids("<|im_end|>")
