"""Vision-language models that reason in pixel space, trained and run with JAX.

`import pixel_jax` is fast: everything below loads when it is first used.
"""

import importlib
import sys
import types

_WHERE = {
    "from_pretrained": "pixel_jax.models.io",
    "save_pretrained": "pixel_jax.models.io",
    "forward": "pixel_jax.models.io",
    "read_image": "pixel_jax.data.images",
    "read_video": "pixel_jax.data.clips",
    "crop_resize": "pixel_jax.ops",
    "gather_frames": "pixel_jax.ops",
    "smart_resize": "pixel_jax.ops",
    "Tool": "pixel_jax.tools",
    "curiosity_reward": "pixel_jax.training.rewards",
    "score_answer": "pixel_jax.training.scorers",
    "sft": "pixel_jax.training.sft",
    "rl": "pixel_jax.training.rl",
    "evaluate": "pixel_jax.evaluation.run",
}

__all__ = sorted([*_WHERE, "rollout"])


class _Rollout(types.ModuleType):
    """The subpackage `pixel_jax.rollout`, which is also the public function: calling it runs a rollout."""

    def __call__(self, *args, **kwargs):
        return importlib.import_module("pixel_jax.rollout.rollout").rollout(*args, **kwargs)


class _Package(types.ModuleType):
    def __getattr__(self, name: str):
        if name == "rollout":
            return importlib.import_module("pixel_jax.rollout")
        if name not in _WHERE:
            raise AttributeError(f"module 'pixel_jax' has no attribute {name!r}")
        return getattr(importlib.import_module(_WHERE[name]), name)

    def __setattr__(self, name: str, value):
        # The import system binds a subpackage here, whoever imports it first.
        if name == "rollout" and isinstance(value, types.ModuleType):
            value.__class__ = _Rollout
        super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
