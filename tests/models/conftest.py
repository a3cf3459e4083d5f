"""Fixtures of the model tests."""

import jax
import numpy as np
import pytest
from tiny_qwen import tiny_config, torch_model


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(our model, transformers' model), untied, the same weights."""
    import pixel_jax

    theirs = torch_model(tiny_config())
    path = tmp_path_factory.mktemp("pair")
    theirs.save_pretrained(path)
    ours, processor = pixel_jax.from_pretrained(path)
    assert processor is None
    return ours, theirs


@pytest.fixture(scope="session")
def model():
    """A random model of ours."""
    from pixel_jax.models import LanguageModel

    tame = jax.jit(LanguageModel, static_argnums=0)(tiny_config(), jax.random.key(0))
    # The initial scale of .02 leaves attention all but uniform; five times as much does not.
    return jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w + 0.1, tame)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def config():
    return tiny_config()
