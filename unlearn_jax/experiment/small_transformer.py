"""A language model small enough to be retrained dozens of times: two layers, width 32, low-rank adapters on q and v."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

LORA_SCALE = 4.0  # alpha / rank


class TransformerSize(NamedTuple):
    """The shapes of the network."""

    vocabulary: int
    length: int
    width: int = 32
    heads: int = 2
    layers: int = 2
    rank: int = 2


def init_base(key: jax.Array, size: TransformerSize) -> dict[str, jax.Array]:
    """Draws the weights of a base model; those of the layers are stacked, [layers, in, out]."""
    width, wide, layers = size.width, 4 * size.width, size.layers
    shapes = {
        "embed": (size.vocabulary, width),
        "positions": (size.length, width),
        "unembed": (width, size.vocabulary),
        "qkvo": (layers, 4, width, width),
        "up": (layers, width, wide),
        "down": (layers, wide, width),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    scale = {"embed": 1.0, "positions": 1.0, "down": wide**-0.5}
    return {name: scale.get(name, width**-0.5) * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}


def init_adapter(key: jax.Array, size: TransformerSize) -> dict[str, dict[str, jax.Array]]:
    """Makes an adapter of the queries and values: A [layers, rank, in] uniform, B [layers, out, rank] zero."""
    bound = size.width**-0.5
    a = jax.random.uniform(key, (2, size.layers, size.rank, size.width), minval=-bound, maxval=bound)
    b = jnp.zeros((size.layers, size.width, size.rank))
    return {name: {"lora_a": a[i], "lora_b": b} for i, name in enumerate("qv")}


def forward(base: dict, adapter: dict, tokens: jax.Array, heads: int = 2) -> tuple[jax.Array, jax.Array]:
    """Computes next-token logits [T, V] of tokens int32 [T], and the residual stream after each layer, [layers, T, D]."""
    length = tokens.shape[0]
    causal = jnp.tril(jnp.ones((length, length), bool))
    split = lambda x: x.reshape(length, heads, -1)

    x, hidden = base["embed"][tokens] + base["positions"][:length], []
    # A loop and not a scan, whose carry would be differentiated through the first layer's input, which needs no gradient.
    for layer in range(len(base["up"])):
        (wq, wk, wv, wo), up, down = (base[name][layer] for name in ("qkvo", "up", "down"))
        pairs = jax.tree.map(operator.itemgetter(layer), adapter)
        y = normalise(x)
        q, v = (y @ w + low_rank(pairs[name], y) for name, w in (("q", wq), ("v", wv)))
        scores = jnp.einsum("ihd,jhd->hij", split(q), split(y @ wk)) * (x.shape[-1] // heads) ** -0.5
        weight = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        x = x + jnp.einsum("hij,jhd->ihd", weight, split(v)).reshape(x.shape) @ wo
        x = x + jax.nn.gelu(normalise(x) @ up) @ down
        hidden.append(x)
    return normalise(x) @ base["unembed"], jnp.stack(hidden)


def low_rank(pair: dict, x: jax.Array) -> jax.Array:
    """The product of a pair of factors with x [..., width]."""
    return LORA_SCALE * (x @ pair["lora_a"].T) @ pair["lora_b"].T


def normalise(x: jax.Array) -> jax.Array:
    """Root mean square normalisation over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def pretrain(key: jax.Array, size: TransformerSize, examples: dict[str, Any], *, steps: int, batch: int = 64) -> dict:
    """Trains a base model on `examples` (tokens, labels, loss_mask [n, T]) by Adam on all its weights."""
    key, init = jax.random.split(key)
    base, silent = init_base(init, size), jax.tree.map(jnp.zeros_like, init_adapter(init, size))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(base, rows):
        logits = jax.vmap(lambda tokens: forward(base, silent, tokens)[0])(rows["tokens"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["labels"])
        return jnp.sum(nll * rows["loss_mask"]) / jnp.sum(rows["loss_mask"])

    def step(carry, key):
        base, state = carry
        chosen = jax.random.randint(key, (batch,), 0, len(examples["tokens"]))
        gradient = jax.grad(loss)(base, {k: jnp.asarray(x)[chosen] for k, x in examples.items()})
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(base, updates), state), None

    run = jax.jit(lambda base: jax.lax.scan(step, (base, optimizer.init(base)), jax.random.split(key, steps))[0][0])
    return run(base)
