"""Policy meets pixels: sampling, the turn machine and the trajectories that come out of it.

The subpackage is callable: `pixel_jax.rollout(model, prompts, key, config)` is `pixel_jax.rollout.rollout.rollout`.
"""

import sys
import types


class _Callable(types.ModuleType):
    def __call__(self, *args, **kwargs):
        from pixel_jax.rollout.rollout import rollout

        return rollout(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
