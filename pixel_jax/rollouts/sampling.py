"""Draws a token for each row, by the Gumbel trick, so that the token depends only on the row's logits and key."""

import jax
import jax.numpy as jnp

from pixel_jax.models import cpu_forms


def truncate(logits: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """Sets `logits` [R, V] outside the `top_k` largest, and then outside the nucleus `top_p`, to -inf.

    The nucleus is the smallest set of most probable tokens (after `top_k`, renormalised) whose mass reaches `top_p`.
    """
    vocab = logits.shape[-1]
    if top_k == 0 or top_k >= vocab:
        if top_p == 1.0:
            return logits
        top_k = vocab
    largest = cpu_forms.top_values(logits, top_k)
    threshold = largest[:, -1:]
    if top_p < 1.0:
        probabilities = jax.nn.softmax(largest)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        threshold = jnp.min(jnp.where(before < top_p, largest, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int,
    top_p: float,
    banned: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws a token for every row.

    Truncation and banned tokens change which tokens can be drawn, never the log-probability that is returned: ratios of
    probabilities of a truncated distribution would be biased.

    Args:
      logits: float32 [R, V].
      keys: [R].
      temperature: float32 [R]; a row at 0 takes its most probable token, with its log-probability at temperature 1.
      top_k: 0: off.
      top_p: 1: off.
      banned: bool [V] or [R, V], tokens that cannot be drawn.

    Returns:
      Tokens int32 [R], and their log-probabilities float32 [R] under the full distribution softmax(logits / temperature).
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    drawable = scaled if banned is None else jnp.where(banned, -jnp.inf, scaled)

    def perturbed(drawable):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        return drawable + jnp.where((temperature > 0)[:, None], noise, 0.0)

    drawable = truncate(drawable, top_k=top_k, top_p=top_p)
    # Greedy decoding needs no noise, which takes longer to draw than the rest of this function.
    drawable = jax.lax.cond(jnp.any(temperature > 0), perturbed, lambda drawable: drawable, drawable)
    choice = cpu_forms.first_largest(drawable)
    chosen = jnp.take_along_axis(scaled, choice[:, None], axis=-1)[:, 0]
    return choice, chosen - jax.nn.logsumexp(scaled, axis=-1)
