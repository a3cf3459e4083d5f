"""Greedy answers of a model with an adapter, or of several adapters' mean; the lower layers read each question once."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.models.attention import Mask
from pixel_jax.models.lora import combine
from unlearn_jax.arrays import Params
from unlearn_jax.recommendation.recommender import (
    KeysAndValues,
    Recommender,
    above,
    angles_of,
    finish,
    queries,
)

BLOCK = 32  # questions that are answered at a time: weights are read once for all of them
WIDTH = 48  # tokens, of whose multiples blocks are wide, so that few shapes are compiled


class QuestionBlock(NamedTuple):
    """Some questions of similar lengths, filled up to `BLOCK` rows by the first of them."""

    positions: np.ndarray  # int [m], of the questions; the rows after them are filling
    tokens: np.ndarray  # int32 [BLOCK, T]
    lengths: np.ndarray  # int32 [BLOCK]
    hidden: np.ndarray  # float32 [BLOCK, T, D]


@dataclasses.dataclass(frozen=True, eq=False)
class ReadQuestions:
    """n questions and their hidden states after the lower layers; tokens behind a question's length are ignored."""

    recommender: Recommender
    tokens: np.ndarray  # int32 [n, T]
    lengths: np.ndarray  # int32 [n]
    hidden: np.ndarray  # float32 [n, T, D]

    @functools.cached_property
    def blocks(self) -> list[QuestionBlock]:
        """The questions ordered by length; a block is as wide as its longest question, rounded up to `WIDTH`."""
        order, made = np.argsort(self.lengths, kind="stable"), []
        for at in range(0, len(order), BLOCK):
            positions = order[at : at + BLOCK]
            rows = np.resize(positions, BLOCK)
            width = min(self.tokens.shape[1], -(-int(self.lengths[positions].max()) // WIDTH) * WIDTH)
            made.append(
                QuestionBlock(positions, self.tokens[rows, :width], self.lengths[rows], self.hidden[rows, :width])
            )
        return made

    @functools.cached_property
    def kept(self) -> list[KeysAndValues]:
        """Keys and values of the lower layers for each block, float16 [layers, BLOCK, T, kv_heads, head_dim]."""
        return [self.recommender.keys_and_values(block.tokens) for block in self.blocks]

    def first_logits(self, adapters: Params) -> np.ndarray:
        """Logits of the answers' first tokens, [n, vocabulary], by the mean of the adapters' probabilities."""
        logits: list[Any] = [None] * len(self.lengths)
        for block in self.blocks:
            found, _ = _first(self.recommender.upper, adapters, block.hidden, block.lengths - 1)
            for row, position in enumerate(block.positions):
                logits[position] = np.asarray(found[row])
        return np.stack(logits)

    def answers(self, adapters: Params, most: int, stop: Sequence[int]) -> list[str]:
        """Generates greedy answers of at most `most` tokens, each up to the first token of `stop`."""
        lower, upper = self.recommender.lower, self.recommender.upper
        answers, ends = [""] * len(self.lengths), jnp.array(stop, jnp.int32)
        for block, kept in zip(self.blocks, self.kept, strict=True):
            logits, over = _first(upper, adapters, block.hidden, block.lengths - 1)
            tokens = _continue(lower, upper, adapters, block.lengths, kept, over, logits, ends, most)
            tokens = np.asarray(tokens).tolist()
            for row, position in enumerate(block.positions):
                answers[position] = self.recommender.tokenizer.decode(_until(tokens[row], stop))
        return answers


def _until(row: list[int], stop: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in stop), len(row))
    return row[:end]


def _mean(logits: jax.Array) -> jax.Array:
    """Logarithms of the mean of the adapters' probabilities, [adapters, ..., vocabulary] -> [..., vocabulary]."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(logits.shape[0])


@jax.jit
def _first(upper: Any, adapters: Params, hidden: jax.Array, last: jax.Array) -> tuple[jax.Array, KeysAndValues]:
    """Logits [B, vocabulary] behind the questions, and each adapter's keys and values [adapters, layers, ...]."""
    logits, kept = jax.vmap(lambda adapter: above(upper, adapter, hidden, last[:, None]))(adapters)
    return _mean(logits[:, :, 0]), kept


@functools.partial(jax.jit, static_argnames="most")
def _continue(lower, upper, adapters, lengths, kept, above_kept, logits, stop, most: int) -> jax.Array:
    """Generates tokens int32 [B, most] behind questions of `lengths`; those behind a token of `stop` are meaningless."""
    rows, width = lengths.shape[0], kept.k.shape[2]
    wide = KeysAndValues(*(x.astype(lower.dtype) for x in kept))
    asked = jnp.arange(width)
    asked = jnp.where(asked < lengths[:, None], asked, -1)

    def empty(like):  # the keys and values of the generated tokens
        return KeysAndValues(*(jnp.zeros((*x.shape[:-3], most, *x.shape[-2:]), x.dtype) for x in like))

    def stack(model, layers, x, order, step, question, written):
        """The output of stacked layers for x [B, 1, D], and the keys and values of this step and those before it."""
        angles = angles_of(model, order)
        new = jnp.where(jnp.arange(most) <= step, lengths[:, None] + jnp.arange(most), -1)
        mask = Mask(order, jnp.concatenate([asked, new], axis=1))

        def block(x, scanned):
            layer, question, written = scanned
            q, k, v, gate = queries(layer, x, angles)
            put = lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one.astype(all.dtype), step, axis=1)
            written = KeysAndValues(put(written.k, k), put(written.v, v))
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(question, written, strict=True))
            return finish(layer, x, q, k, v, gate, mask), written

        return jax.lax.scan(block, x, (layers, question, written))

    def top(adapter, x, order, step, question, written):
        model = combine(adapter, upper)
        x, written = stack(model, model.language_model.layers, x, order, step, question, written)
        return model.logits(model.language_model.norm(x))[:, 0], written

    def body(carry):
        step, logits, tokens, done, below, over = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        tokens, done = tokens.at[:, step].set(token), done | jnp.isin(token, stop)
        order = (lengths + step)[:, None]
        x, below = stack(lower, lower.language_model.layers, lower.embed(token[:, None]), order, step, wide, below)
        logits, over = jax.vmap(top, in_axes=(0, None, None, None, 0, 0))(adapters, x, order, step, above_kept, over)
        return step + 1, _mean(logits), tokens, done, below, over

    start = (
        jnp.int32(0),
        logits,
        jnp.full((rows, most), stop[0]),
        jnp.zeros(rows, bool),
        empty(wide),
        empty(above_kept),
    )
    return jax.lax.while_loop(lambda carry: (carry[0] < most) & ~carry[3].all(), body, start)[2]
