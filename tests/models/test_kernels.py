"""Attention kernels, interpreted on the CPU, against dense attention; compiled for the machines they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.models import kernels
from pixel_jax.models.attention import Mask, attention, visible
from pixel_jax.parallel import make_mesh

KERNELS = [kernels.splash, kernels.triton]


def case(rng, kind, batch=2, length=150, heads=4, kv_heads=2, dim=20):
    """Rows with gaps and padding, one of them nothing but padding; lengths and heads that no tile divides."""
    draw = lambda *shape: jnp.array(rng.standard_normal(shape, dtype=np.float32))
    q, k, v = draw(batch, length, heads, dim), draw(batch, length, kv_heads, dim), draw(batch, length, kv_heads, dim)
    valid = rng.random((batch, length)) < 0.8
    valid[0, 100:] = False
    valid[-1] = batch == 1
    places = np.broadcast_to(np.arange(length), valid.shape) if kind != "bidirectional" else np.zeros_like(valid, int)
    segments = np.cumsum(rng.random(valid.shape) < 0.03, axis=1) if kind == "packed" else None
    return q, k, v, Mask(places, np.where(valid, places, -1), segments, segments), valid


def run(kernel, q, k, v, mask, causal):
    none = np.zeros_like(mask.q_order)
    q_segment, k_segment = (none if x is None else x for x in (mask.q_segment, mask.k_segment))
    given = jnp.asarray(q_segment), jnp.where(mask.k_order >= 0, k_segment, kernels.INVISIBLE)
    return kernels.on_shards(functools.partial(kernel, causal=causal, interpret=True), q, k, v, *given)


@pytest.mark.parametrize("kind", ["causal", "packed", "bidirectional"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients(rng, monkeypatch, kernel, kind):
    monkeypatch.setattr(kernels, "TPU_BLOCKS", (128,))  # two tiles each way
    q, k, v, mask, valid = case(rng, kind)
    causal = kind != "bidirectional"
    # Splash attention answers every query as dense attention does, Triton's none whose own key is invisible.
    asked = valid if kernel is kernels.triton else np.ones_like(valid)
    sees = np.asarray(visible(mask)).any(axis=-1)
    assert not sees.all()

    def loss(attend, q, k, v):
        out = attend(q, k, v)
        return jnp.sum(jnp.where(jnp.asarray(asked)[..., None, None], jnp.sin(out), 0.0)), out

    def grad(attend):
        return jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))(q, k, v)

    (dq, dk, dv), out = grad(lambda q, k, v: run(kernel, q, k, v, mask, causal))
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v))
        expected, values = jax.device_get(grad(lambda q, k, v: attention(q, k, v, mask, causal=causal)))
    np.testing.assert_allclose(out[asked], values[asked], atol=2e-6)
    assert (np.asarray(out)[~sees] == 0).all()
    for ours, theirs in zip((dq, dk, dv), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("length, block", [(100, 128), (640, 640), (4000, 1024), (12_288, 1024), (12_560, 512)])
def test_tiles_pad_least(length, block):
    assert kernels._block(length) == block


def test_every_device_has_its_rows_and_heads(rng):
    q, k, v, mask, valid = case(rng, "causal", batch=4, length=40)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        split = jax.jit(lambda q, k, v: run(kernels.splash, q, k, v, mask, True))
        out = split(q, k, v)
    assert out.sharding.spec[0] == ("data", "fsdp") and out.sharding.spec[2] == "tensor"
    np.testing.assert_allclose(out[valid], attention(q, k, v, mask, causal=True)[valid], atol=2e-6)


def test_where_there_is_no_kernel(rng):
    """On a CPU the door takes 'chunked', and so it does for what a mesh cannot split evenly."""
    q, k, v, mask, _ = case(rng, "packed")
    chunked, kernel = (
        jax.jit(functools.partial(attention, causal=True, implementation=name)) for name in ("chunked", "kernel")
    )
    np.testing.assert_array_equal(kernel(q, k, v, mask), chunked(q, k, v, mask))
    for mesh in ({"data": 8}, {"tensor": 8}, {"sequence": 2, "tensor": 2, "data": 2}):
        with jax.set_mesh(make_mesh(mesh)):
            assert not kernels.divides(q, k)
    with pytest.raises(ValueError, match="log-sum-exp"):
        attention(q, k, v, mask, causal=True, implementation="kernel", return_lse=True)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="lowers Triton kernels only where there is a GPU")
def test_lowered_for_gpus():
    order = jnp.arange(1000)[None]
    loss = lambda q, k: jnp.sum(attention(q, k, k, Mask(order, order), causal=True, implementation="kernel"))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(array(1, 1000, 28, 128), array(1, 1000, 4, 128))
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_compiled_for_tpus(name):
    """At the sizes of the 7B model, with their gradients: three kernels, and no scores in main memory."""
    from jax.sharding import SingleDeviceSharding

    from pixel_jax.planning.machines import machine

    place = SingleDeviceSharding(machine(name).devices[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for causal, length, heads, kv_heads, dim in ((True, 4096, 28, 4, 128), (False, 4000, 16, 16, 80)):

        def loss(q, k, v, valid):
            order = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape) * causal  # noqa: B023
            mask = Mask(order, jnp.where(valid, order, -1))
            return jnp.sum(attention(q, k, v, mask, causal=causal, implementation="kernel").astype(jnp.float32))  # noqa: B023

        keys = array(1, length, kv_heads, dim)
        arguments = array(1, length, heads, dim), keys, keys, array(1, length, dtype=jnp.bool_)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
        scores = 2 * heads * length**2
        assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
