"""The cases of `models.cpu_forms`: what each form saves, measured by the usual one in its place."""

import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.bench.inference import decoding
from pixel_jax.bench.network import random_model, text_tokens
from pixel_jax.bench.operations import close, same
from pixel_jax.bench.timing import Case, Run, Workload
from pixel_jax.bench.training import FORWARD, batch_of, optimizer
from pixel_jax.models import cpu_forms
from pixel_jax.rollouts.sampling import sample
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import make_sft_step


def product(x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
    """The usual form of `cpu_forms.product`."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype or x.dtype)


def attention_product(form: str, x: jax.Array, y: jax.Array, dtype=None) -> jax.Array:
    """The usual form of `cpu_forms.attention_product`."""
    return jnp.einsum(form, x, y, preferred_element_type=dtype)


def first_largest(x: jax.Array) -> jax.Array:
    """The usual form of `cpu_forms.first_largest`."""
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def top_values(x: jax.Array, k: int) -> jax.Array:
    """The usual form of `cpu_forms.top_values`."""
    return jax.lax.top_k(x, k)[0]


# What is replaced in `cpu_forms`, and by what.
USUAL: dict[str, tuple[str, Any]] = {"product, up to FEW tokens": ("FEW", 0)}
USUAL |= {form.__name__: (form.__name__, form) for form in (product, attention_product, first_largest, top_values)}


def alternatives(make: Callable[[], Run], *names: str) -> dict[str, Callable[[], Run]]:
    """The run that `make` compiles as written, and without each of the forms `names` (of `USUAL`)."""

    def without(name: str) -> Run:
        jax.clear_caches()  # functions may have been traced with the form
        with mock.patch.object(cpu_forms, *USUAL[name]):
            return make()

    return {"pixel_jax": make} | {f"without {name}": functools.partial(without, name) for name in names}


def build_sampling(quick: bool) -> Workload:
    """Tokens drawn from the 50 largest logits."""
    rows, words = (2, 64) if quick else (32, 8192)
    logits = jax.random.normal(jax.random.key(0), (rows, words))
    keys, temperature = jax.random.split(jax.random.key(1), rows), jnp.ones(rows)

    def make() -> Run:
        draw = functools.partial(sample, top_k=50, top_p=1.0)
        return functools.partial(jax.jit(draw).lower(logits, keys, temperature).compile(), logits, keys, temperature)

    def check(outputs: Mapping[str, Any]) -> None:
        same({name: tokens for name, (tokens, _) in outputs.items()})

    both = alternatives(make, "first_largest", "top_values")
    return Workload(f"{rows} rows of {words} logits", both, check, memory=())


def build_decoding(quick: bool) -> Workload:
    """The decoding of 32 rows."""
    rows, length, steps = (2, 16, 3) if quick else (32, 210, 64)
    model, tokens = random_model(quick), text_tokens(rows, length)

    def make() -> Run:
        work = decoding(model, tokens, steps, quick)
        arguments = (model, model.unstack(), *work.start(model, work.prompts))
        run = jax.jit(work.decode).lower(*arguments).compile()
        return lambda: run(*arguments).tokens

    names = ("product", "product, up to FEW tokens", "first_largest")
    return Workload(f"{rows} rows, {steps} tokens after {length}", alternatives(make, *names), same, memory=())


def build_tuning(quick: bool) -> Workload:
    """A tuning step."""
    model, batch = random_model(quick), batch_of(quick)

    def make() -> Run:
        state = [init_state(model, optimizer())]
        step = make_sft_step(FORWARD, optimizer(), normalizer="token")
        assert isinstance(step, jax.stages.Wrapped)
        compiled = step.lower(state[0], batch).compile()

        def run():
            state[0], report = compiled(state[0], batch)
            return jnp.stack([report.metrics["loss"], report.metrics["grad_norm"]])

        return run

    rows, length = np.shape(batch.tokens)
    both = alternatives(make, "product", "attention_product")
    return Workload(f"{rows} rows of {length} tokens", both, close(1e-4), memory=())


CASES = (
    Case("cpu-forms-sampling", build_sampling),
    Case("cpu-forms-decoding", build_decoding),
    Case("cpu-forms-tuning", build_tuning),
)
