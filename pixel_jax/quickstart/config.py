"""The settings of the quickstart; `configs/pixel/quickstart.py` has their values."""

import dataclasses
from typing import Literal

from pixel_jax.data import synthesis
from pixel_jax.quickstart.miniature import SceneConfig
from pixel_jax.quickstart.network import NetworkConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """The evaluation of a phase's model."""

    scenes: int = 400  # held-out scenes: photographs and digits that no phase has seen
    batch: int = 80  # scenes decoded together
    traces: int = 16  # conversations kept to look at


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """The traces of the warm start of the lesson "zoom"."""

    mix: synthesis.Mix = synthesis.Mix()
    video_share: float = 0.15  # of the traces


@dataclasses.dataclass(frozen=True)
class TurnsConfig:
    """The traces of the warm start of the lesson "turn"."""

    direct: float = 0.4  # share of the traces about cards on their side that answer without turning them
    corrected: float = 0.2  # share of the others that turn the wrong way first


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """The settings of a seed: ground and read, warm start, reinforcement learning twice from there, evaluation."""

    network: NetworkConfig
    scenes: SceneConfig
    ground: SFTConfig  # 1. write the box of the digit, read it
    ground_rows: int  # rows drawn for it
    look_share: float  # share of these rows that look closer; the rest read large digits
    warm: SFTConfig  # 2. traces of all kinds
    warm_rows: int  # traces made for it
    rl: RLConfig  # 3. the two arms of the lesson change something about it
    evaluation: HeldOutConfig  # 4.
    lesson: Literal["zoom", "turn", "search"] = "zoom"  # what is hard about the scenes, and which tool helps
    traces: WarmStartConfig = WarmStartConfig()  # of the lesson "zoom"
    turns: TurnsConfig = TurnsConfig()  # of the lesson "turn"
    width: int = 32  # tokens of a prompt
    seed: int = 0  # of weights, scenes, order and sampling

    @property
    def temperatures(self) -> str:
        """The temperatures at which reinforcement learning samples, in words."""
        limits = self.rl.rollout
        later = f", and at {limits.later_temperature:g} after the first call" if limits.later_temperature else ""
        return f"temperature {limits.temperature:g}{later}"
