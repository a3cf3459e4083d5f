"""Meshes and how weights and batches lie on them."""

from pixel_jax.parallel.mesh import make_mesh as make_mesh
from pixel_jax.parallel.sharding import batch_sharding as batch_sharding
from pixel_jax.parallel.sharding import constrain as constrain
from pixel_jax.parallel.sharding import shard as shard
from pixel_jax.parallel.sharding import shard_batch as shard_batch
from pixel_jax.parallel.sharding import shardings as shardings
