"""Configurations as they are published, in both layouts, against the networks that transformers builds of them."""

import copy
import json

import numpy as np
import pytest
from released_configs import PUBLISHED

from pixel_jax.files import FileError
from pixel_jax.models import config_from_hf
from pixel_jax.models.checkpoint import layer_numbers, named_weights
from pixel_jax.models.released import weight_shapes
from pixel_jax.models.rope import rotary_frequencies


@pytest.fixture(params=PUBLISHED)
def published(request):
    return copy.deepcopy(PUBLISHED[request.param])


def network(values):
    """transformers' network without weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**values)
    kind = transformers.AutoModelForImageTextToText if "vision_config" in values else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


@pytest.mark.torch
def test_names_and_shapes_of_weights(published):
    config, theirs = config_from_hf(published), network(published)
    expected = {config.names.ours(key): tuple(weight.shape) for key, weight in theirs.named_parameters()}
    ours = {}
    for _, key, weight in named_weights(weight_shapes(config)):
        for layer in layer_numbers(weight_shapes(config), key, weight):
            ours[key.format(layer)] = weight.shape[1:] if "{}" in key else weight.shape
    assert ours == expected


@pytest.mark.torch
def test_both_layouts(published):
    """What we write, what transformers writes (nested, with `rope_parameters`), and what was published are the same."""
    config = config_from_hf(published)
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config
    theirs = json.loads(network(published).config.to_json_string(use_diff=False))
    again = config_from_hf(theirs)
    assert again.vision == config.vision
    for name in {*config.text.__dataclass_fields__, "head_dim"} - {"head_size"}:
        if "token" not in name:  # transformers writes defaults of its own
            assert getattr(again.text, name) == getattr(config.text, name), name
    assert again.visual_tokens == config.visual_tokens
    assert again.tie_word_embeddings == config.tie_word_embeddings


@pytest.mark.torch
def test_rotary_frequencies(published):
    """Scaled as the file says, up to the last bit, in which powers differ between libraries."""
    config, theirs = config_from_hf(published).text, network(published)
    module = next(m for name, m in theirs.named_modules() if name.endswith("rotary_emb") and "visual" not in name)
    expected = type(module)(config=theirs.config.get_text_config()).inv_freq
    np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=3e-7)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("Qwen2.5-7B", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("Qwen2.5-7B", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ("Qwen3-8B", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3' needs factor, low_freq_factor"),
        ("Llama-3.2-1B", {"head_dim": 63}, "head dim 63 is odd"),
        ("Qwen3-VL-8B", {"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe'; the known families are"),
        (
            "llava-1.5-7b",
            {"text_config": {"model_type": "mistral"}},
            "text_config.model_type 'mistral' is not supported",
        ),
        ("llava-1.5-7b", {"vision_feature_layer": -9}, r"vision_feature_layer \(-9,\): there are 2 layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, change, message):
    with pytest.raises(FileError, match=message):
        config_from_hf({**PUBLISHED[name], **change})
