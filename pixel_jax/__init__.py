"""Vision-language models that reason in pixel space, trained and run with JAX.

`import pixel_jax` is fast: a name loads the module that defines it when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixel_jax.data.clips import read_video
    from pixel_jax.data.images import read_image
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.evaluation.run import evaluate
    from pixel_jax.models.io import forward, from_pretrained, save_pretrained
    from pixel_jax.models.peft import load_adapter, save_adapter
    from pixel_jax.ops import crop_resize, gather_frames, patchify, smart_resize
    from pixel_jax.rollouts.config import RolloutConfig
    from pixel_jax.rollouts.materialize import materialize
    from pixel_jax.rollouts.prompts import Query, build_prompts, tables
    from pixel_jax.rollouts.rollout import admit, advance, begin, finish, finished, host_rollout, rollout
    from pixel_jax.tools import Tool
    from pixel_jax.training.rewards import curiosity_reward
    from pixel_jax.training.rl import rl
    from pixel_jax.training.scorers import score_answer
    from pixel_jax.training.sft import sft

_WHERE = {
    "Query": "rollouts.prompts",
    "RolloutConfig": "rollouts.config",
    "Tool": "tools",
    "Vocabulary": "dialog.tokenizer",
    "admit": "rollouts.rollout",
    "advance": "rollouts.rollout",
    "begin": "rollouts.rollout",
    "build_prompts": "rollouts.prompts",
    "crop_resize": "ops",
    "curiosity_reward": "training.rewards",
    "evaluate": "evaluation.run",
    "finish": "rollouts.rollout",
    "finished": "rollouts.rollout",
    "forward": "models.io",
    "from_pretrained": "models.io",
    "gather_frames": "ops",
    "host_rollout": "rollouts.rollout",
    "load_adapter": "models.peft",
    "materialize": "rollouts.materialize",
    "patchify": "ops",
    "read_image": "data.images",
    "read_video": "data.clips",
    "rl": "training.rl",
    "rollout": "rollouts.rollout",
    "save_adapter": "models.peft",
    "save_pretrained": "models.io",
    "score_answer": "training.scorers",
    "sft": "training.sft",
    "smart_resize": "ops",
    "tables": "rollouts.prompts",
}

__all__ = [
    "Query",
    "RolloutConfig",
    "Tool",
    "Vocabulary",
    "admit",
    "advance",
    "begin",
    "build_prompts",
    "crop_resize",
    "curiosity_reward",
    "evaluate",
    "finish",
    "finished",
    "forward",
    "from_pretrained",
    "gather_frames",
    "host_rollout",
    "load_adapter",
    "materialize",
    "patchify",
    "read_image",
    "read_video",
    "rl",
    "rollout",
    "save_adapter",
    "save_pretrained",
    "score_answer",
    "sft",
    "smart_resize",
    "tables",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pixel_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pixel_jax.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
