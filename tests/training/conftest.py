"""The tiny model and a batch of hand-made rows; and the way to the model that talks in tool calls."""

import pathlib
import sys

import pytest
from tiny_model import make_batch, make_model

sys.path.append(str(pathlib.Path(__file__).parents[1] / "rollouts"))


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture
def batch():
    return make_batch()
