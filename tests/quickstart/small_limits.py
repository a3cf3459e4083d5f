"""The limits and the network of the quickstart at the smallest size there is."""

from pixel_jax.quickstart.network import NetworkConfig
from pixel_jax.rollouts.config import RolloutConfig

BUDGET = {"min_pixels": 2 * 784 + 1, "max_pixels": 5 * 784 - 1}  # four visual tokens of a square image
LIMITS = RolloutConfig(
    max_calls=2,
    max_images=8,
    max_tokens=160,
    **BUDGET,
    **{f"crop_{name}": value for name, value in BUDGET.items()},
    **{f"select_{name}": value for name, value in BUDGET.items()},
    video_min_pixels=784,
    video_max_pixels=2 * 784 - 1,
    max_side=112,
    pad=0.0,
)
NETWORK = NetworkConfig(
    width=32, layers=1, mlp=32, vision_width=32, vision_layers=1, vision_mlp=32, heads=2, kv_heads=2, vision_heads=2
)
