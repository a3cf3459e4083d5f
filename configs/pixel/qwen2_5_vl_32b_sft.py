"""The paper's warm start of Qwen2.5-VL-32B; `:lora` after the file's name trains adapters (`pixel_jax/recipe.py`)."""

from pixel_jax.recipe import sft


def get_config(weights: str = "full"):
    return sft("32b", weights)
