"""The study of wrong answers at the smallest size there is."""

import dataclasses

from pixel_jax.quickstart.network import NetworkConfig
from pixel_jax.train_config import LoRAConfig
from unlearn_jax.config import ErasureConfig
from unlearn_jax.noisy_responses.config import BaseConfig, NoisyResponsesConfig, QuestionsConfig
from unlearn_jax.requests.replay import TrainingRecipe

FEW = ("corrupted", "retrain, cold", "erase")  # methods that take little time
NETWORK = NetworkConfig(
    width=16, layers=1, mlp=16, vision_width=16, vision_layers=1, vision_mlp=16, heads=2, kv_heads=2, vision_heads=2
)


def make_config(tmp_path, **changes) -> NoisyResponsesConfig:
    config = NoisyResponsesConfig(
        out=str(tmp_path / "out"),
        cells=str(tmp_path / "cells"),
        base=BaseConfig(NETWORK, each=4, training=TrainingRecipe(epochs=1, batch=8, learning_rate=1e-3)),
        data=QuestionsConfig(each=6, examples=20, tests=16),
        adapter=LoRAConfig(rank=2, alpha=4.0, targets=r"model\.layers\..*\.(q_proj|v_proj|up_proj)"),
        training=TrainingRecipe(epochs=2, batch=5, learning_rate=0.03),
        erasure=ErasureConfig(micro_batch=10),
        seeds=(0,),
        methods=FEW,
        learning_rates=(1e-3,),
        batch=5,
        rows=8,
    )
    return dataclasses.replace(config, **changes)
