"""A decoder of two kinds of layers: some have attention, the others the gated delta rule instead, which is recurrent.

The weights of all attention layers are one stack, those of all recurrent parts another, and the weights that both kinds have are
a third, so that every weight keeps its name in files. A scan goes over the repetitions of the pattern of `layer_types` (usually
three recurrent layers and one with attention); the layers of the pattern are unrolled.

The recurrence reads tokens one after the other. The tokens of a row are therefore moved to its beginning before the first layer,
and back after the last one: padding then comes after all tokens, wherever it was, and does not change a state.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pixel_jax.models.attention import Mask
from pixel_jax.models.config import MAX_LAYERS, TextConfig, field, shown, whole
from pixel_jax.models.decoder import Attention, Decoder, KVCache, Prefix, norm
from pixel_jax.models.delta_rule import CHUNK, RecurrentState, convolution, delta_rule
from pixel_jax.models.layers import (
    GatedMLP,
    Linear,
    Remat,
    RMSNorm,
    Weight,
    normal,
    rematerialised,
    stack,
    unstack,
)
from pixel_jax.parallel.sharding import keep_rows, sequence_shards

ATTENDS, RECURRENT = "full_attention", "linear_attention"  # as files call the kinds of layers


def check_kinds(value: Any) -> tuple[str, ...]:
    """Returns the kinds of layers in a list, none for null; anything else raises ValueError."""
    if value is None:
        return ()
    if not isinstance(value, list) or any(kind not in (ATTENDS, RECURRENT) for kind in value):
        raise ValueError(f"is {shown(value)}, not a list of {ATTENDS!r} and {RECURRENT!r}")
    return tuple(value)


@dataclass(frozen=True)
class HybridText(TextConfig):
    """A decoder of layers with attention and recurrent layers, whose states have the sizes `linear_*`."""

    layer_types: tuple[str, ...] = field((), check_kinds)  # (): every `full_attention_interval`-th layer has attention
    full_attention_interval: int = whole(4, MAX_LAYERS)
    linear_conv_kernel_dim: int = whole(4, 64, 2)
    linear_key_head_dim: int = whole(128)
    linear_value_head_dim: int = whole(128)
    linear_num_key_heads: int = whole(16)
    linear_num_value_heads: int = whole(32)  # consecutive heads of values share a head of keys

    layer_kinds: ClassVar[tuple[str, ...]] = (RECURRENT, ATTENDS)

    def __post_init__(self):
        super().__post_init__()
        count, interval = self.num_hidden_layers, self.full_attention_interval
        if not self.layer_types:
            kinds = tuple(RECURRENT if (i + 1) % interval else ATTENDS for i in range(count))
            object.__setattr__(self, "layer_types", kinds)
        if len(self.layer_types) != count:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers, num_hidden_layers says {count}")
        if set(self.layer_types) != {ATTENDS, RECURRENT}:
            raise ValueError(
                f"layer_types {shown(self.layer_types)} has no layer of the other kind: this is supported by no model"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads {self.linear_num_value_heads} is no multiple of "
                f"linear_num_key_heads {self.linear_num_key_heads}"
            )

    @property
    def attention_layers(self) -> int:
        """See `TextConfig.attention_layers`."""
        return self.layer_types.count(ATTENDS)

    @property
    def recurrent_layers(self) -> int:
        """See `TextConfig.recurrent_layers`."""
        return self.layer_types.count(RECURRENT)

    @property
    def layer_weights(self) -> int:
        """See `TextConfig.layer_weights`."""
        heads, shared = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = (2 + self.output_gate) * heads + 2 * shared
        recurrent = 2 * self.key_size + 3 * self.value_size + 2 * self.linear_num_value_heads
        mixers = self.attention_layers * attention + self.recurrent_layers * recurrent
        return self.hidden_size * (mixers + 3 * self.num_hidden_layers * self.intermediate_size)

    @property
    def recurrence_flops(self) -> int:
        """See `TextConfig.recurrence_flops`; of full chunks, the inverse of the triangular system included."""
        keys, values = self.linear_key_head_dim, self.linear_value_head_dim
        inverse = 2 * (CHUNK - 1).bit_length() * CHUNK
        within = CHUNK * (inverse + 3 * keys + 2 * values)
        return 2 * (within + 3 * keys * values) * self.linear_num_value_heads * self.recurrent_layers

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """See `TextConfig.cache_bytes`."""
        state = jax.eval_shape(lambda: self.empty_state(1, jnp.dtype(f"float{8 * itemsize}")))
        recurrent = sum(x.size * x.dtype.itemsize for x in state)
        return super().cache_bytes(tokens, itemsize) + self.recurrent_layers * recurrent

    def layer_numbers(self, key: str, count: int) -> Sequence[int]:
        """See `TextConfig.layer_numbers`."""
        for part, kind in ((".self_attn.", ATTENDS), (".linear_attn.", RECURRENT)):
            if part in key:
                return [i for i, own in enumerate(self.layer_types) if own == kind]
        return range(count)

    @functools.cached_property
    def period(self) -> tuple[str, ...]:
        """The shortest pattern whose repetition is `layer_types`."""
        count = self.num_hidden_layers
        lengths = (n for n in range(1, count + 1) if count % n == 0)
        return next(self.layer_types[:n] for n in lengths if self.layer_types[:n] * (count // n) == self.layer_types)

    @property
    def key_size(self) -> int:
        """Numbers in the keys of all heads of a recurrent layer."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_size(self) -> int:
        """Numbers in the values of all heads of a recurrent layer."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def empty_state(self, batch: int, dtype) -> RecurrentState:
        """Returns the state of a recurrent layer before the first token of each of `batch` rows."""
        heads = self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim
        tail = jnp.zeros((batch, self.linear_conv_kernel_dim - 1, 2 * self.key_size + self.value_size), dtype)
        return RecurrentState(tail, jnp.zeros((batch, *heads), jnp.promote_types(dtype, jnp.float32)))


class GatedDeltaNet(nnx.Module):
    """A short convolution, the gated delta rule, and a gated norm of its output."""

    def __init__(self, key: jax.Array, config: HybridText, dtype):
        keys = jax.random.split(key, 7)
        dim, values, heads = config.hidden_size, config.value_size, config.linear_num_value_heads
        mixed = 2 * config.key_size + values
        project = lambda key, size: Linear(key, dim, size, ("heads", "embed"), bias=False, dtype=dtype)
        self.in_proj_qkv, self.in_proj_z = project(keys[0], mixed), project(keys[1], values)
        self.in_proj_b, self.in_proj_a = project(keys[2], heads), project(keys[3], heads)
        kernel = normal(keys[4], (mixed, 1, config.linear_conv_kernel_dim), ("heads", None, None), dtype)
        self.conv1d = nnx.Dict(weight=kernel)
        self.dt_bias = Weight(jnp.ones((heads,), dtype), axes=("heads",))
        rates = jax.random.uniform(keys[5], (heads,), jnp.float32, 0.01, 16.0)
        self.A_log = Weight(jnp.log(rates).astype(dtype), axes=("heads",))
        self.norm = RMSNorm(config.linear_value_head_dim, (None,), eps=config.rms_norm_eps, dtype=dtype)
        self.out_proj = Linear(keys[6], values, dim, ("embed", "heads"), bias=False, dtype=dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, state: RecurrentState, count: jax.Array, segments: jax.Array | None = None
    ) -> tuple[jax.Array, RecurrentState]:
        """Computes what is added to x [B, T, D], whose rows begin with `count` int32 [B] tokens, and the state after these.

        segments: int32 [B, T], not decreasing, from 0 on: a token reads only tokens of its own segment; None: one segment.
        """
        config, wide = self.config, state.memory.dtype
        valid = (jnp.arange(x.shape[1]) < count[:, None])[..., None]
        mixed, tail = convolution(self.in_proj_qkv(x), state.tail, self.conv1d["weight"][..., 0, :], count, segments)
        q, k, v = jnp.split(jax.nn.silu(mixed).astype(x.dtype), [config.key_size, 2 * config.key_size], axis=-1)
        shared = config.linear_num_value_heads // config.linear_num_key_heads

        def heads(y: jax.Array, size: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, size).astype(wide)

        def unit(y: jax.Array) -> jax.Array:
            y = heads(y, config.linear_key_head_dim)
            y = y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)
            return jnp.repeat(y, shared, axis=2)

        rate = jnp.exp(self.A_log[...].astype(wide))
        g = -rate * jax.nn.softplus(self.in_proj_a(x).astype(wide) + self.dt_bias[...].astype(wide))
        beta = jax.nn.sigmoid(self.in_proj_b(x)).astype(wide)
        out, memory = delta_rule(
            unit(q) * config.linear_key_head_dim**-0.5,
            unit(k),
            heads(v, config.linear_value_head_dim),
            jnp.where(valid, g, 0),
            jnp.where(valid, beta, 0),
            state.memory,
            segments,
        )
        gate = jax.nn.silu(heads(self.in_proj_z(x), config.linear_value_head_dim))
        out = (self.norm(out.astype(x.dtype)) * gate).astype(x.dtype)
        return self.out_proj(out.reshape(*x.shape[:2], -1)), RecurrentState(tail, memory)


class HybridLayer(nnx.Module):
    """One layer of either kind: attention or a recurrence, and a gated MLP, each behind a norm."""

    def __init__(self, mixer: Attention | GatedDeltaNet, mlp: GatedMLP, before: RMSNorm, between: RMSNorm):
        self.mixer, self.mlp, self.input_layernorm, self.post_attention_layernorm = mixer, mlp, before, between

    def add(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Computes the layer's output from its input x [B, T, D] and the output of the mixer."""
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class HybridLayers(nnx.Module):
    """The layers, as stacks of their parts."""

    def __init__(self, key: jax.Array, config: HybridText, dtype):
        keys = jax.random.split(key, 5)
        dim, count = config.hidden_size, config.num_hidden_layers
        mlp = functools.partial(GatedMLP, dim=dim, hidden=config.intermediate_size, axes=("mlp", "embed"), bias=False)
        self.self_attn = stack(lambda k: Attention(k, config, dtype), keys[0], config.attention_layers)
        self.linear_attn = stack(lambda k: GatedDeltaNet(k, config, dtype), keys[1], config.recurrent_layers)
        self.mlp = stack(lambda k: mlp(k, dtype=dtype), keys[2], count)
        self.input_layernorm = stack(lambda k: norm(config, dim, ("embed",), dtype), keys[3], count)
        self.post_attention_layernorm = stack(lambda k: norm(config, dim, ("embed",), dtype), keys[4], count)

    def one_by_one(self, kinds: tuple[str, ...]) -> tuple[HybridLayer, ...]:
        """Makes the layers, whose kinds are given, from the stacks."""
        mixers = {
            kind: iter(unstack(module, kinds.count(kind)))
            for kind, module in ((ATTENDS, self.self_attn), (RECURRENT, self.linear_attn))
        }
        rest = (unstack(x, len(kinds)) for x in (self.mlp, self.input_layernorm, self.post_attention_layernorm))
        return tuple(HybridLayer(next(mixers[kind]), *parts) for kind, *parts in zip(kinds, *rest, strict=True))


class HybridDecoder(Decoder):
    """Embeddings, layers of two kinds and the last norm."""

    config: HybridText
    layers: HybridLayers

    def make_layers(self, key: jax.Array, dtype) -> HybridLayers:
        """See `Decoder.make_layers`."""
        return HybridLayers(key, self.config, dtype)

    def unstack(self) -> tuple[nnx.Module, ...]:
        """See `Decoder.unstack`."""
        return self.layers.one_by_one(self.config.layer_types)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """See `Model.empty_cache`."""
        cache, dtype = super().empty_cache(batch, capacity), self.embed_tokens.weight.dtype
        states = tuple(self.config.empty_state(batch, dtype) for _ in range(self.config.recurrent_layers))
        return cache._replace(recurrent=states)

    def __call__(
        self, x, positions, valid, *, segments=None, remat: Remat = False, implementation: str | None = None, mesh=None
    ) -> jax.Array:
        """See `Decoder.__call__`.

        Raises:
            ValueError: the mesh splits the positions of a row, which a recurrence has to read in order.
        """
        if (shards := sequence_shards(mesh)) > 1:
            raise ValueError(
                f"sequence = {shards} splits the tokens of a row, which recurrent layers read one after the other: "
                "take sequence = 1"
            )
        options = {"segments": segments, "remat": remat, "implementation": implementation}
        return self._read(x, positions, valid, keep=False, **options)[0]

    def prefill(self, x, positions, valid, *, implementation: str | None = None) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.prefill`."""
        hidden, blocks = self._read(x, positions, valid, keep=True, implementation=implementation)
        kinds, period = self.config.layer_types, len(self.config.period)
        states = [jax.tree.map(lambda y, at=i // period: y[at], blocks[i % period]) for i in range(len(kinds))]
        keys, values = zip(*(state for state, kind in zip(states, kinds, strict=True) if kind == ATTENDS), strict=True)
        recurrent = tuple(state for state, kind in zip(states, kinds, strict=True) if kind == RECURRENT)
        return hidden, KVCache(keys, values, valid.sum(axis=1, dtype=jnp.int32), recurrent)

    def _read(
        self, x, positions, valid, *, keep: bool, segments=None, remat: Remat = False, implementation: str | None = None
    ):
        """Computes hidden states after the last norm, and the caches of the layers of `config.period`, stacked over blocks."""
        config = self.config
        order = jnp.argsort(~valid, axis=1, stable=True)  # tokens first
        x = keep_rows(jnp.take_along_axis(x, order[..., None], axis=1))
        cos, sin = self.angles(jnp.take_along_axis(positions, order[None], axis=2))
        count, place = valid.sum(axis=1, dtype=jnp.int32), jnp.arange(valid.shape[1])
        present = place < count[:, None]
        if segments is not None:
            number = jnp.take_along_axis(segments, order, axis=1)
            begins = (number[:, 1:] != number[:, :-1]) & present[:, 1:]
            segments = jnp.pad(jnp.cumsum(begins, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        mask = Mask(jnp.broadcast_to(place, valid.shape), jnp.where(present, place, -1), segments, segments)

        def run(x, layer: HybridLayer):
            read = layer.input_layernorm(x)
            if isinstance(layer.mixer, GatedDeltaNet):
                mixed, state = layer.mixer(read, config.empty_state(len(x), x.dtype), count, segments)
            else:
                mixed, (k, v) = layer.mixer(read, cos, sin, mask, implementation)
                state = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
            return keep_rows(layer.add(x, mixed)), state if keep else None

        run = rematerialised(run, remat)

        def block(x, layers: HybridLayers):
            states = []
            for layer in layers.one_by_one(config.period):
                x, state = run(x, layer)
                states.append(state)
            return x, states

        number_of_blocks = config.num_hidden_layers // len(config.period)
        blocks = jax.tree.map(lambda w: w.reshape(number_of_blocks, -1, *w.shape[1:]), self.layers)
        x, states = jax.lax.scan(block, x, blocks)
        back = jnp.argsort(order, axis=1)
        return keep_rows(jnp.take_along_axis(self.norm(x), back[..., None], axis=1)), states

    def step(self, layers, x, positions, valid, cache: KVCache, prefix: Prefix | None) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.step`."""
        onto, count = self.onto(positions, valid, cache, prefix), valid.sum(axis=1, dtype=jnp.int32)
        keys, values, recurrent = [], [], []
        for layer in layers:
            read = layer.input_layernorm(x)
            if isinstance(layer.mixer, GatedDeltaNet):
                mixed, state = layer.mixer(read, cache.recurrent[len(recurrent)], count)
                recurrent.append(state)
            else:
                mixed, k, v = layer.mixer.cached(read, *onto(len(keys)))
                keys.append(k)
                values.append(v)
            x = layer.add(x, mixed)
        return self.norm(x), KVCache(tuple(keys), tuple(values), cache.length + count, tuple(recurrent))


def decoder_of(config: TextConfig) -> type[Decoder]:
    """Returns the class of the decoder that a configuration describes."""
    return HybridDecoder if isinstance(config, HybridText) else Decoder
