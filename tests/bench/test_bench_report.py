"""What the bench says of its aims."""

import numpy as np
import pytest

from pixel_jax.bench.machine import Machine
from pixel_jax.bench.report import _remarks, case_record
from pixel_jax.bench.timing import Aim, Timing, Work

MACHINE = Machine(**{name: 1 for name in Machine.__dataclass_fields__})


@pytest.mark.parametrize(
    "theirs, mine, said",
    [
        (300, 100, "reached 3.00x"),
        (300, -28, "too little to measure"),
        (-300, -100, "too little to measure"),
        (300, None, "too little to measure"),
    ],
)
def test_memory_that_is_no_more_than_noise_makes_no_ratio(theirs, mine, said):
    timing = lambda peak: Timing(1.0, 1.0, 1.0, 2, 1.5, 1.5, 1.5, 1.0, 0.0, 0, 0, peak_bytes=peak)
    nothing = {"ours": lambda: np.zeros, "torch": lambda: np.zeros}
    work = Work("", nothing, lambda found: None, aims=(Aim("torch", 1.0), Aim("torch", 3.0, memory=True)))
    entry = case_record(work, {"ours": timing(mine), "torch": timing(theirs)}, MACHINE)
    assert _remarks(entry) == ["aim 1x faster than torch, reached 1.50x", f"aim 3x less memory than torch, {said}"]
