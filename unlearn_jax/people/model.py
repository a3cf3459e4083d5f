"""A small transformer that is trained on some rows, its loss as a function of an adapter, and its greedy answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from unlearn_jax.arrays import Params
from unlearn_jax.experiment import small_transformer
from unlearn_jax.loss import CrossEntropy, Loss
from unlearn_jax.people.config import PeopleNetworkConfig
from unlearn_jax.people.corpus import QuestionRow
from unlearn_jax.people.words import Words

BLOCK = 32  # questions that are answered at a time
GROUP = 32  # weights that share a scale, as in common 4-bit formats
LARGEST = 7  # magnitude of a signed 4-bit integer


class PeopleModel(NamedTuple):
    """The base model, and an adapter before training."""

    words: Words
    base: dict[str, jax.Array]
    fresh: Params

    @classmethod
    def of(cls, config: PeopleNetworkConfig, words: Words, known: Sequence[QuestionRow], seed: int) -> "PeopleModel":
        """Trains a base model on the known rows, in both wordings."""
        size = small_transformer.TransformerSize(
            len(words.ids), words.length, config.width, config.heads, config.layers, config.rank
        )
        pairs = [(row.question, text) for row in known for text in (row.answer, row.paraphrase) if text]
        examples = words.encode(pairs)
        base = small_transformer.pretrain(jax.random.key(seed), size, examples, steps=config.pretraining)
        return cls(words, base, small_transformer.init_adapter(jax.random.key(seed + 1), size))

    def loss(self, base: dict[str, jax.Array] | None = None) -> Loss:
        """The loss of an example as a function of the adapter, on this base model or another of its shape."""
        return Loss(Partial(_logits, self.base if base is None else base), CrossEntropy())

    def answers(self, adapter: Params, questions: Sequence[str], base: dict[str, jax.Array] | None = None) -> list[str]:
        """Generates greedy answers, at most as long as an example."""
        texts, base = [], self.base if base is None else base
        for start in range(0, len(questions), BLOCK):
            block = list(questions[start : start + BLOCK])
            prompts = self.words.encode([(question, "") for question in block + [block[0]] * (BLOCK - len(block))])
            begin = np.asarray(prompts["loss_mask"]).argmax(axis=1) + 1
            tokens = np.asarray(_continue(base, adapter, jnp.asarray(prompts["tokens"]), jnp.asarray(begin)))
            texts += [self.words.decode(row[i:]) for row, i in zip(tokens, begin.tolist(), strict=True)][: len(block)]
        return texts


def merged(base: dict[str, jax.Array], adapter: Params) -> dict[str, jax.Array]:
    """Returns the base model with an adapter added to its weights."""
    added = {
        name: small_transformer.LORA_SCALE * jnp.einsum("lri,lor->lio", pair["lora_a"], pair["lora_b"])
        for name, pair in adapter.items()
    }
    qkvo = base["qkvo"].at[:, 0].add(added["q"]).at[:, 2].add(added["v"])
    return {**base, "qkvo": qkvo}


def silent(adapter: Params) -> Params:
    """An adapter that changes nothing."""
    return jax.tree.map(jnp.zeros_like, adapter)


def int4(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Rounds the weights of all matrices to 4 bits; `GROUP` inputs of an output share a scale, set by the largest weight."""
    matrices = ("qkvo", "up", "down", "unembed")
    return {name: _int4(x) if name in matrices else x for name, x in weights.items()}


def _int4(x: jax.Array) -> jax.Array:
    """Rounds a matrix [..., in, out]."""
    rows = x.shape[-2]
    groups = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -rows % GROUP), (0, 0)])
    groups = groups.reshape(*x.shape[:-2], -1, GROUP, x.shape[-1])
    scale = jnp.abs(groups).max(axis=-2, keepdims=True) / LARGEST
    rounded = jnp.round(groups / jnp.where(scale > 0, scale, 1)) * scale
    return rounded.reshape(*x.shape[:-2], -1, x.shape[-1])[..., :rows, :]


def _logits(base: Any, adapter: Any, example: Any) -> jax.Array:
    return small_transformer.forward(base, adapter, example["tokens"])[0]


@jax.jit
def _continue(base: Any, adapter: Any, tokens: jax.Array, begin: jax.Array) -> jax.Array:
    """Completes tokens int32 [n, T], of which the first `begin` [n] are given, greedily to int32 [n, T + 1]."""
    count, length = tokens.shape
    rows = jnp.arange(count)
    tokens = jnp.concatenate([tokens, jnp.zeros((count, 1), tokens.dtype)], axis=1)

    def write(i, tokens):
        logits = jax.vmap(lambda row: small_transformer.forward(base, adapter, row)[0])(tokens[:, :length])
        position = begin + i
        chosen = jnp.argmax(logits[rows, jnp.clip(position - 1, 0, length - 1)], axis=-1).astype(tokens.dtype)
        unchanged = tokens[rows, jnp.minimum(position, length)]
        return tokens.at[rows, jnp.minimum(position, length)].set(jnp.where(position <= length, chosen, unchanged))

    return jax.lax.fori_loop(0, length, write, tokens)
