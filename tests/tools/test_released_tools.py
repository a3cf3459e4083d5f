"""The two tools of the paper do what they did before tools were values: to the token, to the pixel, to the bit."""

import numpy as np
import pytest

from tests.tools import golden


@pytest.fixture(scope="module")
def kept():
    return dict(np.load(golden.FILE, allow_pickle=False))


@pytest.fixture(scope="module")
def made(kept):
    return golden.make(tuple(golden.unpacked(kept["about"])["pieces"]))


def test_everything_is_compared(kept, made):
    assert kept.keys() - {"about"} == made.keys()
    outcomes = [x for name in ("image", "video", "trace") for x in golden.unpacked(kept[f"{name}.text"])["outcomes"]]
    assert len({outcome for row in outcomes for outcome in row} - {""}) == 10  # all kinds there were


@pytest.mark.parametrize("name", ["image", "video", "trace"])
def test_tokens_outcomes_and_pixels(name, kept, made):
    for key in ("tokens", "valid", "loss_mask", "grids", "slices", "num_calls", "stop"):
        np.testing.assert_array_equal(made[f"{name}.{key}"], kept[f"{name}.{key}"], err_msg=key)
    assert golden.unpacked(made[f"{name}.text"]) == golden.unpacked(kept[f"{name}.text"])


@pytest.mark.parametrize("name", ["image", "video", "trace"])
def test_log_probabilities(name, kept, made):
    mine, theirs = made[f"{name}.logprobs"], kept[f"{name}.logprobs"]
    if golden.machine() == golden.unpacked(kept["about"])["machine"]:
        np.testing.assert_array_equal(mine, theirs)
    else:
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
