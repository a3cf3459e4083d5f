"""The decoder of all families: grouped-query attention, gated MLP, rotary positions.

Its layers are stacked and scanned over, or, onto a cache, unrolled.

The input `x` of the decoder is [B, T, D], the embeddings; or, if visual features have parts for the first layers ("deepstack",
arXiv:2406.04334), [B, T, (1 + n) D]: the embeddings, and what is added to the outputs of layers 0, 1, .. n - 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from pixel_jax.models import cpu_forms, int8
from pixel_jax.models.attention import Mask, attention, cached_attention, merge
from pixel_jax.models.config import TextConfig
from pixel_jax.models.delta_rule import RecurrentState
from pixel_jax.models.layers import (
    CentredRMSNorm,
    GatedMLP,
    Linear,
    Remat,
    RMSNorm,
    normal,
    rematerialised,
    stack,
    unstack,
)
from pixel_jax.models.rope import rotary_angles, rotate
from pixel_jax.parallel.sharding import ROWS, SEQUENCE, keep_rows, split_sequence


class KVCache(NamedTuple):
    """The cache of the tokens read so far: keys and values of layers with attention, and states of recurrent layers.

    k, v: one array per layer with attention, [B, kv_heads, L, head_dim]. They are not stacked, because a stacked cache that a
          loop carries is copied at every layer. Of eight bits they are `int8.Int8`, with a scale for each head and token.
    length: int32 [B], tokens written in each row; further ones go to slots length, length + 1, ...
    recurrent: one state per recurrent layer, of the row's tokens and of the prefix that it continues
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array
    recurrent: tuple[RecurrentState, ...] = ()

    @classmethod
    def empty(cls, config: TextConfig, batch: int, capacity: int, dtype) -> "KVCache":
        """Returns a cache of zeros for `capacity` tokens in each of `batch` rows."""
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(config.attention_layers))
        return cls(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))

    def quantised(self) -> "KVCache":
        """Returns an empty cache of the same size with keys and values of eight bits."""
        return self._replace(k=tuple(map(int8.empty, self.k)), v=tuple(map(int8.empty, self.v)))


Cached = jax.Array | int8.Int8  # keys or values of a layer


def written(cache: Cached, write: jax.Array, new: jax.Array) -> Cached:
    """Puts keys or values `new` [B, T, kv_heads, head_dim] into the slots `write` (int32 [B, T]) of a cache."""
    rows = jnp.arange(new.shape[0])[:, None]
    put = lambda old, new: old.at[rows, :, write].set(new.astype(old.dtype), mode="drop")
    return jax.tree.map(put, cache, int8.quantised(new) if isinstance(cache, int8.Int8) else new)


class Prefix(NamedTuple):
    """The prefixes that rows share: B rows are G groups of neighbours, and each group has E prefixes of up to L tokens.

    k, v: one array per layer, [G, kv_heads, E * L, head_dim], as `KVCache` has them for E = 1
    length: int32 [G, E], tokens of each prefix
    entry: int32 [B], the prefix of its group that a row continues
    recurrent: one state per recurrent layer, arrays [G, E, ...]
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array
    entry: jax.Array
    recurrent: tuple[RecurrentState, ...] = ()

    @classmethod
    def of(cls, cache: KVCache, rows: int) -> "Prefix":
        """Makes a prefix of each row of the cache; the same number of neighbours among `rows` rows continue each."""
        recurrent = jax.tree.map(lambda x: x[:, None], cache.recurrent)
        return cls(cache.k, cache.v, cache.length[:, None], jnp.zeros(rows, jnp.int32), recurrent)

    def continued(self, cache: KVCache) -> KVCache:
        """Returns the rows' empty `cache` with the recurrent states of their prefixes, which each row changes on its own."""
        return cache._replace(recurrent=jax.tree.map(self.of_rows, self.recurrent))

    def of_rows(self, x: jax.Array) -> jax.Array:
        """Takes for each row the value of the prefix that it continues: [G, E, ...] -> [B, ...]."""
        rows = self.entry.shape[0]
        entry = self.entry.reshape(rows, 1, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(jnp.repeat(x, rows // x.shape[0], axis=0), entry, axis=1)[:, 0]

    def mask(self, length: int) -> Mask:
        """Returns the mask of the B rows' queries, `length` each, folded into groups: [G, B / G * length] by [G, E * L]."""
        groups, entries = self.length.shape
        rows = self.entry.shape[0]
        if rows % groups:
            raise ValueError(f"{rows} rows cannot share the prefixes of {groups} groups evenly")
        capacity = self.k[0].shape[2] // entries
        index = jnp.arange(capacity)
        keys = jnp.where(index < self.length[..., None], index, -1).reshape(groups, -1)
        queries = jnp.full((groups, rows // groups * length), capacity)
        if entries == 1:
            return Mask(queries, keys)
        continued = jnp.repeat(self.entry.reshape(groups, -1), length, axis=1)
        return Mask(queries, keys, continued, jnp.broadcast_to(jnp.arange(entries * capacity) // capacity, keys.shape))


def norm(config: TextConfig, dim: int, axes: tuple, dtype) -> RMSNorm:
    """Returns the family's kind of norm."""
    kind = CentredRMSNorm if config.centred_norms else RMSNorm
    return kind(dim, axes, eps=config.rms_norm_eps, dtype=dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; biases, norms of heads and a gate are as the configuration says."""

    def __init__(self, key: jax.Array, config: TextConfig, dtype):
        keys = jax.random.split(key, 4)
        dim, head_dim = config.hidden_size, config.head_dim
        query, shared = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        bias = config.qkv_bias
        queries_and_gate = query * (1 + config.output_gate)
        self.q_proj = Linear(keys[0], dim, queries_and_gate, ("heads", "embed"), bias=bias, dtype=dtype)
        self.k_proj = Linear(keys[1], dim, shared, ("kv", "embed"), bias=bias, dtype=dtype)
        self.v_proj = Linear(keys[2], dim, shared, ("kv", "embed"), bias=bias, dtype=dtype)
        self.o_proj = Linear(keys[3], query, dim, ("embed", "heads"), bias=config.output_bias, dtype=dtype)
        self.q_norm, self.k_norm = nnx.data(None), nnx.data(None)
        if config.qk_norm:
            head_norm = lambda: norm(config, head_dim, (None,), dtype)
            self.q_norm, self.k_norm = head_norm(), head_norm()
        self.head_dim, self.gated = head_dim, config.output_gate

    def __call__(self, x, cos, sin, mask: Mask, implementation: str | None, mesh: Mesh | None = None):
        """Computes what is added to x [B, T, D], and keys and values [B, T, kv_heads, head_dim].

        On a mesh with a sequence axis queries stay split, and keys and values are gathered.
        """
        q, k, v, gate = self.qkv(x, cos, sin)
        q = split_sequence(q, mesh, ROWS, SEQUENCE, "tensor")
        k, v = split_sequence((k, v), mesh, ROWS, None, "tensor")
        return self.out(attention(q, k, v, mask, causal=True, implementation=implementation), gate), (k, v)

    def cached(self, x, cos, sin, write, cache_k, cache_v, mask: Mask, used, prefix, prefix_mask: Mask | None):
        """Computes the same with a cache, to which the tokens are appended.

        Args:
            x: [B, T, D].
            cos: cosines of the rotation, float32 [B, T, rotary_dim / 2].
            sin: sines.
            write: int32 [B, T], the tokens' slots.
            cache_k: this layer's keys [B, kv_heads, L, head_dim].
            cache_v: its values.
            mask: of the cache.
            used: int32 [], the most slots that a row may look at.
            prefix: this layer's (k, v) of a `Prefix`, or None.
            prefix_mask: its mask.

        Returns:
            What is added to x, cache_k and cache_v.
        """
        q, k, v, gate = self.qkv(x, cos, sin)
        cache_k, cache_v = written(cache_k, write, k), written(cache_v, write, v)
        own, own_lse = cached_attention(q, cache_k, cache_v, mask, used)
        if prefix is not None and prefix_mask is not None:
            # The rows of a group become further queries of one row, so that the keys of its prefix are not repeated.
            folded = q.reshape(prefix[0].shape[0], -1, *q.shape[2:])
            out, lse = cached_attention(folded, prefix[0], prefix[1], prefix_mask)
            own = merge([(own, own_lse), (out.reshape(q.shape), lse.reshape(q.shape[:-1]))])
        return self.out(own, gate), cache_k, cache_v

    def qkv(self, x, cos, sin) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """[B, T, D] -> q [B, T, heads, head_dim] and k, v [B, T, kv_heads, head_dim], q and k rotated; a gate like q, or None."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        gate = None
        if self.gated:  # each head's query and gate lie side by side
            q, gate = q[..., 0::2, :], q[..., 1::2, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v, gate

    def out(self, attended: jax.Array, gate: jax.Array | None) -> jax.Array:
        """[B, T, heads, head_dim] -> [B, T, D]."""
        if gate is not None:
            attended = attended * jax.nn.sigmoid(gate)
        return self.o_proj(attended.reshape(*attended.shape[:2], -1))


class DecoderLayer(nnx.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, key: jax.Array, config: TextConfig, dtype):
        keys = jax.random.split(key)
        dim = config.hidden_size
        self.self_attn = Attention(keys[0], config, dtype)
        self.mlp = GatedMLP(keys[1], dim, config.intermediate_size, ("mlp", "embed"), bias=config.mlp_bias, dtype=dtype)
        self.input_layernorm = norm(config, dim, ("embed",), dtype)
        self.post_attention_layernorm = norm(config, dim, ("embed",), dtype)

    def __call__(self, x, cos, sin, mask: Mask, implementation: str | None, mesh: Mesh | None = None):
        """x [B, T, D] -> x and its keys and values [B, T, kv_heads, head_dim]; the arguments are those of `Attention`."""
        attended, keys_and_values = self.self_attn(self.input_layernorm(x), cos, sin, mask, implementation, mesh)
        x = x + attended
        return split_sequence(x + self.mlp(self.post_attention_layernorm(x)), mesh, ROWS, SEQUENCE), keys_and_values

    def cached(self, x, cos, sin, *onto):
        """Computes the same with a cache: x, and this layer's keys and values; the arguments are those of `Attention.cached`."""
        attended, cache_k, cache_v = self.self_attn.cached(self.input_layernorm(x), cos, sin, *onto)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache_k, cache_v


class Embedding(nnx.Module):
    """The table of embeddings [vocab, D]."""

    def __init__(self, key: jax.Array, config: TextConfig, dtype):
        self.weight = normal(key, (config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype)

    def __call__(self, hidden: jax.Array, dtype) -> jax.Array:
        """Applies the table as the head of a network that ties the two: [..., D] -> [..., vocab]."""
        return cpu_forms.product(hidden, self.weight[...], dtype)


class Decoder(nnx.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: TextConfig, key: jax.Array, dtype):
        keys = jax.random.split(key)
        self.config = config
        self.embed_tokens = Embedding(keys[0], config, dtype)
        self.layers = self.make_layers(keys[1], dtype)
        self.norm = norm(config, config.hidden_size, ("embed",), dtype)

    def make_layers(self, key: jax.Array, dtype) -> nnx.Module:
        """The layers, stacked."""
        return stack(lambda k: DecoderLayer(k, self.config, dtype), key, self.config.num_hidden_layers)

    def unstack(self) -> tuple[nnx.Module, ...]:
        """The layers one by one, for `step`."""
        return unstack(self.layers, self.config.num_hidden_layers)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """See `Model.empty_cache`."""
        return KVCache.empty(self.config, batch, capacity, self.embed_tokens.weight.dtype)

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions int32 [3, B, T] -> cosines and sines of the rotation, float32 [B, T, rotary_dim / 2]."""
        return rotary_angles(positions, self.config)

    def split_deepstack(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """[B, T, (1 + n) D] -> embeddings [B, T, D], and what is added to the outputs of layers [n, B, T, D], None if n = 0."""
        dim = self.config.hidden_size
        if x.shape[-1] == dim:
            return x, None
        parts = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, dim), -2, 0)
        return parts[0], parts[1:]

    def __call__(
        self, x, positions, valid, *, segments=None, remat: Remat = False, implementation: str | None = None, mesh=None
    ) -> jax.Array:
        """x [B, T, D], positions int32 [3, B, T], valid bool [B, T] (gaps allowed) -> hidden [B, T, D] after the last norm."""
        options = {"segments": segments, "remat": remat, "implementation": implementation, "mesh": mesh}
        return self._layers(x, positions, valid, lambda keys_and_values: None, **options)[0]

    def prefill(self, x, positions, valid, *, implementation: str | None = None) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.prefill`."""
        in_cache = lambda keys_and_values: jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), keys_and_values)
        hidden, (keys, values) = self._layers(x, positions, valid, in_cache, implementation=implementation)
        return hidden, KVCache(tuple(keys), tuple(values), valid.sum(axis=1, dtype=jnp.int32))

    def _layers(
        self, x, positions, valid, keep, *, segments=None, remat=False, implementation: str | None = None, mesh=None
    ):
        """Hidden states after the last norm, and `keep(keys_and_values)` of every layer, stacked."""
        x, added = self.split_deepstack(split_sequence(x, mesh, ROWS, SEQUENCE))
        cos, sin = self.angles(positions)
        order = jnp.broadcast_to(jnp.arange(x.shape[1]), valid.shape)
        mask = Mask(order, jnp.where(valid, order, -1), segments, segments)

        def block(x, scanned):
            layer, number = scanned
            x, keys_and_values = layer(x, cos, sin, mask, implementation, mesh)
            if added is not None:
                x = x + added.at[number].get(mode="fill", fill_value=0)
            return keep_rows(x), keep(keys_and_values)

        numbers = None if added is None else jnp.arange(self.config.num_hidden_layers)
        x, by_layer = jax.lax.scan(rematerialised(block, remat), keep_rows(x), (self.layers, numbers))
        return self.norm(x), by_layer

    def step(self, layers, x, positions, valid, cache: KVCache, prefix: Prefix | None) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.step`."""
        x, added = self.split_deepstack(x)
        onto = self.onto(positions, valid, cache, prefix)
        keys, values = [], []
        for i, layer in enumerate(layers):
            x, k, v = layer.cached(x, *onto(i))
            if added is not None and i < len(added):
                x = x + added[i]
            keys.append(k)
            values.append(v)
        return self.norm(x), KVCache(tuple(keys), tuple(values), cache.length + valid.sum(axis=1, dtype=jnp.int32))

    def onto(self, positions, valid, cache: KVCache, prefix: Prefix | None) -> Callable[[int], tuple]:
        """Returns a function from the index of a layer in the cache to the arguments of `Attention.cached` after `x`."""
        batch, length = valid.shape
        capacity = cache.k[0].shape[2]
        cos, sin = self.angles(positions)
        order = cache.length[:, None] + jnp.arange(length)
        write = jnp.where(valid, order, capacity)  # out of range: dropped
        mask = Mask(order, jnp.broadcast_to(jnp.arange(capacity), (batch, capacity)))
        # Rows that read no token do not count, because a finished row may be the longest.
        used = jnp.minimum(jnp.max(jnp.where(valid[:, 0], cache.length + length, 0)), capacity)
        prefix_mask = None if prefix is None else prefix.mask(length)

        def layer(i: int) -> tuple:
            shared = None if prefix is None else (prefix.k[i], prefix.v[i])
            return cos, sin, write, cache.k[i], cache.v[i], mask, used, shared, prefix_mask

        return layer
