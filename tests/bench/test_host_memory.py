"""Host memory does not grow with the data: the command that measures it, at a small size."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("phase, sizes", [("sft", (64, 512)), ("rl", (128, 3072))])
def test_peak_memory_does_not_grow_with_the_rows(phase, sizes):
    """Hundreds of two-megapixel images more, which would take 2.3 GB or more if they were kept, take no more memory."""
    peaks = []
    for rows in sizes:
        flags = (f"--rows={rows}", f"--phase={phase}", "--batch=16", "--ahead=8")
        found = subprocess.run(
            [sys.executable, "-m", "pixel_jax.bench.host_memory", *flags],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"{rows // (8 if phase == 'rl' else 1)} rows read" in found.stdout
        peaks.append(float(re.findall(r"peak ([\d.]+) GB", found.stdout)[-1]))
    assert 0.2 < peaks[0] and peaks[1] < peaks[0] + 0.5
