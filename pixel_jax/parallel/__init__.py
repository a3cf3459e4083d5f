"""Meshes, and the sharding of weights and batches over them, in one process or several."""

from pixel_jax.parallel.mesh import make_mesh as make_mesh
from pixel_jax.parallel.sharding import WHOLE as WHOLE
from pixel_jax.parallel.sharding import ProcessShard as ProcessShard
from pixel_jax.parallel.sharding import all_rows as all_rows
from pixel_jax.parallel.sharding import batch_sharding as batch_sharding
from pixel_jax.parallel.sharding import constrain as constrain
from pixel_jax.parallel.sharding import local_rows as local_rows
from pixel_jax.parallel.sharding import process_shard as process_shard
from pixel_jax.parallel.sharding import replicate as replicate
from pixel_jax.parallel.sharding import shard as shard
from pixel_jax.parallel.sharding import shard_batch as shard_batch
from pixel_jax.parallel.sharding import shardings as shardings
