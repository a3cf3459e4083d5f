"""Fixtures of the tests of data."""

import pytest

from pixel_jax.data.limits import Limits, use_limits


@pytest.fixture
def own_limits():
    """`use_limits`, and the usual limits again afterwards."""
    yield use_limits
    use_limits(Limits())
