"""The cases of the network without a gradient: vision tower, prefill, decoding."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.bench.memory import array_bytes
from pixel_jax.bench.network import (
    HAS_TORCH,
    images,
    random_model,
    rollout_config,
    text_tokens,
    transformers_model,
    vocabulary,
)
from pixel_jax.bench.operations import close, same
from pixel_jax.bench.timing import Aim, Case, Workload
from pixel_jax.models.flops import Work, forward_flops, row_work
from pixel_jax.models.inputs import Visual
from pixel_jax.models.model import LanguageModel, encode_visual
from pixel_jax.models.rope import mrope_positions
from pixel_jax.ops import patchify, pixel_values
from pixel_jax.rollouts import decode_loop, queue
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import BatchShape, RolloutShape
from pixel_jax.rollouts.trajectory import Prompts


def _patches(count: int, side: int) -> jax.Array:
    def cut(image):
        return patchify(image, jnp.array([side, side]), max_patches=(side // 14) ** 2)

    return jax.jit(jax.vmap(cut))(images(count, side, side))


def build_vision(quick: bool) -> Workload:
    """The vision tower."""
    count, side = (2, 56) if quick else (8, 336)
    grid = side // 14
    pixels = jax.jit(lambda x: pixel_values(x, x))(_patches(count, side))
    model, hw = random_model(quick), jnp.full((count, 2), grid, jnp.int32)

    def ours():
        encode = jax.jit(lambda model, pixels, hw: model.encode(pixels, hw))
        return lambda: encode(model, pixels, hw)

    alternatives = {"pixel_jax": ours}
    if HAS_TORCH:
        import torch

        def transformers():
            tower = transformers_model(model).model.visual
            flat = torch.from_numpy(np.array(pixels)).flatten(0, 1)
            grids = torch.tensor([[1, grid, grid]] * count)

            def run():
                with torch.no_grad():
                    return tower(flat, grid_thw=grids).pooler_output.reshape(count, grid * grid // 4, -1).numpy()

            return run

        alternatives["transformers"] = transformers
    work = row_work(np.zeros(count), np.tile([1, grid, grid], (count, 1)), model.config)
    flops = sum(forward_flops(model.config, work))
    read = array_bytes(model.visual, pixels)
    return Workload(f"{count} images of {side} x {side} pixels", alternatives, close(1e-5), flops=flops, bytes=read)


def build_prefill(quick: bool) -> Workload:
    """The prefill of prompts with an image."""
    count, side, text = (2, 56, 12) if quick else (4, 336, 66)
    grid = side // 14
    model, words = random_model(quick), vocabulary()
    visual_tokens = grid * grid // 4
    written = text_tokens(count, text)
    image = np.full((count, visual_tokens), words.image_pad)
    ends = np.tile([words.vision_start, words.vision_end], (count, 1))
    tokens = np.concatenate([ends[:, :1], image, ends[:, 1:], written], axis=1).astype(np.int32)
    length = tokens.shape[1]
    patches = _patches(count, side)[:, None]
    visual = Visual(
        patches,
        jnp.zeros((count, 1, 2), jnp.int32),
        jnp.tile(jnp.array([[[1, grid, grid]]]), (count, 1, 1)),
        jnp.zeros((count, 1)),
    )

    def prefill(model, tokens, visual):
        features = encode_visual(model, visual)
        x = model.embed(tokens, features, visual.grids)
        valid = jnp.ones(tokens.shape, bool)
        start = jnp.zeros(count, jnp.int32)
        positions, _ = mrope_positions(
            model.is_visual(tokens), valid, visual.grids, visual.seconds, start, model.config
        )
        hidden, cache = model.prefill(x, positions, valid)
        return model.logits(hidden[:, -1]), cache

    def ours():
        run = jax.jit(prefill)
        return lambda: run(model, tokens, visual)[0]

    alternatives = {"pixel_jax": ours}
    if HAS_TORCH:
        import torch

        def transformers():
            twin = transformers_model(model)
            ids = torch.from_numpy(tokens).long()
            values = torch.from_numpy(np.array(pixel_values(patches[:, 0], patches[:, 0]))).flatten(0, 1)
            inputs = {
                "input_ids": ids,
                "pixel_values": values,
                "image_grid_thw": torch.tensor([[1, grid, grid]] * count),
                "mm_token_type_ids": (ids == words.image_pad).int(),
                "attention_mask": torch.ones_like(ids),
            }

            def run():
                with torch.no_grad():
                    return twin(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].numpy()

            return run

        alternatives["transformers"] = transformers
    work = row_work(np.full(count, length), np.tile([1, grid, grid], (count, 1)), model.config)
    flops = sum(forward_flops(model.config, work._replace(predictions=count)))
    shapes = f"{count} rows of {length} tokens, {visual_tokens} of an image of {side} x {side}, encoded"
    return Workload(shapes, alternatives, close(1e-5), flops=flops, bytes=array_bytes(model, visual))


class Decoding(NamedTuple):
    """The functions of greedy decoding with all that a rollout does for a token: sampling, automaton, record."""

    start: Callable  # (model, prompts) -> the arguments of `decode`, after the prefill
    decode: Callable  # (model, its layers unstacked, *start(model, prompts)) -> the rows' state, `steps` tokens later
    prompts: Prompts
    bytes: float  # least bytes that are read: the weights for every token, and the cache as it grows

    def prepare(self, model: LanguageModel) -> Callable[[], jax.Array]:
        """The run that is timed. It returns the rows' tokens."""
        shared, state = self.start(model, self.prompts)
        run, layers = jax.jit(self.decode), jax.jit(LanguageModel.unstack)(model)
        return lambda: run(model, layers, shared, state).tokens


def decoding(model: LanguageModel, tokens: np.ndarray, steps: int, quick: bool) -> Decoding:
    """The decoding of `steps` tokens after the prompts `tokens` int32 [rows, length]. Only the shapes of `model` count."""
    rows, length = tokens.shape
    words = tables(vocabulary())
    shape = RolloutShape(BatchShape(length, 1, 1, 16, 28, 28), words.tools, shards=1)
    words = dataclasses.replace(words, stop=jnp.full(1, -2, jnp.int32))  # no stop token: no row ends early
    prompts = Prompts(
        tokens=jnp.asarray(tokens),
        length=jnp.full(rows, length, jnp.int32),
        buffers=jnp.zeros((rows, 1, 28, 28, 3), jnp.uint8),
        image_sizes=jnp.full((rows, 1, 2), 28, jnp.int32),
        image_counts=jnp.ones(rows, jnp.int32),
        is_video=jnp.zeros(rows, bool),
        seconds=jnp.zeros(rows, jnp.float32),
        uid=jnp.arange(rows, dtype=jnp.int32),
        tables=words,
    )
    config = dataclasses.replace(
        rollout_config(quick), group_size=1, max_response=steps, max_new_tokens=steps + 1, max_calls=0, max_images=1
    )

    def decode(model, layers, shared, state):
        def body(_, state):
            return decode_loop.decode(model, layers, shared, state, config)

        return jax.lax.fori_loop(0, steps, body, state)

    @jax.jit
    def start(model, prompts):
        nothing = jnp.full(8, -1)
        started = queue.start(model, prompts, nothing, config, shape)
        waiting, state = queue.refill(model, prompts, nothing, *started, config, shape)
        keys = decode_loop.row_keys(jax.random.key(0), state, prompts, config, shape)
        return decode_loop.Shared(prompts, waiting.prefix, jnp.zeros((keys.shape[0], 2)), keys), state

    text = model.config.text
    assert model.lm_head is not None  # the bench's networks have a head of their own
    head = model.lm_head.weight[...]
    cached = 2 * rows * (length + steps // 2) * text.num_key_value_heads * text.head_dim * head.dtype.itemsize
    read = array_bytes(model.language_model.layers, model.lm_head) + cached * text.num_hidden_layers
    return Decoding(start, decode, prompts, read * steps)


def build_decode(rows: int, quick: bool) -> Workload:
    """The decoding of `rows` rows."""
    length, steps = (16, 6) if quick else (210, 64)
    model, tokens = random_model(quick), text_tokens(rows, length)
    work = decoding(model, tokens, steps, quick)
    alternatives: dict = {"pixel_jax": functools.partial(work.prepare, model)}
    if HAS_TORCH:
        alternatives["transformers generate"] = functools.partial(_generate, quick, tokens, steps, False)
    if HAS_TORCH and not quick:  # compilation takes half a minute
        alternatives["transformers generate, static cache, torch.compile"] = functools.partial(
            _generate, quick, tokens, steps, True
        )
    written = rows * steps
    useful = Work(written, written * (length + steps / 2), written, patches=0, full_pairs=0, window_pairs=0)
    return Workload(
        f"{rows} rows, {steps} tokens after {length}",
        alternatives,
        same,
        flops=sum(forward_flops(model.config, useful)),
        bytes=work.bytes,
        aims=tuple(Aim(name, 2.3 if rows == 1 else 2.0) for name in list(alternatives)[1:2]),
    )


def _generate(quick: bool, tokens: np.ndarray, steps: int, static: bool):
    """Prepares `generate` of transformers without the prefill: the cache is cut back to the prompt before every run."""
    import torch
    from transformers import DynamicCache, StaticCache

    twin = transformers_model(random_model(quick))
    ids = torch.from_numpy(tokens).long()
    rows, length = ids.shape
    cache: Any = StaticCache(twin.config.text_config, length + steps) if static else DynamicCache()
    options: dict[str, Any] = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
    if static:
        twin.forward = torch.compile(twin.forward)
    with torch.no_grad():
        twin.generate(ids, **options)

    def run():
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - 1) if static else layer.crop(-steps)
        with torch.no_grad():
            return twin.generate(ids, **options)[:, length:].numpy()

    return run


CASES = (
    Case("vision-tower", build_vision),
    Case("prefill", build_prefill),
    Case("decode-1", functools.partial(build_decode, 1)),
    Case("decode-8", functools.partial(build_decode, 8)),
    Case("decode-32", functools.partial(build_decode, 32)),
)
