"""The tiny model and a batch of hand-made rows."""

import pytest
from tiny_model import make_batch, make_model


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture
def batch():
    return make_batch()
