"""The released networks by name, with their shapes, which are known without the weights.

Source: `config.json` of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct; the technical report (arXiv:2502.13923, Table 1) has the
sizes of all but 32B, the same but for the vision tower's MLP, whose width is 3456 there and 3420 in the two smaller checkpoints.
"""

import jax

from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.config import ModelConfig, TextConfig
from pixel_jax.models.model import LanguageModel, Model
from pixel_jax.models.qwen_vl import Qwen2_5_VLConfig, VisionConfig


def _network(text: tuple[int, ...], vision_mlp: int, vocab: int, tied: bool = False) -> Qwen2_5_VLConfig:
    """text: width, MLP, layers, heads, key-value heads."""
    width, mlp, layers, heads, kv_heads = text
    return Qwen2_5_VLConfig(
        TextConfig(
            *(vocab, width, mlp, layers, heads, kv_heads),
            rms_norm_eps=1e-6,
            max_position_embeddings=128000,
            bos_token_id=151643,
            eos_token_id=151645,
        ),
        VisionConfig(32, 1280, vision_mlp, 16, out_hidden_size=width, tokens_per_second=2),
        tie_word_embeddings=tied,
    )


RELEASED = {
    "qwen2.5-vl-3b": _network((2048, 11008, 36, 16, 2), 3420, 151936, tied=True),
    "qwen2.5-vl-7b": _network((3584, 18944, 28, 28, 4), 3420, 152064),
    "qwen2.5-vl-32b": _network((5120, 27648, 64, 40, 8), 3456, 152064),
    "qwen2.5-vl-72b": _network((8192, 29568, 80, 64, 8), 3456, 152064),
}


def released(name: str) -> Qwen2_5_VLConfig:
    """Returns the network called `name`; ValueError: the name is unknown; the message lists the known ones."""
    if name not in RELEASED:
        raise ValueError(f"no released network is called {name!r}; known are {', '.join(RELEASED)}")
    return RELEASED[name]


def weight_shapes(config: ModelConfig, dtype=None) -> Model:
    """Returns an abstract model, with a `jax.ShapeDtypeStruct` for each array (float32 unless `dtype` is given)."""
    options = {} if dtype is None else {"dtype": dtype}
    return jax.eval_shape(lambda key: LanguageModel(config, key, **options), jax.random.key(0))


def check_architecture(model: Model, name: str, where: str) -> None:
    """Raises ValueError unless the weights of `model`, read from `where`, have the shapes of the network called `name`."""
    expected, actual = (
        {key: weight.shape for _, key, weight in named_weights(x)} for x in (weight_shapes(released(name)), model)
    )
    for key in sorted(expected.keys() | actual.keys()):
        if expected.get(key) != actual.get(key):
            raise ValueError(
                f"{where} does not hold the network {name}: {key} has shape {actual.get(key)}, not {expected.get(key)}; "
                "set architecture to None for another network"
            )
