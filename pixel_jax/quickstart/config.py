"""All that can be set about the quickstart; `configs/pixel/quickstart.py` fills it in."""

import dataclasses

from pixel_jax.data.miniature import SceneConfig
from pixel_jax.quickstart.network import NetworkConfig
from pixel_jax.quickstart.rows import WarmStartConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    scenes: int = 400  # held-out scenes: photographs and digits that no phase has seen
    batch: int = 80  # scenes decoded together
    traces: int = 16  # conversations kept to look at


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """One seed: ground and read, warm start, reinforcement learning with and without curiosity, evaluation."""

    network: NetworkConfig
    scenes: SceneConfig
    ground: SFTConfig  # 1. write the box of the digit, read it
    ground_rows: int  # rows drawn for it
    look_share: float  # of them that look closer; the rest read large digits
    warm: SFTConfig  # 2. traces of all kinds
    warm_rows: int  # traces made for it
    traces: WarmStartConfig
    rl: RLConfig  # 3. twice; without curiosity `rl.reward.alpha` and `beta` are zero
    evaluation: EvaluationConfig  # 4.
    width: int = 32  # tokens of a prompt
    seed: int = 0  # of weights, scenes, order and sampling
