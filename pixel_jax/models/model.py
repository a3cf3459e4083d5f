"""The protocol of a model, its implementation for all families here, and the forward function that all users share."""

import functools
import operator
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from pixel_jax.arrays import AnyArray
from pixel_jax.models.attention import select_implementation
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.families import tower_of
from pixel_jax.models.hybrid import decoder_of
from pixel_jax.models.inputs import Visual, locate, slice_grids, slice_pixels
from pixel_jax.models.layers import Linear, Remat
from pixel_jax.models.rope import mrope_positions, text_positions
from pixel_jax.parallel.sharding import ROWS, SEQUENCE, keep_vocabulary, sequence_shards, split_sequence


class Model(Protocol):
    """A model of any family: a pytree of weights, whose methods are pure functions.

    Rollouts, training, evaluation, planning and curvature use these members and no others. A layer of the decoder keeps keys and
    values of its tokens, or a recurrent state of fixed size (`KVCache` holds both). Rows that continue a `Prefix` read its keys
    and values, and begin with copies of its recurrent states (`Prefix.continued`).
    """

    @property
    def config(self) -> ModelConfig:
        """The family's configuration: patch and merge sizes, placeholder tokens, sizes of the decoder."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the weights: that of the embedding."""
        ...

    def encode(
        self, pixels: jax.Array, hw: jax.Array, *, remat: Remat = False, implementation: str | None = None
    ) -> jax.Array:
        """Computes visual features [N, P / m, F] of temporal slices float32 [N, P, patch_dim]; hw: int32 [N, 2] in patches.

        m patches are one visual token. F = `config.vision.feature_size`.
        """
        ...

    def is_visual(self, tokens: AnyArray) -> jax.Array:
        """Whether tokens [...] are placeholders of visual features, bool [...]."""
        ...

    def positions(
        self, tokens: AnyArray, valid: AnyArray, grids: AnyArray, seconds: AnyArray, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Computes rotary positions int32 [3, B, T] of tokens, and the positions after the last ones, int32 [B].

        Args:
            tokens: int32 [B, T].
            valid: bool [B, T]; a token that is not valid takes no position.
            grids: int32 [B, K, 3], the items that visual tokens belong to; zeros: absent.
            seconds: float32 [B, K], between the slices of a video; 0 for images.
            start: int32 [B], the position of the first token.
        """
        ...

    def embed(
        self,
        tokens: AnyArray,
        features: jax.Array | None = None,
        grids: AnyArray | None = None,
        seen: jax.Array | int = 0,
    ) -> jax.Array:
        """Embeds tokens int32 [B, T], with visual ones replaced by features: the decoder's input, [B, T, D or F]."""
        ...

    def backbone(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        *,
        segments: jax.Array | None = None,
        remat: Remat = False,
        implementation: str | None = None,
        mesh: Mesh | None = None,
    ) -> jax.Array:
        """Computes hidden states [B, T, D] after the last norm from the result of `embed`, without a cache."""
        ...

    def prefill(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array, *, implementation: str | None = None
    ) -> tuple[jax.Array, KVCache]:
        """As `backbone`, and the cache of the tokens."""
        ...

    def unstack(self) -> tuple[nnx.Module, ...]:
        """The decoder layers one by one, for `step`."""
        ...

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache for `capacity` tokens in each of `batch` rows."""
        ...

    def step(
        self,
        layers: tuple[nnx.Module, ...],
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: KVCache,
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Append tokens to each row's cache and return their hidden states.

        cache: of rows that begin behind a prefix, `prefix.continued` of an empty one.
        """
        ...

    @property
    def head(self) -> nnx.Module:
        """The weights that `logits` reads."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., vocab]."""
        ...


class LanguageModel(nnx.Module):
    """A decoder, with a vision tower where its family has one: implements `Model` for every family of `families.py`.

    Randomly initialised from `key`; `pixel_jax.from_pretrained` reads a checkpoint.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.config = config
        self.visual = nnx.data(None)
        if config.vision is not None:
            self.visual = tower_of(config)(config.vision, keys[0], dtype)
        self.language_model = decoder_of(config.text)(config.text, keys[1], dtype)
        # A tied head reads embed_tokens. A second attribute with it would be a second leaf, with a separate gradient.
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            dim, vocab = config.text.hidden_size, config.text.vocab_size
            self.lm_head = Linear(keys[2], dim, vocab, ("vocab", "embed"), bias=False, dtype=dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """See `Model.dtype`."""
        return jnp.dtype(self.language_model.embed_tokens.weight.dtype)

    def encode(
        self, pixels: jax.Array, hw: jax.Array, *, remat: Remat = False, implementation: str | None = None
    ) -> jax.Array:
        """See `Model.encode`. Visual tokens are in raster order."""
        if self.visual is None:
            raise ValueError(f"a model of the family {self.config.model_type!r} has no vision tower")
        return self.visual(pixels, hw, remat=remat, implementation=implementation)

    def is_visual(self, tokens: AnyArray) -> jax.Array:
        """See `Model.is_visual`."""
        placeholders = [jnp.asarray(tokens) == number for number in self.config.visual_tokens]
        return functools.reduce(operator.or_, placeholders, jnp.zeros(tokens.shape, bool))

    def positions(
        self, tokens: AnyArray, valid: AnyArray, grids: AnyArray, seconds: AnyArray, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Model.positions`."""
        if self.config.text.mrope_section is None:
            return text_positions(valid, start)
        return mrope_positions(self.is_visual(tokens), valid, grids, seconds, start, self.config)

    def embed(
        self,
        tokens: AnyArray,
        features: jax.Array | None = None,
        grids: AnyArray | None = None,
        seen: jax.Array | int = 0,
    ) -> jax.Array:
        """See `Model.embed`.

        features: [B, S, P / m, F], the row's temporal slices from `encode`, in order of appearance
        grids:    int32 [B, K, 3], the items they belong to
        seen:     int32 [B] or int, how many of these visual tokens came before this stretch
        The j-th visual token of the row takes the j-th feature; one beyond the row's items keeps its own embedding.
        """
        table = self.language_model.embed_tokens.weight[...]
        # On a mesh either the table or the result is sent between devices, whichever is smaller.
        x = (keep_vocabulary(table) if tokens.size > table.shape[0] else table)[tokens]
        if features is None or grids is None or grids.shape[1] == 0:
            return x
        assert self.config.vision is not None
        batch, _, tokens_per_slice, dim = features.shape
        is_visual = self.is_visual(tokens)
        rank = jnp.asarray(seen).reshape(-1, 1) + jnp.cumsum(is_visual, axis=1) - 1
        located = locate(rank, grids, self.config.vision.spatial_merge_size)
        index = located.slice * tokens_per_slice + located.offset
        flat = features.reshape(batch, -1, dim)
        chosen = jnp.take_along_axis(flat, index[..., None], axis=1, mode="fill", fill_value=0)
        if dim > x.shape[-1]:  # text tokens add zeros in the first layers
            x = jnp.pad(x, ((0, 0), (0, 0), (0, dim - x.shape[-1])))
        return jnp.where((is_visual & located.known)[..., None], chosen.astype(x.dtype), x)

    def backbone(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        *,
        segments=None,
        remat: Remat = False,
        implementation: str | None = None,
        mesh=None,
    ) -> jax.Array:
        """See `Model.backbone`.

        positions: int32 [3, B, T]; valid: bool [B, T], gaps allowed; a token sees the valid ones up to itself
        segments:  int32 [B, T] or None, packed examples that must not see each other
        mesh:      splits the positions of a row, if it has a sequence axis
        """
        return self.language_model(
            x, positions, valid, segments=segments, remat=remat, implementation=implementation, mesh=mesh
        )

    def prefill(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array, *, implementation: str | None = None
    ) -> tuple[jax.Array, KVCache]:
        """As `backbone`, and the cache of the tokens, left-aligned, which `step` can read as a `Prefix`.

        Its capacity is T tokens: nothing can be appended.
        """
        return self.language_model.prefill(x, positions, valid, implementation=implementation)

    def unstack(self) -> tuple[nnx.Module, ...]:
        """The decoder layers one by one, for `step`. Call it once, outside the decoding loop."""
        return self.language_model.unstack()

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """See `Model.empty_cache`."""
        return self.language_model.empty_cache(batch, capacity)

    def step(
        self,
        layers: tuple[nnx.Module, ...],
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: KVCache,
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Append T tokens to each row's cache and return their hidden states [B, T, D].

        layers: from `unstack`
        x:      [B, T, D], positions int32 [3, B, T]
        valid:  bool [B, T], left-aligned: a row's new tokens come first. Tokens that are not valid are not written.
        cache:  the row's own tokens; the caller ensures that length + T fits, tokens that do not fit are dropped
        prefix: the prefixes that rows continue; they are read, not copied
        """
        return self.language_model.step(layers, x, positions, valid, cache, prefix)

    @property
    def head(self) -> nnx.Module:
        """The weights that `logits` reads."""
        return self.language_model.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., vocab]."""
        return logits(self.head, hidden)


def logits(head: nnx.Module, hidden: jax.Array) -> jax.Array:
    """[..., D] -> at least float32 [..., vocab]."""
    return head(hidden, dtype=jnp.promote_types(hidden.dtype, jnp.float32))


def encode_visual(
    model: Model,
    visual: Visual,
    *,
    remat: Remat = False,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Encodes all temporal slices of a batch of rows: [B, S, P / m, F]; absent slices give meaningless finite numbers.

    If attention is linear in memory, a row's slices are encoded one after the other; on a mesh with a sequence axis they are
    split over it instead, if they divide evenly.
    """
    batch, num_slices, _ = visual.slices.shape
    frames = jnp.maximum(visual.slices, 0)
    first, second = (jnp.take_along_axis(visual.patches, frames[..., i, None, None], axis=1) for i in (0, 1))
    hw = slice_grids(visual.grids, num_slices)
    linear = select_implementation(implementation, visual.patches.shape[2], visual.patches.shape[2]) != "dense"
    vision = model.config.vision
    assert vision is not None
    pixels_of = functools.partial(slice_pixels, vision=vision)
    if linear and num_slices > 1 and sequence_shards(mesh) == 1:
        encode = lambda x: model.encode(pixels_of(*x[:2]), x[2], remat=remat, implementation=implementation)
        features = jax.lax.map(encode, tuple(jnp.swapaxes(x, 0, 1) for x in (first, second, hw)))
        return jnp.swapaxes(features, 0, 1)
    pixels = pixels_of(first, second)
    pixels = pixels.reshape(batch * num_slices, *pixels.shape[2:])
    if num_slices % sequence_shards(mesh) == 0:
        pixels = split_sequence(pixels, mesh, (*ROWS, SEQUENCE))
    features = model.encode(pixels, hw.reshape(-1, 2), remat=remat, implementation=implementation)
    return features.reshape(batch, num_slices, *features.shape[1:])


def forward_hidden(
    model: Model,
    tokens: jax.Array,
    valid: jax.Array,
    visual: Visual | None,
    *,
    remat: Remat = False,
    implementation: str | None = None,
    segments: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Computes hidden states [B, T, D] of tokens int32 [B, T], valid bool [B, T] and the images of the rows.

    It is the forward function of SFT, RL, scoring and curvature; `model.logits` turns its result into logits. Positions run on
    over packed segments, because rotary attention depends only on differences. On a `mesh` with a sequence axis the positions of
    each row are split over it, and so are hidden states.
    """
    if tokens.shape[1] % sequence_shards(mesh):
        raise ValueError(f"rows of {tokens.shape[1]} tokens cannot be split over sequence = {sequence_shards(mesh)}")
    tokens = jnp.where(valid, tokens, 0)
    features, grids = None, jnp.zeros((tokens.shape[0], 0, 3), jnp.int32)
    seconds = jnp.zeros(grids.shape[:2], jnp.float32)
    if visual is not None and visual.slices.shape[1] and model.config.vision is not None:
        features = encode_visual(model, visual, remat=remat, implementation=implementation, mesh=mesh)
        grids, seconds = visual.grids, visual.seconds
    x = model.embed(tokens, features, grids)
    positions, _ = model.positions(tokens, valid, grids, seconds, jnp.zeros(tokens.shape[:1], jnp.int32))
    return model.backbone(x, positions, valid, segments=segments, remat=remat, implementation=implementation, mesh=mesh)
