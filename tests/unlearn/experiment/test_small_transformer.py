"""The small language model and the facts it is taught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearn_jax.experiment import invented_people, small_transformer
from unlearn_jax.experiment.small_transformer import LORA_SCALE, forward

SIZE = small_transformer.TransformerSize(vocabulary=11, length=6, width=8)


@pytest.fixture(scope="module")
def model():
    base = small_transformer.init_base(jax.random.key(0), SIZE)
    fresh = small_transformer.init_adapter(jax.random.key(1), SIZE)
    key = jax.random.key(2)
    trained = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), fresh)
    return base, fresh, trained


TOKENS = jnp.array([3, 1, 4, 1, 5, 9])


def test_a_fresh_adapter_is_silent_and_a_trained_one_is_merged_weights(model):
    base, fresh, trained = model
    silent = jax.tree.map(jnp.zeros_like, fresh)
    np.testing.assert_allclose(forward(base, fresh, TOKENS)[0], forward(base, silent, TOKENS)[0])
    change = [jnp.einsum("lor,lri->lio", trained[name]["lora_b"], trained[name]["lora_a"]) for name in "qv"]
    qkvo = base["qkvo"].at[:, 0].add(LORA_SCALE * change[0]).at[:, 2].add(LORA_SCALE * change[1])
    found, hidden = forward(base, trained, TOKENS)
    np.testing.assert_allclose(found, forward({**base, "qkvo": qkvo}, silent, TOKENS)[0], rtol=1e-3, atol=1e-4)
    assert found.shape == (6, 11) and hidden.shape == (2, 6, 8)
    assert np.abs(found - forward(base, fresh, TOKENS)[0]).max() > 0.1


def test_tokens_see_only_what_came_before(model):
    base, _, trained = model
    one, two = (forward(base, trained, TOKENS.at[4].set(t))[0] for t in (5, 6))
    np.testing.assert_allclose(one[:4], two[:4], rtol=1e-5, atol=1e-6)
    assert np.abs(one[4:] - two[4:]).max() > 1e-2


def test_an_adapter_of_the_documented_size():
    adapter = small_transformer.init_adapter(
        jax.random.key(0), small_transformer.TransformerSize(vocabulary=100, length=13)
    )
    assert sum(x.size for x in jax.tree.leaves(adapter)) == 512


def test_pretraining_teaches_the_language():
    known = invented_people.facts(invented_people.people(8, 0), 0).examples
    size = small_transformer.TransformerSize(len(invented_people.VOCABULARY), invented_people.LENGTH, width=16)
    base = small_transformer.pretrain(jax.random.key(0), size, known, steps=40, batch=16)
    silent = small_transformer.init_adapter(jax.random.key(0), size)
    logits = jax.vmap(lambda tokens: forward(base, silent, tokens)[0])(known["tokens"])
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), known["labels"][..., None], -1)[..., 0]
    assert -(logp * known["loss_mask"]).sum() / known["loss_mask"].sum() < 0.7 * np.log(len(invented_people.VOCABULARY))


def test_an_example_is_a_question_with_loss_on_its_answer():
    names = invented_people.people(3, 0)
    found = invented_people.facts(names, 7)
    assert (
        len(set(names)) == 3 and len(found.answers) == 12 and found.person.tolist() == np.repeat([0, 1, 2], 4).tolist()
    )
    for row, answer in enumerate(found.answers):
        tokens, labels, mask = (found.examples[k][row] for k in ("tokens", "labels", "loss_mask"))
        assert invented_people.decode(labels[mask == 1]) == answer
        assert labels[mask == 1][-1] == invented_people.END
        count = (tokens != invented_people.PAD).sum()
        np.testing.assert_array_equal(tokens[1:count], labels[: count - 1])
        relation = invented_people.RELATIONS[row % 4]
        question = relation.question.format(name=" ".join(names[row // 4]))
        assert invented_people.decode(tokens) == f"{question} {answer}"


def test_paraphrases_tell_the_same_and_wrong_answers_another():
    found = invented_people.facts(invented_people.people(4, 1), 3)
    text = lambda rows: [
        invented_people.decode(t[m == 1]) for t, m in zip(rows["labels"], rows["loss_mask"], strict=True)
    ]
    for row, answer in enumerate(found.answers):
        values = invented_people.RELATIONS[row % 4].values
        value = lambda text, values=values: [word for word in text.split() if word in values]
        right = value(answer)
        others = text({k: v[row] for k, v in found.wrong.items()})
        assert value(text(found.paraphrased)[row]) == right and text(found.paraphrased)[row] != answer
        assert len({*map(str, map(value, others)), str(right)}) == invented_people.WRONG + 1


def test_facts_are_those_of_the_seed():
    names = invented_people.people(2, 0)
    one, two, other = invented_people.facts(names, 1), invented_people.facts(names, 1), invented_people.facts(names, 2)
    assert one.answers == two.answers != other.answers
    assert invented_people.people(5, 0)[:2] == names
    with pytest.raises(ValueError, match="1000"):
        invented_people.people(1000, 0)
