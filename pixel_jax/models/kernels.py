"""Attention kernels that come with JAX: Pallas' splash attention on TPUs, its Triton kernel on GPUs.

Scores stay in on-chip memory. The kernels have no forward-mode derivative: curvature products need 'chunked' or 'dense'. The keys
that a query sees are given by whether the order is causal, which is static, and by segments. Keys that no query may see have the
segment `INVISIBLE`.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from pixel_jax.parallel.sharding import ROWS, row_shards, sequence_shards

LANES = 128  # a TPU's registers: heads and blocks are padded to multiples
TPU_BLOCKS = (1024, 512)  # queries and keys of a tile
GPU_BLOCK = 128
INVISIBLE = -1  # the segment of keys that no query sees
# One more score in every softmax, whose value vector is zero. It only counts for a query that sees no key, whose output is then
# zero and not the mean of invisible values, because the kernel's score of an invisible key is even smaller.
SINK = -1e30


def splash(q, k, v, q_segment, k_segment, *, causal: bool, interpret: bool = False) -> jax.Array:
    """Computes attention on TPUs: q [B, T, heads, D]; k, v [B, S, kv_heads, D]; segments int32 [B, T], [B, S] -> like q.

    Lengths and head sizes are padded, so that any are possible. Queries that see no key give zeros.
    """
    length, keys, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    block_q, block_kv = _block(length), _block(keys)
    q, q_segment = _pad(q * head_dim**-0.5, block_q, LANES), _pad(q_segment, block_q)
    k, v, k_segment = _pad(k, block_kv, LANES), _pad(v, block_kv, LANES), _pad(k_segment, block_kv, fill=INVISIBLE)
    kernel = _splash_kernel(q.shape[2], q.shape[1], k.shape[1], block_q, block_kv, causal, interpret)
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    segments = splash_attention_kernel.SegmentIds(q_segment, k_segment)
    sinks = jnp.full(q.shape[2], SINK)
    attend = jax.vmap(lambda *arrays: kernel(*arrays, sinks))
    out = attend(heads_first(q), heads_first(k), heads_first(v), segments)
    return heads_first(out)[:, :length, :, :head_dim]


def _block(size: int) -> int:
    """Returns the size of a tile: what pads least; of equals the largest, which reads keys and values least often."""
    size = -(-size // LANES) * LANES
    return min((min(block, size) for block in TPU_BLOCKS), key=lambda block: (-size % block, -block))


def _splash_kernel(heads, length, keys, block_q, block_kv, causal, interpret):
    shape = (length, keys)
    mask = splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def triton(q, k, v, q_segment, k_segment, *, causal: bool, interpret: bool = False) -> jax.Array:
    """Computes attention on GPUs, with T = S. Each key has the segment of its query, or is invisible: its query then gives 0."""
    # Imported here, because jax 0.12 warns that it will move to another package.
    from jax.experimental.pallas.ops.gpu import attention as triton_attention

    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    # This kernel has one segment for a query and the key at its position. Where the key is invisible or padding, it is INVISIBLE:
    # these queries see only each other's keys, no other query sees them, and their output is set to zero or cut off.
    segments = _pad(jnp.where(k_segment == INVISIBLE, INVISIBLE, q_segment), GPU_BLOCK, fill=INVISIBLE)
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    q, k, v = (_pad(x, GPU_BLOCK) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    out = cast(jax.Array, triton_attention.mha(q, k, v, segments, sm_scale=scale, causal=causal, interpret=interpret))
    return jnp.where((k_segment == INVISIBLE)[..., None, None], 0, out[:, :length])


def _pad(x: jax.Array, length: int, last: int | None = None, fill: int = 0) -> jax.Array:
    """Pads positions (axis 1) to a multiple of `length`, and the last axis to one of `last`, unless that is None."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % length)
    if last is not None:
        widths[-1] = (0, -x.shape[-1] % last)
    return jnp.pad(x, widths, constant_values=fill)


def on_shards(kernel, q, k, v, q_segment, k_segment) -> jax.Array:
    """Runs `kernel` on every device's rows and heads, where a mesh is set: the compiler cannot split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, q_segment, k_segment)
    heads, rows = PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS)
    split = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False)
    return split(q, k, v, q_segment, k_segment)


def divides(q: jax.Array, k: jax.Array) -> bool:
    """Whether rows and heads can be split over the mesh that is set, so that each device has a kernel's whole work."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return True
    return not q.shape[0] % row_shards(mesh) and not k.shape[2] % mesh.shape["tensor"] and sequence_shards(mesh) == 1
