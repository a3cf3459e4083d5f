"""Tiny random models, ours and transformers', with the same weights."""

import numpy as np

from pixel_jax.models import Qwen2_5_VLConfig, TextConfig, VisionConfig

IMAGE, VIDEO, START, END = 60, 61, 58, 59


def tiny_config(tied: bool = False, depth: int = 3) -> Qwen2_5_VLConfig:
    """Width 32: grouped-query attention 4 on 2, M-RoPE sections of unlike sizes, windowed and full vision blocks."""
    text = TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        mrope_section=(1, 1, 2),
        bos_token_id=None,
        eos_token_id=2,
    )
    vision = VisionConfig(
        depth=depth,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=(1,),
        tokens_per_second=2,
    )
    return Qwen2_5_VLConfig(text, vision, IMAGE, VIDEO, START, END, tie_word_embeddings=tied)


def relative(ours, theirs) -> float:
    """Largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def torch_model(config: Qwen2_5_VLConfig, seed: int = 0):
    """A transformers model in float32 with random weights."""
    import transformers

    values = config.to_hf()
    hf_config = transformers.Qwen2_5_VLConfig(**values)
    hf_config._attn_implementation = "eager"
    model = transformers.Qwen2_5_VLForConditionalGeneration(hf_config).float().eval()
    return random_weights(model, seed)


def random_weights(model, seed: int = 0):
    """The model with every weight random at a scale that lets signals through, biases and norms included."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(noise * 0.2 + ("norm" in name or "ln_q" in name or "layrnorm" in name) * 1.0)
    return model
