"""Views that are encoded one after the other are what they are together."""

import jax.numpy as jnp
import numpy as np

from pixel_jax.rollouts.views import encode_still
from tests.rollouts import scripted_model


def test_large_views_one_after_the_other():
    model, random = scripted_model.model(), np.random.default_rng(0)
    patches = random.integers(0, 256, (2, 3, 288, 588), dtype=np.uint8)  # more than a tile of scores: linear in memory
    sizes = jnp.array([[[224, 252], [28, 56], [0, 0]], [[252, 224], [112, 112], [224, 252]]])
    together, apart = (encode_still(model, patches, sizes, name) for name in ("dense", None))
    assert together.shape == apart.shape == (2, 3, 72, model.config.text.hidden_size)
    used = np.arange(72) < np.asarray(jnp.prod(sizes // 28, axis=-1))[..., None]
    np.testing.assert_allclose(np.asarray(apart)[used], np.asarray(together)[used], rtol=0, atol=1e-6)
