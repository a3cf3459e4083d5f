"""The paper's RL of Qwen2.5-VL-32B; `:lora` after the file's name trains adapters (`pixel_jax/recipe.py`)."""

from pixel_jax.recipe import rl


def get_config(words: str = "full"):
    return rl("32b", words)
