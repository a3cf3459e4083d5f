"""A language model whose top layers have an adapter. The layers below them are computed once for every text.

The model is cut in two: `lower` computes hidden states of tokens, `upper` has the adapter and computes logits of hidden states.
Of the topmost layer, keys and values are computed at all positions, the rest only where a token of the answer is predicted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pixel_jax.cli import UserError
from pixel_jax.models import Model
from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.decoder import Decoder
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, copied, split
from unlearn_jax.arrays import AnyArray, Example, Params
from unlearn_jax.loss import MASK, CrossEntropy, Loss
from unlearn_jax.studies.study import digest_of, fresh_adapter

BLOCK = 8  # texts that the lower layers read at a time


class KeysAndValues(NamedTuple):
    """Keys and values of some layers, [layers, B, T, kv_heads, head_dim]."""

    k: AnyArray
    v: AnyArray


class Encoded(NamedTuple):
    """n texts, padded behind their ends."""

    tokens: np.ndarray  # int32 [n, T]
    lengths: np.ndarray  # int32 [n], of the questions
    places: np.ndarray  # int32 [n, A], the positions that predict the answer's tokens
    labels: np.ndarray  # int32 [n, A]
    mask: np.ndarray  # float32 [n, A]


@dataclasses.dataclass(frozen=True, eq=False)
class Recommender:
    """A model in two parts, and a fresh adapter's shape."""

    tokenizer: Any
    lower: Model
    upper: Model  # without the adapter's weights
    shape: Params  # an adapter, of which only names, shapes and dtypes are used

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, *, layers: int, rank: int, alpha: float, targets: str, key: jax.Array
    ) -> "Recommender":
        """Cuts a model below its top `layers` (None: all of them have an adapter).

        Raises:
            UserError: the decoder is not a stack of equal attention layers, or has fewer than `layers`.
        """
        decoder, count = model.language_model, model.config.text.num_hidden_layers
        if type(decoder) is not Decoder:
            raise UserError(f"a model of the family {model.config.model_type!r} has no stack of equal layers to cut")
        if not 1 <= layers <= count:
            raise UserError(f"config.adapter.layers is {layers}; the model has {count}")
        upper = add_lora(_cut(model, count - layers, count), key, rank=rank, alpha=alpha, targets=targets)
        adapter, rest = split(upper, LoRAWeight)
        return cls(tokenizer, _cut(model, 0, count - layers), rest, adapter)

    def fresh(self, seed: int) -> Params:
        """Makes an adapter before training."""
        return fresh_adapter(self.shape, seed)

    @property
    def loss(self) -> Loss:
        """The loss of an example (`hidden`, `places`, `labels` and the mask) as a function of the adapter."""
        return Loss(Partial(_answer_logits, self.upper), CrossEntropy())

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the weights of both parts, which depends on where the model is cut."""
        return digest_of(self.lower, self.upper)

    def ids(self, text: str) -> list[int]:
        """Encodes a text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode(self, pairs: Sequence[tuple[str, str]], length: int, answer: int) -> Encoded:
        """Encodes pairs of a question and an answer; both together have at most `length` tokens, the answer at most `answer`.

        Raises:
            ValueError: a pair is longer.
        """
        count = len(pairs)
        tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        places, labels = np.zeros((2, count, answer), np.int32)
        mask = np.zeros((count, answer), np.float32)
        for i, (question, said) in enumerate(pairs):
            asked, target = self.ids(question), self.ids(said)
            if len(asked) + len(target) > length or len(target) > answer:
                raise ValueError(
                    f"{question!r} with {said!r} has {len(asked)} + {len(target)} tokens, over {length} or {answer}: raise "
                    f"config.data.length or config.data.answer"
                )
            tokens[i, : len(asked) + len(target)] = [*asked, *target]
            lengths[i] = len(asked)
            places[i, : len(target)] = len(asked) - 1 + np.arange(len(target))
            labels[i, : len(target)], mask[i, : len(target)] = target, 1
        return Encoded(tokens, lengths, places, labels, mask)

    def hidden(self, tokens: np.ndarray) -> np.ndarray:
        """Computes the hidden states of tokens int32 [n, T] after the lower layers, float32 [n, T, D]."""
        return np.concatenate([np.asarray(below(self.lower, block)[0])[:real] for block, real in blocks(tokens)])

    def keys_and_values(self, tokens: np.ndarray) -> KeysAndValues:
        """Computes the lower layers' keys and values of tokens int32 [B, T], rounded to 16 bits."""
        return KeysAndValues(*(np.asarray(x, np.float16) for x in below(self.lower, tokens)[1]))


def blocks(rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Splits rows into blocks of `BLOCK`, the last one padded by its first row; with the number of real rows of each."""
    padded_blocks = []
    for at in range(0, len(rows), BLOCK):
        block = rows[at : at + BLOCK]
        padding = np.repeat(block[:1], BLOCK - len(block), axis=0)
        padded_blocks.append((np.concatenate([block, padding]), len(block)))
    return padded_blocks


def _cut(model: Any, first: int, last: int) -> Any:
    """Returns the model with only the layers from `first` up to, but not including, `last`."""
    part = copied(model)
    text = dataclasses.replace(model.config.text, num_hidden_layers=last - first)
    part.config = dataclasses.replace(model.config, text=text)
    part.language_model.config = text
    part.language_model.layers = jax.tree.map(lambda w: w[first:last], part.language_model.layers)
    return part


def queries(layer: Any, x: jax.Array, angles: tuple) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Computes q, k, v and the gate of a layer from its input x [B, T, D]."""
    return layer.self_attn.qkv(layer.input_layernorm(x), *angles)


def finish(layer: Any, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, gate: Any, mask: Mask) -> jax.Array:
    """Computes the output of a layer from its input x [B, Q, D] at the positions of the queries."""
    x = x + layer.self_attn.out(attention(q, k, v, mask, causal=False, implementation="dense"), gate)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _causal(x: jax.Array) -> tuple[jax.Array, Mask]:
    """Positions int32 [B, T] of x, and a causal mask; padding needs none, because it is at the end."""
    order = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return order, Mask(order, order)


def angles_of(model: Any, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The angles of rotary embeddings at positions int32 [B, T]."""
    return model.language_model.angles(jnp.broadcast_to(order, (3, *order.shape)))


def through(model: Any, layers: Any, x: jax.Array) -> tuple[jax.Array, KeysAndValues]:
    """Computes the output [B, T, D] of stacked layers, and their keys and values."""
    order, mask = _causal(x)
    angles = angles_of(model, order)

    def block(x, layer):
        q, k, v, gate = queries(layer, x, angles)
        return finish(layer, x, q, k, v, gate, mask), KeysAndValues(k, v)

    return jax.lax.scan(block, x, layers)


@jax.jit
def below(lower: Any, tokens: jax.Array) -> tuple[jax.Array, KeysAndValues]:
    """Computes hidden states [B, T, D] of tokens int32 [B, T], and the keys and values of the lower layers."""
    return through(lower, lower.language_model.layers, lower.embed(tokens))


def above(upper: Any, adapter: Params, hidden: jax.Array, places: jax.Array) -> tuple[jax.Array, KeysAndValues]:
    """Computes logits [B, A, vocabulary] at positions `places` int32 [B, A] of hidden states [B, T, D].

    Returns:
        The logits, and the keys and values of all upper layers.
    """
    model = combine(adapter, upper)
    layers = model.language_model.layers
    x, kept = through(model, jax.tree.map(lambda w: w[:-1], layers), hidden)
    top = jax.tree.map(lambda w: w[-1], layers)
    order, _ = _causal(x)
    _, k, v, _ = queries(top, x, angles_of(model, order))
    at = jnp.take_along_axis(x, places[..., None], axis=1)
    q, _, _, gate = queries(top, at, angles_of(model, places))
    x = finish(top, at, q, k, v, gate, Mask(places, order))
    join = lambda below, own: jnp.concatenate([below, own[None]])
    return model.logits(model.language_model.norm(x)), KeysAndValues(join(kept.k, k), join(kept.v, v))


def _answer_logits(upper: Any, adapter: Params, example: Example) -> jax.Array:
    """Computes logits [A, vocabulary] of the answer of one example."""
    return above(upper, adapter, example["hidden"][None], example["places"][None])[0][0]


def examples(encoded: Encoded, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of the loss, as a mapping of its fields."""
    return {"hidden": hidden, "places": encoded.places, "labels": encoded.labels, MASK: encoded.mask}
